"""Masks: how many weights, which, when, and for which others.

Oracles: tables worked by hand (the arithmetic stands beside them), numpy's sort, scipy's root finder, and
torch's own optimizers on a network that multiplies its weights by the mask.
"""
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings, strategies as st
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from rest_nb.masks import SET, Places, RigL, StaticSparse, by_chance, dead, drop_and_grow, erk, first_masks, keep_counts, largest, maskable
from rest_nb.masks import overlap, random_mask, uniform
from rest_nb.models import cnn
from rest_nb.pruning import GMP, ITOP, Momentum
from rest_nb.sparse import sparsify

# Derandomised: what passed today passes tomorrow. No deadline: the machine may be busy.
few, many = (settings(max_examples=n, deadline=None, derandomize=True) for n in (60, 300))
methods = pytest.mark.parametrize("kind", [SET, RigL])


CNN = [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (10, 256)]  # the paper's network, facts/rest.md §1.3
CNN_POSITIONS = [14 * 14, 7 * 7, 3 * 3, 1]  # at 28×28: each convolution halves the sides, rounding down


def sgd(model, **kwargs): return torch.optim.SGD(model.parameters(), **{"lr": .1, "momentum": .9, **kwargs})


def linear(inputs, outputs): return nn.Linear(inputs, outputs, bias=False)


def backward(layer, gradient):
    "Backpropagate so that a linear layer's weight receives just this gradient: its inputs are the identity."
    layer.weight.grad = None
    (layer(torch.eye(layer.in_features)) * gradient.T).sum().backward()


# ------------------------------------------------------------------------------ what a mask covers

def test_conv_and_linear_weights_are_covered_and_nothing_else():
    inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.LayerNorm(2))
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), inner, nn.ConvTranspose2d(2, 2, 3),
                          nn.Conv3d(1, 1, 2), nn.Embedding(3, 2), nn.Linear(2, 2))
    found = maskable(model)
    assert list(found) == ["0.weight", "2.0.weight", "3.weight", "4.weight", "6.weight"]
    own = dict(model.named_parameters())
    assert all(weight is own[name] for name, weight in found.items())  # the parameters, by torch's names


def test_a_layer_may_be_the_whole_model():
    layer = nn.Linear(2, 3)
    assert list(maskable(layer)) == ["weight"] and maskable(layer)["weight"] is layer.weight


def test_a_model_without_such_layers_is_refused_by_name():
    with pytest.raises(ValueError, match="BatchNorm2d"): maskable(nn.BatchNorm2d(3))


def test_a_weight_shared_by_two_layers_is_one_weight():
    # Two masks on one tensor would both be applied, and keep their intersection: fewer than was asked for.
    model = nn.Sequential(linear(8, 8), linear(8, 8))
    model[1].weight = model[0].weight
    StaticSparse(model, sgd(model), 0.5)
    assert model[0].weight.count_nonzero() == 32


# ------------------------------------------------------------------------------- how many: by hand

FACTS = [(.0005, .0009), (.005, .0085), (.01, .0171), (.05, .1040), (.1, .1674), (.5, .674)]  # §1.5, "CNN@28"


@pytest.mark.parametrize("density, flops", FACTS)
def test_erk_gives_the_flops_of_the_fact_sheet(density, flops):
    sizes = [3072, 131_072, 524_288, 2560]
    dense = sum(n * p for n, p in zip(sizes, CNN_POSITIONS))
    assert dense == 602_112 + 6_422_528 + 4_718_592 + 2560  # 11.75 M, as the fact sheet has it
    kept = sum(d * n * p for d, n, p in zip(erk(CNN, density), sizes, CNN_POSITIONS))
    assert kept / dense == pytest.approx(flops, abs=.00051 if density == .5 else .000051)  # half a last digit


@pytest.mark.parametrize("shapes, density, expected", [
    # Budget 10 of 20; sum/prod 4/4 and 8/16; scale 10/12, so 4·10/12 of 4 and 8·10/12 of 16.
    ([(2, 2), (4, 4)], .5, [10 / 12, 20 / 3 / 16]),
    # Budget 14; scale 14/12 would keep 4⅔ of 4: dense. The other has 14 - 4 = 10 of 16.
    ([(2, 2), (4, 4)], .7, [1, 10 / 16]),
    # The same, with the small layer last: order must not matter.
    ([(4, 4), (2, 2)], .7, [10 / 16, 1]),
    # Two rounds. Budget 63 of 120, sums 4 + 8 + 20. Scale 63/32 = 1.97 fills the first (4·1.97 > 4), but not
    # the second (8·1.97 < 16); scale 59/28 = 2.11 fills that too (8·2.11 > 16); 63 - 4 - 16 = 43 remain.
    ([(2, 2), (4, 4), (10, 10)], .525, [1, 1, .43]),
    # All four axes count: 8+4+3+3 = 18 = 10+8, so both keep half of 36.8 (without the kernel, 12 : 18).
    ([(8, 4, 3, 3), (10, 8)], .1, [18.4 / 288, 18.4 / 80]),
    # One layer has no choice.
    ([(3, 5)], .2, [.2]),
    # Everything is everything, and never a bit more.
    ([(2, 2), (4, 4), (10, 10)], 1, [1, 1, 1]),
])
def test_erk_by_hand(shapes, density, expected):
    assert erk(shapes, density) == pytest.approx(expected, rel=1e-12)
    assert max(erk(shapes, density)) <= 1


def test_uniform_is_the_same_share_for_everyone():
    assert uniform([(2, 2), (4, 4), (10, 10)], .3) == [.3, .3, .3]


@pytest.mark.parametrize("sizes, density, distribution, expected", [
    # 2.5, 5, 7.5 make 15; the floors 14. One is left, two fractions tie: the earlier layer has it.
    ([(1, 10), (1, 20), (1, 30)], .25, uniform, [3, 5, 7]),
    # 2.4, 4.8, 7.2 make 14.4, so 14; the floors 13. The largest fraction is the second's.
    ([(1, 10), (1, 20), (1, 30)], .24, uniform, [2, 5, 7]),
    # 3⅓ and 6⅔ (see above): the second has the tenth.
    ([(2, 2), (4, 4)], .5, erk, [3, 7]),
    ([(2, 2), (4, 4)], 1, erk, [4, 16]),
])
def test_counts_by_hand(sizes, density, distribution, expected):
    weights = {f"layer {i}": torch.empty(size) for i, size in enumerate(sizes)}
    assert keep_counts(weights, density, distribution) == dict(zip(weights, expected))


def test_a_distribution_of_ones_own_may_miss_the_budget():
    # All of 4 and a quarter of 4 make 5; asked for are 6. The first is full, so the sixth goes to the second.
    def first_full(shapes, density): return [1.0, 0.25]
    assert keep_counts({"a": torch.empty(2, 2), "b": torch.empty(2, 2)}, .75, first_full) == {"a": 4, "b": 2}


# ------------------------------------------------------------------------ how many: for all shapes

shapes = st.lists(st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple), min_size=1, max_size=6)


def fair_shares(shapes, density, distribution):
    "ERK as one equation, solved by scipy: layers keep min(all, scale · sum of axes), together the budget."
    full, sums = [math.prod(s) for s in shapes], [sum(s) for s in shapes]
    if distribution is uniform: return [density * n for n in full]
    shares = lambda scale: [min(n, scale * s) for n, s in zip(full, sums)]
    excess = lambda scale: sum(shares(scale)) - density * sum(full)
    top = max(n / s for n, s in zip(full, sums)) + 1  # here every layer is full: the root lies below
    return shares(brentq(excess, 0, top, xtol=1e-14, rtol=1e-14))


@many
@given(shapes, st.floats(.001, .999), st.sampled_from([uniform, erk]))
def test_densities_are_the_definitions(shapes, density, distribution):
    kept = [d * math.prod(s) for d, s in zip(distribution(shapes, density), shapes)]
    assert kept == pytest.approx(fair_shares(shapes, density, distribution), rel=1e-6, abs=1e-9)


@many
@given(shapes, st.floats(.001, 1), st.sampled_from([uniform, erk]))
def test_counts_are_exact_and_fair_or_refused(shapes, density, distribution):
    # On "meta" tensors have a shape and no memory: only the shape may matter.
    weights = {f"layer-{i}": torch.empty(shape, device="meta") for i, shape in enumerate(shapes)}
    full = [math.prod(s) for s in shapes]
    shares = fair_shares(shapes, min(density, 1 - 1e-12), distribution)
    try: counts = list(keep_counts(weights, density, distribution).values())
    except ValueError as error:  # only where some layer really has less than one weight; it is named
        poor = [name for name, share in zip(weights, shares) if share < 1]
        assert str(density) in str(error) and any(name in str(error) for name in poor)
        return
    assert sum(counts) == round(density * sum(full))
    assert all(1 <= count <= n for count, n in zip(counts, full))
    assert all(abs(count - share) < 1 + 1e-6 for count, share in zip(counts, shares))
    # Largest remainder: nobody who was rounded up had less of a claim than one who was rounded down.
    up = [share % 1 for count, share in zip(counts, shares) if count > share + 1e-6]
    down = [share % 1 for count, share in zip(counts, shares) if count < share - 1e-6]
    assert not up or not down or min(up) >= max(down) - 1e-6


def test_an_empty_layer_is_refused_by_name():
    # 1 % of 100 and of 4 weights: one, and none.
    with pytest.raises(ValueError, match=r"0\.01\b.*uniform.*small"):
        keep_counts({"large": torch.empty(10, 10), "small": torch.empty(2, 2)}, .01, uniform)


@pytest.mark.parametrize("density", [0, -.1, 1.01, math.nan, math.inf])
def test_a_density_that_is_no_share_is_refused(density):
    with pytest.raises(ValueError, match=f"density is {density}; expected a share"):
        keep_counts({"w": torch.empty(9, 9)}, density)


@pytest.mark.parametrize("density, said", [
    (dict(a=.5), "^density has nothing for b; expected a share for each of a, b$"), (dict(a=.5, b=.5, c=1), "^density has c, which the model has not$"),
    (dict(a=0, b=.5), r"^density is 0 for a; expected a share in \(0, 1\]$"), (dict(a=.5, b=math.nan), "^density is nan for b"), (dict(a=.01, b=1), "leaves a without")])
def test_densities_by_layer_are_checked_by_name(density, said):
    with pytest.raises(ValueError, match=said): keep_counts({"a": torch.empty(3, 3), "b": torch.empty(2, 2)}, density)


def test_densities_by_layer_are_kept():
    # 2.5, 4 and 2.6 make 9.1, so 9; the floors make 8, and the third's fraction is the largest.
    weights = {"a": torch.empty(5, 1), "b": torch.empty(2, 2), "c": torch.empty(13, 1)}
    assert keep_counts(weights, dict(c=.2, a=.5, b=1)) == dict(a=2, b=4, c=3)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4))
    for store in (False, True):
        sparse = RigL(sparsify(model, {"0.weight": .1, "1.weight": 1}) if store else model, sgd(model), None if store else {"0.weight": .1, "1.weight": 1}, delta_t=1, t_end=9)
        assert sparse.kept_at(0) == {"0.weight": 10, "1.weight": 40}


@pytest.mark.parametrize("shares, said", [
    ([1, .05, 1], "^mine keeps 205 weights in 3 layers; expected 30 in 3$"), ([.1, .1], "^mine keeps 20 weights in 2 layers; expected 30 in 3$"),
    ([-1, .1, .1], r"^mine is -1 for a; expected a share in \(0, 1\]$"), ([.1, .1, math.nan], "^mine is nan for c"), ([.01, .01, .01], "^mine keeps 3 weights")])
def test_a_distribution_that_is_none_is_refused(shares, said):
    def mine(shapes, density): return shares
    with pytest.raises(ValueError, match=said): keep_counts({name: torch.empty(10, 10) for name in "abc"}, .1, mine)


# --------------------------------------------------------------------------------- which, at first

def test_a_random_mask_has_its_count_and_may_lie_anywhere():
    generator, draws, k = torch.Generator().manual_seed(0), 2000, 3
    masks = [random_mask((2, 2, 2), k, generator) for _ in range(draws)]
    assert all(mask.dtype == torch.bool and mask.shape == (2, 2, 2) and mask.sum() == k for mask in masks)
    hits, p = torch.stack(masks).sum(0), k / 8
    assert ((hits - draws * p).abs() < 4 * math.sqrt(draws * p * (1 - p))).all()  # binomial, 4 sigma


def test_masks_follow_the_seed_and_only_the_seed():
    def drawn(seed, noise):
        torch.manual_seed(noise)  # torch's global generator must not matter
        model = cnn(width=4)
        return StaticSparse(model, sgd(model), .2, seed=seed).masks
    first, again, other = drawn(1, noise=0), drawn(1, noise=9), drawn(2, noise=0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_weights_are_masked_at_once():
    model = cnn(width=4)
    before = copy.deepcopy(model)
    sparse = StaticSparse(model, sgd(model), .2)
    for name, weight in maskable(model).items():
        assert torch.equal(weight, maskable(before)[name] * sparse.masks[name])  # the kept ones are untouched


# -------------------------------------------------------------- one update, eight weights, by hand

# Two are dropped, two grown. Smallest magnitudes of the active: 0 and 4 (by sign it would be 1 and 4).
# Largest gradients of those inactive after that, 0 2 3 4 5 6: 5 and 0 (by sign 2 and 6; 1 is active).
# So 4 goes, 5 comes, and 0 goes and comes straight back. MEMORY is what the optimizer holds, everywhere.
#                             0    1    2    3     4    5    6    7
MASK = torch.tensor([[        1,   1,   0,   0], [ 1,   0,   0,   1]]).bool()
WEIGHT = torch.tensor([[     .1, -.5,   0,   0], [-.2,  0,   0,  .9]])
GRADIENT = torch.tensor([[  -7., 99.,  6.,  1.], [2., -8.,  3.,  .5]])
KEPT = torch.tensor([[        0,   1,   0,   0], [ 0,   0,   0,   1]]).bool()
NEW = torch.tensor([[         1,   1,   0,   0], [ 0,   1,   0,   1]]).bool()
MEMORY = torch.tensor([[     1.,  2.,  3.,  4.], [5.,  6.,  7.,  8.]])


def eight_weights(optimizer_class, kind=RigL, **kwargs):
    "The layer drawn above just before a step whose update exchanges int(.6 · 4) = 2 of the 4 active weights."
    layer = linear(4, 2)
    optimizer = optimizer_class(layer.parameters(), lr=.1, **kwargs)
    method = kind(layer, optimizer, .5, delta_t=1, t_end=10_000, drop_fraction=.6)
    backward(layer, torch.ones(2, 4))
    optimizer.step()  # the optimizer makes its state
    with torch.no_grad(): layer.weight.copy_(WEIGHT)
    method.layers["weight"].mask = MASK.clone()
    for state in optimizer.state[layer.weight].values():
        if state.shape == MEMORY.shape: state.copy_(MEMORY)
    backward(layer, GRADIENT)
    assert torch.equal(layer.weight.grad, GRADIENT)
    return layer, optimizer, method


def test_rigl_exchanges_what_the_table_says():
    layer, optimizer, rigl = eight_weights(torch.optim.SGD, momentum=.9)
    rigl.before_step()
    assert rigl.updates == 1
    assert rigl.masks["weight"].tolist() == NEW.tolist()
    # Kept weights and their momentum are as they were; all else starts from nothing, 0 too, which came back.
    assert layer.weight.tolist() == (WEIGHT * KEPT).tolist()
    assert optimizer.state[layer.weight]["momentum_buffer"].tolist() == (MEMORY * KEPT).tolist()
    assert layer.weight.grad.tolist() == (GRADIENT * KEPT).tolist()  # grown ones wait for the next step's
    optimizer.step(); rigl.after_step()
    # Kept: v = .9·v + g, so 1: 1.8 + 99 = 100.8 and 7: 7.2 + .5 = 7.7. Grown ones stay at 0, without their former life.
    expected = torch.tensor([[0, -.5 - 10.08, 0, 0], [0, 0, 0, .9 - .77]])
    assert torch.allclose(layer.weight, expected, rtol=0, atol=1e-5)


def test_adam_forgets_too_but_not_its_clock():
    layer, optimizer, rigl = eight_weights(torch.optim.Adam, amsgrad=True)
    rigl.before_step()
    state = optimizer.state[layer.weight]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert state[name].tolist() == (MEMORY * KEPT).tolist()
    assert state["step"] == 1


def test_set_drops_the_same_and_grows_anywhere():
    # 0 and 4 are dropped. Any two of the six inactive ones may then grow: each does in a third of the runs.
    runs, hits = 300, torch.zeros(2, 4)
    layer, _, method = eight_weights(torch.optim.SGD, kind=SET)
    for _ in range(runs):
        method.layers["weight"].mask = MASK.clone()
        with torch.no_grad(): layer.weight.copy_(WEIGHT)
        method.update()
        assert layer.weight.tolist() == (WEIGHT * KEPT).tolist() and method.masks["weight"].sum() == 4
        hits += method.masks["weight"]
    assert (hits[KEPT] == runs).all()
    assert ((hits[~KEPT] - runs / 3).abs() < 4 * math.sqrt(runs / 3 * 2 / 3)).all()  # binomial, 4 sigma


# --------------------------------------------------------------------- drop and grow, ties and all

@st.composite
def exchanges(draw):
    "A mask, as many magnitudes and scores of few different values (so that many tie), a number to exchange."
    n = draw(st.integers(2, 12))
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    numbers = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    return mask, draw(numbers), draw(numbers), draw(st.integers(0, sum(mask)))


@many
@given(exchanges())
def test_drop_and_grow_is_two_sorts(case):
    mask, magnitudes, scores, k = case
    # By definition, with Python's sort: smallest magnitude, largest score, lowest index where they tie.
    dropped = sorted((m, i) for i, m in enumerate(magnitudes) if mask[i])[:k]
    kept = {i for i in range(len(mask)) if mask[i]} - {i for _, i in dropped}
    grown = {i for _, i in sorted((-s, i) for i, s in enumerate(scores) if i not in kept)[:k]}
    new, survived = drop_and_grow(torch.tensor(mask), torch.tensor(magnitudes), torch.tensor(scores), k)
    assert set(np.flatnonzero(survived)) == kept
    assert set(np.flatnonzero(new)) == kept | grown
    assert new.sum() == sum(mask)  # so none was picked that was active already


def test_a_score_that_is_no_number_costs_no_weight():
    "As many grow as are dropped, where there is a number first; both ways to store would lose weights otherwise."
    mask, nan = torch.tensor([True, True, False, False, False]), math.nan
    for scores, expected in (([0., 0, nan, 2, 1], [1, 3]), ([nan] * 5, [0, 1]), ([nan, nan, math.inf, nan, 1], [1, 2])):
        new, kept = drop_and_grow(mask, torch.tensor([1., 2, 0, 0, 0]), torch.tensor(scores), 1)
        assert new.nonzero().flatten().tolist() == expected and kept.nonzero().flatten().tolist() == [1]


@methods
def test_an_optimizer_of_other_weights_is_refused(kind):
    "As one is that was made before the model was stored sparse: its weights would never train."
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    early = sgd(model)
    with pytest.raises(ValueError, match=r"does not hold 0\.weight.*after sparsify"): kind(sparsify(model, .5), early, delta_t=1, t_end=9)
    head = sgd(model[2])
    with pytest.raises(ValueError, match=r"does not hold 0\.weight"): kind(model, head, delta_t=1, t_end=9)
    model[0].values.requires_grad_(False)  # frozen: nobody need hold it
    kind(model, head, delta_t=1, t_end=9)


@methods
@pytest.mark.parametrize("computed", [nn.utils.parametrizations.weight_norm, lambda layer: prune.random_unstructured(layer, "weight", .5)])
def test_a_computed_weight_is_refused(kind, computed):
    "A mask would be put on what is computed, and forgotten at the next call."
    layer = computed(nn.Linear(9, 9))
    with pytest.raises(ValueError, match="weight is computed"): kind(layer, sgd(layer), .5, delta_t=1, t_end=9)


def test_the_mask_that_is_given_stays_as_it_is():
    mask = MASK.clone()
    new, kept = drop_and_grow(mask, WEIGHT.abs(), GRADIENT.abs(), 2)
    assert torch.equal(mask, MASK) and new.shape == kept.shape == MASK.shape


def test_all_weights_and_gradients_zero():
    # The official code drops all tied weights and may "grow" active ones: layers dwindle (facts/rest §4.5).
    layer = linear(4, 2)
    rigl = RigL(layer, sgd(layer), .5, delta_t=1, t_end=10_000, drop_fraction=.6)
    rigl.layers["weight"].mask = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]).bool()
    nn.init.zeros_(layer.weight)
    backward(layer, torch.zeros(2, 4))
    rigl.before_step()
    # The lowest active, 1 and 3, go; the lowest inactive, 0 and 1, come.
    assert rigl.masks["weight"].int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    for _ in range(20):
        rigl.before_step()
        assert rigl.masks["weight"].sum() == 4


def test_nothing_is_exchanged_where_the_share_is_less_than_one_weight():
    layer, optimizer, rigl = eight_weights(torch.optim.SGD, momentum=.9)
    rigl.drop_fraction = .24  # .96 of a weight
    rigl.before_step()
    assert torch.equal(rigl.masks["weight"], MASK) and torch.equal(layer.weight.detach(), WEIGHT)


@methods
def test_dense_layers_are_left_alone(kind):
    # A dense layer has nothing to exchange its weights for: dropping would only set them back to zero.
    model = nn.Sequential(linear(2, 2), linear(2, 8))  # ERK at .7: 14 of 20, sums 4 and 10: all four, and ten
    optimizer = sgd(model)
    method = kind(model, optimizer, .7, delta_t=1, t_end=10_000, drop_fraction=.5)
    small, large = method.masks.values()
    assert small.all() and large.sum() == 10
    model(torch.randn(3, 2)).square().sum().backward()
    method.before_step(); optimizer.step(); method.after_step()
    weight = model[0].weight.detach().clone()
    memory = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    method.update()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], memory)
    assert (model[1].weight == 0).sum() == 10  # the other was updated: 6 masked, int(.4999 · 10) dropped


@few
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([.2, .5, .8]))
def test_rigl_grows_exactly_where_the_gradient_is_largest(seed, groups, density):
    torch.manual_seed(seed)
    layer = nn.Conv2d(2 * groups, 3 * groups, (3, 2), groups=groups, bias=False)
    rigl = RigL(layer, sgd(layer), density, delta_t=1, t_end=10_000, drop_fraction=.5)
    layer(torch.randn(4, 2 * groups, 6, 5)).square().mean().backward()
    before = layer.weight, layer.weight.grad, rigl.masks["weight"]
    weight, gradient, mask = (t.detach().numpy().ravel().copy() for t in before)
    rigl.before_step()
    k = int(.4999999 * mask.sum())  # the share at step 1 of 10,000, a breath below .5
    active = np.flatnonzero(mask)
    kept = np.setdiff1d(active, active[np.argsort(abs(weight[active]))[:k]])
    inactive = np.setdiff1d(np.arange(mask.size), kept)
    grown = inactive[np.argsort(-abs(gradient[inactive]))[:k]]
    assert set(np.flatnonzero(rigl.masks["weight"].numpy())) == set(kept) | set(grown)


def test_rigl_needs_a_gradient_and_says_so():
    layer = linear(4, 2)
    rigl = RigL(layer, sgd(layer), .5, delta_t=1, t_end=10)
    with pytest.raises(ValueError, match="backward"): rigl.before_step()


# -------------------------------------------------------------------------------------------- when

def test_the_share_is_half_a_cosine():
    layer = linear(4, 2)
    rigl = RigL(layer, sgd(layer), .5, delta_t=1000, t_end=12, drop_fraction=.4)
    shares = [rigl.share()]
    for _ in range(12):
        backward(layer, GRADIENT)
        rigl.before_step()
        shares.append(rigl.share())
    # cos 0 = 1, cos 60° = 1/2, cos 90° = 0, cos 120° = -1/2, cos 180° = -1; .4 · (1 + cos)/2
    assert [shares[s] for s in (0, 4, 6, 8, 12)] == pytest.approx([.4, .3, .2, .1, 0], abs=1e-12)


@pytest.mark.parametrize("delta_t, t_end, expected", [
    (4, 12, [4, 8]),  # none at the end itself
    (4, 13, [4, 8, 12]),
    (5, 7.5, [5]),  # a share of the steps need not be whole
    (1, 4, [1, 2, 3]),
    (21, 100, []),
    (3, 0, []),
    (7, 100, [7, 14]),  # the run ends first
])
@methods
def test_updates_come_every_delta_t_steps_before_t_end(kind, delta_t, t_end, expected):
    layer, seen = linear(4, 2), []
    method = kind(layer, sgd(layer), .5, delta_t=delta_t, t_end=t_end)
    for step in range(1, 21):
        backward(layer, GRADIENT)
        before = method.updates
        method.before_step()
        if method.updates > before: seen.append(step)
    assert seen == expected and method.updates == len(expected)


# ------------------------------------------------------------- invariants, over networks and knobs

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, .05, momentum=.9, weight_decay=.01),
    "nesterov": lambda p: torch.optim.SGD(p, .05, momentum=.9, weight_decay=.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, .01, weight_decay=.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, .01, weight_decay=.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, .01, momentum=.5, weight_decay=.01, centered=True),
}


@st.composite
def networks(draw):
    "A network of one to three masked layers, and the shape of its inputs."
    depth, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["linear", "conv1d", "conv2d"]))
    bias, layers, channels = draw(st.booleans()), [], draw(st.sampled_from([2, 4]))
    sides = {"linear": (), "conv1d": (7,), "conv2d": (6, 5)}[kind]
    shape = (channels, *sides)
    for _ in range(depth - 1):
        out = draw(st.sampled_from([4, 6]))
        if kind == "linear": layers += [nn.Linear(channels, out, bias), nn.Tanh()]
        elif kind == "conv1d":
            kernel = draw(st.integers(1, 3))
            layers += [nn.Conv1d(channels, out, kernel, bias=bias), nn.BatchNorm1d(out), nn.ReLU()]
        else:
            kernel = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 2)]))
            conv = nn.Conv2d(channels, out, kernel, groups=draw(st.sampled_from([1, 2])), bias=bias)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    pool = {"linear": [], "conv1d": [nn.AdaptiveAvgPool1d(1)], "conv2d": [nn.AdaptiveAvgPool2d(1)]}[kind]
    return nn.Sequential(*layers, *pool, nn.Flatten(), nn.Linear(channels, 3, bias)), shape


def memories(optimizer, weight):
    "What the optimizer remembers of each single weight (so not Adam's step count)."
    return [state for state in optimizer.state[weight].values() if state.shape == weight.shape]


@settings(few, max_examples=100)
@given(network=networks(), optimizer=st.sampled_from(list(OPTIMIZERS)), kind=st.sampled_from([SET, RigL]),
       distribution=st.sampled_from([uniform, erk]), density=st.floats(.15, 1), delta_t=st.integers(1, 4),
       t_end=st.integers(0, 14), drop_fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_invariants(network, optimizer, kind, distribution, density, delta_t, t_end, drop_fraction, seed):
    torch.manual_seed(seed)
    model, shape = network
    for module in model.modules():
        if hasattr(module, "reset_parameters"): module.reset_parameters()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    knobs = dict(delta_t=delta_t, t_end=t_end, drop_fraction=drop_fraction)
    try: method = kind(model, optimizer, density, distribution=distribution, seed=seed, **knobs)
    except ValueError: reject()  # too sparse for so small a network: tested above
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}  # all but biases and batch norm
    active = {name: int(mask.sum()) for name, mask in method.masks.items()}
    assert active.keys() == weights.keys()
    assert sum(active.values()) == round(density * sum(w.numel() for w in weights.values()))
    shares = fair_shares([tuple(w.shape) for w in weights.values()], min(density, 1 - 1e-12), distribution)
    assert all(abs(count - share) < 1 + 1e-6 for count, share in zip(active.values(), shares))
    for step in range(1, 13):
        old = {name: mask.clone() for name, mask in method.masks.items()}
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, *shape)), torch.randint(0, 3, (4,))).backward()
        method.before_step(); optimizer.step(); method.after_step()
        is_update = step < t_end and step % delta_t == 0
        share = drop_fraction * (1 + np.cos(np.pi * step / t_end)) / 2 if is_update else 0
        for name, weight in weights.items():
            mask = method.masks[name]
            assert mask.sum() == active[name]  # density, exactly
            assert (mask & ~old[name]).sum() <= share * active[name] + 1e-9  # so none between updates
            assert not weight[~mask].any() and not weight.grad[~mask].any()
            states = memories(optimizer, weight)
            assert states and not any(state[~mask].any() for state in states)
    assert method.updates == sum(1 for step in range(delta_t, 13, delta_t) if step < t_end)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_static_training_is_training_a_masked_product(name):
    # The oracle is autograd: a network computing with weight × mask has no gradient where the mask is zero.
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    optimizer = OPTIMIZERS[name](ours.parameters())
    sparse = StaticSparse(ours, optimizer, .3)
    theirs, masks = copy.deepcopy(ours), {name: mask.clone() for name, mask in sparse.masks.items()}
    their_optimizer = OPTIMIZERS[name](theirs.parameters())
    for _ in range(10):
        x, y = torch.randn(8, 2, 5, 5), torch.randint(0, 3, (8,))
        optimizer.zero_grad(); their_optimizer.zero_grad()
        F.cross_entropy(ours(x), y).backward()
        product = {name: p * masks[name] if name in masks else p for name, p in theirs.named_parameters()}
        F.cross_entropy(torch.func.functional_call(theirs, product, (x,)), y).backward()
        sparse.before_step(); optimizer.step(); sparse.after_step()
        their_optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(mine, other, atol=1e-6)
    assert all(torch.equal(sparse.masks[name], mask) for name, mask in masks.items())  # the mask never moved
    assert sparse.updates == 0


# ------------------------------------------------------------------------ reproducible from a seed

def evolve(kind, seed, noise=0, steps=6):
    "Masks at the end of a short run on data that is always the same, whatever torch's global generator does."
    torch.manual_seed(7)
    x, y = torch.randn(steps, 4, 3, 16, 16), torch.randint(0, 2, (steps, 4))
    model = cnn(num_classes=2, width=4)
    optimizer = sgd(model)
    method = kind(model, optimizer, .2, delta_t=2, t_end=100, seed=seed)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[step]), y[step]).backward()
        torch.manual_seed(noise)
        method.before_step(); optimizer.step(); method.after_step()
    return torch.cat([mask.flatten() for mask in method.masks.values()])


@methods
def test_the_same_seed_evolves_the_same_masks(kind):
    assert torch.equal(evolve(kind, seed=1, noise=1), evolve(kind, seed=1, noise=2))
    assert not torch.equal(evolve(kind, seed=1), evolve(kind, seed=2))


def test_set_grows_by_its_seed_from_the_same_start():
    def grown(seed):
        layer, _, method = eight_weights(torch.optim.SGD, kind=SET)
        method.generator.manual_seed(seed)
        method.update()
        return method.masks["weight"]
    assert torch.equal(grown(0), grown(0))
    assert any(not torch.equal(grown(0), grown(seed)) for seed in range(1, 6))


# ---------------------------------------------------------------------------- somebody else's loop

FOREIGN = ["Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", FOREIGN)
def test_in_somebody_elses_loop(name):
    # Gradient accumulation, clipping, a schedule, parameter groups, channels last: two calls are ours.
    torch.manual_seed(0)
    model = cnn(num_classes=3, width=4).to(memory_format=torch.channels_last)
    groups = [{"params": model[:3].parameters(), "lr": .02}, {"params": model[3:].parameters()}]
    decay = {} if name == "Rprop" else dict(weight_decay=.01)  # the one without
    optimizer = getattr(torch.optim, name)(groups, lr=.01, **decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    method = RigL(model, optimizer, .1, delta_t=2, t_end=7)
    wanted = round(.1 * sum(p.numel() for p in model.parameters() if p.ndim > 1))
    start = {key: mask.clone() for key, mask in method.masks.items()}
    for _ in range(8):
        for _ in range(2):
            (F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.randint(0, 3, (4,))) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        method.before_step()
        optimizer.step()
        method.after_step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        assert sum(int(mask.sum()) for mask in method.masks.values()) == wanted
        assert all(not weight[~method.masks[key]].any() for key, weight in maskable(model).items())
    assert method.updates == 3
    assert any(not torch.equal(start[key], mask) for key, mask in method.masks.items())


@pytest.mark.parametrize("kind", [StaticSparse, SET])
def test_layers_that_do_not_train_are_masked_all_the_same(kind):
    # A frozen layer has no gradient and no state in the optimizer: nothing to clear, and no reason to fail.
    model = nn.Sequential(linear(4, 8), linear(8, 2))
    model[0].requires_grad_(False)
    optimizer = sgd(model[1])
    method = kind(model, optimizer, .5, **({} if kind is StaticSparse else dict(delta_t=1, t_end=9)))
    model(torch.randn(3, 4)).sum().backward()
    method.before_step(); optimizer.step(); method.after_step()
    assert sum(int(mask.sum()) for mask in method.masks.values()) == 24  # half of 32 + 16
    assert not model[0].weight[~method.masks["0.weight"]].any()


def test_a_training_run_goes_on_while_sparse():
    # Is the image red or green? After 30 steps on 3 % of the weights the loss has at least halved.
    torch.manual_seed(0)
    model = cnn(num_classes=2, width=8)
    optimizer = sgd(model)
    rigl = RigL(model, optimizer, .03, delta_t=5, t_end=25)
    y = torch.arange(32) % 2
    x = torch.rand(32, 3, 16, 16) * .5
    x[torch.arange(32), y] += .5
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(); loss.backward()
        rigl.before_step(); optimizer.step(); rigl.after_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and rigl.updates == 4
    # 3·8 + 8·16 + 16·32 kernels of 4×4, and 32·2: 10,688 weights, of which 3 % are 320.64
    assert sum(int(mask.sum()) for mask in rigl.masks.values()) == 321
    assert sum(int(weight.count_nonzero()) for weight in maskable(model).values()) <= 321


# ------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("knobs, message", [
    (dict(density=0), "density is 0"), (dict(density=1.5), "density is 1.5"),
    (dict(density=.001), "density is 0.001"), (dict(delta_t=0), "delta_t is 0"),
    (dict(delta_t=-3), "delta_t is -3"), (dict(delta_t=math.nan), "delta_t is nan"),
    (dict(drop_fraction=-.1), "drop_fraction is -0.1"), (dict(drop_fraction=1.1), "drop_fraction is 1.1"),
    (dict(drop_fraction=math.nan), "drop_fraction is nan"), (dict(delta_t=1.5), "delta_t is 1.5"), (dict(delta_t=math.inf), "delta_t is inf"),
    (dict(t_end=.75), "t_end is 0.75; expected steps, not a share"), (dict(t_end=-1), "t_end is -1"),
    (dict(t_end=math.nan), "t_end is nan"),
])
@methods
def test_a_wrong_knob_is_refused_by_value(kind, knobs, message):
    layer = linear(4, 4)
    with pytest.raises(ValueError, match=message):
        kind(layer, sgd(layer), **{"density": .5, "delta_t": 1, "t_end": 9, **knobs})


@pytest.mark.parametrize("knobs", [dict(density=2), dict(delta_t=0), dict(drop_fraction=2)])
def test_a_wrong_knob_changes_nothing(knobs):
    # Whoever mends the knob and tries again starts from the network they had, not from a pruned one.
    layer = linear(4, 4)
    with pytest.raises(ValueError):
        RigL(layer, sgd(layer), **{"density": .5, "delta_t": 1, "t_end": 9, **knobs})
    assert layer.weight.count_nonzero() == 16


def test_the_defaults_are_the_papers():
    # Half of a layer's weights are exchanged at first; ERK shares the density: 3 and 7 of 4 and 16, as above.
    model = nn.Sequential(linear(2, 2), linear(4, 4))
    rigl = RigL(model, sgd(model), .5, delta_t=1, t_end=9)
    assert rigl.share() == .5 and [int(mask.sum()) for mask in rigl.masks.values()] == [3, 7]


def test_the_limits_themselves_are_allowed():
    layer = linear(4, 4)
    for knobs in (dict(drop_fraction=0), dict(drop_fraction=1), dict(density=1)):
        RigL(layer, sgd(layer), **{"density": .5, "delta_t": 1, "t_end": 9, **knobs})


# -------------------------------------------------------------------------------------------- CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@methods
def test_on_a_gpu(kind):
    torch.manual_seed(0)
    model = cnn(num_classes=3, width=8)
    here = kind(copy.deepcopy(model), sgd(model), .1, delta_t=1, t_end=9, seed=3)
    model = model.cuda()
    optimizer = sgd(model)
    there = kind(model, optimizer, .1, delta_t=1, t_end=9, seed=3)
    for name, mask in here.masks.items(): assert torch.equal(mask, there.masks[name].cpu())  # the seed's
    for _ in range(4):
        F.cross_entropy(model(torch.rand(4, 3, 16, 16).cuda()), torch.randint(0, 3, (4,)).cuda()).backward()
        there.before_step(); optimizer.step(); there.after_step(); optimizer.zero_grad()
        for name, weight in maskable(model).items():
            assert weight.is_cuda and there.masks[name].is_cuda
            assert there.masks[name].sum() == here.masks[name].sum() and not weight[~there.masks[name]].any()
            assert not any(state[~there.masks[name]].any() for state in memories(optimizer, weight))


# --------------------------------------------------------------------------------- masks that are given

def diagonals(model): return {name: torch.eye(*w.shape).bool() for name, w in maskable(model).items()}


@pytest.mark.parametrize("store", [False, True], ids=["masked", "compact"])
def test_given_masks_are_taken_as_they_are(store):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    masks, before = diagonals(model), {name: w.detach().clone() for name, w in maskable(model).items()}
    model = sparsify(model, masks=masks) if store else model
    sparse = SET(model, sgd(model), masks=None if store else masks, delta_t=1, t_end=9)
    assert {name: mask.tolist() for name, mask in sparse.masks.items()} == {name: mask.tolist() for name, mask in masks.items()}
    for name, layer in sparse.layers.items(): assert torch.equal(layer.dense(), before[name] * masks[name])
    assert sparse.kept_at(5) == {"0.weight": 3, "2.weight": 2}


@pytest.mark.parametrize("changes, said", [
    ({"3.weight": torch.ones(2, 2).bool()}, "^masks has 3.weight, which the model has not; expected 0.weight, 2.weight$"),
    ({"0.weight": None}, r"^the mask of 0.weight is missing; expected bool of 4×3"),
    ({"2.weight": torch.ones(2, 3).bool()}, r"^the mask of 2.weight is torch.bool of 2×3, 6 kept; expected bool of 2×4"),
    ({"2.weight": torch.ones(2, 4)}, "^the mask of 2.weight is torch.float32"),
    ({"0.weight": torch.zeros(4, 3).bool()}, "^the mask of 0.weight is torch.bool of 4×3, 0 kept; .* 1 kept or more$")])
def test_masks_that_do_not_fit_are_refused_by_name(changes, said):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for take in (lambda masks: StaticSparse(model, sgd(model), masks=masks), lambda masks: sparsify(model, masks=masks)):
        with pytest.raises(ValueError, match=said): take(diagonals(model) | changes)


def test_how_sparse_is_said_once():
    model = linear(3, 4)
    for take in (lambda: first_masks(maskable(model), .5, masks=diagonals(model)), lambda: sparsify(model, .5, masks=diagonals(model)),
                 lambda: StaticSparse(model, sgd(model), .5, masks=diagonals(model))):
        with pytest.raises(ValueError, match="^density is 0.5 and masks are given"): take()
    model = sparsify(model, .5)
    with pytest.raises(ValueError, match="stored sparse already"): StaticSparse(model, sgd(model), masks={"weight": torch.ones(4, 3).bool()})


@many
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_largest_is_a_sort(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    top = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    for kind in (torch.float32, torch.int64):
        assert largest(torch.tensor(scores, dtype=kind), k).nonzero().flatten().tolist() == sorted(top)


@pytest.mark.parametrize("as_dicts", [False, True])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("kind, make", [(SET, sgd), (RigL, sgd), (RigL, lambda model: torch.optim.Adam(model.parameters())), (ITOP, sgd), (Momentum, sgd), (GMP, sgd)])
def test_what_was_put_aside_goes_on_as_if_nothing_had_been(kind, make, store, as_dicts, tmp_path):
    "Model, optimizer and masks in one file, or the state of each: the next six steps are the same to the bit, updates among them."
    if store and kind is GMP: return  # it begins dense

    def begin(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
        if store: sparsify(model, .3, seed=seed)
        optimizer = make(model)
        return model, optimizer, kind(model, optimizer, None if store else .3, delta_t=2, t_end=20, seed=seed)
    model, optimizer, method = begin(0)

    def go_on(model, optimizer, method, first):
        for step in range(first, first + 6):
            x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(5) % 3).backward()
            method.before_step(); optimizer.step(); method.after_step()
        return [value.clone() for value in model.state_dict().values()], {name: mask.clone() for name, mask in method.masks.items()}

    go_on(model, optimizer, method, 0)
    parts = model, optimizer, method
    torch.save([part.state_dict() for part in parts] if as_dicts else parts, tmp_path / "aside.pt")
    values, masks = go_on(*parts, 6)
    if as_dicts:
        parts = begin(1)  # another seed: nothing of it may be left
        for part, state in zip(parts, torch.load(tmp_path / "aside.pt")): part.load_state_dict(state)
    else: parts = torch.load(tmp_path / "aside.pt", weights_only=False)
    again, masks_again = go_on(*parts, 6)
    assert all(map(torch.equal, values, again)) and all(torch.equal(masks[name], masks_again[name]) for name in masks)
    assert method.updates == parts[2].updates == 6


def test_a_state_of_another_class_or_model_is_refused():
    models = [nn.Linear(3, 4), nn.Linear(3, 5)]
    moving, static, other = (RigL(models[0], sgd(models[0]), .5, delta_t=1, t_end=9), StaticSparse(models[0], sgd(models[0]), .5),
                             RigL(models[1], sgd(models[1]), .5, delta_t=1, t_end=9))
    with pytest.raises(ValueError, match="^the state has generator, masks, updates; expected generator, masks, step, updates$"): moving.load_state_dict(static.state_dict())
    with pytest.raises(ValueError, match="^the mask of weight is torch.bool of 5×3, .* expected bool of 4×3"): moving.load_state_dict(other.state_dict())


def test_growth_does_not_repeat_the_numbers_of_the_first_masks():
    "Else SET would grow where the first mask's draw points to."
    model = linear(30, 30)
    drawn = torch.rand(30, 30, generator=torch.Generator().manual_seed(7))
    sparse = SET(model, sgd(model), .1, seed=7, delta_t=1, t_end=9)
    assert not torch.equal(sparse.grow_scores(sparse.layers["weight"]), drawn)


# ------------------------------------------------------------------------------ where masks go

@many
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4 * n, max_size=4 * n)))
def test_two_masks_are_compared_weight_by_weight(pairs):
    one, other = ({"a": part[: len(part) // 2].view(-1, 2), "b": part[len(part) // 2:].view(-1, 1, 2)} for part in torch.tensor(pairs).T)
    assert dead(other)["a"] == np.mean([not any(row) for row in other["a"].tolist()])
    kept = [p for p in pairs if p[0]]
    if not kept: return
    assert overlap(one, other) == pytest.approx(np.mean([q for _, q in kept]))
    expected = sum(int(one[name].sum()) * np.mean(other[name].tolist()) for name in one) / len(kept)
    assert by_chance(one, other) == pytest.approx(expected)


@few
@given(st.sampled_from([StaticSparse, SET, RigL]), st.booleans(), st.integers(0, 9), st.integers(1, 4))
def test_places_are_those_that_masks_were_seen_at(kind, is_compact, seed, delta_t):
    "Whatever the storage: sets of positions, noted after each step by whoever trains."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    if is_compact: model = sparsify(model, .3, seed=seed)
    optimizer = sgd(model)
    schedule = dict(delta_t=delta_t, t_end=7, drop_fraction=.6) if kind.schedule else {}
    sparse = kind(model, optimizer, None if is_compact else .3, seed=seed, **schedule)
    at = lambda: {(name, place) for name, mask in sparse.masks.items() for place in np.flatnonzero(mask.numpy())}
    places = Places(sparse)
    first, ever = at(), at()
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.rand(5, 2, 4, 4)).square().mean().backward()
        for hook in (sparse, places): hook.before_step()
        optimizer.step()
        for hook in (sparse, places): hook.after_step()
        ever |= at()
    told, sizes = places.told(), {name: mask.numel() for name, mask in sparse.masks.items()}
    assert told["travel"] == pytest.approx(len(first - at()) / len(first)) and told["explored"] == pytest.approx(len(ever) / sum(sizes.values()))
    assert {(name, place) for name, kept in told["kept"].items() for place in kept} == at()
    assert told["densities"] == pytest.approx({name: len(told["kept"][name]) / size for name, size in sizes.items()})
    assert told["dead"] == dead(sparse.masks)
    assert (told["travel"] > 0) == (sparse.updates > 0)
