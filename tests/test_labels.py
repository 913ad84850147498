"Labels: numbers by the definition of a sorted order, pairs against a search through all of them."
import itertools
import string

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rest_nb.labels import attribute_codes, check_classes, coded, positions


# --- numbers

kinds = st.sampled_from([st.integers(-5, 5), st.text(string.printable, min_size=1, max_size=3), st.booleans()])


@settings(derandomize=True, deadline=None)
@given(kinds.flatmap(lambda kind: st.lists(kind, min_size=1, max_size=40)))
def test_numbers_lead_back_to_the_labels_and_keep_their_order(labels):
    numbers, values = coded("y", labels, len(labels))
    assert numbers.dtype == np.int64 and [values[i] for i in numbers] == labels
    assert values == sorted(values) and set(values) == set(labels) and len(values) == len(set(labels))
    assert set(numbers.tolist()) == set(range(len(values)))  # dense


@pytest.mark.parametrize("labels", [
    [3, 1, 3], (3, 1, 3), np.array([3, 1, 3], np.uint8), torch.tensor([3, 1, 3]), pd.Series([3, 1, 3], index=[7, 8, 9]),
    [np.int64(3), np.int32(1), 3], [torch.tensor(3), torch.tensor(1), torch.tensor(3)]], ids=lambda v: type(v).__name__)
def test_any_container_will_do(labels):
    numbers, values = coded("y", labels, 3)
    assert numbers.tolist() == [1, 0, 1] and values == [1, 3] and all(type(v) is int for v in values)


def test_text_and_bools_from_arrays_are_plain():
    assert coded("a", np.array(["b", "a"]), 2)[1] == ["a", "b"]
    assert coded("a", pd.Series(["b", "a"]), 2)[1] == ["a", "b"]
    assert coded("a", map(str, [10, 9]), 2)[1] == ["10", "9"]  # text is sorted as text
    values = coded("a", np.array([True, False]), 2)[1]
    assert values == [False, True] and all(type(v) is bool for v in values)


@pytest.mark.parametrize("labels, said", [
    ([0, 1], "y has 2 labels; expected 3"),
    ([0, 1, None], r"y\[2\] is missing"),
    ([0., float("nan"), 1.], r"y\[1\] is missing"),
    (["a", pd.NA, "b"], r"y\[1\] is missing"),
    (["a", "b", ""], r"y\[2\] is empty"),
    ([0, 1, "1"], "y holds int and str; expected whole numbers, text or bools"),
    ([0, True, 1], "y holds bool and int"),
    ([0., 1., 2.], "y holds float"),
    ([[0], [1], [2]], r"y holds several numbers for an image; .*y.ravel\(\)"),
    (np.eye(3), r"y holds several numbers for an image; .*y.ravel\(\)"),
])
def test_what_is_no_label_is_refused_in_a_line(labels, said):
    with pytest.raises(ValueError, match=f"^{said}") as caught: coded("y", labels, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [[0, 1], [1, 2, 3], [-1, 0], [False, True], ["0", "1", "3"], ["b", "z"]])
def test_classes_without_a_gap_are_fine(classes): check_classes(classes)


@pytest.mark.parametrize("classes, said", [
    ([0, 1, 3], "y has no 2 between 0 and 3"), ([0, 10 ** 12], "y has no 1 between 0 and 1000000000000"),
    ([-1, 1], "y has no 0 between -1 and 1"), ([1, 2, 4, 6], "y has no 3 between 1 and 6"),
    ([4], r"y has the classes \[4\]; expected two or more"), ([], r"y has the classes \[\]"), ([True], "two or more"),
    (["cat"], r"\['cat'\]")])
def test_gaps_and_single_classes_are_refused(classes, said):
    with pytest.raises(ValueError, match=said) as caught: check_classes(classes)
    assert "\n" not in str(caught.value)


# --- pairs

tables = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(st.integers(0, 30), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    .map(lambda counts: np.array(counts).reshape(shape)))


def one_to_one(classes, values):
    "All ways to pair as many as possible of so many classes and values: lists of (class, value)."
    if classes <= values: return [[*enumerate(chosen)] for chosen in itertools.permutations(range(values), classes)]
    return [[(c, v) for v, c in pairs] for pairs in one_to_one(values, classes)]


def aligned_by(table, codes): return sum(table[code, value] for value, code in enumerate(codes) if code < len(table))


def best(table, fixed=()):
    return max(sum(table[pair] for pair in pairs) for pairs in one_to_one(*table.shape) if set(fixed) <= set(pairs))


def check_numbers(codes, table):
    classes, values = table.shape
    assert codes.dtype == np.int64 and len(set(codes.tolist())) == values  # no two values share a number
    assert sum(codes < classes) == min(classes, values)
    assert sorted(codes[codes >= classes]) == [*range(classes, max(classes, values))]  # the rest, without a gap


@settings(derandomize=True, deadline=None)
@given(tables)
def test_no_other_pairing_aligns_more(table):
    before, codes = table.copy(), attribute_codes(table)
    check_numbers(codes, table)
    assert aligned_by(table, codes) == best(table) and (table == before).all()


@settings(derandomize=True, deadline=None)
@given(tables, st.data())
def test_fixed_pairs_hold_and_the_others_are_the_best_left(table, data):
    pairs = data.draw(st.sampled_from(one_to_one(*table.shape)))
    fixed = pairs[:data.draw(st.integers(1, len(pairs)))]
    before, codes = table.copy(), attribute_codes(table, fixed)
    check_numbers(codes, table)
    assert (table == before).all()
    assert all(codes[value] == target for target, value in fixed)
    assert aligned_by(table, codes) == best(table, fixed)


def test_pairs_by_hand():
    #                                  values:  0   1   2
    assert attribute_codes(np.array([[9, 0, 1], [8, 0, 2]])).tolist() == [0, 2, 1]    # 9 + 2 before 8 + 1
    assert attribute_codes(np.array([[1, 9], [9, 1]])).tolist() == [1, 0]
    assert attribute_codes(np.array([[5], [7], [6]])).tolist() == [1]                 # one value: the class that has most of it
    assert attribute_codes(np.full((3, 3), 4)).tolist() == [0, 1, 2]                  # nothing to choose by: in order


def test_names_to_positions():
    assert positions({}, ["a", "b"], [1, 2]) == []
    assert positions({"b": 1, "a": 3}, ["a", "b"], [1, 2, 3]) == [(1, 0), (0, 2)]


@pytest.mark.parametrize("aligned, said", [
    ({"c": 1}, "aligned names the class 'c'; expected one of .'a', 'b'."),
    ({"a": 4}, "aligned names the attribute value 4; expected one of .1, 2."),
    ({"a": 1, "b": 1}, "aligned gives 1 to two classes"),
])
def test_names_that_are_none_are_refused(aligned, said):
    with pytest.raises(ValueError, match=f"^{said}") as caught: positions(aligned, ["a", "b"], [1, 2])
    assert "\n" not in str(caught.value)
