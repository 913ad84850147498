"The audit: each defect of the official code against its definition, on cases small enough to count by hand."
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rest_nb import audit, masks
from rest_nb.batches import CIFAR, Transform, assemble
from rest_nb.configs import Config
from rest_nb.data import BiasedDataset
from rest_nb.experiments import run_seed
from rest_nb.masks import RigL, maskable
from rest_nb.models import cnn
from rest_nb.sparse import sparsify


def run(model, seed=0, density=.1, distribution="erk"):
    return SimpleNamespace(model=model, seed=seed, config=SimpleNamespace(density=density, distribution=distribution))


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_tosses_keep_each_weight_with_its_layers_probability(distribution):
    model = cnn(width=8)
    shapes = [tuple(w.shape) for w in maskable(model).values()]
    drawn = [audit.bernoulli(run(model, seed, distribution=distribution)) for seed in range(200)]
    for name, share in zip(maskable(model), getattr(masks, distribution)(shapes, .1)):
        kept = torch.tensor([float(found[name].sum()) for found in drawn])
        n = drawn[0][name].numel()
        spread = math.sqrt(n * share * (1 - share))
        assert abs(kept.mean() - n * share) < 4 * spread / math.sqrt(200) + 1e-3 * n * share
        assert (kept.std() < 1e-9) if share == 1 else .8 < kept.std() / spread < 1.25


@pytest.mark.parametrize("masks_of", [lambda model, seed: audit.bernoulli(run(model, seed)),
                                      lambda model, seed: masks.first_masks(maskable(model), .1, seed=seed)])
def test_tosses_know_nothing_of_the_weights(masks_of):
    "Both are drawn by the run's seed; were they the same draws, the smallest weights would be kept."
    places = []  # of the kept weights, among all of their layer: 0 for the smallest, 1 for the largest
    for seed in range(20):
        torch.manual_seed(seed)
        model = cnn(width=8)
        for name, mask in masks_of(model, seed).items():
            weight = maskable(model)[name].detach()
            if not mask.all(): places.append(weight.flatten().argsort().argsort()[mask.flatten()].double() / (weight.numel() - 1))
    places = torch.cat(places)
    assert abs(places.mean() - .5) < 4 * math.sqrt(1 / 12 / len(places))


def test_tosses_are_the_seeds():
    model = cnn(width=4)
    first, again, other = (audit.bernoulli(run(model, seed))["3.weight"] for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    RigL(model, torch.optim.SGD(model.parameters(), .1), masks=audit.bernoulli(run(model)), delta_t=1, t_end=2)  # takes them


def trained(kind, momentum, steps, gradient=1., delta_t=2):
    "Twelve weights under masks, pushed by one gradient for all: (weight, mask before and after, the optimizer's momentum)."
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 1., momentum=momentum)
    hook = kind(layer, optimizer, .5, delta_t=delta_t, t_end=2 * steps)
    before = hook.masks["weight"].clone()
    for _ in range(steps):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        hook.before_step(), optimizer.step(), hook.after_step()
    return layer.weight.detach(), before, hook.masks["weight"], optimizer.state[layer.weight].get("momentum_buffer")


def test_stale_momentum_is_that_of_a_weight_that_was_always_there():
    weight, before, after, buffer = trained(audit.StaleMomentum, .5, 2)
    grown = after & ~before
    assert grown.any() and (weight[grown] == -1.5).all() and (weight[~after] == 0).all() and (buffer == 1.5).all()
    weight, before, after, buffer = trained(RigL, .5, 2)
    assert (weight[after & ~before] == 0).all() and (buffer[~after] == 0).all()
    assert int(before.sum()) == int(after.sum()) == 6


def test_dense_gradients_are_counted_at_every_step():
    config = Config(sparsity="audit.StaleMomentum", storage="masked", width=4, density=.3, batch_size=8, steps=6, eval_every=3)
    data = BiasedDataset(torch.randint(0, 256, (40, 3, 28, 28)).byte(), torch.arange(40) % 10, torch.arange(40) // 4)
    assert run_seed(config, 1, lambda name: data)[0]["spent"]["dense_gradients"] == 6


def test_without_momentum_nothing_is_stale():
    "But a grown weight takes its first step at once: its gradient is not set to zero."
    weight, before, after, _ = trained(audit.StaleMomentum, 0., 2)
    assert (weight[after & ~before] == -1).all()
    kept = before & after
    assert weight[kept].equal(trained(RigL, 0., 2)[0][kept])


def test_a_model_stored_sparse_has_no_momentum_to_be_stale():
    model = sparsify(nn.Sequential(nn.Linear(4, 4)), .5)
    with pytest.raises(ValueError, match="expected storage: masked"):
        audit.StaleMomentum(model, torch.optim.SGD(model.parameters(), .1), delta_t=1, t_end=2)


@pytest.mark.parametrize("transform, shape", [(CIFAR, (9, 3, 32, 32)), (Transform(2), (5, 1, 6, 9)), (Transform(0, True), (5, 3, 7, 4)), (Transform(), (2, 3, 4, 4))])
def test_moved_is_what_training_sees(transform, shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    still, seen = (assemble(x, transform=transform, generator=generator) for generator in (None, torch.Generator().manual_seed(5)))
    shown = audit.Moved(nn.Identity(), transform, torch.Generator().manual_seed(5))
    assert shown(still).equal(seen) and shown(still).equal(still) == (transform == Transform())


def test_moved_tests_by_the_runs_transform():
    images = SimpleNamespace(transform=CIFAR)
    model = audit.moved(SimpleNamespace(seed=7, config=SimpleNamespace(images=images)), nn.Identity(), None)
    x = torch.rand(4, 3, 32, 32)
    assert model(x).equal(audit.Moved(nn.Identity(), CIFAR, torch.Generator().manual_seed(7))(x))


def entry(step, worst_group, unbiased): return dict(step=step, worst_group=worst_group, unbiased=unbiased)


@pytest.mark.parametrize("history, chosen", [
    ([entry(1, 0., .95), entry(2, .9, .5)], 1), ([entry(1, 0., .5), entry(2, .9, .5)], 2), ([entry(1, .4, .9), entry(2, .4, .8)], 2),
    ([entry(1, 0., 0.), entry(2, .1, .1)], 2), ([entry(1, .3, .9), entry(2, 0., .95), entry(3, .9, .9)], 2)])
def test_a_worst_group_of_zero_counts_as_the_average(history, chosen):
    assert audit.official_choice(history) == chosen


def test_the_official_choice_too_waits_for_the_final_sparsity():
    assert audit.official_choice([entry(1, .9, .9), entry(2, .1, .1)], select_from=2) == 2
