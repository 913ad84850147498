"""Colored MNIST is what its description says, to the image.

Two kinds of MNIST: the real one, built once (70,000 images), and a made-up one in MNIST's format and numbers,
whose images are 21 pixels that spell the image's number in binary: after any shuffle we know which is which.
"""
import itertools
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import full_disk
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from rest_nb import data
from rest_nb.data import BiasedDataset, assign_attributes, colored_mnist, examples, load, save
from rest_nb.shim import load_torchvision

ROOT = Path(__file__).parents[1]
SPLITS = {"train": 55_000, "valid": 5_000, "test": 10_000}
RATIOS = [0, .005, .01, .02, .05, 1]
# LfF's mean colours and standard deviations, as noted from its code
MEANS = np.array("""
.9837 .3125 .1686   .9905 .9156 .3515   .6730 .4611 .5798   .7833 .8316 .6013   .0880 .7780 .9818
.3214 .9611 .4464   .0246 .2357 .7587   .5552 .1016 .7618   .2077 .3929 .0187   .8337 .2024 .2669
""".split(), float).reshape(10, 3)
SIGMAS = {1: .05, 2: .02, 3: .01, 4: .005, 5: .002}


# --- who gets a lying attribute

def check_counts(y, a, ratio):
    "Per class, the whole number nearest to ratio × n conflict; the other nine values differ by one at most."
    for target in range(10):
        counts = np.bincount(a[y == target], minlength=10)
        others = np.delete(counts, target)
        exact = Fraction(ratio) * int(counts.sum())  # at a half, either neighbour is the nearest
        assert abs(int(others.sum()) - exact) <= .5 + 1e-9, (target, counts)
        assert others.max() - others.min() <= 1, (target, counts)


ratios = st.sampled_from(RATIOS) | st.floats(0, 1)


@settings(deadline=None)
@given(hnp.arrays(np.int64, st.integers(0, 400), elements=st.integers(0, 9)), ratios, st.integers(0, 9))
def test_counts_are_exact_and_even(y, ratio, seed):
    before = y.copy()
    a = assign_attributes(y, ratio, 10, np.random.default_rng(seed))
    check_counts(y, a, ratio)
    assert (y == before).all() and a.dtype == np.int64


@pytest.mark.parametrize("ratio, conflicting", [
    (0, 0), (.005, 5), (.01, 10), (.02, 20), (.05, 50), (.0009, 1), (.0004, 0), (1, 1000)])
def test_counts_by_hand(ratio, conflicting):
    "Of a thousand sevens."
    a = assign_attributes(np.full(1000, 7), ratio, 10, np.random.default_rng(0))
    assert (a != 7).sum() == conflicting


def test_as_many_values_as_classes():
    "Two classes (faces): there is one other value, and it gets them all."
    y = np.repeat([0, 1], 50)
    a = assign_attributes(y, .1, 2, np.random.default_rng(0))
    assert np.bincount(a[:50]).tolist() == [45, 5] and np.bincount(a[50:]).tolist() == [5, 45]


def test_which_images_conflict_and_with_what_is_drawn():
    "One of twenty conflicts: in 600 draws each is it once, and each value is taken (else a chance of 1e-12)."
    y = np.zeros(20, np.int64)
    drawn = [assign_attributes(y, .05, 10, np.random.default_rng(seed)) for seed in range(600)]
    assert {int(np.flatnonzero(a)[0]) for a in drawn} == set(range(20))
    assert {int(a.max()) for a in drawn} == set(range(1, 10))


@pytest.mark.parametrize("ratio", [-.01, 1.01, float("nan"), float("inf"), 5])
def test_ratio_outside_0_1_is_refused(ratio):
    with pytest.raises(ValueError, match="conflict_ratio is .*expected a share in"):
        assign_attributes(np.zeros(10, np.int64), ratio, 10, np.random.default_rng(0))


# --- made-up MNIST: the splits

BITS = 1 << np.arange(17)  # 17 bits spell numbers up to 131,071


def idx(array):
    "An idx file: two zeros, 8 for uint8, the number of axes, their lengths as big-endian int32, the values."
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(root, prefix, images, labels):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))


def label(number):
    "Image `number` is of this class; classes are unequal, as MNIST's are (0 and 1 are the rare ones)."
    return np.where(number % 3 == 0, number % 10, number % 8 + 2)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A root with 60,000 training and 10,000 test images of 3×7 pixels: the number in binary (255 or 0), then
    a white pixel and three grey ones, of 51, 102 and 204. The test images are those from 60,000 on."""
    root = tmp_path_factory.mktemp("made-up")
    for prefix, numbers in (("train", np.arange(60_000)), ("t10k", np.arange(60_000, 70_000))):
        spelt, greys = (numbers[:, None] & BITS > 0) * 255, np.tile([255, 51, 102, 204], (len(numbers), 1))
        pixels = np.concatenate([spelt, greys], axis=1)
        write_mnist(root, prefix, pixels.reshape(-1, 3, 7), label(numbers))
    return root


def number(data):
    "Which made-up image each is, read from the brightest channel (no mean colour is dark in all three)."
    return (data.x.amax(1).flatten(1)[:, :17] > 0).numpy() @ BITS


def tint(data): return data.x.flatten(2)[:, :, 17].numpy() / 255  # the white pixel's colour, N×3


def test_splits_partition_the_images_and_keep_their_labels(made_up):
    numbers = {}
    for split, size in SPLITS.items():
        built = colored_mnist(made_up, split, conflict_ratio=.05)
        numbers[split] = number(built)
        assert len(built) == size and built.x.shape == (size, 3, 3, 7)
        assert (built.y.numpy() == label(numbers[split])).all()
        check_counts(built.y.numpy(), built.a.numpy(), .9 if split == "test" else .05)
    together = np.sort(np.concatenate([numbers["train"], numbers["valid"]]))
    assert np.array_equal(together, np.arange(60_000))  # disjoint, and nothing missing
    assert np.array_equal(np.sort(numbers["test"]), np.arange(60_000, 70_000))
    # drawn, not cut off an end (MNIST's writers come in order): the mean's sd is 17,320 / sqrt(5,000) = 245
    assert abs(numbers["valid"].mean() - 30_000) < 5 * 245


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_train_and_valid_share_the_ratio(split, ratio, made_up):
    built = colored_mnist(made_up, split, conflict_ratio=ratio)
    check_counts(built.y.numpy(), built.a.numpy(), ratio)


def test_same_arguments_same_set_and_each_argument_counts(made_up):
    def build(conflict_ratio=.05, **words):
        np.random.seed(next(calls))  # the global generator must not matter
        return colored_mnist(made_up, "valid", conflict_ratio=conflict_ratio, **words)
    calls = itertools.count()
    first, again = build(), build()
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in "xya")

    ratio, seed, severity = build(conflict_ratio=.02), build(seed=1), build(severity=2)
    # another seed: other images, and other of them conflict
    assert set(number(seed)) != set(number(first))
    assert set(number(seed)[seed.is_conflicting]) != set(number(first)[first.is_conflicting])
    # another ratio: the same images in the same order, under fresh colours; those that conflict are no subset
    assert (number(ratio) == number(first)).all()
    assert not np.array_equal(tint(ratio)[:, 0] - MEANS[ratio.a, 0], tint(first)[:, 0] - MEANS[first.a, 0])
    assert not set(number(ratio)[ratio.is_conflicting]) <= set(number(first)[first.is_conflicting])
    # another severity: the same images and attributes, other colours
    assert torch.equal(severity.a, first.a) and not torch.equal(severity.x, first.x)
    # severity 4 and seed 0 are what one gets without asking
    assert torch.equal(build(severity=4, seed=0).x, first.x)


def test_splits_seeds_and_ratios_each_have_draws_of_their_own(tmp_path, monkeypatch):
    "Where all splits are alike, 20 white pixels of one class, nothing but the draws can tell them apart."
    for prefix, n in (("train", 40), ("t10k", 20)):
        write_mnist(tmp_path, prefix, np.full((n, 1, 1), 255), np.full(n, 3))
    monkeypatch.setattr(data, "VALID_SIZE", 20)
    draws = {colored_mnist(tmp_path, split, conflict_ratio=ratio, seed=seed).x.numpy().tobytes()
             for split in SPLITS for seed in (0, 1) for ratio in (0, .001)}  # .001 × 20: none conflicts
    assert len(draws) == 3 * 2 * 2


@pytest.mark.parametrize("severity", SIGMAS)
def test_noise_has_the_severitys_sigma_for_each_image_and_channel(severity, made_up):
    built = colored_mnist(made_up, "train", conflict_ratio=0, severity=severity)
    twos = (built.a == 2).numpy()  # colour 2 is far from 0 and from 1: nothing is clamped
    noise = tint(built)[twos] - MEANS[2]
    assert len(noise) > 4000
    rounding = 1 / 255 / 12 ** .5  # sd of rounding to whole grey levels, independent of the noise
    expected = np.hypot(SIGMAS[severity], rounding)
    # 4,000 values give a mean to 1.6 % of sigma, a correlation to .016; 12,000 give the sd to 0.7 %
    assert np.abs(noise.mean(axis=0)).max() < .08 * expected
    assert abs(noise.std() / expected - 1) < .04
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < .08  # channels vary by themselves


def test_grey_levels_keep_their_ratio(made_up):
    "51, 102, 204 are 1/5, 2/5, 4/5 of 255; both sides are rounded, hence one level of slack."
    built = colored_mnist(made_up, "valid", conflict_ratio=.05, severity=1)
    pixels = built.x.flatten(2).double()
    for place, share in ((18, .2), (19, .4), (20, .8)):
        assert (pixels[:, :, place] - share * pixels[:, :, 17]).abs().max() <= 1
    # one colour for the image: all its white pixels are equal
    white = pixels[:, :, :17]
    assert ((white == 0) | (white == pixels[:, :, 17:18])).all()


def test_colours_beyond_black_and_white_are_clamped(made_up):
    "Severity 1 takes colour 6's red (.0246) below 0, colour 1's (.9905) above 1: uint8 would wrap around."
    built = colored_mnist(made_up, "train", conflict_ratio=0, severity=1)
    red = tint(built)[:, 0]
    dark, bright = red[(built.a == 6).numpy()], red[(built.a == 1).numpy()]
    assert dark.max() < MEANS[6, 0] + 5 * .05 and bright.min() > MEANS[1, 0] - 5 * .05
    # a third of the one (0.49 sigma) and four tenths of the other (0.19 sigma) lie on the limit
    assert .26 < (dark == 0).mean() < .40 and .36 < (bright == 1).mean() < .49


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("ratio", [-.01, 1.01, float("nan"), float("inf")])
def test_any_split_refuses_a_ratio_outside_0_1(ratio, split, made_up):
    with pytest.raises(ValueError, match="conflict_ratio is"):
        colored_mnist(made_up, split, conflict_ratio=ratio)


@pytest.mark.parametrize("name, value", [("split", "training"), ("severity", 0), ("severity", 6)])
def test_unknown_split_or_severity_is_refused(name, value, made_up):
    words = dict(split="valid", conflict_ratio=.05) | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected one of"):
        colored_mnist(made_up, **words)


# --- the real one

@pytest.fixture(scope="module")
def real(): return {split: colored_mnist(ROOT / "data", split, conflict_ratio=.005) for split in SPLITS}


def test_real_sizes_and_counts(real):
    assert {split: len(built) for split, built in real.items()} == SPLITS
    assert all(built.x.shape[1:] == (3, 28, 28) for built in real.values())
    # MNIST's images of each class, as its description counts them
    both = torch.cat([real["train"].y, real["valid"].y])
    assert torch.bincount(both).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(real["test"].y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    for split, ratio in dict(train=.005, valid=.005, test=.9).items():
        check_counts(real[split].y.numpy(), real[split].a.numpy(), ratio)


def test_real_test_attribute_is_uniform_and_tells_nothing(real):
    test = real["test"]
    cells = torch.bincount(test.y * 10 + test.a, minlength=100).view(10, 10)
    assert (cells - cells.sum(1, keepdim=True) / 10).abs().max() <= 1  # a tenth of each class
    assert abs((test.y == test.a).double().mean().item() - .1) < .001


@pytest.mark.parametrize("split", SPLITS)
def test_real_colours_are_those_of_the_attribute(split, real):
    built = real[split]
    brightest = built.x.amax((2, 3)).numpy() / 255
    # 5 sigma, half a level for rounding, one more because an image's whitest pixel may be 254
    assert np.abs(brightest - MEANS[built.a]).max() < 5 * SIGMAS[4] + 1.5 / 255
    for value in range(10):  # hundreds of images average the noise out: the table holds to its second decimal
        assert np.abs(brightest[built.a == value].mean(axis=0) - MEANS[value]).max() < .003


def test_real_test_images_are_mnists_under_a_colour(real):
    "torchvision reads the grey images, in the same order: background black, greys kept, labels in place."
    mnist = load_torchvision().datasets.MNIST(ROOT / "data", train=False)
    assert torch.equal(real["test"].y, mnist.targets)
    x, grey = real["test"].x[::5], mnist.data[::5, None].float()
    assert not x.amax(1, keepdim=True)[grey == 0].any()
    expected = grey / grey.amax((2, 3), keepdim=True) * x.amax((2, 3), keepdim=True)
    assert (x - expected).abs().max() <= 1.01  # two roundings


# --- a biased data set

def tiny(n=4, num_classes=10, **changes):
    "`n` black images, targets 0, 1, 2…, all of attribute 0."
    x, y, a = torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.arange(n), torch.zeros(n, dtype=torch.int64)
    return BiasedDataset(**dict(x=x, y=y % num_classes, a=a, num_classes=num_classes) | changes)


@pytest.mark.parametrize("changes, said", [
    (dict(x=torch.zeros(4, 3, 2, 2)), "x is torch.float32"),
    (dict(x=torch.zeros(4, 2, 2, dtype=torch.uint8)), "shape \\(4, 2, 2\\)"),
    (dict(y=torch.zeros(3, dtype=torch.int64)), "y is .*4 images"),
    (dict(a=torch.zeros(5, dtype=torch.int64)), "a is .*4 images"),
    (dict(y=torch.zeros(4)), "y is torch.float32"),
    (dict(a=torch.zeros(4, dtype=torch.int32)), "a is torch.int32"),
    (dict(a=torch.zeros(4, 1, dtype=torch.int64)), "a is .*\\(4, 1\\)"),
    (dict(y=torch.tensor([0, 1, 2, 10])), "y runs from 0 to 10; expected 0 to 9"),
    (dict(a=torch.tensor([0, -1, 2, 9])), "a runs from -1 to 9"),
    (dict(num_classes=3), "y runs from 0 to 3; expected 0 to 2"),
])
def test_what_does_not_fit_is_refused_in_a_line(changes, said):
    fits = tiny()
    with pytest.raises(ValueError, match=said) as caught:
        BiasedDataset(**dict(x=fits.x, y=fits.y, a=fits.a) | changes)
    assert "\n" not in str(caught.value)


def test_what_fits_is_taken():
    assert len(tiny(4)) == 4 and len(tiny(0)) == 0
    assert tiny(a=torch.tensor([0, 2, 2, 9])).is_conflicting.tolist() == [False, True, False, True]
    assert tiny(y=torch.tensor([0, 1, 2, 9])).y.max() == 9  # the last class is one
    with pytest.raises(AttributeError): tiny().y = tiny().a  # a set does not change under its user


# --- on disk

def sets_of(n, fill, **words):
    "A small data set full of `fill`."
    return tiny(n, x=torch.full((n, 3, 2, 2), fill, dtype=torch.uint8), **words)


def same(one, other): return all(torch.equal(getattr(one, name), getattr(other, name)) for name in "xya")


def test_saved_sets_load_again(tmp_path):
    sets = {"train": sets_of(6, 1, a=torch.tensor([9, 8, 7, 6, 5, 4])), "test": sets_of(3, 2)}
    save(tmp_path / "new" / "folder" / "set.npz", sets)  # makes the folders
    path = tmp_path / "new" / "folder" / "set.npz"
    assert all(same(load(path, split), built) for split, built in sets.items())
    with pytest.raises(ValueError, match=f"split is 'tset'; .*set.npz has {', '.join(sets)}"): load(path, "tset")
    assert list(path.parent.iterdir()) == [path]
    assert load(str(path), "test").x.dtype == torch.uint8  # a path may be text


@pytest.mark.parametrize("num_classes", [2, 12])
def test_the_number_of_classes_is_saved_too(num_classes, tmp_path):
    save(tmp_path / "set.npz", {"train": sets_of(num_classes, 1, num_classes=num_classes)})
    assert load(tmp_path / "set.npz", "train").num_classes == num_classes


def test_saving_replaces_the_old_file(tmp_path):
    for fill in (1, 2): save(tmp_path / "set.npz", {"train": sets_of(2, fill)})
    assert load(tmp_path / "set.npz", "train").x.unique().tolist() == [2]


def test_same_sets_same_bytes_whenever_written(tmp_path, monkeypatch):
    "DVC knows a file by its hash."
    save(tmp_path / "one.npz", {"train": sets_of(2, 1)})
    now, localtime = time.time, time.localtime
    monkeypatch.setattr(time, "time", lambda: now() + 1e6)
    monkeypatch.setattr(time, "localtime", lambda at=None: localtime((now() if at is None else at) + 1e6))
    save(tmp_path / "two.npz", {"train": sets_of(2, 1)})
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_the_bytes_are_plain_npy_files_in_a_plain_zip(tmp_path):
    """Each header of the archive by its definition (PKWARE's APPNOTE 4.3.7): version 2.0, no flags, no compression, 1980-01-01,
    and no extra field: `numpy.savez` leaves one whose content differs between releases of Python."""
    save(tmp_path / "set.npz", {"train": sets_of(2, 1)})
    content = (tmp_path / "set.npz").read_bytes()
    headers = [content[at:at + 30] for at in range(len(content)) if content[at:at + 4] == b"PK\3\4"]
    assert len(headers) == 4
    assert all(h[4:14] == bytes([20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0]) and h[28:30] == b"\0\0" for h in headers)


def test_a_set_without_attributes(tmp_path):
    unknown = BiasedDataset(torch.ones(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), None, 2)
    save(tmp_path / "set.npz", {"train": unknown, "test": sets_of(2, 1)})
    again = load(tmp_path / "set.npz", "train")
    assert again.a is None and torch.equal(again.y, unknown.y) and load(tmp_path / "set.npz", "test").a is not None
    with pytest.raises(ValueError, match="^a is None; expected the bias attribute of each image$"): again.is_conflicting


def test_an_attribute_may_agree_with_no_class():
    assert tiny(2, y=torch.tensor([0, 1]), a=torch.tensor([0, 2]), num_classes=2).is_conflicting.tolist() == [False, True]


@pytest.mark.parametrize("room", [0, 5_000, -1], ids=["no room", "room for half", "room for all but a byte"])
@pytest.mark.parametrize("old", [True, False], ids=["old file", "no file"])
def test_a_disk_that_fills_leaves_what_was_there(old, room, tmp_path):
    def held(): return {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = {"train": sets_of(600, 1)}
    save(tmp_path / "set.npz", new)
    whole = held()
    if old: save(tmp_path / "set.npz", {"train": sets_of(2, 7)})
    else: (tmp_path / "set.npz").unlink()
    before = held()
    with full_disk(room % len(whole["set.npz"])), pytest.raises(OSError): save(tmp_path / "set.npz", new)
    assert held() == before
    save(tmp_path / "set.npz", new)  # the disk was all that was wrong
    assert held() == whole


def test_a_save_that_is_stopped_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path / "set.npz", {"train": sets_of(2, 7)})
    before = (tmp_path / "set.npz").read_bytes()
    def stopped(file, arrays):
        file.write(b"PK half a file")
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "_write_arrays", stopped)
    with pytest.raises(KeyboardInterrupt): save(tmp_path / "set.npz", {"train": sets_of(2, 1)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_split_is_read_without_the_others(tmp_path):
    "Training never opens the test split: spoil it in the file, and train still loads."
    save(tmp_path / "set.npz", {"train": sets_of(50, 1), "test": sets_of(50, 77)})
    content = (tmp_path / "set.npz").read_bytes()
    assert content.count(b"M" * 600) == 1  # 77 is M: the test images, as they are (50 × 3 × 2 × 2 bytes)
    (tmp_path / "set.npz").write_bytes(content.replace(b"M" * 600, b"N" * 600))
    assert same(load(tmp_path / "set.npz", "train"), sets_of(50, 1))
    with pytest.raises(Exception, match="CRC"): load(tmp_path / "set.npz", "test")


def test_a_missing_file_names_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set\.npz is missing: `dvc repro sets sets-objects` makes it"):
        load(tmp_path / "set.npz", "train")
    with pytest.raises(FileNotFoundError): load(tmp_path, "train")  # a folder is no file


# --- a picture of it

def picture_set(y, a, num_classes):
    "Image i is 1×2 pixels, i in the left one, 100 + i in the right one."
    x = torch.tensor([[[[i, 100 + i]]] for i in range(len(y))], dtype=torch.uint8)
    return BiasedDataset(x, torch.tensor(y), torch.tensor(a), num_classes)


def test_picture_has_aligned_rows_then_conflicting_ones():
    #                 number  0  1  2  3  4  5  6
    built = picture_set(y=[0, 1, 0, 1, 0, 0, 0], a=[1, 1, 0, 0, 0, 0, 1], num_classes=3)
    # class 0: 2, 4, 5 aligned, 0, 6 conflicting; class 1: 1 aligned, 3 conflicting; class 2: none
    assert examples(built, per_class=2)[..., 0].tolist() == [
        [2, 102, 1, 101, 255, 255],
        [4, 104, 255, 255, 255, 255],
        [0, 100, 3, 103, 255, 255],
        [6, 106, 255, 255, 255, 255]]
    assert examples(built)[..., 0].tolist() == [  # one of each
        [2, 102, 1, 101, 255, 255],
        [0, 100, 3, 103, 255, 255]]


def test_picture_keeps_rows_columns_and_channels_of_an_image():
    x = torch.arange(3 * 2 * 4, dtype=torch.uint8).view(1, 3, 2, 4)
    picture = examples(BiasedDataset(x, torch.tensor([1]), torch.tensor([1]), num_classes=2))
    assert picture.shape == (2 * 2, 2 * 4, 3) and picture.dtype == np.uint8
    assert (picture[:2, 4:] == np.moveaxis(x[0].numpy(), 0, 2)).all()
    assert (picture[:, :4] == 255).all() and (picture[2:] == 255).all()
