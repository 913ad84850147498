"""Face sets without a face: drawn squares under UTKFace's and BFFHQ's names, whose colour tells which is which.

The real UTKFace is asked too where it lies beside the clone; nothing of it is ever written or shown.
"""
import errno
import itertools
import os
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from rest_nb import faces
from rest_nb.faces import bffhq, image_files, place, train_counts, utkface, utkface_label, utkface_rows

ROOT = Path(__file__).parents[1]
ZIP = ROOT.parent / "shared" / "data" / "utkface-128.zip"
real = pytest.mark.skipif(not ZIP.is_file(), reason=f"the real UTKFace is not here ({ZIP.name})")
YOUNG, OLD, MAN, WOMAN = 20, 50, 0, 1  # ages, and genders in UTKFace's code
SPLITS = ("train", "valid", "test")


def square(number, size=4, **options):
    "A square whose colour is its number."
    return Image.new("RGB", (size, size), (number // 65536, number // 256 % 256, number % 256))


def numbers(data): return (data.x[:, :, 0, 0].long() * torch.tensor([65536, 256, 1])).sum(1).tolist()


def put(folder, age, gender, number, name="{age}_{gender}_0_{number:017}.png", **options):
    path = folder / name.format(age=age, gender=gender, number=number)
    path.parent.mkdir(parents=True, exist_ok=True)
    square(number, **options).save(path)
    return path


COUNTS = {(YOUNG, WOMAN): 40, (OLD, MAN): 30, (YOUNG, MAN): 25, (OLD, WOMAN): 20}
CELL = {(YOUNG, WOMAN): (0, 0), (OLD, MAN): (1, 1), (YOUNG, MAN): (0, 1), (OLD, WOMAN): (1, 0)}


def fill(folder):
    "COUNTS squares; returns {number: (y, a)} as their names say."
    people = [kind for kind, n in COUNTS.items() for _ in range(n)]
    for number, kind in enumerate(people, 1000): put(folder, *kind, number)
    return {number: CELL[kind] for number, kind in enumerate(people, 1000)}


@pytest.fixture(autouse=True)
def small_held_out(request, monkeypatch):
    "Ten of each cell are held out instead of 375, so that sets may be small."
    if "real" not in request.node.name: monkeypatch.setattr(faces, "HELD_OUT", {"test": 7, "valid": 3})


def refused(error, call, *args, **kwargs):
    with pytest.raises(error) as caught: call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1 and type(caught.value) is error
    return str(caught.value)


# --- what a name says

@pytest.mark.parametrize("age", [10, 29, 40, 59])
@pytest.mark.parametrize("gender, a", [(0, 1), (1, 0)])
@pytest.mark.parametrize("ending", [".jpg", ".jpg.chip.jpg", " .jpg", "jpg.chip.jpg"])
def test_labels(age, gender, a, ending):
    "Aligned, y == a: young women and old men. UTKFace's own code: 0 man, 1 woman."
    name = f"{age}_{gender}_3_20170116174525125{ending}"
    for file in (name, f"some/where/{name}", Path(name), ("x.zip", f"some/{name}")):
        assert utkface_label(file) == (int(age >= 40), a)


@pytest.mark.parametrize("age", [1, 9, 30, 39, 60, 116])
def test_other_ages(age): assert utkface_label(f"{age}_0_0_20170116174525125.jpg") == "other age"


@pytest.mark.parametrize("name", [
    "portrait.jpg", "25_1_20170116174525125.jpg", "25_2_0_20170116174525125.jpg", "25__0_20170116174525125.jpg",
    "25_1_7_20170116174525125.jpg", "x25_1_0_20170116174525125.jpg", "-5_1_0_20170116174525125.jpg", "25_1_0_.jpg",
    "25_1_0.jpg", "1025_1_0_20170116174525125.jpg"])
def test_names_that_do_not_parse_are_named_before_any_file_is_read(tmp_path, monkeypatch, name):
    fill(tmp_path)
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("a file was read"))
    said = refused(ValueError, utkface, tmp_path, conflict_ratio=.1, size=4)
    assert said == f"{tmp_path / name}: the name is not age_gender_race_date.jpg as in UTKFace"


def test_known_slips_are_passed_over_and_counted(tmp_path, capsys):
    fill(tmp_path)
    for name in ("39_1_20170116174525125", "61_1_20170109142408075", "61_1_20170109150557335"):
        (tmp_path / f"{name}.jpg.chip.jpg").write_bytes(name.encode())
    for number in range(4): put(tmp_path, 35, MAN, number)
    assert len(utkface_rows(tmp_path)) == 115
    assert capsys.readouterr().err == "UTKFace: 115 images; left out: 3 misnamed, 4 other age\n"


# --- which rows

def test_duplicates_are_kept_once_and_contradictions_never(tmp_path, capsys):
    fill(tmp_path)
    put(tmp_path, YOUNG, WOMAN, 1000, "21_1_2_5.png")                       # number 1000 again, a young woman again
    put(tmp_path, YOUNG, WOMAN, 1001, "deep/22_0_0_6.png")                  # 1001, now a man
    put(tmp_path, YOUNG, WOMAN, 1002, "35_1_0_7.png")                       # 1002, now of another age
    rows = utkface_rows(tmp_path)
    assert capsys.readouterr().err == "UTKFace: 113 images; left out: 1 duplicate, 4 under two labels\n"
    found = Counter(int(np.asarray(Image.open(file))[0, 0] @ [65536, 256, 1]) for file in rows.file)
    assert set(found.values()) == {1} and found.keys() == set(range(1000, 1115)) - {1001, 1002}


def test_folder_and_zip_in_any_order_under_any_name_give_the_same_sets(tmp_path, monkeypatch):
    fill(tmp_path / "plain")
    paths = sorted((tmp_path / "plain").iterdir())
    mixed = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:  # shuffled, elsewhere, renamed
        for i, path in enumerate(mixed):
            archive.write(path, f"{i % 3}/" + "_".join(path.name.split("_")[:2]) + f"_4_{i}.jpg.chip.png")
        archive.writestr("README.txt", "no image")
        archive.writestr("__MACOSX/._20_1_0_5.png", "no image either")
    plain = utkface(tmp_path / "plain", conflict_ratio=.1, size=4)
    real_walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((w, d, files[::-1]) for w, d, files in real_walk(*a, **k)))
    for again in (utkface(str(tmp_path / "set.zip"), conflict_ratio=.1, size=4),
                  utkface(str(tmp_path / "plain"), conflict_ratio=.1, size=4)):
        for split in SPLITS:
            for name in "xya": assert torch.equal(getattr(again[split], name), getattr(plain[split], name))


# --- how many of each

sizes = st.integers(1, 60)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.tuples(sizes, sizes, sizes, sizes), st.sampled_from([0, .005, .05, .2, .5, 1]) | st.floats(0, 1))
def test_train_counts(n, ratio):
    available = dict(zip(itertools.product((0, 1), (0, 1)), n))
    found = train_counts(available, ratio)
    assert all(0 <= found[cell] <= available[cell] for cell in available)
    conflicting, aligned = found[0, 1] + found[1, 0], found[0, 0] + found[1, 1]
    assert abs(conflicting - Fraction(ratio) * (conflicting + aligned)) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert 0 <= found[0, 1] - found[1, 0] <= 1
    # the largest: aligned ones are all in, or no more conflicting ones can be
    assert aligned == n[0] + n[3] or conflicting == 2 * min(n[1], n[2])
    assert abs(found[0, 0] - found[1, 1]) <= 1 or found[0, 0] == available[0, 0] or found[1, 1] == available[1, 1]


@pytest.mark.parametrize("ratio, expected", [
    (0, (30, 20, 0, 0)), (1, (0, 0, 10, 10)), (.5, (10, 10, 10, 10)), (1 / 11, (30, 20, 3, 2)), (.25, (30, 20, 9, 8))])
def test_train_counts_by_hand(ratio, expected):
    "30 young women, 20 old men, 15 young men, 10 old women may train."
    found = train_counts({(0, 0): 30, (1, 1): 20, (0, 1): 15, (1, 0): 10}, ratio)
    assert tuple(found[cell] for cell in ((0, 0), (1, 1), (0, 1), (1, 0))) == expected


def cells(data): return Counter(zip(data.y.tolist(), data.a.tolist()))


@pytest.mark.parametrize("ratio", [0, .01, .1, .5, 1])
def test_the_set_is_what_it_says(tmp_path, ratio):
    truth = fill(tmp_path)
    sets = utkface(tmp_path, conflict_ratio=ratio, size=4)
    assert tuple(sets) == SPLITS
    for data in sets.values():  # every image with its own label
        assert data.num_classes == 2 and data.x.shape[1:] == (3, 4, 4)
        assert [truth[n] for n in numbers(data)] == list(zip(data.y.tolist(), data.a.tolist()))
    everyone = [n for data in sets.values() for n in numbers(data)]
    assert len(everyone) == len(set(everyone))  # no image stands in two splits, or twice in one
    assert cells(sets["valid"]) == dict.fromkeys(CELL.values(), 3)
    assert cells(sets["test"]) == dict.fromkeys(CELL.values(), 7)
    expected = train_counts({(0, 0): 30, (1, 1): 20, (0, 1): 15, (1, 0): 10}, ratio)
    assert cells(sets["train"]) == {cell: n for cell, n in expected.items() if n}


def test_what_is_held_out_does_not_depend_on_the_ratio_but_on_the_seed(tmp_path):
    fill(tmp_path)
    one, two, other = (utkface(tmp_path, conflict_ratio=ratio, size=4, seed=seed)
                       for ratio, seed in ((.05, 0), (.5, 0), (.05, 1)))
    for split in ("valid", "test"):
        assert numbers(one[split]) == numbers(two[split]) and set(numbers(one[split])) != set(numbers(other[split]))


def test_a_set_of_fewer_is_part_of_a_set_of_more(tmp_path):
    "The conflicting images at a low ratio are among those at a higher one."
    fill(tmp_path)
    few, many = (utkface(tmp_path, conflict_ratio=ratio, size=4)["train"] for ratio in (.04, .2))
    few, many = (set(np.array(numbers(data))[data.is_conflicting.numpy()]) for data in (few, many))
    assert 0 < len(few) < len(many) and few < many


def test_rows_are_mixed(tmp_path):
    "Not one cell after the other: whoever looks at the first ten sees several kinds."
    fill(tmp_path)
    data = utkface(tmp_path, conflict_ratio=.5, size=4)["train"]
    assert len(set(zip(data.y[:10].tolist(), data.a[:10].tolist()))) > 2


def test_size_is_the_side_in_pixels_and_128_by_default(tmp_path):
    fill(tmp_path)
    put(tmp_path, YOUNG, WOMAN, 5, size=9)
    assert utkface(tmp_path, conflict_ratio=.1, size=6)["train"].x.shape[2:] == (6, 6)
    assert utkface(tmp_path, conflict_ratio=.1)["valid"].x.shape[2:] == (128, 128)


# --- what cannot be read

def test_too_few_are_told_before_any_image_is_decoded(tmp_path, monkeypatch):
    fill(tmp_path)
    for path in sorted(tmp_path.glob(f"{OLD}_{WOMAN}_*"))[:10]: path.unlink()
    monkeypatch.setattr(faces, "read_images", lambda *args: pytest.fail("images were read"))
    said = refused(ValueError, utkface, tmp_path, conflict_ratio=.1)
    assert said == "10 old women: expected more than the 10 that valid and test take of each cell"


@pytest.mark.parametrize("ratio", [-.1, 1.1, float("nan")])
def test_ratios_that_are_none(ratio):
    assert "expected a share in [0, 1]" in refused(ValueError, utkface, "nowhere", conflict_ratio=ratio)


def test_empty_folders_and_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"): pass
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    (tmp_path / "folder" / ".20_0_0_1.jpg").write_text("hidden")
    for source in (tmp_path / "empty.zip", tmp_path / "folder"):
        assert refused(ValueError, utkface, source, conflict_ratio=.1) == f"{source} holds no .jpg or .png file"


def test_missing_and_cut_short(tmp_path):
    assert refused(FileNotFoundError, image_files, tmp_path / "no.zip") == f"{tmp_path / 'no.zip'} is missing"
    fill(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "set").iterdir(): archive.write(path, path.name)
    whole = (tmp_path / "set.zip").read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.zip").write_bytes(whole[:end])
        assert refused(ValueError, utkface, tmp_path / "cut.zip", conflict_ratio=.1) == \
            f"{tmp_path / 'cut.zip'} is no zip, or one cut short: copy it again"


def test_a_folder_without_permission_is_not_an_empty_one(tmp_path, monkeypatch):
    "Whoever runs this, root too: scandir is what the kernel refuses."
    fill(tmp_path / "deep" / "er")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "er": raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    said = refused(ValueError, utkface, tmp_path, conflict_ratio=.1)
    assert said == f"{tmp_path / 'deep' / 'er'} cannot be read: Permission denied"


@pytest.mark.parametrize("content, said", [(b"This is no image.", "is no image that Pillow knows"),
                                           (None, "cannot be decoded: ")])
def test_bad_images_are_named(tmp_path, content, said):
    fill(tmp_path)
    bad = tmp_path / f"{OLD}_{MAN}_0_77.png"
    square(7, 200).save(bad)
    bad.write_bytes(bad.read_bytes()[:200] if content is None else content)
    assert refused(ValueError, utkface, tmp_path, conflict_ratio=.1).startswith(f"{bad} {said}")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK"])
def test_grey_palette_and_cmyk_are_read_like_the_others(tmp_path, mode):
    fill(tmp_path)
    for path in list(tmp_path.glob(f"{OLD}_{WOMAN}_*")):
        path.unlink()
        side = 5 + int(path.name.split("_")[3][:-4]) % 100  # so that no two are the same
        Image.new("RGB", (side, side), "gold").convert(mode).save(path.with_suffix(".jpg" if mode == "CMYK" else ".png"))
    sets = utkface(tmp_path, conflict_ratio=1, size=4)
    assert sum(len(data) for data in sets.values()) == 40 + 2 * 10


@pytest.mark.parametrize("variable, make", [("REST_NB_FACES", lambda: utkface(conflict_ratio=.1, size=4)),
                                            ("REST_NB_BFFHQ", lambda: bffhq(size=4))])
def test_the_environment_names_the_place(tmp_path, monkeypatch, variable, make):
    monkeypatch.delenv(variable, raising=False)
    said = refused(FileNotFoundError, make)
    assert said.startswith(f"{variable} is not set: let it name the folder or zip of ")
    assert {"REST_NB_FACES": "non-commercial research only", "REST_NB_BFFHQ": "CC BY-NC-SA 4.0"}[variable] in said
    fill(tmp_path) if variable == "REST_NB_FACES" else archive(tmp_path)
    monkeypatch.setenv(variable, str(tmp_path))
    assert place(variable) == tmp_path and len(make()["test"]) == {"REST_NB_FACES": 28, "REST_NB_BFFHQ": 12}[variable]


# --- BFFHQ, on a stand-in with its layout

def archive(folder, valid="bffhq/0.5pct/valid", classes=True):
    "20 images to train, 4 of them conflicting; 8 to validate, 12 to test."
    truth, number = {}, 0
    for where, labels in (("bffhq/0.5pct/align", [(0, 0), (1, 1)] * 8), ("bffhq/0.5pct/conflict", [(0, 1), (1, 0)] * 2),
                          (valid, [*itertools.product((0, 1), repeat=2)] * 2),
                          ("bffhq/test", [*itertools.product((0, 1), repeat=2)] * 3)):
        for y, a in labels:
            put(folder / where / (str(y) if classes else ""), y, a, number, "{number}_{age}_{gender}.png")
            truth[number] = where, y, a
            number += 1
    return truth


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("valid", ["bffhq/0.5pct/valid", "bffhq/valid"])
def test_bffhq_is_split_and_labelled_as_its_paths_say(tmp_path, valid, classes):
    truth = archive(tmp_path / "set", valid, classes)
    put(tmp_path / "set", 0, 0, 999, "bffhq/1pct/align/0/{number}_{age}_{gender}.png")  # another ratio
    put(tmp_path / "set", 0, 0, 998, "overview.png")                                     # and a picture of the set
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in (tmp_path / "set").rglob("*.png"): file.write(path, path.relative_to(tmp_path / "set"))
    for source in (tmp_path / "set", tmp_path / "set.zip"):
        sets = bffhq(source, size=4)
        assert {split: len(data) for split, data in sets.items()} == dict(train=20, valid=8, test=12)
        assert int(sets["train"].is_conflicting.sum()) == 4
        for split, data in sets.items():
            for number, y, a in zip(numbers(data), data.y.tolist(), data.a.tolist()):
                where, *labels = truth[number]
                assert [y, a] == labels and (split in where or split == "train" and ("align" in where) == (y == a))


@pytest.mark.parametrize("path, said", [
    ("align/0/5_0_1.png", "y is 0 and a is 1, but the folder says align"),
    ("conflict/1/5_1_1.png", "y is 1 and a is 1, but the folder says conflict"),
    ("valid/0/face.png", "the name is not id_y_a.png as in BFFHQ"),
    ("align/2/5_2_2.png", "the name is not id_y_a.png as in BFFHQ")])
def test_bffhq_names_what_does_not_fit(tmp_path, path, said):
    archive(tmp_path)
    bad = put(tmp_path, 0, 0, 5, f"bffhq/0.5pct/{path}")
    assert refused(ValueError, bffhq, tmp_path) == f"{bad}: {said}"


@pytest.mark.parametrize("split", SPLITS)
def test_bffhq_without_a_split(tmp_path, split):
    archive(tmp_path)
    folders = {"train": ["bffhq/0.5pct/align", "bffhq/0.5pct/conflict"], "valid": ["bffhq/0.5pct/valid"], "test": ["bffhq/test"]}
    for path in [p for f in folders[split] for p in (tmp_path / f).rglob("*.png")]: path.unlink()
    assert refused(ValueError, bffhq, tmp_path).startswith(f"{tmp_path} holds no image of {split}; expected bffhq/0.5pct/")


# --- the real UTKFace

@pytest.fixture(scope="module")
def real_rows(): return utkface_rows(ZIP)


@real
def test_real_counts(real_rows):
    found = Counter(zip(real_rows.y, real_rows.a))
    assert found == {(0, 0): 4993, (1, 1): 3086, (0, 1): 3603, (1, 0): 1341}


def not_decoding(monkeypatch, seen=None):
    "Let `utkface` make black images; note in `seen` which files they were."
    def read_images(files, size):
        if seen is not None: seen.append(list(files))
        return np.zeros((len(files), 3, 1, 1), np.uint8)
    monkeypatch.setattr(faces, "read_images", read_images)


@real
def test_real_splits_are_disjoint_by_content_and_balanced(monkeypatch):
    not_decoding(monkeypatch, seen := [])
    sets = utkface(ZIP, conflict_ratio=.2)
    assert set(cells(sets["valid"]).values()) == {125} and set(cells(sets["test"]).values()) == {250}
    with zipfile.ZipFile(ZIP) as archive: contents = {archive.read(name) for files in seen for _, name in files}
    assert [len(files) for files in seen] == [9161, 500, 1000] and len(contents) == 10661


@real
def test_real_folder_and_zip_give_the_same_rows(tmp_path, real_rows):
    with zipfile.ZipFile(ZIP) as archive: archive.extractall(tmp_path, names := archive.namelist()[::97])
    assert len(names) > 100
    in_zip = [name for (_, name), *_ in real_rows.itertuples(index=False) if name in set(names)]
    assert [os.path.relpath(file, tmp_path) for file in utkface_rows(tmp_path).file] == in_zip


def notebooks_table():
    "The table of training sets in the notebook: {ratio: numbers}."
    text = "\n".join(c.source for c in nbformat.read(ROOT / "nbs" / "01_faces.ipynb", 4).cells if c.cell_type == "markdown")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| 0.")]
    return {float(row[0]): [int(cell.replace(",", "")) for cell in row[1:]] for row in rows}


@real
@pytest.mark.parametrize("ratio", [.005, .05, .2, .5])
def test_real_sizes_are_those_of_the_notebook(real_rows, monkeypatch, ratio):
    monkeypatch.setattr(faces, "utkface_rows", lambda *args: real_rows)
    not_decoding(monkeypatch)
    train = cells(utkface(ZIP, conflict_ratio=ratio)["train"])
    found = [train[0, 0], train[1, 1], train[0, 1], train[1, 0]]
    assert notebooks_table()[ratio] == [sum(found), *found]
