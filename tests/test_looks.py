"Looks: answers, cells, colours, Grad-CAM and probes against counts by hand, autograd by finite differences, and pictures drawn anew."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rest_nb import looks
from rest_nb.data import COLOURS, colour
from rest_nb.models import cnn

labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(labels)
def test_answers_and_cells_are_counts(told):
    predicted, y, a = torch.tensor(told).T
    conflicting = [(p, t, v) for p, t, v in told if t != v]
    if conflicting:
        counted = [sum(p == t for p, t, v in conflicting), sum(p == v for p, t, v in conflicting), sum(p not in (t, v) for p, t, v in conflicting)]
        assert [*looks.answers(predicted, y, a).values()] == pytest.approx([n / len(conflicting) for n in counted])
    cells = looks.by_cell(predicted, y, a)
    assert cells.shape == (max(t for _, t, _ in told) + 1, max(v for *_, v in told) + 1)
    for t, row in enumerate(cells.tolist()):
        for v, share in enumerate(row):
            members = [p == t for p, target, value in told if (target, value) == (t, v)]
            assert share == pytest.approx(np.mean(members)) if members else np.isnan(share)


def test_a_recoloured_digit_is_the_one_drawn_in_that_colour():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 9, 7), dtype=np.uint8)
    grey[:, 4, 3] = 255  # MNIST's brightest
    before, after = np.arange(20) % 10, (np.arange(20) * 3 + 1) % 10
    x, wanted = (torch.from_numpy(colour(grey, a, 5, rng)) for a in (before, after))
    found = looks.recoloured(x, torch.from_numpy(COLOURS[after]))
    assert found.dtype == torch.uint8 and (found.int() - wanted.int()).abs().max() <= 5  # rounding, and the noise of both colours
    assert (x.int() - wanted.int()).abs().max() > 50


def test_grad_cam_is_its_equation():
    torch.manual_seed(0)
    model, x, classes = cnn(width=3).double().train(), torch.rand(4, 3, 16, 16).double(), torch.tensor([1, 2, 3, 9])
    found = looks.grad_cam(model, model[5], x.clone(), classes)
    assert model.training and found.shape == (4, 16, 16) and 0 <= found.min() and found.max() <= 1
    model.eval()
    with torch.no_grad():
        seen = model[:6](x)
        weights = torch.zeros(4, seen.shape[1]).double()
        for k in range(seen.shape[1]):  # the mean gradient by differences: the whole channel raised a little
            raised = seen.clone()
            raised[:, k] += 1e-6
            weights[:, k] = ((model[6:](raised) - model[6:](seen))[torch.arange(4), classes] / 1e-6) / seen[0, 0].numel()
        wanted = nn.functional.interpolate((weights[:, :, None, None] * seen).sum(1, keepdim=True).relu(), (16, 16), mode="bilinear")[:, 0]
    assert torch.allclose(found, wanted / wanted.amax((1, 2), keepdim=True), atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_grad_cam_leaves_its_images_alone():
    model, x = cnn(10, width=4), torch.rand(2, 3, 16, 16)
    looks.grad_cam(model, model[5], x, torch.tensor([0, 1]))
    assert not x.requires_grad


def test_grad_cam_wants_a_layer_that_gives_an_image():
    model = cnn(width=2)
    with pytest.raises(ValueError, match="expected a layer with an output"): looks.grad_cam(model, model[11], torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))


def test_features_are_the_means_of_outputs():
    model, x = cnn(width=2).eval(), torch.rand(5, 3, 16, 16)
    found = looks.features(model, x, dict(first=model[2], last=model[8]))
    with torch.no_grad():
        assert torch.allclose(found["first"], model[:3](x).mean((2, 3)).double()) and torch.allclose(found["last"], model[:9](x).mean((2, 3)).double()) and found["last"].dtype == torch.float64
    assert not model[2]._forward_hooks


@pytest.mark.parametrize("angle, least, most", [(0, .97, 1), (90, .35, .65)])
def test_a_probe_finds_what_is_there_and_no_more(angle, least, most):
    "A label along one axis; the probe sees another, `angle` degrees off."
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (600,), generator=generator)
    x = torch.randn(600, 2, generator=generator).double()
    x[:, 0] += 6 * labels
    axis = torch.tensor([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    assert least <= looks.probe(torch.stack([x @ axis, torch.full((600,), 3.).double()], 1), labels) <= most


def test_a_probe_is_asked_about_samples_that_it_has_not_seen():
    x, labels = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).double(), torch.arange(60) // 2 % 2
    assert looks.probe(x, labels, C=1e6) < .8  # thirty samples in fifty dimensions: those seen are told without a miss
