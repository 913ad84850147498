"""Reweighting: who is drawn how often, and that a weighted loss says the same.

Oracles: the set in which conflicting samples are really repeated; binomial and chi-square bounds.
"""
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch.nn import functional as F

from rest_nb.reweighting import UPWEIGHT, cross_entropy, sample_weights, shuffled_batches, weighted_batches
from rest_nb.reweighting import weighted_cross_entropy

relaxed = settings(max_examples=60, deadline=None, derandomize=True)


def seeded(seed): return torch.Generator().manual_seed(seed)


def drawn(weights, number, seed=0):
    "`number` indices from the sampler, in one tensor."
    return torch.cat(list(weighted_batches(weights, 1000, number // 1000, seeded(seed))))


# ----------------------------------------------------------------------------------------- weights

def test_the_upweights_are_dcwps():
    assert UPWEIGHT == {.005: 80, .01: 50, .02: 30, .05: 10}  # facts/rest.md §1.1: the rarer, the heavier


@relaxed
@given(st.lists(st.booleans(), max_size=20), st.floats(1e-6, 1e6))
def test_conflicting_samples_weigh_exactly_the_upweight(is_conflicting, upweight):
    weights = sample_weights(torch.tensor(is_conflicting, dtype=torch.bool), upweight)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [upweight if conflicts else 1. for conflicts in is_conflicting]


@pytest.mark.parametrize("upweight", [0, -1, -.5, math.nan, math.inf])
def test_an_upweight_that_is_no_positive_number_is_refused(upweight):
    # Infinity too: the sampler would silently draw one and the same image for ever.
    with pytest.raises(ValueError, match=f"upweight is {upweight}"):
        sample_weights(torch.tensor([True, False]), upweight)


# ------------------------------------------------------------------------------------- the sampler

@pytest.mark.parametrize("ratio, upweight, aligned, conflicting, share", [
    (.005, 80, 54_751, 249, .267),
    (.01, 50, 54_509, 491, .311),
    (.02, 30, 54_014, 986, .354),
    (.05, 10, 52_551, 2_449, .318),
])
def test_the_four_pairings(ratio, upweight, aligned, conflicting, share):
    # CMNIST's counts and, to three digits, the share of a batch that conflicts: facts/rest.md §2 and §1.1.
    is_conflicting = torch.arange(aligned + conflicting) % (1 + aligned // conflicting) == 0
    is_conflicting &= is_conflicting.cumsum(0) <= conflicting  # scattered over the set
    assert is_conflicting.sum() == conflicting and UPWEIGHT[ratio] == upweight
    rho = conflicting / (aligned + conflicting)
    expected = rho * upweight / (rho * upweight + 1 - rho)
    assert round(expected, 3) == share
    index = drawn(sample_weights(is_conflicting, upweight), 200_000)
    found = is_conflicting[index].double().mean().item()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / len(index))  # binomial, 4 sigma
    # Within either group everyone is drawn alike, by chi-square.
    for group in (is_conflicting, ~is_conflicting):
        times = index.bincount(minlength=len(group))[group]
        assert stats.chisquare(times).pvalue > 1e-4


@relaxed
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(0, 10**6))
def test_draws_follow_the_weights_and_never_touch_a_zero(weights, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    counts = drawn(weights, 5000, seed).bincount(minlength=len(weights))
    assert len(counts) == len(weights) and not counts[weights == 0].any()
    possible = weights > 0
    expected = weights[possible] / weights.sum() * 5000
    if possible.sum() > 1: assert stats.chisquare(counts[possible], expected).pvalue > 1e-6


@pytest.mark.parametrize("uniform, index", [
    (0., 1),  # not 0, which weighs nothing
    (.25, 1),
    (.5, 3),  # on the edge between 1 and 3: not 2, which weighs nothing
    (.75, 3),
    (1 - 2**-53, 3),  # the largest float64 below one: not 4
])
def test_draws_on_an_edge(monkeypatch, uniform, index):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), uniform, dtype=torch.float64))
    weights = torch.tensor([0, 1, 0, 1, 0], dtype=torch.float64)
    assert next(weighted_batches(weights, 2, 1, seeded(0))).tolist() == [index, index]


def test_weighted_batches_are_as_many_and_as_large_as_asked():
    # Larger than the set is fine: draws are with replacement.
    for steps in (4, 0):
        batches = list(weighted_batches(torch.ones(3).double(), 7, steps, seeded(0)))
        assert [batch.shape for batch in batches] == [(7,)] * steps


# -------------------------------------------------------------------------------- shuffled batches

@relaxed
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30), st.integers(0, 10**6))
def test_each_index_once_an_epoch(n, batch_size, steps, seed):
    batch_size = min(n, batch_size)
    batches = [batch.tolist() for batch in shuffled_batches(n, batch_size, steps, seeded(seed))]
    assert [len(batch) for batch in batches] == [batch_size] * steps  # no short ones
    per_epoch = n // batch_size  # the remainder is dropped
    for start in range(0, steps, per_epoch):
        epoch = sum(batches[start:start + per_epoch], [])
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(n))
        if len(epoch) == n: assert sorted(epoch) == list(range(n))


def test_who_comes_back_for_more_is_told():
    "A data loader begins anew at each epoch, and would find nothing, epoch after epoch."
    batches = weighted_batches(torch.ones(9), 3, 2, torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(range(9), batch_sampler=batches)
    assert [len(batch) for batch in loader] == [3, 3]
    with pytest.raises(ValueError, match="all 2 batches have been drawn"): next(iter(loader))
    assert list(shuffled_batches(9, 3, 0, torch.Generator())) == []  # who asks for none gets none


def test_every_epoch_has_an_order_of_its_own():
    epochs = [tuple(batch.tolist()) for batch in shuffled_batches(20, 20, 5, seeded(0))]
    assert len({*epochs, tuple(range(20))}) == 6  # and none is the order of the set; by chance: one in 20!


def test_the_remainder_is_another_one_each_time():
    # Of 7, 2 batches of 3 leave one out: over 700 epochs each stays out about 100 times (binomial, 4 sigma).
    seen = Counter(torch.cat(list(shuffled_batches(7, 3, 1400, seeded(0)))).tolist())
    assert all(abs(700 - seen[index] - 100) < 4 * math.sqrt(700 * 1 / 7 * 6 / 7) for index in range(7))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="batch_size is 5.*4 samples"):
        list(shuffled_batches(4, 5, 1, seeded(0)))
    assert len(next(shuffled_batches(4, 4, 1, seeded(0)))) == 4


# ------------------------------------------------------------------------------------- determinism

@pytest.mark.parametrize("batches", [
    lambda steps, generator: shuffled_batches(50, 8, steps, generator),
    lambda steps, generator: weighted_batches(torch.arange(50.).double(), 8, steps, generator),
])
def test_batches_follow_their_generator_and_only_that(batches):
    def taken(seed, noise, steps=12):
        torch.manual_seed(noise)
        return torch.stack(list(batches(steps, seeded(seed))))
    assert torch.equal(taken(1, noise=0), taken(1, noise=1))
    assert not torch.equal(taken(1, noise=0), taken(2, noise=0))
    assert torch.equal(taken(1, noise=0)[:5], taken(1, noise=0, steps=5))  # however many are asked for
    state = torch.get_rng_state()
    list(batches(3, seeded(1)))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up


# ---------------------------------------------------------------------------------------- the loss

def gradients(loss, x, y, index, weight):
    "The gradients of a loss of a linear model, on the samples `index`."
    weight = weight.clone().requires_grad_()
    loss(x[index] @ weight, y[index], index).backward()
    return weight.grad


@relaxed
@given(st.integers(1, 10), st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 10**6))
def test_upweight_is_as_many_copies(upweight, is_conflicting, seed):
    # The oracle is the set in which conflicting samples really are `upweight` times, under the plain loss.
    generator, is_conflicting = seeded(seed), torch.tensor(is_conflicting)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((len(is_conflicting), 4), (4, 3)))
    y, every = torch.randint(0, 3, (len(x),), generator=generator), torch.arange(len(x))
    loss = weighted_cross_entropy(sample_weights(is_conflicting, upweight))
    copies = torch.cat([every, *[every[is_conflicting]] * (upweight - 1)])
    repeated = gradients(lambda logits, y, _: F.cross_entropy(logits, y), x, y, copies, weight)
    assert torch.allclose(gradients(loss, x, y, every, weight), repeated, rtol=1e-4, atol=1e-6)
    logits = x @ weight  # and the loss keeps its scale
    assert torch.allclose(loss(logits, y, every), F.cross_entropy(logits[copies], y[copies]), rtol=1e-5)


def test_the_sampler_and_the_weighted_loss_agree_on_average():
    # Losses -log softmax by sample, large and small; the mean of 200,000 draws, within 4 standard errors.
    generator, is_conflicting = seeded(0), torch.arange(40) % 8 == 0
    logits, y, every = torch.randn(40, 3, generator=generator) * 3, torch.arange(40) % 3, torch.arange(40)
    weights = sample_weights(is_conflicting, 30)
    index = drawn(weights, 200_000)
    each = -logits.log_softmax(1)[every, y][index].double()
    error = 4 * each.std() / math.sqrt(len(index))
    assert abs(each.mean() - weighted_cross_entropy(weights)(logits, y, every)) < error
    assert abs(each.mean() - F.cross_entropy(logits, y)) > 3 * error  # the unweighted mean is well outside


def test_weights_are_looked_up_by_index():
    # Samples 3 and 0 of four, which weigh 5 and 1 (mean 2): 5/2 and 1/2 of -log 1/2 and -log 1/4, over two.
    loss = weighted_cross_entropy(torch.tensor([1, 1, 1, 5], dtype=torch.float64))
    logits = torch.tensor([[0., 0.], [0., math.log(3)]])
    value = loss(logits, torch.tensor([1, 0]), torch.tensor([3, 0]))
    assert value.item() == pytest.approx((2.5 * math.log(2) + .5 * math.log(4)) / 2, rel=1e-6)


def test_equal_weights_are_no_weights():
    logits, y, index = torch.randn(9, 4, generator=seeded(0)), torch.arange(9) % 4, torch.arange(9)
    weighted = weighted_cross_entropy(torch.full((9,), 7.))
    assert torch.allclose(weighted(logits, y, index), F.cross_entropy(logits, y))


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [1, math.nan], [-1, -2]])
def test_a_loss_of_weights_that_are_none_is_refused(weights):
    with pytest.raises(ValueError, match="^weights go from .*; expected 0 or more, and some above 0$"): weighted_cross_entropy(torch.tensor(weights, dtype=torch.float64))


def test_cross_entropy_by_hand_whatever_the_index():
    logits = torch.tensor([[0., 0.], [0., math.log(3)]])  # -log 1/2 and -log 3/4
    for index in (torch.tensor([3, 0]), None):
        value = cross_entropy(logits, torch.tensor([1, 1]), index).item()
        assert value == pytest.approx((math.log(2) + math.log(4 / 3)) / 2, rel=1e-6)


@pytest.mark.parametrize("steps", [93.75, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("batches", [lambda steps: shuffled_batches(9, 3, steps, seeded(0)), lambda steps: weighted_batches(torch.ones(9), 3, steps, seeded(0))])
def test_batches_without_end_are_refused(batches, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; expected a whole number"): batches(steps)
    assert len(list(batches(4.))) == 4


@pytest.mark.parametrize("size", [0, -1])
def test_empty_batches_are_refused(size):
    with pytest.raises(ValueError, match=f"batch_size is {size}"): shuffled_batches(9, size, 2, seeded(0))
    with pytest.raises(ValueError, match=f"batch_size is {size}"): weighted_batches(torch.ones(9), size, 2, seeded(0))
