"""Own data: what comes in is what comes out, counted by pandas, cut by definition; what is wrong is said in a line.

Where an image must be recognised, it is: its first two pixels spell its number.
"""
import contextlib
import os
import re
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from rest_nb import own_data
from rest_nb.data import SPLITS, BiasedDataset, load, save
from rest_nb.own_data import (as_images, cells, from_arrays, from_dataset, from_folder, names, read_labels, report, split,
                              split_counts)


def numbered(n):
    "`n` grey images of 2×4 pixels (uint8), each with its number in its first two."
    x = np.full((n, 2, 4), 7, np.uint8)
    x[:, 0, 0], x[:, 0, 1] = np.divmod(np.arange(n), 256)
    return x


def numbers(data): return (data.x[:, 0, 0, 0].long() * 256 + data.x[:, 0, 0, 1]).tolist()


# --- images

def test_each_layout_is_the_same_images():
    grey = numbered(5)
    for x in (grey, grey[:, None], grey[..., None]):
        for given_ in (x, torch.from_numpy(x), np.asfortranarray(x)):
            out = as_images(given_)
            assert out.shape == (5, 3, 2, 4) and all((out[:, c].numpy() == grey).all() for c in range(3))


@pytest.mark.parametrize("size", [(4, 5), (3, 4), (8, 1)])
def test_channels_may_be_first_or_last(size):
    colours = np.random.default_rng(0).integers(0, 256, (6, 3, *size), np.uint8)
    if size[1] not in (1, 3): assert (as_images(colours).numpy() == colours).all()
    last = np.moveaxis(colours, 1, 3)
    if size[0] not in (1, 3): assert (as_images(last).numpy() == colours).all()
    for x in (colours, last):
        if size == (8, 1) and x is colours or size == (3, 4) and x is last:
            with pytest.raises(ValueError, match="no doubt which"): as_images(x)


def test_grey_images_three_pixels_wide_are_grey_images():
    assert as_images(np.zeros((5, 8, 3), np.uint8)).shape == (5, 3, 8, 3)


def test_images_that_may_not_be_written_to_or_run_backwards():
    x = numbered(4)
    assert (as_images(x[::-1])[:, 0].numpy() == x[::-1]).all()
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (as_images(x)[:, 0].numpy() == x).all()


@pytest.mark.parametrize("x, said", [
    (np.zeros((4, 8, 8)), r"x is float64; expected uint8, 0 to 255: by np.uint8\(255 \* x\), if it runs from 0 to 1"),
    (torch.zeros(4, 8, 8), "x is torch.float32"), (np.zeros((4, 8, 8), int), r"x is int64; .* by x.astype\("), (np.zeros((4, 8, 8), bool), "x is bool"),
    (np.zeros((4, 8), np.uint8), r"x is of shape \(4, 8\); expected N×H×W, N×H×W×3 or N×3×H×W"),
    (np.zeros((4, 2, 8, 8), np.uint8), r"shape \(4, 2, 8, 8\)"), (np.zeros((4, 8, 8, 4), np.uint8), r"shape \(4, 8, 8, 4\)"),
    (np.zeros((4, 3, 8, 3), np.uint8), r"shape \(4, 3, 8, 3\)"), (np.zeros((1, 4, 3, 8, 8), np.uint8), r"shape \(1, 4"),
])
def test_other_images_are_refused_in_a_line(x, said):
    with pytest.raises(ValueError, match=f"^{said}" if said.startswith("x") else said) as caught: as_images(x)
    assert "\n" not in str(caught.value)


# --- from arrays

label_lists = st.lists(st.tuples(st.sampled_from(["cat", "dog", "eel"]), st.sampled_from("uvwxyz")), min_size=2, max_size=60) \
    .filter(lambda pairs: len({y for y, _ in pairs}) > 1)


@settings(derandomize=True, deadline=None)
@given(label_lists)
def test_the_set_says_what_the_labels_said(pairs):
    y, a = zip(*pairs)
    data = from_arrays(numbered(len(y)), y, a)
    assert [data.classes[i] for i in data.y] == [*y] and [data.attributes[i] for i in data.a] == [*a]
    assert data.num_classes == len(set(y)) and data.classes == tuple(sorted(set(y)))
    assert numbers(data) == [*range(len(y))]
    # conflicting: whoever has not the value of its class, the one at the same place
    value_of = dict(zip(data.classes, data.attributes))
    assert data.is_conflicting.tolist() == [value_of[target] != value for target, value in pairs]
    # each value has one number; a place without a value is empty, and a class's
    assert sorted(filter(None, data.attributes)) == sorted(set(a)) and all(data.attributes[data.num_classes:])


def test_most_images_of_a_class_are_aligned():
    data = from_arrays(numbered(10), list("ccccccdddd"), [9, 9, 9, 9, 5, 7, 5, 5, 5, 9])
    assert data.a.tolist() == [0, 0, 0, 0, 1, 2, 1, 1, 1, 0] and data.attributes == ("9", "5", "7")


def test_whoever_knows_the_pairs_says_so():
    y, a = ["cat"] * 5 + ["dog"] * 5, [True, True, True, False, False] * 2
    data = from_arrays(numbered(10), y, a, aligned={"dog": True})
    assert data.attributes == ("False", "True") and data.is_conflicting.sum() == 5
    for aligned, said in (({"cow": True}, "aligned names the class 'cow'"), ({"cat": True, "dog": True}, "two classes")):
        with pytest.raises(ValueError, match=said): from_arrays(numbered(10), y, a, aligned=aligned)
    with pytest.raises(ValueError, match="^aligned is given and a is None"): from_arrays(numbered(10), y, aligned={"dog": True})


def test_fewer_values_than_classes_leave_some_classes_without():
    data = from_arrays(numbered(6), [0, 1, 2] * 2, ["u"] * 6)
    assert sorted(data.attributes) == ["", "", "u"] and data.is_conflicting.sum() == 4


def test_attributes_may_be_unknown():
    data = from_arrays(numbered(3), [1, 2, 1])
    assert data.a is None and data.y.tolist() == [0, 1, 0] and data.classes == ("1", "2") and data.attributes == ()
    with pytest.raises(ValueError, match="^a is None; expected the bias attribute of each image$"): data.is_conflicting


@pytest.mark.parametrize("words, said", [
    (dict(y=[0, 1, 3, 1]), "y has no 2 between 0 and 3"), (dict(y=[1] * 4), r"y has the classes \[1\]; expected two"),
    (dict(y=[0, 1]), "y has 2 labels; expected 4"), (dict(a=[0, 1]), "a has 2 labels; expected 4"),
    (dict(a=[0, 1, None, 0]), r"a\[2\] is missing"), (dict(a=[.1, .2, .3, .4]), "a holds float"),
    (dict(x=np.zeros((4, 2, 3))), "x is float64"), (dict(x=numbered(0), y=[], a=[]), r"y has the classes \[\]")])
def test_what_does_not_fit_is_refused_in_a_line(words, said):
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        from_arrays(**dict(x=numbered(4), y=[0, 1, 0, 1], a=[0, 1, 1, 0]) | words)
    assert "\n" not in str(caught.value)


def test_gaps_among_attributes_are_no_mistake():
    assert from_arrays(numbered(4), [0, 1, 0, 1], [0, 7, 0, 7]).attributes == ("0", "7")


def test_a_named_set_is_saved_as_any_other(tmp_path):
    data = from_arrays(numbered(4), ["u", "v"] * 2, ["p", "q", "r", "q"])
    save(tmp_path / "set.npz", {"train": data})
    again = load(tmp_path / "set.npz", "train")
    assert all(torch.equal(getattr(again, name), getattr(data, name)) for name in "xya") and again.num_classes == 2
    np.load(tmp_path / "set.npz", allow_pickle=False)["train_classes"]  # and nothing in it is pickled


# --- the table of cells

@settings(derandomize=True, deadline=None)
@given(label_lists)
def test_cells_are_a_crosstab(pairs):
    y, a = zip(*pairs)
    table = cells(from_arrays(numbered(len(y)), y, a))
    expected = pd.crosstab(pd.Series(y), pd.Series(a))
    assert table.index.names == ["split", "y"] and table.columns.name == "a" and (table.dtypes == int).all()
    assert sorted(table.columns) == sorted(expected.columns) and [*table.loc["all"].index] == sorted(set(y))
    assert (table.loc["all"][[*expected.columns]].to_numpy() == expected.to_numpy()).all()


def plain(y, a, num_classes=2):
    a = None if a is None else torch.tensor(a)
    return BiasedDataset(torch.zeros(len(y), 3, 2, 2, dtype=torch.uint8), torch.tensor(y), a, num_classes)


def test_cells_of_sets_without_names():
    table = cells({"train": plain([0, 1, 1], [0, 1, 2]), "test": plain([0, 0], [1, 0])})
    assert table.loc["train"].to_numpy().tolist() == [[1, 0, 0], [0, 1, 1]]
    assert table.loc["test"].to_numpy().tolist() == [[1, 1, 0], [0, 0, 0]]
    assert [*table.columns] == ["0", "1", "2"] and names(plain([0], [0], 3)) == (("0", "1", "2"),) * 2
    assert cells(plain([0, 1, 1], None)).to_numpy().tolist() == [[1], [2]]


def test_the_report_starts_with_the_table_and_names_empty_cells(capsys):
    train = from_arrays(numbered(5), list("uuvvv"), list("pqqqp"))
    report({"train": train, "test": own_data.take(train, [0, 3])})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:6]] == [["a", "p", "q"], ["split", "y"], ["train", "u", "1", "1"], ["v", "1", "2"],
                                                    ["test", "u", "1", "0"], ["v", "0", "1"]]
    assert lines[6:] == ["aligned (y, a): (u, p), (v, q)", "conflicting: 2 of 5 in train, 0 of 2 in test",
                         "without a sample: test (u, q), test (v, p)"]


def test_what_is_split_already_is_not_split_again():
    sets = split(from_arrays(numbered(40), [0, 1] * 20, [0, 1] * 20))
    with pytest.raises(ValueError, match="split already, into train, valid, test; use these"): split(sets)


def test_images_of_different_sizes_and_no_labels_are_refused_in_a_line():
    with pytest.raises(ValueError, match="^x holds images of different shapes; expected one: resize them$"):
        from_arrays([np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)], [0, 1])
    with pytest.raises(ValueError, match="^y is None; expected a label for each image$"): from_arrays(numbered(2), None)


def test_the_report_says_what_is_not_known_and_what_nobody_has(capsys):
    report({"train": from_arrays(numbered(2), [0, 1])})
    assert capsys.readouterr().out.splitlines()[-2:] == ["aligned (y, a): not known", "without a sample: no cell"]
    report({"train": from_arrays(numbered(3), [0, 1, 1], ["p"] * 3)})
    assert "aligned (y, a): (0, none), (1, p)\n" in capsys.readouterr().out


# --- three splits

share_pairs = st.sampled_from([(.1, .2), (.25, .25), (.05, .5), (.34, .33), (.01, .01), (.8, .1)])


@settings(derandomize=True)
@given(st.integers(0, 500), share_pairs)
def test_counts_add_up_and_stay_near_their_shares(n, pair):
    shares = np.array([1 - sum(pair), *pair])
    counts, exact = split_counts(n, shares), n * shares
    assert counts.sum() == n and (counts >= 0).all()
    if n >= 3: assert (counts >= 1).all()
    if (exact >= 1).all() or n < 3: assert (np.abs(counts - exact) < 1 + 1e-6).all()  # largest remainder
    else:  # one sample for each of two splits, at most, comes from the third
        assert (np.abs(counts - exact) < 2).all() and counts.max() == counts[exact.argmax()]


@pytest.mark.parametrize("n, expected", [
    (0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (5, [3, 1, 1]), (7, [5, 1, 1]),
    (8, [5, 1, 2]), (9, [6, 1, 2]), (10, [7, 1, 2]), (11, [8, 1, 2]), (14, [10, 1, 3]), (15, [10, 2, 3]), (100, [70, 10, 20])])
def test_counts_by_hand(n, expected):
    "70 %, 10 %, 20 %."
    assert split_counts(n, np.array([.7, .1, .2])).tolist() == expected


def some_set(n, seed=0, **words):
    rng = np.random.default_rng(seed)
    y = rng.choice(["cat", "dog"], n)
    a = np.where(rng.random(n) < .85, np.where(y == "cat", "sofa", "grass"), rng.choice(["grass", "snow"], n))
    return from_arrays(numbered(n), y, a, **words)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(30, 400), st.integers(0, 20), share_pairs)
def test_each_sample_is_in_one_split_and_each_cell_in_its_shares(n, seed, pair):
    data = some_set(n, seed)
    with contextlib.redirect_stdout(None): sets = split(data, *pair, seed=seed)
    assert [*sets] == list(SPLITS)
    assert sorted(sum(map(numbers, sets.values()), [])) == [*range(n)]
    cell = [*zip(data.y.tolist(), data.a.tolist())]
    shares = np.array([1 - sum(pair), *pair])
    for part in sets.values():  # labels, names and order stay with their images
        assert [*zip(part.y.tolist(), part.a.tolist())] == [cell[i] for i in numbers(part)]
        assert part.classes == data.classes and part.attributes == data.attributes and numbers(part) == sorted(numbers(part))
        assert part.num_classes == 2
    for value, size in Counter(cell).items():
        there = [sum(cell[i] == value for i in numbers(part)) for part in sets.values()]
        assert there == split_counts(size, shares).tolist()


def test_a_seed_says_who_lands_where(capsys):
    data = some_set(200)
    drawn = {seed: [tuple(numbers(part)) for part in split(data, seed=seed).values()] for seed in (0, 1, 2)}
    assert drawn[0] == [tuple(numbers(part)) for part in split(data).values()]  # seed 0 is the default
    assert len({tuple(parts) for parts in drawn.values()}) == 3
    assert capsys.readouterr().out.startswith("a ")  # the table comes first


def test_who_lands_where_does_not_follow_the_order_of_the_data():
    "Half of a class in a test drawn at random from 400: the mean position is in the middle, to 5 sigma."
    with contextlib.redirect_stdout(None): parts = split(from_arrays(numbered(400), [0, 1] * 200), .25, .5)
    assert abs(np.mean(numbers(parts["test"])) - 199.5) < 5 * 400 / 12 ** .5 / 200 ** .5


def test_without_attributes_classes_are_cut(capsys):
    parts = split(from_arrays(numbered(40), [0] * 10 + [1] * 30))
    assert {name: torch.bincount(part.y).tolist() for name, part in parts.items()} == dict(train=[7, 21], valid=[1, 3], test=[2, 6])
    assert all(part.a is None for part in parts.values()) and "not known" in capsys.readouterr().out


def test_many_empty_cells_are_counted_rather_than_listed(capsys):
    n = 30
    data = from_arrays(numbered(n), [f"y{i:02}" for i in range(n)], [f"a{i:02}" for i in range(n)])
    report({"all": data})
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("without a sample: all (y00, a01), ") and last.endswith(f"(y00, a12) and {n * (n - 1) - 12} more")


def test_samples_are_taken_by_number_or_by_yes_and_no():
    data = from_arrays(numbered(6), [0, 1] * 3, [0, 1, 1, 0, 0, 1])
    for which in ([2, 3], torch.tensor([2, 3]), data.is_conflicting, data.is_conflicting.numpy(), data.is_conflicting.tolist()):
        assert numbers(own_data.take(data, which)) == [2, 3]
    assert numbers(own_data.take(data, [5, 0])) == [5, 0]
    with pytest.raises(ValueError, match="each of the 6 samples"): own_data.take(data, torch.ones(5, dtype=torch.bool))


def test_splits_that_one_brings_along_share_their_numbers(capsys):
    # By itself, the test split would pair (0, y), (1, x): there they are the more frequent ones.
    y = ["c0", "c1"] * 10 + ["c0", "c1"] * 4 + ["c0", "c1", "c0"]
    a = ["x", "y"] * 10 + ["x", "y"] * 4 + ["y", "x", "z"]
    splits = ["train"] * 20 + ["valid"] * 8 + ["test"] * 3
    items = [(image, label) for image, label in zip(numbered(31), y)]
    for made in (lambda: from_arrays(numbered(31), y, a, splits=splits), lambda: from_dataset(items, a, splits=splits)):
        sets = made()
        assert [*sets] == [*SPLITS] and [len(data) for data in sets.values()] == [20, 8, 3]
        assert numbers(sets["test"]) == [28, 29, 30] and sets["test"].is_conflicting.all() and not sets["train"].is_conflicting.any()
        assert {data.attributes for data in sets.values()} == {("x", "y", "z")}
        assert "conflicting: 0 of 20 in train, 0 of 8 in valid, 3 of 3 in test" in capsys.readouterr().out
    with pytest.raises(ValueError, match="splits are test, train; expected train, valid, test"):
        from_arrays(numbered(2), [0, 1], [0, 1], splits=["train", "test"])
    with pytest.raises(ValueError, match="splits has 1 labels; expected 2"): from_arrays(numbered(2), [0, 1], splits=["train"])


def test_sets_without_names_are_cut_too():
    with contextlib.redirect_stdout(None): parts = split(plain([0, 1] * 20, [0, 2] * 20))
    assert type(parts["train"]) is BiasedDataset and len(parts["train"]) == 28


@pytest.mark.parametrize("valid, test", [(0, .2), (.1, 0), (.5, .5), (.9, .1), (-.1, .2), (.1, 1.2), (float("nan"), .2)])
def test_shares_that_leave_nothing_are_refused(valid, test, capsys):
    with pytest.raises(ValueError, match=f"^valid is {valid} and test is {test}; expected shares above 0"): split(some_set(50), valid, test)
    assert not capsys.readouterr().out


def test_too_few_samples_for_three_splits_are_refused():
    with pytest.raises(ValueError, match="^valid would have none of 4 samples"): split(from_arrays(numbered(4), [0, 1, 0, 1]))


# --- from a folder

@pytest.fixture
def folder(tmp_path):
    "A folder of 12 images, and a function that writes its table."
    for i, image in enumerate(numbered(12)): Image.fromarray(image).save(tmp_path / f"{i}.png")

    def write(name="labels.csv", **columns):
        columns = dict(file=[f"{i}.png" for i in range(12)], y=["cat", "dog"] * 6,
                       a=["sofa", "grass"] * 5 + ["snow", "sofa"]) | columns
        table = pd.DataFrame({k: v for k, v in columns.items() if v is not None})
        table.to_csv(tmp_path / name, index=False)
        return table
    write()
    tmp_path.write = write
    return tmp_path


@pytest.fixture
def tmp_path(tmp_path):
    "A path that a function can be hung on."
    class Folder(type(tmp_path)): pass
    return Folder(tmp_path)


def test_a_folder_is_what_its_table_says(folder):
    data, table = from_folder(folder), folder.write()
    assert numbers(data) == [*range(12)] and data.x.shape == (12, 3, 2, 4)
    assert [data.classes[i] for i in data.y] == [*table.y] and [data.attributes[i] for i in data.a] == [*table.a]
    assert data.is_conflicting.sum() == 2 and torch.equal(from_folder(str(folder)).x, data.x)


def test_rows_may_come_in_any_order_and_under_another_name(folder):
    folder.write("other.csv", file=[f"{i}.png" for i in range(11, -1, -1)])
    assert numbers(from_folder(folder, "other.csv")) == [*range(11, -1, -1)]
    assert numbers(from_folder(folder, folder / "other.csv")) == [*range(11, -1, -1)]


def test_images_may_be_resized(folder):
    with Image.open(folder / "3.png") as image: image.resize((9, 9)).save(folder / "3.png")
    assert from_folder(folder, size=4).x.shape == (12, 3, 4, 4)
    with pytest.raises((ValueError, OSError), match="png") as caught: from_folder(folder)
    assert "\n" not in str(caught.value)


def test_attributes_may_be_left_out(folder):
    folder.write(a=None)
    assert from_folder(folder).a is None


def test_whole_numbers_in_a_table_are_numbers_and_words_like_none_are_words(folder):
    folder.write(y=[11, 10] * 6, a=["None", "NA"] * 6)
    data = from_folder(folder)
    assert data.classes == ("10", "11") and set(data.attributes) == {"None", "NA"}


def test_spaces_after_commas_and_blank_lines_do_no_harm(folder):
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace(",", ", ") + "\n\n")
    assert from_folder(folder).classes == ("cat", "dog") and [*read_labels(folder / "labels.csv").columns] == ["file", "y", "a"]


def test_lines_are_counted_as_an_editor_counts_them(folder):
    (folder / "labels.csv").write_text("file,y\n0.png,cat\n\n1.png,\n")
    with pytest.raises(ValueError, match="line 4: no y"): from_folder(folder)


def test_a_table_may_hold_the_splits(folder, capsys):
    table = folder.write(split=["test"] * 3 + ["train"] * 6 + ["valid"] * 3)
    sets = from_folder(folder)
    assert list(sets) == list(SPLITS)
    assert {name: numbers(part) for name, part in sets.items()} == dict(train=[*range(3, 9)], valid=[9, 10, 11], test=[0, 1, 2])
    assert sets["valid"].classes == ("cat", "dog") and [sets["test"].attributes[i] for i in sets["test"].a] == [*table.a[:3]]
    assert capsys.readouterr().out.startswith("a ")


def test_training_images_decide_what_is_aligned(folder):
    "Four in the training split, eight in the others that say the opposite."
    folder.write(y=["cat", "dog"] * 6, a=["sofa", "grass"] * 2 + ["grass", "sofa"] * 4, split=["train"] * 4 + ["valid", "test"] * 4)
    sets = from_folder(folder)
    assert sets["train"].attributes == ("sofa", "grass") and sets["test"].is_conflicting.all()
    assert from_folder(folder, aligned={"cat": "grass"})["train"].is_conflicting.all()
    folder.write(y=["cat", "dog"] * 6, a=["sofa", "grass"] * 2 + ["grass", "sofa"] * 4)
    assert from_folder(folder).attributes == ("grass", "sofa")


bad_tables = [
    (dict(file=["0.png", "1.png", "two.png", *[f"{i}.png" for i in range(3, 12)]]), "line 4: .*two.png is no file"),
    (dict(file=["0.png", "1.png", "1.png", *[f"{i}.png" for i in range(3, 12)]]), "line 4: 1.png is there twice"),
    (dict(file=[None] + [f"{i}.png" for i in range(1, 12)]), "line 2: no file"),
    (dict(y=["cat", "dog"] * 5 + ["cat", None]), "line 13: no y"), (dict(a=["u", "", "v"] * 4), "line 3: no a"),
    (dict(y=None), "has no 'y', only file, a; expected columns file and y"), (dict(file=None), "has no 'file', only y, a"),
    (dict(attribute=1), "has an unknown column 'attribute'; expected columns file and y"),
    (dict(splits="train"), "unknown column 'splits', did you mean 'split'. expected"), (dict(Y=1), "'Y', did you mean 'y'"),
    (dict(split="training"), "line 2: split is 'training'; expected train, valid, test"),
    (dict(split=["train", "valid"] * 6), "no split 'test'; expected train, valid, test"), (dict(split=["train", ""] * 6), "line 3: no split"),
    (dict(y=[0, 2] * 6), "labels.csv: y has no 1 between 0 and 2"), (dict(y=0), r"labels.csv: y has the classes \[0\]"),
    (dict(y=[.5, 1] * 6), "labels.csv: y holds float"), (dict(a=[.5, 1] * 6), "labels.csv: a holds float"),
]


@pytest.mark.parametrize("columns, said", bad_tables)
def test_a_bad_table_is_refused_in_a_line_that_names_the_place(columns, said, folder, capsys, monkeypatch):
    folder.write(**columns)
    monkeypatch.setattr(own_data, "read_images", lambda *args, **options: pytest.fail("an image was opened"))
    with pytest.raises((OSError, ValueError), match=said) as caught: from_folder(folder)
    assert str(caught.value).startswith(str(folder / "labels.csv")) and "\n" not in str(caught.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("text, said", [
    (b"", "No columns to parse"), (b"\n", "labels.csv"), (b"file,y\n", "has no row"), (b"file,y\n0.png,cat,1\n", "rows are too long; expected columns"),
    (b"file,y\n0.png,cat\n1.png,dog,1\n", "line 3, saw 3"), (b"\xff\xfe\x00file,y\n", "can't decode"), (b"\x89PNG\r\n\x1a\n\0\0", "labels.csv")])
def test_a_file_that_is_no_table_is_refused_in_a_line(text, said, folder):
    (folder / "labels.csv").write_bytes(text)
    with pytest.raises(ValueError, match=said) as caught: from_folder(folder)
    assert str(caught.value).startswith(str(folder / "labels.csv")) and "\n" not in str(caught.value)


def test_an_empty_or_missing_folder_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(place))}/labels.csv: No such file or directory; expected columns file and y"):
            from_folder(place)
    (tmp_path / "labels.csv").mkdir()
    with pytest.raises(IsADirectoryError, match="labels.csv: Is a directory"): from_folder(tmp_path)


@pytest.fixture
def nobody():
    "Root may read everything: for a while we are somebody else."
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    yield
    if root: os.seteuid(0)


@pytest.mark.parametrize("what", ["folder", "table"])
def test_what_may_not_be_read_is_named(what, folder, request):
    for above in folder.parents:
        if above.stat().st_uid == os.geteuid() and above.name.startswith(("pytest", "test")): above.chmod(0o755)
    folder.chmod(0o755)
    locked = dict(folder=folder, table=folder / "labels.csv")[what]
    locked.chmod(0)
    request.getfixturevalue("nobody")
    try:
        with pytest.raises(PermissionError, match="labels.csv: Permission denied") as caught: from_folder(folder)
        assert "\n" not in str(caught.value)
    finally:
        if os.getuid() == 0: os.seteuid(0)
        locked.chmod(0o755)


def test_the_table_is_checked_before_any_image_is_opened(folder, monkeypatch):
    monkeypatch.setattr(own_data, "read_images", lambda *args, **words: pytest.fail("an image was opened"))
    for columns, said in bad_tables[:12]:
        folder.write(**columns)
        with pytest.raises((OSError, ValueError), match=said): from_folder(folder)


def test_an_image_that_is_none_is_named(folder):
    (folder / "5.png").write_text("no image")
    with pytest.raises((OSError, ValueError), match="5.png") as caught: from_folder(folder)
    assert "\n" not in str(caught.value)


# --- from a data set

colours = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)


@pytest.mark.parametrize("form", [Image.fromarray, lambda x: x, torch.from_numpy, lambda x: np.moveaxis(x, 2, 0)],
                         ids=["PIL", "array", "tensor", "channels first"])
def test_a_data_set_is_its_items(form):
    data = from_dataset([(form(x), i % 2) for i, x in enumerate(colours)], list("ababba"))
    assert (data.x.numpy() == np.moveaxis(colours, 3, 1)).all() and data.y.tolist() == [0, 1] * 3
    assert data.attributes == ("a", "b") and data.a.tolist() == [0, 1, 0, 1, 1, 0]
    assert from_dataset([(form(x), i % 2) for i, x in enumerate(colours)]).a is None


def test_one_item_is_asked_for_once():
    class Counting:
        def __init__(self): self.asked = Counter()
        def __len__(self): return 6
        def __getitem__(self, i):
            self.asked[i] += 1
            return Image.fromarray(colours[i]).convert("L" if i else "RGB"), torch.tensor(i % 3)  # modes may differ
    counting = Counting()
    assert from_dataset(counting).y.tolist() == [0, 1, 2] * 2 and counting.asked == Counter(range(6))


@pytest.mark.parametrize("items, said", [
    ([], "the data set has no sample"),
    ([(colours[0], 0), (colours[1][:2], 1)], r"image 1 is of shape \(2, 5, 3\), the first of \(4, 5, 3\); expected one size"),
    ([(torch.rand(3, 4, 5), 0)] * 2, "images are float32; expected PIL, or uint8"),
    ([(colours[0], 0), (colours[1], 2)], "y has no 1 between 0 and 2"),
    ([(colours[0], 0), (colours[1], 0)], r"y has the classes \[0\]"),
])
def test_a_data_set_that_does_not_fit_is_refused_in_a_line(items, said):
    with pytest.raises(ValueError, match=f"^{said}") as caught: from_dataset(items)
    assert "\n" not in str(caught.value)


def test_attributes_of_another_length_are_refused():
    with pytest.raises(ValueError, match="^a has 1 labels; expected 2"): from_dataset([(colours[0], 0), (colours[1], 1)], ["u"])


def test_images_of_16_bits_keep_their_range_and_those_of_32_are_refused():
    # As read_images has it: Pillow's own conversion would make all but black white.
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    data = from_dataset([(Image.fromarray(ramp), 0), (Image.fromarray(ramp), 1)])
    assert (data.x[0].numpy() == ramp >> 8).all()
    with pytest.raises(ValueError, match="image 1: its pixels have 32 bits"):
        from_dataset([(Image.fromarray(ramp), 0), (Image.fromarray(ramp.astype(np.int32)), 1)])


def test_a_transform_to_floats_is_named_before_all_images_are_read():
    class Floats:
        asked = 0
        def __len__(self): return 1000
        def __getitem__(self, index):
            self.asked += 1
            return torch.rand(3, 4, 4), index % 2
    data = Floats()
    with pytest.raises(ValueError, match="torch.float32|float32.*ToTensor"): from_dataset(data)
    assert data.asked == 1


def test_labels_of_a_column_say_how_to_flatten_them():
    with pytest.raises(ValueError, match=r"y holds several numbers.*y.ravel\(\)"): from_arrays(numbered(2), np.array([[0], [1]]))


def test_spaces_around_names_in_a_table_are_none_of_theirs(folder):
    table = read_labels(folder / "labels.csv")
    table.assign(y=[f" {y} " for y in table.y]).to_csv(folder / "spaced.csv", index=False)
    assert from_folder(folder, "spaced.csv").classes == from_folder(folder).classes
    table.assign(y=[" ", *table.y[1:]]).to_csv(folder / "empty.csv", index=False)
    with pytest.raises(ValueError, match="line 2: no y"): from_folder(folder, "empty.csv")
