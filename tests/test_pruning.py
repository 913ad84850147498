"""Pruning: scores, rankings, schedules, other ways to drop and grow.

Oracles: numpy's stable sort; finite differences in double precision; PyTorch's explicit Hessian; the papers' formulas
worked by hand; sets of positions; and one storage for the other.
"""
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from rest_nb.configs import part
from rest_nb.data import BiasedDataset
from rest_nb.experiments import Config, Run, run_seed
from rest_nb.masks import SET, RigL, StaticSparse, erk, keep_counts, maskable, uniform
from rest_nb.models import cnn
from rest_nb.pruning import (GMP, ITOP, DropAtRandom, DropBySensitivity, Momentum, grasp_scores, magnitude_scores,
                             snip_scores, top_of_all, top_of_each)
from rest_nb.reweighting import shuffled_batches, weighted_batches
from rest_nb.rules import toy
from rest_nb.sparse import sparsify

few = settings(max_examples=60, deadline=None, derandomize=True)


def sgd(model, **kwargs): return torch.optim.SGD(model.parameters(), **{"lr": .1, "momentum": .9, **kwargs})


def step(layer, optimizer, method, gradient):
    "One step of a bare linear layer that receives just this gradient."
    layer.weight.grad = torch.tensor(gradient).view_as(layer.weight).clone()
    method.before_step(); optimizer.step(); method.after_step()


def bare(values):
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad(): layer.weight.copy_(torch.tensor([values]))
    return layer


def bits(*numbers): return torch.tensor([numbers]).bool()


# ------------------------------------------------------------------------------------------ rankings

tables = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=9), min_size=1, max_size=5)


@few
@given(tables, st.floats(.01, 1))
def test_the_top_of_all_is_numpys(rows, density):
    scores = {f"layer {i}": torch.tensor(row).double() for i, row in enumerate(rows)}
    flat = np.concatenate(rows)
    order = np.argsort(-flat, kind="stable")[:round(density * len(flat))]
    expected = np.isin(np.arange(len(flat)), order)
    parts = np.split(expected, np.cumsum([len(row) for row in rows])[:-1])
    empty = [i for i, part in enumerate(parts) if not part.any()]
    if empty:
        with pytest.raises(ValueError, match=f"density is {density}.*layer {empty[0]} "): top_of_all(scores, density)
        return
    masks = top_of_all(scores, density)
    assert [mask.tolist() for mask in masks.values()] == [part.tolist() for part in parts]
    assert list(masks) == list(scores)


@few
@given(st.integers(0, 99), st.floats(.2, 1), st.sampled_from([erk, uniform]))
def test_the_top_of_each_layer_is_numpys(seed, density, distribution):
    rng = np.random.default_rng(seed)
    scores = {name: torch.tensor(rng.integers(0, 4, shape)).double() for name, shape in dict(a=(3, 4), b=(5, 2, 2, 2)).items()}
    for name, mask in top_of_each(scores, density, distribution).items():
        k = keep_counts(scores, density, distribution)[name]
        order = np.argsort(-scores[name].numpy().ravel(), kind="stable")[:k]
        assert mask.shape == scores[name].shape and sorted(order) == mask.flatten().nonzero().flatten().tolist()


def test_shapes_and_memory_formats_do_not_matter():
    score = torch.arange(16.).view(2, 2, 2, 2).to(memory_format=torch.channels_last)
    assert top_of_all({"a": score % 2}, .25)["a"].flatten().int().tolist() == [0, 1] * 4 + [0] * 8


@pytest.mark.parametrize("density", [0, -1, 1.01, float("nan")])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ValueError, match=f"density is {density}"): top_of_all({"a": torch.ones(4)}, density)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_rank_nothing_are_refused(value):
    with pytest.raises(ValueError, match="not finite"): top_of_all({"a": torch.tensor([1., value])}, .5)


# -------------------------------------------------------------------------------------------- scores

def small_net():
    "Conv, batch norm, linear; smooth, so that differences are derivatives."
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 2, 2, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()


def some_batches(count=2, n=7):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 2, 3, 3, generator=generator).double(), torch.randint(3, (n,), generator=generator))
            for _ in range(count)]


def test_magnitudes():
    model = bare([-2., 1, 0, -.5])
    assert magnitude_scores(model)["weight"].tolist() == [[2, 1, 0, .5]]
    assert not magnitude_scores(model)["weight"].requires_grad


@pytest.mark.parametrize("count", [1, 2])
def test_snip_is_the_slope_of_a_switch(count):
    # c·w for one weight at a time, c = 1 ± 1e-5; the loss of several batches is their mean.
    model, batches = small_net(), some_batches(count)
    scores = snip_scores(model, batches)

    def loss(): return sum(F.cross_entropy(model(x), y).item() for x, y in batches) / len(batches)
    for name, weight in maskable(model).items():
        for place in np.ndindex(*weight.shape):
            was, losses = weight[place].item(), []
            for c in (1 + 1e-5, 1 - 1e-5):
                weight.data[place] = c * was
                losses.append(loss())
            weight.data[place] = was
            assert scores[name][place].item() == pytest.approx(abs(losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("temperature, count", [(1, 1), (1, 2), (200, 2)])
def test_grasp_by_the_explicit_hessian(temperature, count):
    # 20 weights: 2·4 + 4·3. Biases are no part of the flow.
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(torch.randn(9, 2).double(), torch.randint(3, (9,))) for _ in range(count)]

    def loss(flat):
        a, b = flat.split([8, 12])
        weights = {"0.weight": a.view(4, 2), "2.weight": b.view(3, 4)}
        return sum(F.cross_entropy(functional_call(model, weights, (x,)) / temperature, y) for x, y in batches) / count

    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    H = torch.autograd.functional.hessian(loss, flat)
    g = torch.autograd.functional.jacobian(loss, flat)
    S = -flat * (H @ g)  # the paper's: the largest are removed
    scores = grasp_scores(model, batches, temperature=temperature)
    found = torch.cat([scores["0.weight"].flatten(), scores["2.weight"].flatten()])
    assert torch.allclose(found, -S, rtol=1e-9, atol=0)
    kept = torch.cat([mask.flatten() for mask in top_of_all(scores, .7).values()])
    assert S[~kept].min() > S[kept].max() and kept.sum() == 14


def test_grasps_temperature_is_200():
    model, batches = small_net(), some_batches()
    for name, score in grasp_scores(model, batches).items():
        assert torch.equal(score, grasp_scores(model, batches, temperature=200)[name])


@pytest.mark.parametrize("scores", [snip_scores, grasp_scores])
def test_the_model_stays_as_it_is(scores):
    model, batches = small_net(), some_batches()
    model[1].eval()  # somebody has frozen the statistics
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].weight.requires_grad_(False)
    for training in (True, False):
        model[1].training = training
        modes = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        scores(model, batches)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[4].weight.grad is None
        assert not model[4].weight.requires_grad and model[0].weight.is_leaf


def test_scores_are_computed_in_the_models_own_mode():
    model, batches = small_net(), some_batches(1)
    training = snip_scores(model, batches)["0.weight"]
    assert not torch.allclose(training, snip_scores(model.eval(), batches)["0.weight"])


@pytest.mark.parametrize("scores", [snip_scores, grasp_scores])
def test_no_batch_is_refused(scores):
    with pytest.raises(ValueError, match="no batch"): scores(small_net(), [])


def test_a_shared_weight_has_one_score():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    x, y = torch.randn(5, 3), torch.randint(3, (5,))
    F.cross_entropy(model(x), y).backward()
    scores = snip_scores(model, [(x, y)])
    assert list(scores) == ["0.weight"]
    assert torch.allclose(scores["0.weight"], (model[0].weight * model[0].weight.grad).abs())


# ----------------------------------------------------------------------------------------------- GMP

def formula(size, final, step, delta_t, n):
    "Zhu & Gupta's equation 1, on sparsities: s_i = 0, t_0 = 0."
    t = min(step // delta_t, n) * delta_t
    s_f = 1 - final / size
    s_t = s_f + (0 - s_f) * (1 - t / (n * delta_t)) ** 3
    return size * (1 - s_t)


@pytest.mark.parametrize("mixin", [None, DropBySensitivity, DropAtRandom])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gmp_keeps_what_it_said_and_nothing_returns(mixin, optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 3, bias=False))
    model[2].requires_grad_(mixin is DropBySensitivity)  # a frozen layer is pruned all the same
    optimizer = optimizer(model.parameters(), lr=.1)
    kind = type("Mixed", (mixin, GMP), {}) if mixin else GMP
    gmp = kind(model, optimizer, .15, delta_t=3, t_end=15, distribution=uniform)  # 200 and 60 weights: 30 and 9
    assert all(mask.all() for mask in gmp.masks.values()) and gmp.kept_at(0) == {"0.weight": 200, "2.weight": 60}
    for number in range(1, 21):
        old = {name: mask.clone() for name, mask in gmp.masks.items()}
        weights = {name: w.detach().clone() for name, w in maskable(model).items()}
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 3, (8,))).backward()
        gmp.before_step(); optimizer.step(); gmp.after_step()
        for (name, mask), size, final in zip(gmp.masks.items(), (200, 60), (30, 9)):
            assert gmp.kept_at(number)[name] == mask.sum() and not (mask & ~old[name]).any()
            assert abs(int(mask.sum()) - formula(size, final, number, 3, 4)) <= .5 + 1e-9  # updates at 3, 6, 9, 12
            assert not maskable(model)[name][~mask].any()
            dropped, magnitudes = old[name] & ~mask, weights[name].abs()
            if not mixin and dropped.any(): assert magnitudes[dropped].max() <= magnitudes[mask].min()
            if mixin is DropAtRandom and number == 3: assert magnitudes[dropped].max() > magnitudes[mask].min()
    assert gmp.updates == 4 and gmp.dense_gradients == 0
    assert gmp.kept_at(12) == gmp.kept_at(10 ** 6) == {"0.weight": 30, "2.weight": 9}


def test_gmp_by_hand():
    # 1000 weights, 50 at last, n = 3, ten steps apart: 50 + 950·(2/3)³ = 331.48, 50 + 950·(1/3)³ = 85.19, 50.
    layer = nn.Linear(40, 25, bias=False)
    gmp = GMP(layer, sgd(layer), .05, delta_t=10, t_end=30.5)
    assert [gmp.kept_at(step)["weight"] for step in (9, 10, 19, 20, 29, 30, 31)] == [1000, 331, 331, 85, 85, 50, 50]
    assert GMP.schedule == ("delta_t", "t_end")


def test_an_update_at_t_end_itself_does_not_count():
    layer = nn.Linear(40, 25, bias=False)
    assert GMP(layer, sgd(layer), .05, delta_t=10, t_end=30).kept_at(20) == {"weight": 50}


@pytest.mark.parametrize("knobs, message", [
    (dict(delta_t=9), "delta_t is 9.*t_end, 9"), (dict(t_end=0), "delta_t is 2.*t_end, 0"), (dict(delta_t=0), "delta_t is 0"), (dict(t_end=-1), "t_end is -1"),
    (dict(density=2), "density is 2"), (dict(density=None), "density is None"), (dict(masks={}), "dense.*masks")])
def test_gmp_refuses(knobs, message):
    layer = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=message) as error:
        GMP(layer, sgd(layer), **{"density": .5, "delta_t": 2, "t_end": 9, **knobs})
    assert "\n" not in str(error.value) and layer.weight.count_nonzero() == 16


def test_gmp_refuses_a_model_that_is_stored_sparse():
    model = sparsify(cnn(num_classes=2, width=4), .3)
    with pytest.raises(ValueError, match="unsparsified.*storage: masked"): GMP(model, sgd(model), delta_t=2, t_end=9)


# ------------------------------------------------------------------------------------ momentum growth

def test_momentum_by_hand():
    # α = 0.9: .1·10 = 1; .9·1 + .1·0 = .9; .9·.9 + .1·(-20) = -1.19
    layer = bare([1., 0, 0])
    optimizer = sgd(layer, lr=0)
    method = Momentum(layer, optimizer, delta_t=9, t_end=99, masks={"weight": bits(1, 0, 0)})
    seen = []
    for gradient in (10., 0, -20):
        step(layer, optimizer, method, [5., gradient, 1])
        seen.append(method.averages[method.layers["weight"]][0, 1].item())
    assert seen == pytest.approx([1, .9, -1.19], rel=1e-6) and method.dense_gradients == 3


def test_momentum_grows_by_the_average_not_the_last_gradient():
    layer = bare([1., 2, 0, 0])
    optimizer = sgd(layer, lr=0)
    method = Momentum(layer, optimizer, delta_t=2, t_end=99, alpha=.5, masks={"weight": bits(1, 1, 0, 0)})
    step(layer, optimizer, method, [0., 0, -9, 0])  # averages -4.5, 0
    method.drop_fraction = 1
    step(layer, optimizer, method, [0., 0, 0, 2])   # -2.25, 1: one of the two weights goes, the larger average comes
    assert method.masks["weight"].equal(bits(0, 1, 1, 0))


def test_momentum_needs_the_dense_gradient_until_t_end():
    layer = bare([1., 2, 3, 4])
    optimizer = sgd(layer, lr=0)
    method = Momentum(layer, optimizer, .5, delta_t=2, t_end=5)
    wanted = []
    for _ in range(7):
        wanted.append(method.layers["weight"].wanted)
        step(layer, optimizer, method, [1., 2, 3, 4])
    assert wanted == [True] * 4 + [False] * 3 and method.dense_gradients == 4 and method.updates == 2


@pytest.mark.parametrize("alpha", [-.1, 1, float("nan")])
def test_an_alpha_that_is_no_share_is_refused(alpha):
    layer = bare([1., 2])
    with pytest.raises(ValueError, match=f"alpha is {alpha}"): Momentum(layer, sgd(layer), .5, delta_t=1, t_end=3, alpha=alpha)
    assert layer.weight.count_nonzero() == 2


# ---------------------------------------------------------------------------------------------- ITOP

@few
@given(st.integers(1, 6), st.integers(2, 8), st.floats(.05, .9), st.integers(1, 3), st.integers(0, 99),
       st.sampled_from([ITOP, type("AtRandom", (DropAtRandom, ITOP), {})]))
def test_itop_returns_nowhere_while_there_is_somewhere_new(rows, columns, density, delta_t, seed, kind):
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False)
    optimizer = sgd(layer)
    try: method = kind(layer, optimizer, density, delta_t=delta_t, t_end=30, seed=seed)
    except ValueError: return  # too sparse for so small a layer
    active = lambda: {tuple(place) for place in method.masks["weight"].nonzero().tolist()}
    ever, count, size = active(), len(active()), rows * columns
    for _ in range(12):
        before, fresh = active(), size - len(ever)
        layer.weight.grad = torch.randn_like(layer.weight)
        method.before_step(); optimizer.step(); method.after_step()
        new = active() - before
        assert len(active()) == count
        if fresh: assert len(new & ever) == 0 or len(new - ever) == fresh  # old ones only beside all of the new
        ever |= new
        assert method.explored == pytest.approx(len(ever) / size, abs=1e-9)


def test_itop_grows_at_random_among_the_new():
    def grown(seed):
        layer = nn.Linear(20, 20, bias=False)
        optimizer = sgd(layer)
        method = ITOP(layer, optimizer, delta_t=1, t_end=9, seed=seed, masks={"weight": torch.eye(20).bool()})
        step(layer, optimizer, method, [0.] * 400)
        return frozenset((method.masks["weight"] & ~torch.eye(20).bool()).flatten().nonzero().flatten().tolist())
    assert grown(0) == grown(0) and len({grown(seed) for seed in range(5)}) == 5


def test_itop_leaves_given_masks_alone():
    layer, given_masks = bare([1., 2, 0, 0]), {"weight": bits(1, 1, 0, 0)}
    optimizer = sgd(layer)
    method = ITOP(layer, optimizer, delta_t=1, t_end=9, drop_fraction=1, masks=given_masks)
    step(layer, optimizer, method, [0.] * 4)
    assert given_masks["weight"].equal(bits(1, 1, 0, 0)) and method.explored == .75  # int(.97 · 2) = 1 is new


# ------------------------------------------------------------------------------- dropping, combining

def test_sensitivity_by_hand():
    # |w·g|: .9, .5, .2, 0 for a weight with gradient 0, however large
    layer = bare([.1, -.5, .2, 9, 0, 0])
    optimizer = sgd(layer, lr=0)
    method = type("Mixed", (DropBySensitivity, RigL), {})(layer, optimizer, delta_t=1, t_end=3, drop_fraction=.7,
                                                          masks={"weight": bits(1, 1, 1, 1, 0, 0)})
    step(layer, optimizer, method, [9., 1, -1, 0, 3, 4])  # int(.525 · 4) = 2 go
    assert method.masks["weight"].equal(bits(1, 1, 0, 0, 1, 1))


def test_sensitivity_without_a_gradient_is_refused():
    layer = bare([1., 2, 3])
    method = type("Mixed", (DropBySensitivity, SET), {})(layer, sgd(layer), delta_t=1, t_end=3, masks={"weight": bits(1, 1, 0)})
    with pytest.raises(ValueError, match="after backward"): method.before_step()


def test_dropping_at_random_spares_nobody():
    layer, dropped = bare([1., 10, 100, 1000, 0, 0]), []
    for seed in range(30):
        method = type("Mixed", (DropAtRandom, SET), {})(layer, sgd(layer), delta_t=1, t_end=3, seed=seed,
                                                        masks={"weight": bits(1, 1, 1, 1, 0, 0)})
        optimizer = method.optimizer
        with torch.no_grad(): layer.weight.copy_(torch.tensor([[1., 10, 100, 1000, 0, 0]]))
        step(layer, optimizer, method, [0.] * 6)
        dropped += (layer.weight == 0)[0, :4].nonzero().flatten().tolist()
    assert set(dropped) == {0, 1, 2, 3}


ROOT = Path(__file__).parents[1]
COMBINED = [drop + grow for drop in ("", "pruning.DropBySensitivity + ", "pruning.DropAtRandom + ")
            for grow in ("masks.SET", "masks.RigL", "pruning.ITOP", "pruning.Momentum(alpha=.5)")]


def test_every_combination_has_a_name_in_the_study():
    methods = yaml.safe_load((ROOT / "params.yaml").read_text())["methods"]
    assert {re.sub(r"\(.*?\)", "", said.get("sparsity", "")) for said in methods.values()} >= {text.split("(")[0] for text in COMBINED}


@pytest.mark.parametrize("text", COMBINED)
def test_both_storages_evolve_the_same_masks(text):
    torch.manual_seed(4)
    dense = cnn(num_classes=3, width=4).double()
    batches = [(torch.rand(6, 3, 16, 16).double(), torch.randint(0, 3, (6,))) for _ in range(7)]
    (kind, options), masks = part(text), []
    for stored in (False, True):
        model = copy.deepcopy(dense)
        if stored: sparsify(model, .3, seed=5)
        optimizer = sgd(model, lr=.05)
        method = kind(model, optimizer, None if stored else .3, delta_t=2, t_end=8, seed=5, **options)
        start = {name: mask.clone() for name, mask in method.masks.items()}
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            method.before_step(); optimizer.step(); method.after_step()
        assert method.updates == 3 and any(not torch.equal(start[name], mask) for name, mask in method.masks.items())
        assert method.kept_at(0) == {name: int(mask.sum()) for name, mask in start.items()}
        masks.append(method.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


FIRST = dict(magnitude=lambda model, x, y: top_of_each(magnitude_scores(model), .3, erk),
             snip=lambda model, x, y: top_of_all(snip_scores(model, [(x, y)]), .3),
             grasp=lambda model, x, y: top_of_all(grasp_scores(model, [(x, y)]), .3))


@pytest.mark.parametrize("text", ["dense", "ticket", "masks.StaticSparse", "pruning.GMP", *COMBINED, *FIRST])
def test_sparse_or_not_it_is_reweighting_that_leaves_the_shortcut(text):
    "On points whose answer is known, in a loop of one's own: drawn as they come, the rarest cell is got wrong; drawn evenly, it is not."
    x, y, a = toy(4000, .02, torch.Generator().manual_seed(0))
    fresh_x, fresh_y, fresh_a = toy(4000, .5, torch.Generator().manual_seed(1))
    # The attribute's coordinate is five times as large, so are SNIP's scores, and the other one would lose all its weights.
    if text == "snip": x, fresh_x = x * torch.tensor([.5, 1]), fresh_x * torch.tensor([.5, 1])

    def worst(upweight):
        torch.manual_seed(0)
        model, generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)), torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), .2)
        method, schedule, start = None, dict(delta_t=20, t_end=400, drop_fraction=.3), copy.deepcopy(model.state_dict())
        drawn = lambda batches: weighted_batches(torch.where(y != a, upweight, 1.).double(), 100, batches, generator)
        if text in FIRST: method = StaticSparse(model, optimizer, masks=FIRST[text](model, *(values[torch.cat([*drawn(5)])] for values in (x, y))))
        elif text not in ("dense", "ticket"):
            kind, options = part(text)
            method = kind(model, optimizer, .3, **{name: schedule[name] for name in kind.schedule}, **options)

        def train():
            for index in drawn(600):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                if method: method.before_step()
                optimizer.step()
                if method: method.after_step()
        train()
        if text == "ticket":  # pruned by what it has become, rewound to what it was, trained again
            tops = top_of_each(magnitude_scores(model), .3, erk)
            model.load_state_dict(start)
            method = StaticSparse(model, optimizer, masks=tops)
            train()
        if method: assert sum(int(w.count_nonzero()) for w in maskable(model).values()) <= round(.3 * 128)
        right = (model(fresh_x).argmax(1) == fresh_y).double()
        return min(right[(fresh_y == t) & (fresh_a == v)].mean().item() for t in (0, 1) for v in (0, 1))
    assert worst(1.) < (.75 if text == "ticket" else .7) and worst(49.) > .9  # a ticket has trained twice as long


@pytest.mark.parametrize("stored", [False, True])
def test_a_copied_momentum_goes_on_like_the_original(stored):
    torch.manual_seed(4)
    model = cnn(num_classes=3, width=4)
    if stored: sparsify(model, .3)
    optimizer = sgd(model)
    method = Momentum(model, optimizer, None if stored else .3, delta_t=3, t_end=20)
    batches = [(torch.rand(6, 3, 16, 16), torch.randint(0, 3, (6,))) for _ in range(7)]

    def go(model, optimizer, method, batches):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            method.before_step(); optimizer.step(); method.after_step()
        return method.masks
    go(model, optimizer, method, batches[:2])
    twin = copy.deepcopy((model, optimizer, method))
    ours, theirs = go(model, optimizer, method, batches[2:]), go(*twin, batches[2:])
    assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items()) and method.updates == 2


# ------------------------------------------------------------------------------------ on the harness

CONFIG = Config(sparsity="masks.StaticSparse", density=.3, width=4, lr=.05, batch_size=16, precision="fp32", steps=8, eval_every=4)


def split(name, n=96):
    generator = torch.Generator().manual_seed(len(name))
    y = torch.arange(n) % 10
    a = torch.where(torch.rand(n, generator=generator) < .2, (y + 3) % 10, y)
    x = torch.randint(0, 90, (n, 3, 28, 28), generator=generator, dtype=torch.uint8)
    x[torch.arange(n), a % 3] += 60
    return BiasedDataset(x, y, a)


def changed(**changes): return Config(**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | changes)


@pytest.mark.parametrize("text, trained", [("magnitude", 0), ("snip", 16), ("snip(batches=3)", 48), ("grasp", 64),
                                           ("grasp(batches=2)", 128), ("rewound", 8 * 16), ("rewound(steps=4)", 4 * 16)])
def test_first_masks_of_a_run(text, trained):
    run = Run(changed(initial=f"pruning.{text}"), 1, split("train"))
    before = copy.deepcopy(run.model.state_dict())
    masks = run.call("initial")
    assert list(masks) == list(maskable(run.model)) and run.trained == trained and run.asked == 0
    total = sum(w.numel() for w in maskable(run.model).values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(.3 * total)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.model.training and all(p.grad is None for p in run.model.parameters())
    if "snip" not in text and "grasp" not in text:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == keep_counts(maskable(run.model), .3, erk)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("kind", ["snip", "grasp"])
def test_scores_on_the_harness_are_those_of_the_first_batches(kind, batches):
    run = Run(changed(initial=f"pruning.{kind}(batches={batches})"), 1, split("train"))
    kept = torch.cat([mask.flatten() for mask in run.call("initial").values()])
    other = Run(CONFIG, 1, split("train"))
    weights, g = maskable(other.model), torch.Generator().manual_seed(1)
    indices = list(shuffled_batches(96, 16, batches, g))
    T = 200 if kind == "grasp" else 1
    loss = sum(F.cross_entropy(other.model(other.train.x[i] / 255) / T, other.train.y[i]) for i in indices) / batches
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=kind == "grasp")
    if kind == "snip": scores = [(w * g).abs() for w, g in zip(weights.values(), gradients)]
    else:
        products = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), weights.values())
        scores = [w * h for w, h in zip(weights.values(), products)]
    scores = torch.cat([score.detach().flatten() for score in scores])
    close = 1e-4 * scores.abs().mean()
    assert scores[kept].min() >= scores[~kept].max() - close and scores[kept].min() > scores.min() + close


@pytest.mark.parametrize("kind", ["snip", "grasp"])
def test_scores_are_of_batches_drawn_as_the_run_draws_them(kind):
    config = changed(initial=f"pruning.{kind}(batches=3)", reweighting="reweighting.sample(upweight=1e9)", guess="guesses.by_chance")
    run, seen = Run(config, 1, split("train")), []
    images, run.images = run.images, lambda index: seen.append(index) or images(index)
    batches = run.prepare()["batches"]
    assert len(seen) == 3 and all(run.is_conflicting[index].all() for index in seen)
    assert len({tuple(index.tolist()) for index in seen}) == 3
    assert len(list(batches)) == config.steps  # none of the run's own is used up


@pytest.mark.parametrize("text", ["magnitude", "rewound(steps=1)"])
def test_the_distribution_of_a_run_is_followed(text):
    run = Run(changed(initial=f"pruning.{text}", distribution="uniform"), 1, split("train"))
    assert all(abs(mask.float().mean() - .3) < .02 for mask in run.call("initial").values())


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_ticket_starts_from_the_initial_weights(storage):
    config = changed(initial="pruning.rewound", storage=storage)
    untouched, run = Run(config, 1, split("train")), Run(config, 1, split("train"))
    trained = Run(config, 1, split("train")).pretrain(reweighting="none")
    run.prepare()
    hook, = run.hooks
    for name, first in maskable(untouched.model).items():
        mask, weight = hook.masks[name], hook.layers[name].dense().detach()
        assert torch.equal(weight[mask], first[mask]) and not weight[~mask].any()
        magnitudes = maskable(trained)[name].detach().abs()
        assert mask.all() or magnitudes[mask].min() >= magnitudes[~mask].max()
    final = maskable(trained)["6.weight"].detach()
    assert not torch.equal(final, maskable(untouched.model)["6.weight"])  # it has been trained


def test_a_ticket_is_trained_as_the_run_is():
    # Reweighted, the dense network learns other weights, and other ones are the largest.
    plain, sampled = (Run(changed(initial="pruning.rewound", reweighting=text, upweight=50), 1, split("train")).call("initial")
                      for text in ("none", "reweighting.sample"))
    assert any(not torch.equal(mask, sampled[name]) for name, mask in plain.items())


def test_less_than_one_batch_is_refused():
    run = Run(changed(initial="pruning.snip(batches=0)"), 1, split("train"))
    with pytest.raises(ValueError, match="batches is 0"): run.call("initial")


@pytest.mark.parametrize("roles", [
    *(dict(sparsity=text) for text in COMBINED), dict(sparsity="pruning.GMP", storage="masked"),
    dict(sparsity="pruning.DropBySensitivity + pruning.GMP", storage="masked"), dict(initial="pruning.grasp"),
    dict(initial="pruning.snip", sparsity="masks.RigL"), dict(initial="pruning.rewound(steps=2)")], ids=str)
def test_a_whole_run(roles):
    config = changed(**roles)
    result, _ = run_seed(config, 1, split)
    json.dumps(result)
    spent, total = result["spent"], sum(w.numel() for w in maskable(config.untrained()).values())
    others = sum(p.numel() for p in config.untrained().parameters()) - total
    assert spent["kept"] == round(.3 * total) + others
    momentum, grows_by_gradient = "Momentum" in config.sparsity, "RigL" in config.sparsity
    assert spent["dense_gradients"] == (5 if momentum else spent["updates"] if grows_by_gradient else 0)  # t_end: 6
    assert spent["updates"] == (0 if "Static" in config.sparsity else 2)
    if "GMP" not in config.sparsity: assert spent["average_flops"] == spent["flops"]
    else:  # of 8 steps 2 are dense, 2 have an eighth of what shall go still there, 4 none of it; a weight works at as many places as its layer's output has
        final, weights = keep_counts(maskable(config.untrained()), .3), maskable(config.untrained())
        at = lambda left: 2 * sum(places * round(final[name] + left * (w.numel() - final[name])) for places, (name, w) in zip((14 ** 2, 7 ** 2, 3 ** 2, 1), weights.items()))
        assert spent["average_flops"] == pytest.approx((2 * at(1) + 2 * at(1 / 8) + 4 * at(0)) / 8) and spent["flops"] == at(0)


def test_a_way_to_drop_must_come_first():
    "Behind SET it would be RigL under another name."
    for bases, message in (((RigL, DropAtRandom), "DropAtRandom must come first"), ((DropBySensitivity, DropAtRandom, SET), "only one of them")):
        with pytest.raises(TypeError, match=message): type("Mixed", bases, {})
    with pytest.raises(ValueError, match="RigL \\+ pruning.DropAtRandom is no class: DropAtRandom must come first"):
        part("masks.RigL + pruning.DropAtRandom")


def test_gmp_is_refused_on_compact_storage_before_it_trains():
    with pytest.raises(ValueError, match="storage: masked"): Run(changed(sparsity="pruning.GMP"), 1, split("train")).prepare()
