"""Batches: torchvision's transforms, image by image, are the judge of every bit."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from rest_nb import kernels
from rest_nb.batches import CIFAR, FACES, LAYOUTS, PLAIN, Transform, assemble, moves
from rest_nb.shim import load_torchvision
from rest_nb.sparse import batch_last

load_torchvision()
from torchvision.transforms import functional, v2
from torchvision.transforms.v2 import functional as V


def images(n, channels=3, height=32, width=32, seed=0):
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator(seed): return torch.Generator().manual_seed(seed)


def one_by_one(x, index, transform, seed):
    "What torchvision makes of each image, told the moves; the draws are made as it is documented: rows, columns, flips."
    n, pad = len(index), transform.pad
    g = generator(seed)
    rows, columns = torch.randint(-pad, pad + 1, (n,), generator=g), torch.randint(-pad, pad + 1, (n,), generator=g)
    flip, made = torch.rand(n, generator=g) < .5, []
    for i, image in enumerate(x[index]):
        height, width = image.shape[1:]
        window = V.crop(V.pad(image, [pad]), pad + int(rows[i]), pad + int(columns[i]), height, width)
        if transform.flip and flip[i]: window = V.horizontal_flip(window)
        scaled = functional.to_tensor(window.permute(1, 2, 0).numpy())
        channels = len(image) // len(transform.mean)  # one mean for all, or for each
        made.append(V.normalize(scaled, transform.mean * channels, transform.std * channels))
    return torch.stack(made)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_batch_is_torchvisions_image_by_image(data):
    draw = data.draw
    channels, height, width = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    entries = draw(st.sampled_from([1, channels]))
    numbers = st.floats(.0625, 3, width=32)
    transform = Transform(draw(st.integers(0, 25)), draw(st.booleans()),  # frames wider than the image, too
                          tuple(draw(st.lists(numbers, min_size=entries, max_size=entries))),
                          tuple(draw(st.lists(numbers, min_size=entries, max_size=entries))))
    x, n = images(draw(st.integers(1, 9)), channels, height, width), draw(st.sampled_from([1, 2, 17, 255, 256]))
    index = torch.randint(len(x), (n,), generator=generator(1))  # duplicates, nearly always
    seed, layout = draw(st.integers(0, 99)), draw(st.sampled_from(list(LAYOUTS)))
    batch = assemble(x, index, transform, generator=generator(seed), layout=layout)
    assert batch.dtype == torch.float32 and torch.equal(batch, one_by_one(x, index, transform, seed))
    still = assemble(x, index, transform, layout=layout)
    assert torch.equal(still, one_by_one(x, index, Transform(mean=transform.mean, std=transform.std), seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transform", [CIFAR, FACES])
@pytest.mark.parametrize("n", [1, 255, 256])
def test_the_papers_transforms_are_torchvisions(transform, n, layout):
    x, index = images(50), torch.randint(50, (n,), generator=generator(n))
    batch = assemble(x, index, transform, generator=generator(3), layout=layout)
    assert torch.equal(batch, one_by_one(x, index, transform, 3)) and torch.isfinite(batch).all()


def test_presets_are_the_papers():
    assert (CIFAR.pad, CIFAR.flip, FACES.pad, FACES.flip, PLAIN.pad, PLAIN.flip) == (4, True, 0, True, 0, False)
    for transform in (CIFAR, FACES):
        assert transform.mean == (.4914, .4822, .4465) and transform.std == (.2023, .1994, .2010)


def test_every_byte_is_scaled_as_torch_scales_it():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    before, batch = x.clone(), assemble(x)
    assert torch.equal(batch, x.float().div_(255)) and torch.equal(x, before)
    torch.testing.assert_close(batch[1, 2].flatten(), torch.tensor([i / 255 for i in range(256)]), rtol=1e-6, atol=0)


def test_all_crops_are_seen_as_torchvision_sees_them():
    # RandomCrop and RandomHorizontalFlip draw otherwise, but from the same set of pictures: (2·1 + 1)² windows, mirrored or not.
    x = images(1, height=3, width=4)
    theirs = v2.Compose([v2.RandomCrop((3, 4), padding=1), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    seen = {tuple(theirs(x[0]).flatten().tolist()) for _ in range(600)}
    ours = assemble(x, torch.zeros(600, dtype=torch.int64), Transform(1, True), generator=generator(0)) * 255
    assert len(seen) == 18 and {tuple(image.flatten().round().int().tolist()) for image in ours} == seen


# --- chance --------------------------------------------------------------------------------------------

def test_moves_are_uniform_and_independent():
    rows, columns, flip = moves(CIFAR, 90_000, generator(0))
    cells = torch.bincount(((rows + 4) * 9 + columns + 4) * 2 + flip, minlength=162)
    assert len(cells) == 162 and chisquare(cells.numpy()).pvalue > .01
    assert chisquare(torch.bincount(flip.long()).numpy()).pvalue > .01


def test_neighbours_in_a_batch_are_moved_apart():
    rows, columns, flip = (move.double() for move in moves(CIFAR, 20_000, generator(0)))
    for move in (rows, columns, flip):
        assert abs(np.corrcoef(move[1:], move[:-1])[0, 1]) < .03


def test_the_seed_decides_and_the_generator_goes_on():
    x, index = images(8), torch.arange(8)
    first, second = ([assemble(x, index, CIFAR, generator=g) for _ in range(3)] for g in (generator(5), generator(5)))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))
    assert not torch.equal(first[0], assemble(x, index, CIFAR, generator=generator(6)))


def test_the_global_seed_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assemble(images(8), torch.arange(8), CIFAR, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("transform, moved", [(Transform(pad=2), (True, True, False)), (FACES, (False, False, True)),
                                              (PLAIN, (False, False, False))])
def test_only_what_the_transform_says_is_moved(transform, moved):
    assert tuple(bool(move.any()) for move in moves(transform, 100, generator(0))) == moved


# --- memory and threads --------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 255])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 28, 28), (4, 6, 1)])
def test_layouts(n, shape):
    x = images(300, *shape)
    index, size = torch.arange(n), (n, *shape)
    dense, compact = (assemble(x, index, layout=layout) for layout in ("channels_last", "batch_last"))
    c, h, w = shape
    assert dense.shape == compact.shape == size and torch.equal(dense, compact)
    assert dense.stride() == (h * w * c, 1, w * c, c) and dense.is_contiguous(memory_format=torch.channels_last)
    assert compact.stride() == (1, h * w * n, w * n, n)
    assert batch_last(compact).ctypes.data == compact.data_ptr(), "a compact layer would have to copy it"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_threads_gives_the_same(layout):
    x, before, made = images(300, height=33, width=29), torch.get_num_threads(), []
    index = torch.randint(300, (256,), generator=generator(0))
    assemble(x, index, CIFAR, layout=layout)  # the first call of all is on one thread
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            made += [assemble(x, index, CIFAR, generator=generator(0), layout=layout) for _ in range(5)]
        assert len(kernels.workers) >= 6
    finally: torch.set_num_threads(before)
    assert all(torch.equal(batch, made[0]) for batch in made[1:])
    assert torch.equal(made[0], one_by_one(x, index, CIFAR, 0))


def test_a_batch_is_not_overwritten_by_the_next():
    x = images(512)
    first = assemble(x, torch.arange(256))
    kept = first.clone()
    assemble(x, torch.arange(256, 512))
    assert torch.equal(first, kept)


def test_images_may_lie_anywhere():
    whole = images(10, height=12, width=12)
    for x in (whole[3:9], whole[::2], whole.flip(0)[:, :, 2:9, 1:12:2], whole.permute(0, 1, 3, 2)):
        for layout in LAYOUTS: assert torch.equal(assemble(x, [4, 0, 4], layout=layout), x[[4, 0, 4]].float() / 255)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_and_empty_batches(layout):
    x = images(5)
    assert torch.equal(assemble(x, layout=layout), x.float() / 255)
    assert assemble(x, torch.zeros(0, dtype=torch.int64), CIFAR, generator=generator(0), layout=layout).shape == (0, 3, 32, 32)


# --- what does not fit ---------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, says", [
    (dict(x=images(3).float()), "x is torch.float32 of shape (3, 3, 32, 32); expected uint8, N×C×H×W"),
    (dict(x=images(3)[0]), "x is torch.uint8 of shape (3, 32, 32)"),
    (dict(index=torch.tensor([0, 3])), "index runs from 0 to 3; expected 0 to 2"),
    (dict(index=torch.tensor([-1, 0])), "index runs from -1 to 0"),
    (dict(index=torch.tensor([True, False, True])), "index is torch.bool of shape (3,); expected int64, N"),
    (dict(index=torch.tensor(1)), "index is torch.int64 of shape ()"),
    (dict(x=images(3, channels=4), transform=CIFAR), "mean has 3 entries; expected one for each of 4 channels"),
    (dict(layout="contiguous"), "layout is 'contiguous'; expected one of channels_last, batch_last")])
def test_what_does_not_fit_is_refused_in_a_line(wrong, says):
    with pytest.raises(ValueError) as caught: assemble(**dict(dict(x=images(3), index=[0]), **wrong))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong, says", [
    (dict(pad=-1), "pad is -1; expected a whole number of pixels, 0 or more"), (dict(pad=1.5), "pad is 1.5"),
    (dict(mean=(.5, .5)), r"mean is \(0.5, 0.5\) and std \(1.0,\); expected equally many"),
    (dict(mean=(0., 0.), std=(1., 0.)), r"std is \(1.0, 0.0\); expected numbers above 0")])
def test_transforms_that_make_no_sense_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): Transform(**wrong)
