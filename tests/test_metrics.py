"""Metrics: a loop that counts, and textbook statistics."""
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from rest_nb.metrics import group_accuracy, holm, over_seeds, p_value

many = settings(max_examples=200, deadline=None, derandomize=True)


def accuracy(*lists): return group_accuracy(*(torch.tensor(values, dtype=torch.int64) for values in lists))


def same(found, expected): return found == expected or (math.isnan(found) and math.isnan(expected))


# ---------------------------------------------------------------------------------------- by group

def by_loop(samples):
    "{group: (accuracy, number)} for all groups and cells, counted one sample at a time."
    right, number = {}, {}
    for predicted, y, a in samples:
        for group in ("unbiased", "aligned" if y == a else "conflicting", (y, a)):
            number[group] = number.get(group, 0) + 1
            right[group] = right.get(group, 0) + (predicted == y)
    return {group: (right[group] / number[group], number[group]) for group in number}


def triples(values): return st.lists(st.tuples(*[st.integers(0, values)] * 3), max_size=25)


@many
@given(st.integers(0, 3).flatmap(triples))  # few values: full cells; one value: nobody conflicts
def test_accuracies_are_those_of_a_loop(samples):
    found, expected = accuracy(*(zip(*samples) if samples else ([], [], []))), by_loop(samples)
    for group in ("unbiased", "aligned", "conflicting"):
        value, number = expected.get(group, (math.nan, 0))
        assert same(found[group], value) and found[f"{group}_n"] == number
    groups = [expected[group] for group in ("aligned", "conflicting") if group in expected]
    cells = [value for group, value in expected.items() if isinstance(group, tuple)]
    for name, parts in (("worst_group", groups), ("worst_cell", cells)):
        assert same(found[name], min((value for value, _ in parts), default=math.nan))
        assert (found[name], found[f"{name}_n"]) in parts or not parts and found[f"{name}_n"] == 0
    assert len(found) == 10


def test_by_hand():
    # Prediction, y, a. Aligned 2 of 3, conflicting 3 of 4; cells (0,0) 1/1, (1,1) 1/2, (0,1) 2/2, (1,0) 1/2.
    samples = [(0, 0, 0), (1, 1, 1), (0, 1, 1), (0, 0, 1), (0, 0, 1), (1, 1, 0), (2, 1, 0)]
    found = accuracy(*zip(*samples))
    assert found == dict(unbiased=5 / 7, unbiased_n=7, aligned=2 / 3, aligned_n=3,
                         conflicting=3 / 4, conflicting_n=4, worst_group=2 / 3, worst_group_n=3,
                         worst_cell=1 / 2, worst_cell_n=2)


@pytest.mark.parametrize("a, empty, full", [
    ([0, 1, 2], "conflicting", "aligned"), ([1, 2, 0], "aligned", "conflicting"),
])
def test_an_empty_group_is_nan_and_never_the_worst(a, empty, full):
    found = accuracy([0, 1, 0], [0, 1, 2], a)  # 2 of 3, all in one group
    assert math.isnan(found[empty]) and found[f"{empty}_n"] == 0
    assert found["worst_group"] == found[full] == 2 / 3 and found["worst_group_n"] == 3


def test_cells_without_a_sample_do_not_count():
    # Two of the hundred cells of ten targets and ten attributes have samples: 1 of 1 and 1 of 2.
    found = accuracy([9, 0, 5], [9, 0, 0], [9, 7, 7])
    assert (found["worst_cell"], found["worst_cell_n"]) == (1 / 2, 2)


def test_the_worst_is_the_lowest_and_not_the_smallest():
    # Three aligned samples wrong out of four, the one conflicting sample right.
    found = accuracy([0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1])
    assert (found["worst_group"], found["worst_group_n"]) == (1 / 4, 4)
    assert (found["worst_cell"], found["worst_cell_n"]) == (1 / 4, 4)


def test_results_are_plain_numbers():
    # They go to JSON, which refuses numpy's and torch's.
    found = accuracy([0, 1], [0, 0], [0, 1])
    assert {type(value) for name, value in found.items() if not name.endswith("_n")} == {float}
    assert {type(value) for name, value in found.items() if name.endswith("_n")} == {int}


@pytest.mark.parametrize("lengths", [(3, 2, 2), (2, 3, 2), (2, 2, 3)])
def test_unequal_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="{} predictions, {} targets, {} attributes".format(*lengths)):
        accuracy(*([0] * n for n in lengths))


def test_what_is_no_vector_is_refused():
    "N×1 against N would be compared all with all."
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^shapes are \(2, 1\), \(2,\), \(2,\); expected vectors"): group_accuracy(y[:, None], y, y)


# -------------------------------------------------------------------------------------- over seeds

# Hundredths, as accuracies are: no overflow, and spreads large enough for relative comparison.
values = st.lists(st.integers(0, 10_000).map(lambda v: v / 100), min_size=2, max_size=12)


@many
@given(values)
def test_mean_spread_and_interval_are_the_textbooks(values):
    found = over_seeds(values)
    assert found["n"] == len(values) and list(found) == ["mean", "sd", "ci95", "n"]
    assert found["mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    assert found["sd"] == pytest.approx(statistics.stdev(values), rel=1e-9, abs=1e-9)
    if len(set(values)) == 1: assert found["ci95"] == pytest.approx(0, abs=1e-9)
    else:  # scipy's t-test brings its own interval
        low, high = stats.ttest_1samp(values, 0).confidence_interval(.95)
        interval = found["mean"] - found["ci95"], found["mean"] + found["ci95"]
        assert interval == pytest.approx((low, high), abs=1e-6)


def test_three_seeds_by_hand():
    # Deviations -3, 0, 3: variance 18/2, sd 3. Student's t, 2 degrees of freedom: 4.303, so 4.303 · 3 / √3.
    found = over_seeds([67, 70, 73])
    assert found == dict(mean=70, sd=3, ci95=pytest.approx(4.303 * math.sqrt(3), abs=.001), n=3)


@pytest.mark.parametrize("values", [[.5], (.5,), np.array([.5]), torch.tensor([.5])])
def test_one_seed_has_a_mean_and_no_spread(values):
    found = over_seeds(values)
    assert found["mean"] == .5 and found["n"] == 1
    assert math.isnan(found["sd"]) and math.isnan(found["ci95"])  # not 0, which would look certain


def test_an_undefined_value_is_not_averaged_away():
    # An empty group's accuracy is NaN; a mean over the other seeds would be a mean of another thing.
    found = over_seeds([.5, math.nan, .7])
    assert found["n"] == 3 and all(math.isnan(found[name]) for name in ("mean", "sd", "ci95"))


def test_results_over_seeds_are_plain_numbers():
    assert [type(value) for value in over_seeds([.5, .7]).values()] == [float, float, float, int]


# ---------------------------------------------------------------------------------------- many comparisons

@many
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_p_is_that_of_the_paired_t_test(pairs):
    ours, theirs = np.array(pairs).T
    if np.ptp(ours - theirs) < 1e-6: return  # without spread: below
    assert p_value(ours - theirs) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-6, abs=1e-12)


def test_p_at_the_edges():
    assert math.isnan(p_value([.3])) and math.isnan(p_value([0, 0, 0])) and p_value([.5, .5]) == 0
    assert p_value([-1, 1]) == pytest.approx(1) and p_value([.1, .2, .3]) == p_value([-.1, -.2, -.3])


@many
@given(st.lists(st.one_of(st.just(math.nan), st.floats(0, 1), st.sampled_from([.01, .04])), max_size=8))
def test_holm_by_its_definition(p):
    """The adjusted p of a question is the smallest level at which Holm's procedure rejects it: the largest of
    p × (questions with no smaller p), over all questions whose p is no larger."""
    known = [q for q in p if q == q]
    for value, adjusted in zip(p, holm(p), strict=True):
        if value != value: assert adjusted != adjusted
        else: assert adjusted == pytest.approx(min(1, max(q * sum(r >= q for r in known) for q in known if q <= value)))


def test_holm_rejects_as_the_step_down_procedure_does():
    p, level = [.001, .04, .012, .3, .02], .05
    rejected = set()
    for rank, i in enumerate(sorted(range(5), key=p.__getitem__)):  # by hand: .001 < .01, .012 < .0125, .02 > .0167
        if p[i] > level / (5 - rank): break
        rejected.add(i)
    assert {i for i, q in enumerate(holm(p)) if q <= level} == rejected == {0, 2}
