"""Rules: the papers' formulas worked by hand, counts, and points in the plane on which the answer is known.

Oracles: plain Python numbers and loops; the expectation counted over cells; a twin trained by hand; Φ(2).
"""
import copy
import functools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from rest_nb import training
from rest_nb.batches import assemble
from rest_nb.configs import Config
from rest_nb.data import BiasedDataset
from rest_nb.experiments import Run
from rest_nb.masks import RigL, maskable
from rest_nb.models import cnn
from rest_nb.reweighting import cross_entropy, sample_weights, shuffled_batches, weighted_batches
from rest_nb.reweighting import weighted_cross_entropy
from rest_nb.rules import GroupDRO, LfF, balanced_weights, cells, cost_multiple, error_set, generalised_cross_entropy
from rest_nb.rules import group_sizes, subsample, toy
from rest_nb.sparse import sparsify
from rest_nb.training import fit

relaxed = settings(max_examples=50, deadline=None, derandomize=True)


def seeded(seed): return torch.Generator().manual_seed(seed)


@st.composite
def grouped(draw):
    "Groups of 1 to 5 kinds, each of which has a sample, in any order."
    kinds = draw(st.integers(1, 5))
    rest = draw(st.lists(st.integers(0, kinds - 1), max_size=20))
    return torch.tensor(draw(st.permutations([*range(kinds), *rest])))


# ------------------------------------------------------------------------------------------- cells

@relaxed
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30))
def test_cells_number_the_pairs_or_name_those_that_are_missing(pairs):
    y, a = map(torch.tensor, zip(*pairs))
    there, all_there = set(pairs), {(t, v) for t in range(max(y) + 1) for v in {v for _, v in pairs}}  # a code that nobody has is none
    if there == all_there:
        numbers = cells(y, a).tolist()
        assert sorted(all_there) == [pair for _, pair in sorted(set(zip(numbers, pairs)))]  # one number, one pair
        assert set(numbers) == set(range(len(all_there)))
    else:
        missing = sorted(all_there - there)
        with pytest.raises(ValueError, match=f"^{len(missing)} of {len(all_there)} cells") as caught: cells(y, a)
        named = ", ".join(map(str, missing[:6])) + (", …" if len(missing) > 6 else "")
        assert f"have no sample: {named};" in str(caught.value) and "\n" not in str(caught.value)


def test_cells_of_class_and_conflict():
    y, a = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 3, 1, 0, 3])
    assert cells(y, y != a).tolist() == [0, 1, 2, 3, 3]


def test_sizes_are_counts():
    assert group_sizes(torch.tensor([2, 0, 1, 2, 2])).tolist() == [1, 1, 3]


# --------------------------------------------------------------------------------------- balancing

@relaxed
@given(grouped(), st.integers(0, 10**6))
def test_each_group_counts_the_same(groups, seed):
    weights, kinds = balanced_weights(groups), len(set(groups.tolist()))
    assert weights.dtype == torch.float64
    # The sampler: what a draw expects of each group, counted.
    expected = [sum(w for w, g in zip(weights.tolist(), groups.tolist()) if g == kind) for kind in range(kinds)]
    assert expected == pytest.approx([len(groups) / kinds] * kinds)
    assert weights.mean().item() == pytest.approx(1)
    assert all(len({w for w, g in zip(weights.tolist(), groups.tolist()) if g == kind}) == 1 for kind in range(kinds))
    # The loss: the mean of the groups' means.
    logits, y = torch.randn(len(groups), 3, generator=seeded(seed)), torch.arange(len(groups)) % 3
    each = -logits.log_softmax(1)[torch.arange(len(y)), y].numpy()
    means = [each[groups.numpy() == kind].mean() for kind in range(kinds)]
    assert weighted_cross_entropy(weights)(logits, y, torch.arange(len(y))).item() == pytest.approx(np.mean(means), rel=1e-4)


def test_cells_are_drawn_alike():
    y = torch.arange(900) % 3
    a = torch.where(torch.arange(900) < 60, (y + 1 + torch.arange(900) // 3 % 2) % 3, y)
    groups = cells(y, a)
    drawn = groups[torch.cat(list(weighted_batches(balanced_weights(groups), 1000, 30, seeded(0))))]
    assert groups.bincount().max() > 20 * groups.bincount().min()
    assert stats.chisquare(drawn.bincount(minlength=9)).pvalue > 1e-3


# ------------------------------------------------------------------------------------- subsampling

@relaxed
@given(grouped(), st.integers(0, 10**6))
def test_as_many_of_each_group_as_the_smallest_has(groups, seed):
    kept, counts = subsample(groups, seeded(seed)).tolist(), Counter(groups.tolist())
    assert Counter(groups[kept].tolist()) == {kind: min(counts.values()) for kind in counts}
    assert kept == sorted(set(kept))
    assert kept == subsample(groups, seeded(seed)).tolist()


def test_everyone_of_a_group_is_as_likely_to_stay():
    groups, state = torch.tensor([0] * 10 + [1] * 4 + [0] * 10), torch.get_rng_state()
    times = Counter(i for seed in range(500) for i in subsample(groups, seeded(seed)).tolist())
    assert all(times[i] == 500 for i in range(10, 14))
    assert stats.chisquare([times[i] for i in range(24) if groups[i] == 0]).pvalue > 1e-3  # 4 of 20 each time
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------- group DRO

def losses_of(values):
    "Logits for two classes at which target 0 has these cross-entropies."
    return torch.tensor([[0, math.log(math.exp(v) - 1)] for v in values], requires_grad=True)


def test_three_steps_of_algorithm_1_by_hand():
    # η_q = 0.5. Samples 0, 1, 2 are of group 0, samples 3, 4 of group 1; C = 0.
    dro, y = GroupDRO(torch.tensor([0, 0, 0, 1, 1]), step_size=.5), torch.tensor([0, 0, 0])
    # 1: group 0 loses 1 and 3, on average 2; group 1 loses 1. q' = ½e¹, ½e^½
    value = dro(losses_of([1, 3, 1]), y, torch.tensor([0, 2, 3])).item()
    q = [math.exp(1) / (math.exp(1) + math.exp(.5)), math.exp(.5) / (math.exp(1) + math.exp(.5))]
    assert dro.q.tolist() == pytest.approx(q) and value == pytest.approx(2 * q[0] + 1 * q[1])
    # 2: group 1 alone loses 4, 4, 1, on average 3. q' = e¹, e^½·e^1.5; group 0 is not touched
    value = dro(losses_of([4, 4, 1]), y, torch.tensor([4, 3, 4])).item()
    q = [math.exp(1) / (math.exp(1) + math.exp(2)), math.exp(2) / (math.exp(1) + math.exp(2))]
    assert dro.q.tolist() == pytest.approx(q) and value == pytest.approx(3 * q[1])
    # 3: 2 and 1. q' = e¹·e¹, e²·e^½
    value = dro(losses_of([2, 1]), y[:2], torch.tensor([1, 4])).item()
    q = [math.exp(2) / (math.exp(2) + math.exp(2.5)), math.exp(2.5) / (math.exp(2) + math.exp(2.5))]
    assert dro.q.tolist() == pytest.approx(q) and value == pytest.approx(2 * q[0] + 1 * q[1])


def test_the_adjustment_moves_q_and_nothing_else():
    # C = 6: 6/√4 = 3 for group 0, 6/√1 = 6 for group 1. Both lose 1: q' = e^(η4), e^(η7).
    dro = GroupDRO(torch.tensor([0, 0, 1, 0, 0]), step_size=.1, adjustment=6)
    logits, index = losses_of([1, 1]), torch.tensor([0, 2])
    value = dro(logits, torch.tensor([0, 0]), index)
    q = math.exp(.4) / (math.exp(.4) + math.exp(.7))
    assert dro.q.tolist() == pytest.approx([q, 1 - q])
    assert value.item() == pytest.approx(1)  # q·1 + (1-q)·1, without 3 and 6


@relaxed
@given(st.integers(0, 10**6))
def test_the_gradient_is_that_of_the_groups_mean_losses_times_q(seed):
    g = seeded(seed)
    groups, logits = torch.arange(12) % 3, torch.randn(8, 4, generator=g, requires_grad=True)
    index, y = torch.randint(12, (8,), generator=g), torch.randint(4, (8,), generator=g)
    dro = GroupDRO(groups, step_size=.3)
    ours, = torch.autograd.grad(dro(logits, y, index), logits)
    softmax = np.exp(logits.detach().double().numpy())
    softmax /= softmax.sum(1, keepdims=True)
    members = Counter(groups[index].tolist())
    for i in range(8):  # of cross-entropy: softmax - one-hot
        kind = int(groups[index[i]])
        theirs = (softmax[i] - np.eye(4)[y[i]]) * dro.q[kind].item() / members[kind]
        np.testing.assert_allclose(ours[i].numpy(), theirs, atol=1e-5)


def test_group_dro_goes_on_where_it_stopped():
    def some(dro, seeds):
        for seed in seeds:
            g = seeded(seed)
            dro(torch.randn(6, 3, generator=g), torch.randint(3, (6,), generator=g), torch.randint(9, (6,), generator=g))
        return dro.q
    groups = torch.arange(9) % 4
    whole = some(GroupDRO(groups, .5, adjustment=1), range(6))
    stopped, resumed = GroupDRO(groups, .5, adjustment=1), GroupDRO(groups, .5, adjustment=1)
    some(stopped, range(3))
    assert list(stopped.state_dict()) == ["q"]
    resumed.load_state_dict(stopped.state_dict())
    pickled = pickle.loads(pickle.dumps(stopped))
    assert torch.equal(some(resumed, range(3, 6)), whole) and torch.equal(some(pickled, range(3, 6)), whole)
    assert whole.sum().item() == pytest.approx(1) and whole.std() > .01


# --------------------------------------------------------------------------------------------- JTT

def test_the_error_set_is_the_known_mistakes():
    # Two far blobs; three labels lie. A line cannot serve them.
    y, lies = torch.arange(40) % 2, torch.tensor([3, 8, 31])
    x = 4. * (2 * y[:, None] - 1) + torch.randn(40, 2, generator=seeded(0))
    y[lies] = 1 - y[lies]
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    errors = error_set(model(x).argmax(1), y)
    assert errors.nonzero().flatten().tolist() == lies.tolist()
    assert sample_weights(errors, 20).tolist() == [20 if i in (3, 8, 31) else 1 for i in range(40)]


def test_costs_by_hand():
    # 100 images of training are 300 passes. A second network on 50: 150; asked about 30: 30.
    assert cost_multiple(100, trained=50, asked=30) == pytest.approx(1 + 180 / 300)
    assert cost_multiple(100, trained=100) == 2  # LfF with equal networks
    assert cost_multiple(100, trained=0) == 1
    assert cost_multiple(100, trained=50, asked=30, relative=4) == pytest.approx(1 + 4 * 180 / 300)


# --------------------------------------------------------------------------------------------- GCE

def probabilities(logits, y):
    e = np.exp(logits.detach().double().numpy())
    return (e / e.sum(1, keepdims=True))[np.arange(len(y)), y.numpy()]


@relaxed
@given(st.integers(0, 10**6), st.floats(.01, 1))
def test_generalised_cross_entropy_is_its_definition(seed, q):
    g = seeded(seed)
    logits, y = 3 * torch.randn(6, 4, generator=g), torch.randint(4, (6,), generator=g)
    logits.requires_grad_()
    value, p = generalised_cross_entropy(q)(logits, y, None), probabilities(logits, y)
    assert value.item() == pytest.approx(((1 - p ** q) / q).mean(), rel=1e-4, abs=1e-6)
    ours, = torch.autograd.grad(value, logits)
    by_ce, = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    torch.testing.assert_close(ours, by_ce * torch.from_numpy(p[:, None] ** q).float(), rtol=1e-3, atol=1e-6)


def test_the_two_limits_of_generalised_cross_entropy():
    logits, y = 2 * torch.randn(50, 5, generator=seeded(0)), torch.arange(50) % 5
    p = probabilities(logits, y)
    assert generalised_cross_entropy(1e-6)(logits, y, None).item() == pytest.approx(-np.log(p).mean(), rel=1e-4)
    assert generalised_cross_entropy(1)(logits, y, None).item() == pytest.approx(1 - p.mean(), rel=1e-5)


# --------------------------------------------------------------------------------------------- LfF

def weights_only(y, **options):
    twin = nn.Linear(1, 2)
    return LfF(torch.tensor(y), None, twin, torch.optim.SGD(twin.parameters(), .1), **options)


def test_weights_of_four_samples_by_hand():
    # Classes 0: samples 0, 1; 1: samples 2, 3. Decay .7, the first loss whole.
    lff = weights_only([0, 0, 1, 1])
    w = lff.weigh(torch.tensor([[2., 1, 4], [1, .5, 3]]).double(), torch.tensor([0, 1, 2]))
    # largest biased: 2, 4; debiased: 1, 3. Sample 3 is not seen yet.
    assert w.tolist() == pytest.approx([1 / 2, .5 / (.5 + .5), 1 / 2])
    w = lff.weigh(torch.tensor([[3., 8], [1, 3]]).double(), torch.tensor([1, 3]))
    # biased: 1 → .7·1 + .3·3 = 1.6 of at most 2, and 8 whole; debiased: .5 → .65 of at most 1, and 3 of 3.
    assert w.tolist() == pytest.approx([.8 / (.8 + .65), 1 / (1 + 1)])
    w = lff.weigh(torch.tensor([[1.], [1]]).double(), torch.tensor([2]))
    # biased: 4 → 3.1 of at most 8 now; debiased: 3 → 2.4 of at most 3.
    assert w.tolist() == pytest.approx([(3.1 / 8) / (3.1 / 8 + .8)])
    assert lff.averages.tolist() == [pytest.approx(row) for row in ([2, 1.6, 3.1, 8], [1, .65, 2.4, 3])]


def test_a_loss_of_nothing_has_been_seen():
    "In single precision a sure network loses exactly 0: the next loss, 2, counts .3 of itself, and 1, whose debiased one was 1, counts .7·1 + .3·2."
    lff = weights_only([0, 0])
    lff.weigh(torch.tensor([[0.], [1]]).double(), torch.tensor([0]))
    lff.weigh(torch.tensor([[2.], [2]]).double(), torch.tensor([0]))
    assert lff.averages[:, 0].tolist() == pytest.approx([.6, 1.3])
    assert lff.weigh(torch.tensor([[3.], [2.6]]).double(), torch.tensor([1])).item() == pytest.approx(1 / 2)  # the first loss of another, whole


def test_nothing_lost_weighs_nothing_and_is_a_number():
    assert weights_only([0, 0]).weigh(torch.zeros(2, 2).double(), torch.tensor([0, 1])).tolist() == [0, 0]


def test_lff_is_algorithm_1_written_out():
    # Both networks against loops over samples, in Python's numbers where numbers do.
    g = seeded(0)
    x, y = torch.randn(12, 3, generator=g), torch.arange(12) % 3
    torch.manual_seed(0)
    twin, model = nn.Linear(3, 3), nn.Linear(3, 3)
    other_twin, other = copy.deepcopy(twin), copy.deepcopy(model)
    lff = LfF(y, lambda twin, index: twin(x[index]), twin, torch.optim.SGD(twin.parameters(), .2), q=.6, decay=.5)
    average, seen = {}, 0
    for index in torch.randint(12, (5, 4), generator=g):
        index = index.unique()  # each sample once
        seen += len(index)
        logits = model(x[index])
        value = lff(logits, y[index], index)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        # the same by hand
        p = {name: net(x[index]).softmax(1)[range(len(index)), y[index]] for name, net in (("b", other_twin), ("d", other))}
        for k, i in enumerate(index.tolist()):
            for name in "bd":
                loss = -math.log(p[name][k].item())
                average[name, i] = .5 * average[name, i] + .5 * loss if (name, i) in average else loss
        weights = []
        for i in index.tolist():
            b, d = (average[name, i] / max(v for (n, j), v in average.items() if n == name and y[j] == y[i]) for name in "bd")
            weights.append(b / (b + d))
        expected = -(torch.tensor(weights) * p["d"].log()).mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
        theirs = torch.autograd.grad(expected, list(other.parameters()))
        torch.testing.assert_close(gradients, theirs, rtol=1e-3, atol=1e-6)
        biased = torch.autograd.grad(((1 - p["b"] ** .6) / .6).mean(), list(other_twin.parameters()))
        with torch.no_grad():
            for net, grads in ((other_twin, biased), (other, theirs), (model, gradients)):
                for parameter, gradient in zip(net.parameters(), grads): parameter -= .2 * gradient
        torch.testing.assert_close(twin.state_dict(), other_twin.state_dict(), rtol=1e-4, atol=1e-6)
    assert lff.trained == seen


def test_lff_goes_on_where_it_stopped(tmp_path):
    x, y = torch.randn(10, 2, generator=seeded(1)), torch.arange(10) % 2

    def made():
        torch.manual_seed(0)
        twin = nn.Linear(2, 2)
        return LfF(y, lambda twin, index: twin(x[index]), twin, torch.optim.SGD(twin.parameters(), .3, momentum=.9))

    def some(lff, seeds):
        for seed in seeds:
            index = torch.randint(10, (4,), generator=seeded(seed))
            value = lff(x[index] * 2, y[index], index)
        return value.item()
    whole, stopped, resumed = made(), made(), made()
    expected = some(whole, range(6))
    some(stopped, range(3))
    torch.save(stopped.state_dict(), tmp_path / "lff.pt")
    resumed.load_state_dict(torch.load(tmp_path / "lff.pt"))
    assert some(resumed, range(3, 6)) == expected and resumed.trained == whole.trained == 24
    torch.testing.assert_close(resumed.twin.state_dict(), whole.twin.state_dict(), rtol=0, atol=0)


def test_a_twin_can_be_sparse_too():
    torch.manual_seed(0)
    twin, data = cnn(width=4), noise(40)
    optimizer = torch.optim.SGD(twin.parameters(), .05, momentum=.9)
    rigl = RigL(twin, optimizer, density=.2, delta_t=2, t_end=10)
    lff = LfF(data.y, lambda twin, index: twin(assemble(data.x, index)), twin, optimizer, hooks=[rigl])
    for index in shuffled_batches(40, 10, 5, seeded(0)): lff(torch.randn(10, 10), data.y[index], index)
    weights = maskable(twin).values()
    assert rigl.updates == 2 and lff.trained == 50
    assert sum(int(w.count_nonzero()) for w in weights) <= round(.2 * sum(w.numel() for w in weights))


# -------------------------------------------------------------------- points whose answer is known

def plane(x, **batch):
    "The coordinates that two pixels stand for."
    return (assemble(x, **batch) - .5) * 8


def points(n, conflict_ratio, seed):
    "The toy as images of two pixels."
    x, y, a = toy(n, conflict_ratio, seeded(seed))
    return BiasedDataset(((x / 8 + .5) * 255).round().clamp(0, 255).byte().view(n, 1, 1, 2), y, a, 2)


TRAIN, FRESH = points(4000, .02, 0), points(4000, .5, 1)
GROUPS = cells(TRAIN.y, TRAIN.a)


def learn(batches, loss=cross_entropy):
    "The worst cell's accuracy on fresh points after training by `fit`; and the model."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    batches = list(batches)
    fitted = fit(model, torch.optim.SGD(model.parameters(), .5), TRAIN, FRESH, batches, eval_every=len(batches),
                 loss=loss, inputs=plane)
    return fitted.history[-1]["worst_cell"], model


def shuffled(steps=600): return shuffled_batches(len(TRAIN), 100, steps, seeded(2))


def weighted(weights): return weighted_batches(weights, 100, 600, seeded(2))


def test_the_points_are_as_said():
    x, y, a = toy(20_000, .1, seeded(0))
    assert (y != a).sum() == 2000 and (y[y != a] == 0).sum() == 1000
    for column, label, mean, deviation in ((0, a, 2, .5), (1, y, .4, .2)):
        for value, sign in ((0, -1), (1, 1)):
            part = x[label == value, column]
            assert part.mean().item() == pytest.approx(sign * mean, abs=5 * deviation / 100)
            assert part.std().item() == pytest.approx(deviation, rel=.05)
    right = (x[:, 1] > 0) == (y == 1)  # Φ(2), whichever the cell
    assert right[y != a].double().mean().item() == pytest.approx(stats.norm.cdf(2), abs=.015)


def test_erm_takes_the_shortcut(): assert learn(shuffled())[0] < .5


def by_jtt():
    _, identified = learn(shuffled(100))
    errors = error_set(identified(plane(TRAIN.x)).argmax(1), TRAIN.y)
    assert (errors & TRAIN.is_conflicting).sum() > .8 * TRAIN.is_conflicting.sum()
    return learn(weighted(sample_weights(errors, 50)))


def by_subsampling():
    kept = subsample(GROUPS, seeded(0))
    return learn(kept[i] for i in shuffled_batches(len(kept), 40, 600, seeded(2)))


def by_lff():
    torch.manual_seed(1)
    twin = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    return learn(shuffled(), LfF(TRAIN.y, lambda twin, index: twin(plane_of(TRAIN.x, index)), twin,
                                 torch.optim.SGD(twin.parameters(), .2)))


def plane_of(x, index): return plane(x, index=index)


@pytest.mark.parametrize("rule, least", [
    (lambda: learn(weighted(balanced_weights(GROUPS))), .93),
    (lambda: learn(shuffled(), weighted_cross_entropy(balanced_weights(GROUPS))), .93),
    (by_subsampling, .93),
    (lambda: learn(weighted(balanced_weights(GROUPS)), GroupDRO(GROUPS, .1)), .93),
    (by_jtt, .93),
    (by_lff, .7),
], ids=["balanced sampler", "balanced loss", "subsampling", "group DRO", "JTT", "LfF"])
def test_a_rule_does_not(rule, least):
    worst, _ = rule()
    assert least < worst < stats.norm.cdf(2) + .015  # no line does better in all cells


def test_group_dro_ends_where_both_groups_are_as_bad():
    "The minimum of the larger of two losses that pull a line apart has both equal; that of their mean does not."
    n, generator = 2000, seeded(0)
    x = torch.cat([-1 + .3 * torch.randn(n, 1, generator=generator), 1 + 2 * torch.randn(n, 1, generator=generator)])
    y = torch.arange(2 * n) // n

    def losses(loss):
        torch.manual_seed(0)
        model = nn.Linear(1, 2)
        optimizer = torch.optim.SGD(model.parameters(), .3)
        for _ in range(1500):
            optimizer.zero_grad()
            loss(model(x), y, torch.arange(2 * n)).backward()
            optimizer.step()
        each = F.cross_entropy(model(x), y, reduction="none")
        return each[:n].mean().item(), each[n:].mean().item()
    narrow, wide = losses(cross_entropy)
    assert narrow < wide - .2
    narrow, wide = losses(GroupDRO(y, .05))
    assert narrow == pytest.approx(wide, abs=.01)


# ----------------------------------------------------------------------------- beside being sparse

def noise(n, seed=0):
    "Images that say nothing, of all cells of 5 classes and 2 attribute values."
    number = torch.arange(n)
    x = torch.randint(0, 256, (n, 3, 16, 16), generator=seeded(seed)).byte()
    return BiasedDataset(x, number % 5, (number // 5 % 3 == 0).long(), 10)


def twin_of(data):
    torch.manual_seed(7)
    twin = cnn(width=4)
    return LfF(data.y, lambda twin, index: twin(assemble(data.x, index)), twin, torch.optim.SGD(twin.parameters(), .05))


RULES = {  # the rule's batches and loss, for 40 images
    "balancing": lambda data: (balanced_weights(cells(data.y, data.a)), cross_entropy),
    "subsampling": lambda data: (torch.zeros(40).double().index_fill(0, subsample(
        cells(data.y, torch.arange(40) % 40 < 10), seeded(0)), 1), cross_entropy),
    "group DRO": lambda data: (torch.ones(40).double(), GroupDRO(cells(data.y, data.a), .5)),
    "JTT": lambda data: (sample_weights(error_set((data.y + (torch.arange(40) % 7 == 0)) % 5, data.y), 20), cross_entropy),
    "LfF": lambda data: (torch.ones(40).double(), twin_of(data)),
    "generalised": lambda data: (torch.ones(40).double(), generalised_cross_entropy()),
}


@functools.cache
def trained(rule, storage):
    "The weights after six steps of a rule and RigL, how many of them are not 0, and updates."
    data = noise(40)
    weights, loss = RULES[rule](data) if rule else (torch.ones(40).double(), cross_entropy)
    torch.manual_seed(0)
    model = cnn(width=4)
    if storage == "compact": model = sparsify(model, .3)
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    rigl = RigL(model, optimizer, *[.3] * (storage == "masked"), delta_t=2, t_end=6)
    fit(model, optimizer, data, data, weighted_batches(weights, 10, 6, seeded(0)), eval_every=6, loss=loss, hooks=[rigl])
    kept = sum(int(mask.sum()) for mask in rigl.masks.values())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), kept, rigl.updates


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_go_with_rigl(rule, storage):
    plain, kept, updates = trained(None, storage)
    ours, still_kept, as_often = trained(rule, storage)
    assert ours.isfinite().all() and not torch.equal(ours, plain)  # the rule has reached the weights
    assert kept == still_kept == round(.3 * sum(w.numel() for w in maskable(cnn(width=4)).values()))
    assert updates == as_often == 2


# -------------------------------------------------------------------------------------- bad input

three = torch.tensor([0, 1, 1])


@pytest.mark.parametrize("call, message", [
    (lambda: cells(three, None), "a is None; expected the bias attribute"),
    (lambda: cells(three, three[:2]), "3 targets, 2 attributes"),
    (lambda: cells(three[:0], three[:0]), "0 targets"),
    (lambda: group_sizes(torch.tensor([0, 3])), r"groups \[1, 2\] have no sample"),
    (lambda: group_sizes(three[:0]), "groups .* have no sample"),
    (lambda: balanced_weights(torch.tensor([1, 1])), r"groups \[0\] have no sample"),
    (lambda: subsample(torch.tensor([0, 2]), seeded(0)), r"groups \[1\] have no sample"),
    (lambda: GroupDRO(torch.tensor([0, 2])), r"groups \[1\] have no sample"),
    (lambda: GroupDRO(three, step_size=0), "step_size is 0"),
    (lambda: GroupDRO(three, step_size=math.nan), "step_size is nan"),
    (lambda: GroupDRO(three, adjustment=-1), "adjustment is -1"),
    (lambda: error_set(three, three[:2]), "3 predictions, 2 targets"),
    (lambda: error_set(three, three), "all 3 predictions are right"),
    (lambda: cost_multiple(0, trained=3), "run is 0"),
    (lambda: generalised_cross_entropy(0), "q is 0"),
    (lambda: generalised_cross_entropy(1.1), "q is 1.1"),
    (lambda: weights_only([0], q=-1), "q is -1"),
    (lambda: weights_only([0], decay=1), "decay is 1"),
])
def test_bad_input_is_refused_in_a_line(call, message):
    with pytest.raises(ValueError, match=message) as caught: call()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- on the harness

def tiny(n=300):
    "Noise with 3 classes, a tenth of which conflicts, with every cell."
    y = torch.arange(n) % 3
    a = torch.where(torch.arange(n) % 10 == 0, (y + 1 + torch.arange(n) // 10 % 2) % 3, y)
    return BiasedDataset(torch.randint(0, 256, (n, 3, 28, 28), generator=seeded(3)).byte(), y, a)


def run_of(**fields):
    "A run on the real harness, and what `fit` would be given."
    config = Config(width=4, batch_size=20, steps=6, eval_every=3, conflict_ratio=.1, precision="fp32", **fields)
    run = Run(config, 5, tiny())
    return run, run.prepare()


def test_balanced_batches_on_the_harness():
    run, setup = run_of(reweighting="rules.balanced")
    drawn, again = list(setup["batches"]), list(run_of(reweighting="rules.balanced")[1]["batches"])
    groups = cells(run.train.y, run.train.a)
    expected = weighted_batches(1 / groups.bincount()[groups].double(), 20, 6, seeded(5))
    assert all(map(torch.equal, drawn, expected)) and all(map(torch.equal, drawn, again)) and len(drawn) == 6


def test_subsampled_batches_on_the_harness():
    run, setup = run_of(reweighting="rules.subsampled")
    drawn, counts = torch.cat(list(setup["batches"])), cells(run.train.y, run.train.a).bincount()
    assert len(drawn) == 120
    kept = drawn.unique()
    assert cells(run.train.y, run.train.a)[kept].bincount().tolist() == [int(counts.min())] * 9
    run, setup = run_of(reweighting="rules.subsampled", sparsity="masks.StaticSparse", initial="pruning.snip(batches=2)", density=.5)
    assert len(list(setup["batches"])) == 6  # as many, though SNIP has looked at two more


def test_an_attribute_code_that_nobody_has_is_no_cell():
    "Ten classes of two genders: eight codes are left out, for the classes that no gender goes with."
    y, a = torch.arange(10).repeat(4), torch.tensor([0, 4]).repeat_interleave(20)
    assert cells(y, a).tolist() == [2 * t + int(v > 0) for t, v in zip(y.tolist(), a.tolist())]
    there = ~((y == 9) & (a == 4))
    with pytest.raises(ValueError, match=r"^1 of 20 cells.*: \(9, 4\);"): cells(y[there], a[there])


def test_losses_on_the_harness():
    _, setup = run_of(reweighting="rules.group_dro(step_size=0.5, adjustment=2.0)")
    loss, batches = setup["loss"], list(setup["batches"])
    assert isinstance(loss, GroupDRO) and loss.step_size == .5 and len(loss.q) == 9 and len(batches) == 6
    assert loss.margins.tolist() == pytest.approx([2 / math.sqrt(n) for n in loss.groups.bincount().tolist()])
    _, setup = run_of(reweighting="rules.biased(q=0.5)")
    logits = torch.tensor([[0., 0, 0, 0]])
    assert setup["loss"](logits, torch.tensor([2]), None).item() == pytest.approx((1 - .25 ** .5) / .5)


def test_lffs_twin_computes_in_the_precision_of_the_run(monkeypatch):
    monkeypatch.setattr(training, "has_bf16", lambda: True)  # emulated, if need be
    seen = {}
    for precision in ("fp32", "bf16"):
        config = Config(width=4, batch_size=20, steps=6, eval_every=3, conflict_ratio=.1, precision=precision, reweighting="rules.lff")
        run = Run(config, 5, tiny())
        loss = run.prepare()["loss"]
        loss.twin[0].register_forward_hook(lambda layer, inputs, output: seen.update({precision: output.dtype}))
        loss(torch.zeros(20, 10), run.train.y[:20], torch.arange(20))
    assert seen == dict(fp32=torch.float32, bf16=torch.bfloat16)


@pytest.mark.parametrize("sparsity, storage", [("dense", "masked"), ("masks.RigL", "compact"), ("masks.RigL", "masked")])
def test_lff_on_the_harness(sparsity, storage):
    run, setup = run_of(reweighting="rules.lff(q=0.6, decay=0.5)", sparsity=sparsity, storage=storage)
    loss = setup["loss"]
    torch.manual_seed(5)
    first = cnn(width=4)
    assert all(map(torch.equal, first.parameters(), loss.twin.parameters()))  # dense, with the run's first weights
    assert loss.optimizer.param_groups[0]["lr"] == run.config.lr and loss.decay == .5
    fit(valid=run.train, eval_every=3, **setup)
    assert run.trained == loss.trained == 120
    assert not torch.equal(first[0].weight, loss.twin[0].weight) and (loss.averages >= 0).sum() == 240
