"""Corrupted CIFAR-10 is made of the right images, spoilt in the right way: of made-up ones, whose colour spells their number;
and of the real ones, where they have been fetched."""
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import SPLITS, check_counts, same

from rest_nb import data
from rest_nb.corruptions import DISENT
from rest_nb.objects import corrupted_cifar10

ROOT = Path(__file__).parents[1]


def write_cifar10(root, per_batch=40):
    "Image number i of the 6 × `per_batch` is plain, of target i % 10, with red and green spelling its number."
    (root / "CIFAR10").mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        numbers = np.arange(i * per_batch, (i + 1) * per_batch)
        planes = [np.repeat(value[:, None], 1024, 1) for value in (numbers // 16 * 10, numbers % 16 * 10, 0 * numbers + 200)]
        np.column_stack([numbers % 10, *planes]).astype(np.uint8).tofile(root / "CIFAR10" / f"{name}.bin")
    return root


PLAIN = ["jpeg"] * 10  # at the least severity it leaves plain images nearly as they are


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "VALID_SIZE", 50)
    return write_cifar10(tmp_path)


def cifar_number(built):
    red, green = (np.rint(built.x[:, i].double().mean((1, 2)).numpy() / 10).astype(int) for i in (0, 1))
    return red * 16 + green


def test_cifar_splits_partition_the_images_and_keep_their_labels(cifar10):
    built = {split: corrupted_cifar10(cifar10, split, conflict_ratio=.1, severity=1, corruptions=PLAIN) for split in SPLITS}
    numbers = {split: cifar_number(it) for split, it in built.items()}
    assert {split: len(it) for split, it in built.items()} == dict(train=150, valid=50, test=40)
    assert sorted([*numbers["train"], *numbers["valid"]]) == list(range(200))
    assert sorted(numbers["test"]) == list(range(200, 240)) and set(numbers["valid"]) != set(range(50))
    for split, it in built.items():
        assert it.x.shape[1:] == (3, 32, 32) and it.x.is_contiguous()
        assert (it.y.numpy() == numbers[split] % 10).all()
        check_counts(it.y.numpy(), it.a.numpy(), .9 if split == "test" else .1)
        assert abs(it.x[:, 2].double().mean() - 200) < 2  # blue is the third


def test_each_image_is_spoilt_as_its_attribute_says(cifar10):
    "Contrast leaves plain images; brightness lifts blue from 200 to 255 at severity 5; only its own images are lifted."
    kinds = ["contrast"] * 10
    kinds[3] = "brightness"
    built = corrupted_cifar10(cifar10, "test", conflict_ratio=.1, corruptions=kinds)
    assert (built.x[built.a == 3][:, 2] == 255).all() and (built.x[built.a != 3][:, 2] == 200).all()
    assert 0 < (built.a == 3).sum() < 12


def test_cifar_same_arguments_same_set_and_each_argument_counts(cifar10):
    def build(**words):
        words = dict(conflict_ratio=.1, corruptions=["gaussian noise"] * 10) | words
        return corrupted_cifar10(cifar10, words.pop("split", "valid"), **words)
    first = build()
    assert same(first, build()) and same(first, build(severity=5, seed=0))
    for words in (dict(seed=1), dict(conflict_ratio=.12), dict(severity=4), dict(corruptions=PLAIN)):
        assert not torch.equal(build(**words).x, first.x)
    assert torch.equal(build(severity=4).a, first.a)


@pytest.mark.parametrize("words, error, said", [
    (dict(split="training"), ValueError, "split is 'training'"), (dict(conflict_ratio=2), ValueError, "conflict_ratio is 2"),
    (dict(severity=6), ValueError, "severity is 6"), (dict(corruptions=PLAIN[:9]), ValueError, "corruptions are 9; expected 10"),
    (dict(corruptions=["rain"] * 10), ValueError, "corruption is 'rain'"),
    (dict(corruptions=DISENT), FileNotFoundError, "frost holds 0 of the 5 textures .*fetch frost"),
])
def test_cifar_refuses_what_does_not_fit_in_a_line(words, error, said, cifar10):
    words = dict(split="valid", conflict_ratio=.1, corruptions=PLAIN) | words
    with pytest.raises(error, match=said) as caught: corrupted_cifar10(cifar10, words.pop("split"), **words)
    assert "\n" not in str(caught.value)


def test_cifar_files_missing_or_cut_are_named(cifar10):
    def build(): corrupted_cifar10(cifar10, "train", conflict_ratio=.1, corruptions=PLAIN)
    path = cifar10 / "CIFAR10" / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="data_batch_4.bin is cut short"): build()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"data_batch_4.bin is missing: .*fetch CIFAR10 {cifar10}` brings it"): build()


def test_the_real_corrupted_cifar10_where_it_is_fetched():
    if not all((ROOT / "raw_objects" / name).is_dir() for name in ("CIFAR10", "frost")): pytest.skip("CIFAR-10 is not fetched")
    built = corrupted_cifar10(ROOT / "raw_objects", "valid", conflict_ratio=.05)
    assert len(built) == 5000
    check_counts(built.y.numpy(), built.a.numpy(), .05)
    level, spread = built.x.double().mean((1, 2, 3)), built.x.double().std((1, 2, 3))
    assert level[built.a == 0].mean() > level.mean() + 30 and spread[built.a == 1].mean() < .3 * spread.mean()
