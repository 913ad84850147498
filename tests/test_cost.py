"""Cost: counted by hand, counted by brute force, and counted by others.

Oracles: convolutions of ones, whose outputs add up to the number of multiplications; what torchvision
publishes about its models; torch's own FLOP counter; RigL's formula; a clock that only the test moves.
"""
import os
import statistics
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rest_nb import cost
from rest_nb.cost import alternate, forward_flops, layer_costs, parameters, peak_memory, training_flops
from rest_nb.masks import StaticSparse, erk, maskable
from rest_nb.models import cnn
from rest_nb.shim import load_torchvision

relaxed = settings(max_examples=100, deadline=None, derandomize=True)


def total(model, shape): return int(layer_costs(model, shape).dense_macs.sum())


# ----------------------------------------------------------------------- by hand, and as published

def test_the_papers_network_by_hand():
    # Kernel 4, stride 2, padding 1: 28 → 14 → 7 → 3, as (7 + 2 - 4) // 2 + 1. Channels 3, 64, 128, 256.
    model = cnn()
    for weight in maskable(model).values(): nn.init.ones_(weight)  # drawn at random, one in 2²⁴ weights is zero
    table = layer_costs(model, (3, 28, 28))
    assert table.layer.tolist() == ["0", "3", "6", "11"]
    assert table.weights.tolist() == [3 * 64 * 16, 64 * 128 * 16, 128 * 256 * 16, 2560]
    assert table.positions.tolist() == [196, 49, 9, 1]
    assert table.dense_macs.tolist() == table.macs.tolist() == [602_112, 6_422_528, 4_718_592, 2_560]
    assert table.nonzero.tolist() == table.weights.tolist()
    assert forward_flops(model, (3, 28, 28)) == (2 * 11_745_792,) * 2  # 11.75 M MACs: facts/rest.md §1.3


@pytest.mark.parametrize("name", ["ResNet18", "MobileNet_V2"])
def test_what_torchvision_publishes(name):
    # ResNet-18 at 224²: 1.814 GMACs, 11,689,512 parameters. MobileNet's depth-wise layers test the groups.
    models = load_torchvision().models
    published = getattr(models, f"{name}_Weights").IMAGENET1K_V1.meta
    model = getattr(models, name.lower())()
    assert round(total(model, (3, 224, 224)) / 1e9, 3) == published["_ops"]
    assert parameters(model)[0] == published["num_params"]


@pytest.mark.parametrize("classes, side, macs, facts", [
    (10, 32, 37.0, [.0014, .0144, .0290, .1494, .2935, .809]),
    (2, 128, 592, [.0014, .0149, .0300, .1503, .2942, .809]),
])
def test_resnet_18_in_the_fact_sheet(classes, side, macs, facts):
    # facts/rest.md §1.3 and §1.5: dense MACs in millions; ERK's FLOPs, as a share of dense ones, by density.
    model = load_torchvision().models.resnet18(num_classes=classes)
    table = layer_costs(model, (3, side, side))
    dense = table.dense_macs.sum()
    assert dense / 1e6 == pytest.approx(macs, rel=.002)
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in table.layer]
    for density, expected in zip((.0005, .005, .01, .05, .1, .5), facts):
        kept = sum(d * m for d, m in zip(erk(shapes, density), table.dense_macs))
        assert kept / dense == pytest.approx(expected, abs=.00051 if density == .5 else .000051)


def test_parameters_by_hand():
    # 660,992 weights; batch norm 2 · (64 + 128 + 256), half of it zero at first, but kept; 10 biases.
    assert parameters(cnn()) == (660_992 + 896 + 10,) * 2


# ---------------------------------------------------------------------------------- by brute force

def taps(layer, size, weight):
    """How often a weight meets an input: all of them are one (or zero), so that the outputs count products.

    Padding counts as if it were image: the input is that much larger, and nothing is cropped.
    """
    dim = len(size)
    if layer.transposed: size, conv = list(size), getattr(F, f"conv_transpose{dim}d")
    else: size, conv = [s + 2 * p for s, p in zip(size, layer.padding)], getattr(F, f"conv{dim}d")
    x = torch.ones(1, layer.in_channels, *size, dtype=torch.float64)
    knobs = dict(stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    return int(conv(x, weight.double(), **knobs).sum())


@st.composite
def convolutions(draw):
    "A convolution of any kind, some of its weights zero, and the shape of an input to it."
    dim, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    each = lambda low, high: tuple(draw(st.lists(st.integers(low, high), min_size=dim, max_size=dim)))
    kernel, stride, padding, dilation, size = each(1, 3), each(1, 3), each(0, 2), each(1, 2), each(2, 6)
    groups = draw(st.integers(1, 3))
    # The window must fit, and a transposed convolution must not crop all that it makes.
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    if transposed: assume(all((n - 1) * s + w - 2 * p > 0 for n, s, w, p in zip(size, stride, span, padding)))
    else: assume(all(n + 2 * p >= w for n, p, w in zip(size, padding, span)))
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dim}d")
    layer = kind(groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), kernel, stride=stride,
                 padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    zero = torch.rand(layer.weight.shape, generator=generator) < .5
    with torch.no_grad(): layer.weight.fill_(-.5).masked_fill_(zero, 0)
    return layer, (layer.in_channels, *size)


@relaxed
@given(convolutions())
def test_convolutions_of_every_kind(case):
    layer, shape = case
    row, = layer_costs(layer, shape).to_dict("records")
    assert row["dense_macs"] == taps(layer, shape[1:], torch.ones_like(layer.weight))
    assert row["macs"] == taps(layer, shape[1:], layer.weight != 0)
    assert row["weights"] == layer.weight.numel() and row["nonzero"] == (layer.weight != 0).sum()


@pytest.mark.parametrize("shape, positions", [((5,), 1), ((4, 5), 4), ((3, 4, 5), 12)])
def test_a_linear_layer_on_sequences(shape, positions):
    # Each element of the sequence (of sequences) is one position: the matrix of 7·5 weights is used for each.
    assert layer_costs(nn.Linear(5, 7), shape).positions.tolist() == [positions]
    assert total(nn.Linear(5, 7), shape) == F.linear(torch.ones(1, *shape), torch.ones(7, 5)).sum()


class Patches(nn.Module):
    "Cuts 4×4 patches out of an image and gives them to its layer as if they were a batch."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        if isinstance(self.layer, nn.Linear): return self.layer(patches.reshape(-1, 48))
        return self.layer(patches.reshape(-1, 3, 4, 4))


@pytest.mark.parametrize("layer", [nn.Linear(48, 5), nn.Conv2d(3, 5, 4)])
def test_positions_folded_into_the_batch_count(layer):
    # An 8×12 image has 2·3 patches of 48 numbers, each multiplied by 5·48 weights, by either layer.
    with FlopCounterMode(display=False) as counter: Patches(layer)(torch.zeros(1, 3, 8, 12))
    assert counter.get_total_flops() == 2 * 6 * 240
    assert forward_flops(Patches(layer), (3, 8, 12))[0] == 2 * 6 * 240


class Twice(nn.Module):
    "One convolution, used at two sizes."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x): return self.conv(F.max_pool2d(self.conv(x), 2))


def test_a_layer_used_twice_costs_twice():
    # 2·2·9 weights, at 8·8 positions and again at 4·4.
    assert total(Twice(), (2, 8, 8)) == 36 * (64 + 16)
    assert parameters(Twice()) == (38, 38)  # but it is stored once


def test_a_weight_shared_by_two_layers_costs_twice():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert total(model, (4,)) == 2 * 16 and parameters(model)[0] == 16


# --------------------------------------------------------------------------------- sparse networks

def test_sparse_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[[1., 0.], [0., -2.]]], [[[0., 0.], [3., 0.]]]]))  # 3 of 8
        model[2].weight.zero_()[1, 4] = 1e-30  # 1 of 24: small, but not zero
        model[2].bias.copy_(torch.tensor([0., 1., 1.]))
    table = layer_costs(model, (1, 3, 3))  # 2×2 output positions
    assert table.nonzero.tolist() == [3, 1] and table.macs.tolist() == [12, 1]
    assert table.dense_macs.tolist() == [32, 24]
    assert forward_flops(model, (1, 3, 3)) == (2 * 56, 2 * 13)
    assert parameters(model) == (8 + 24 + 3, 3 + 1 + 3)  # a bias that is zero is kept


@pytest.mark.parametrize("density", [.005, .05, .5])
def test_a_masked_network_costs_what_its_masks_keep(density):
    model = cnn()
    masks = StaticSparse(model, torch.optim.SGD(model.parameters()), density).masks.values()
    expected = sum(int(mask.sum()) * positions for mask, positions in zip(masks, (196, 49, 9, 1)))
    assert forward_flops(model, (3, 28, 28)) == (2 * 11_745_792, 2 * expected)


# ---------------------------------------------------------------------------------------- training

@relaxed
@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 2000), st.integers(1, 50))
def test_training_is_rigls_formula(sparse, extra, delta_t, rounds):
    # RigL's average over ΔT + 1 steps: (3·f_S·ΔT + 2·f_S + f_D) / (ΔT + 1); as a fraction, so it is exact.
    dense, steps = sparse + extra, rounds * (delta_t + 1)
    average = Fraction(3 * sparse * delta_t + 2 * sparse + dense, delta_t + 1)
    assert training_flops(dense, sparse, steps, updates=rounds) == average * steps
    assert training_flops(dense, sparse, steps) == 3 * sparse * steps  # a static mask: no dense gradient


def test_a_step_is_three_forward_passes():
    # Torch's counter sees the forward pass and the gradients of weights and inputs (images ask for theirs).
    with FlopCounterMode(display=False) as counter:
        cnn()(torch.zeros(2, 3, 28, 28, requires_grad=True)).sum().backward()
    dense, _ = forward_flops(cnn(), (3, 28, 28))
    for updates in (0, 1): assert counter.get_total_flops() == 2 * training_flops(dense, dense, 1, updates)


# ------------------------------------------------------------------------ counting leaves no trace

class Refuses(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x): raise KeyError("no forward today")


def hooks(model): return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_hooks_come_back_even_after_an_error(training):
    for model, error in ((cnn(width=2), None), (Refuses(), KeyError)):
        model.train(training)
        if error:
            with pytest.raises(error): layer_costs(model, (2,))
        else: layer_costs(model, (3, 16, 16))
        assert model.training == training and hooks(model) == 0


def test_a_part_that_was_frozen_stays_frozen():
    # Who fine-tunes keeps batch norm in eval mode while the rest trains.
    model = cnn(width=2).train()
    model[1].eval()
    layer_costs(model, (3, 16, 16))
    assert [module.training for module in model] == [index != 1 for index in range(len(model))]


def test_counting_does_not_train():
    # Batch norm's running mean would move on an image of zeros, dropout would draw a random number.
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2))
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    layer_costs(model, (1, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------- measuring

class Clock:
    "Stands still unless told: `takes(a, b, …)` is a contestant whose next runs last a, b, … seconds."
    def __init__(self, monkeypatch):
        self.now, self.ran = 0., []
        monkeypatch.setattr(cost.time, "perf_counter", lambda: self.now)

    def takes(self, name, *seconds):
        left = list(seconds)

        def run():
            self.ran.append(name)
            self.now += left.pop(0)
        return run


def test_contestants_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    alternate({name: clock.takes(name, *[1] * 5) for name in "abc"}, rounds=3, warmup=2)
    assert "".join(clock.ran) == "abc" * 5  # never aaa, bbb: what slows the machine down slows all of them


def test_what_counts_is_the_median_after_the_warmup(monkeypatch):
    clock = Clock(monkeypatch)
    contestants = {"a": clock.takes("a", 64, 32, 1, 16, 2), "b": clock.takes("b", 0, 0, 8, 8, 9)}
    # Of 1 16 2, and of 8 8 9. The mean of a's would be 6⅓, the median of all five 16.
    assert alternate(contestants, rounds=3, warmup=2) == {"a": 2, "b": 8}


@relaxed
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.lists(st.integers(0, 1000), max_size=4))
def test_alternate_is_the_textbooks_median(counted, warmup):
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        contestants = {"a": clock.takes("a", *warmup, *counted), "b": clock.takes("b", *[1] * 13)}
        assert alternate(contestants, len(counted), len(warmup)) == {"a": statistics.median(counted), "b": 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_counts_bytes_and_remembers():
    # Blocks until the kernel itself counts 64 MB beyond the highest level so far, whatever ran before in this process:
    # one block sized in advance fell short where memory of an earlier test was given back meanwhile.
    def held():
        with open("/proc/self/statm") as file: return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    before, blocks = peak_memory(), []
    while held() < before + 64 * 10**6: blocks.append(torch.ones(16 * 10**6, dtype=torch.uint8))
    grown = peak_memory() - before
    assert 60e6 < grown < 96e6  # not kibibytes, and not a thousand times as much
    del blocks
    assert peak_memory() >= before + grown  # a peak does not come down


def test_a_model_stored_sparse_costs_what_the_masked_one_does():
    from rest_nb.sparse import densify, sparsify
    model = sparsify(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, groups=1), torch.nn.Flatten(), torch.nn.Linear(4 * 9, 5)), .3)
    stored = layer_costs(model, (3, 8, 8))
    counted = parameters(model)
    assert stored.equals(layer_costs(densify(model), (3, 8, 8))) and stored.weights.tolist() == [108, 180]
    assert counted == parameters(model) == (108 + 4 + 180 + 5, round(.3 * 288) + 9)


def test_a_zero_that_is_stored_is_not_kept():
    from rest_nb.sparse import sparsify
    model = sparsify(torch.nn.Sequential(torch.nn.Linear(9, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5)), .5)
    with torch.no_grad(): model[0].values[:3] = 0
    assert parameters(model) == (36 + 4 + 20 + 5, 28 - 3 + 9)
