"""Layers stored sparse: PyTorch's dense convolution, batch-norm and linear layer with a masked weight are the oracle;
for whole runs, the same network with masks."""
import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from rest_nb import kernels, sparse
from rest_nb.masks import SET, RigL, StaticSparse, maskable
from rest_nb.models import cnn, evaluating
from rest_nb.sparse import SparseConv2d, SparseLinear, densify, sparsify

ROOT = Path(__file__).parents[1]


def is_close(ours, theirs, relative=1e-5, scale=0):
    "Within `relative` of the largest magnitude (or of `scale`), NaN and Inf at the same places."
    ours, theirs = ours.detach(), theirs.detach()
    finite = theirs.isfinite()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours[~finite].nan_to_num(7, 8, 9), theirs[~finite].nan_to_num(7, 8, 9)) and ours[finite].isfinite().all()
    scale = scale or (theirs[finite].abs().max().item() if finite.any() else 0)
    assert not finite.any() or (ours - theirs)[finite].abs().max().item() <= relative * scale + 1e-30
    return True


def masked(layer, share, seed=0):
    "A copy of `layer` with random weights at zero, and its mask."
    layer = copy.deepcopy(layer)
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < share
    with torch.no_grad(): layer.weight.mul_(mask)
    return layer, mask


def gradients(layer, x, g):
    "Output and gradients: to the input, and {name: to a parameter}."
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(g)
    return out, x.grad, {name: p.grad for name, p in layer.named_parameters()}


@st.composite
def convolutions(draw):
    "Any convolution that is supported, and the size of a batch it can take."
    pick = lambda low, high: draw(st.integers(low, high))
    groups = pick(1, 3)
    kernel, dilation = (pick(1, 4), pick(1, 4)), (pick(1, 2), pick(1, 2))
    stride = (pick(1, 3), pick(1, 3))
    padding = draw(st.sampled_from([(pick(0, 3), pick(0, 3)), "valid"] + (["same"] if stride == (1, 1) else [])))
    size = [d * (k - 1) + 1 + pick(0, 5) for k, d in zip(kernel, dilation)]
    torch.manual_seed(pick(0, 999))
    layer = nn.Conv2d(groups * pick(1, 4), groups * pick(1, 5), kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    batch = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33, 64, 70, 128, 257, 300]))
    return layer, (batch, layer.in_channels, *size), draw(st.sampled_from([0, .05, .3, 1]))


def check(ours, dense, mask, x, g):
    """Output and all gradients of `ours` against `dense` in double precision: its own rounding must not count as our error.
    Where terms cancel, rounding is measured by their magnitudes."""
    out, to_x, to = gradients(ours, x, g)
    expected, to_x2, to2 = gradients(copy.deepcopy(dense).double(), x.double(), g.double())
    large = copy.deepcopy(dense).double()
    for p in large.parameters(): p.data.abs_()
    terms, to_x3, to3 = gradients(large, x.double().abs(), g.double().abs())
    top = lambda t: t.abs().max().item() if t.numel() else 0
    assert is_close(out, expected.float(), 1e-6, top(terms)) and is_close(to_x, to_x2.float(), 1e-6, top(to_x3))
    assert is_close(to["values"], to2["weight"][mask].float(), 1e-6, top(to3["weight"]))
    if dense.bias is not None: assert is_close(to["bias"], to2["bias"].float(), 1e-6, top(to3["bias"]))


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch, request):
    "These tests are of the kernels, however small their layers; those marked `by_rule` let the layer choose."
    if "by_rule" not in request.keywords: monkeypatch.setattr(SparseConv2d, "is_better_dense", lambda layer, batch: False)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(convolutions())
def test_convolution_is_the_masked_dense_one(case):
    layer, shape, share = case
    dense, mask = masked(layer, share)
    x = torch.randn(shape)
    with torch.no_grad(): g = torch.randn_like(dense(x))
    check(SparseConv2d(copy.deepcopy(dense), mask), dense, mask, x, g)


@pytest.mark.by_rule
@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions())
def test_a_dense_choice_is_the_masked_dense_one(case):
    layer, shape, share = case
    dense, mask = masked(layer, share)
    ours, x = SparseConv2d(copy.deepcopy(dense), mask), torch.randn(shape)
    ours.is_better_dense = lambda batch: True
    with torch.no_grad(): g = torch.randn_like(dense(x))
    check(ours, dense, mask, x, g)


@pytest.mark.by_rule
@pytest.mark.parametrize("inputs, kernel, batch, at_least", [  # of each output's weights: 300 and a sixth of all a sample, and all once, by how far vectors are filled
    (64, 3, 256, 399), (256, 3, 256, 694), (64, 1, 256, None), (256, 1, 1, 38),
    (64, 3, 1, 61), (64, 3, 17, 229), (64, 3, 8, 235)])
def test_dense_is_chosen_where_many_weights_are_there_or_few_samples(monkeypatch, inputs, kernel, batch, at_least):
    monkeypatch.setattr(sparse.kernels, "LANES", 16)
    def layer(kept):
        conv = nn.Conv2d(inputs, 10, kernel)
        return SparseConv2d(conv, (torch.arange(conv.weight[0].numel()) < kept).view_as(conv.weight[0]).expand_as(conv.weight))
    if at_least is None: assert not layer(inputs * kernel ** 2).is_better_dense(batch)
    else: assert layer(at_least).is_better_dense(batch) and not layer(at_least - 1).is_better_dense(batch)


@pytest.mark.by_rule
def test_a_batch_of_nobody(): assert sparsify(nn.Sequential(nn.Conv2d(2, 3, 3)), .5)(torch.rand(0, 2, 5, 5)).shape == (0, 3, 3, 3)


@pytest.mark.by_rule
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_a_dense_choice_changes_rounding_only(training, grad):
    dense = chain(channels=60)
    ours = sparsify(copy.deepcopy(dense), .9).train(training)
    with torch.no_grad(): dense[0].weight.mul_(ours[0].mask)
    dense.train(training)
    x = torch.randn(64, 60, 8, 7)
    assert ours[0].is_better_dense(len(x))
    with grad(), torch.autocast("cpu", torch.bfloat16): out = ours(x)  # single precision, as the kernels
    assert out.dtype == torch.float32 and is_close(out, dense(x), 1e-5)
    for name in ("running_mean", "running_var"): assert is_close(getattr(ours[1], name), getattr(dense[1], name), 1e-5)


@pytest.mark.by_rule
@torch.no_grad()
def test_a_dense_weight_that_is_kept_is_the_present_one(monkeypatch):
    made, real, mask = [], SparseConv2d.dense, (torch.arange(36) < 30).view(4, 1, 3, 3)
    monkeypatch.setattr(SparseConv2d, "dense", lambda layer, *values: made.append(1) or real(layer, *values))
    ours, x = SparseConv2d(nn.Conv2d(1, 4, 3), mask), torch.randn(1, 1, 5, 5)
    monkeypatch.setattr(SparseConv2d, "is_better_dense", lambda layer, batch: True)
    def asked():
        now = len(made)
        out = ours(x)
        assert is_close(out, F.conv2d(x, real(ours), ours.bias), 1e-6)
        return len(made) - now
    assert [asked(), asked()] == [1, 0]
    changes = [lambda: ours.values.add_(1), lambda: ours.values.data.mul_(2),  # the second tells no version
               lambda: ours.exchange(mask.flatten().roll(5).view(4, 1, 3, 3), torch.ones_like(mask), []),
               lambda: ours.load_state_dict({name: -value for name, value in ours.state_dict().items() if name != "positions"}, strict=False)]
    for change in changes:
        change()
        made.clear()
        assert [asked(), asked()] == [1, 0]
    assert pickle.loads(pickle.dumps(ours)).asked is None and copy.deepcopy(ours).asked is None
    with torch.enable_grad(): ours(x)
    assert ours.asked is None  # between updates there is no dense weight


@pytest.mark.by_rule
def test_rigl_sees_the_same_gradient_through_a_dense_choice(monkeypatch):
    conv = nn.Conv2d(4, 6, 3)
    ours = SparseConv2d(conv, torch.rand(conv.weight.shape) < .8)
    x, found = torch.randn(32, 4, 9, 9), []
    for is_dense in (True, False):
        monkeypatch.setattr(SparseConv2d, "is_better_dense", lambda layer, batch: is_dense)
        ours.wanted = True
        ours(x).square().sum().backward()
        found.append(ours.gradient())
    assert is_close(*found, 1e-4) and found[0].shape == conv.weight.shape and found[0][~ours.mask].abs().min() > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 40), min_size=0, max_size=3), st.sampled_from([0, .3, 1]))
def test_linear_is_the_masked_dense_one(inputs, outputs, batch, share):
    torch.manual_seed(0)
    dense, mask = masked(nn.Linear(inputs, outputs), share)
    check(SparseLinear(copy.deepcopy(dense), mask), dense, mask, torch.randn(*batch, inputs), torch.randn(*batch, outputs))


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 2), (1, 2, 1)])
def test_gradcheck_in_double_precision(stride, dilation, groups):
    torch.manual_seed(0)
    dense, mask = masked(nn.Conv2d(2, 4, 3, stride, 1, dilation, groups).double(), .5)
    layer, x = SparseConv2d(dense, mask), torch.randn(2, 2, 5, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, values, bias: sparse.Convolve.apply(x, values, bias, None, None, None, layer),
                                    (x, layer.values, layer.bias))


def chain(channels=5, outputs=6, relu=True, bias=False):
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(outputs)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm.weight.data[0] = 0
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, 2, 1, bias=bias), norm, *([nn.ReLU()] if relu else []))


@pytest.mark.parametrize("batch", [3, 40, 300])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("density", [.3, .01])
def test_convolution_norm_and_relu_in_one_go(batch, relu, bias, is_first, density):
    dense = chain(relu=relu, bias=bias)
    ours = sparsify(copy.deepcopy(dense), density)
    with torch.no_grad(): dense[0].weight.mul_(ours[0].mask)
    assert bool((~ours[0].mask).flatten(1).all(1).any()) == (density == .01)  # channels that no weight leads to
    assert ours[0].norm == [ours[1]] and type(ours[1]) is sparse.PassedNorm  # not the slow way round
    for _ in range(2):
        x, g = torch.randn(batch, 5, 8, 7), torch.randn(batch, 6, 4, 4)
        if is_first:  # an input without gradient: its kernels keep no output
            ours.zero_grad(), dense.zero_grad()
            out, expected = ours(x), dense(x)
            out.backward(g), expected.backward(g)
        else:
            out, to_x, _ = gradients(ours, x, g)
            expected, to_x2, _ = gradients(dense, x, g)
            assert is_close(to_x, to_x2, 1e-4)
        assert is_close(out, expected, 1e-5)
        assert is_close(ours[0].values.grad, dense[0].weight.grad[ours[0].mask], 1e-4)
        assert is_close(ours[1].weight.grad, dense[1].weight.grad, 1e-4) and is_close(ours[1].bias.grad, dense[1].bias.grad, 1e-4)
        if bias:  # 0 but for rounding, which the dense one's dead channels multiply by 316, 1 / sqrt(eps)
            assert ours[0].bias.grad.abs().max() < 1e-3 and dense[0].bias.grad.abs().max() < (1e-3 if density == .3 else .1)
        for name in ("running_mean", "running_var"): assert is_close(getattr(ours[1], name), getattr(dense[1], name))
        assert ours[1].num_batches_tracked == dense[1].num_batches_tracked
    for grad in (torch.no_grad, torch.enable_grad):
        with evaluating(ours), evaluating(dense), grad(): assert is_close(ours(x), dense(x))


def test_norm_needs_more_than_one_value():
    with pytest.raises(ValueError, match="more than 1 value per channel to train, not 1"):
        sparsify(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), .5)(torch.rand(1, 2, 3, 3))


def residual_networks():
    "Of torchvision: with basic blocks, and with bottlenecks; in double precision, and with the masks of `ours` on `dense`."
    from rest_nb.shim import load_torchvision
    load_torchvision()
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
    for block in (BasicBlock, Bottleneck):
        torch.manual_seed(0)
        dense = ResNet(block, [1, 2, 1, 1], num_classes=7, width_per_group=64).double()
        for m in dense.modules():
            if isinstance(m, nn.BatchNorm2d): nn.init.normal_(m.weight), nn.init.normal_(m.bias)
        ours = sparsify(copy.deepcopy(dense), .05)
        masks = {name: layer.mask for name, layer in ours.named_modules() if isinstance(layer, SparseConv2d)}
        with torch.no_grad():
            for name, mask in masks.items(): dense.get_submodule(name).weight.mul_(mask)
        yield block, dense, ours, masks


def test_residual_network_of_torchvision():
    for block, dense, ours, masks in residual_networks():
        assert type(ours.layer1[0]) is sparse.Residual and type(ours.relu) is sparse.PassedReLU
        assert sum(bool(m.norm) for m in ours.modules() if isinstance(m, SparseConv2d)) == len(masks) - 1  # all but the linear one
        assert ours.state_dict().keys() - dense.state_dict().keys() == {f"{n}.{p}" for n in masks for p in ("values", "positions")}
        x, y = torch.rand(20, 3, 40, 40).double(), torch.arange(20) % 7
        for _ in range(2):
            losses = [F.cross_entropy(model(x), y) for model in (ours, dense)]
            for loss in losses: loss.backward()
            assert is_close(*losses)
        for name, mask in masks.items():
            assert is_close(ours.get_submodule(name).values.grad, dense.get_submodule(name).weight.grad[mask], 1e-9)
        for name, p in ours.named_parameters():
            if not name.endswith("values"): assert is_close(p.grad, dense.get_parameter(name).grad, 1e-9)
        for name, b in ours.named_buffers():
            if not name.endswith("positions"): assert is_close(b.double(), dense.get_buffer(name).double(), 1e-9)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        with evaluating(ours), evaluating(dense), evaluating(twin), torch.no_grad():
            assert is_close(ours(x), dense(x)) and torch.equal(twin(x), ours(x))
        back = densify(ours)
        assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()] and type(back.layer1[0]) is block
        assert [list(m.__dict__) for m in back.modules()] == [list(m.__dict__) for m in dense.modules()]


def test_gradients_in_evaluation_mode():
    "Fine-tuning with frozen statistics: the same gradients as the dense network's, to everything."
    for _, dense, ours, masks in residual_networks():
        x, y = torch.rand(20, 3, 40, 40).double(), torch.arange(20) % 7
        with torch.no_grad():
            for model in (dense, ours):
                for _ in range(3): model(x)
        with evaluating(ours), evaluating(dense):
            for model in (ours, dense): F.cross_entropy(model(x), y).backward()
        for name, p in ours.named_parameters():
            expected = dense.get_parameter(name.replace(".values", ".weight")).grad
            assert is_close(p.grad, expected[masks[name[:-7]]] if name.endswith("values") else expected, 1e-9)


def test_addition_needs_the_same_shape():
    layer = sparsify(chain(), .5)[0]
    with pytest.raises(ValueError, match=r"\(4, 6, 4, 2\) cannot be added to \(4, 6, 4, 4\)"):
        layer(torch.rand(4, 5, 8, 8), torch.rand(4, 6, 4, 2))


class Twice(nn.Sequential):
    "A Sequential only by name: what its modules see is not what stands before them."
    def forward(self, x): return self[2](self[1](self[0](x) + 1))


class Odd(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 6, 1), norm)
    def forward(self, x): return self.inner[1](self.inner[0](x).view(len(x), -1, 8, 8))


def seen(module):
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize("model", [Twice(*chain()), nn.Sequential(chain()[0], seen(nn.BatchNorm2d(6)), nn.ReLU()), Odd(nn.BatchNorm2d(3))],
                         ids=["own forward", "hooked norm", "other channels"])
def test_what_does_not_surely_follow_is_done_by_itself(model):
    ours = sparsify(copy.deepcopy(model), .5)
    assert not any(m.norm for m in ours.modules() if isinstance(m, SparseConv2d))


def test_a_second_derivative_is_refused():
    "Its terms would be missing in silence."
    for model, x in [(sparsify(nn.Conv2d(2, 3, 3), .5), torch.rand(4, 2, 5, 5)), (sparsify(chain(), .5), torch.rand(4, 5, 5, 5)),
                     (sparse.SwappedAdaptiveAvgPool(1), sparse.innermost(torch.rand(4, 5, 5, 5)))]:
        x.requires_grad_()
        with pytest.raises(RuntimeError, match="no second derivative"): torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_backward_twice():
    model, x = sparsify(chain(), .5), torch.rand(4, 5, 8, 8, requires_grad=True)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in (x, *model.parameters())]
    loss.backward()
    for p, g in zip((x, *model.parameters()), once): assert torch.equal(p.grad, 2 * g)


def test_an_input_changed_between_forward_and_backward_is_noticed():
    for x in (torch.rand(4, 5, 8, 8), sparse.innermost(torch.rand(4, 5, 8, 8))):
        lies_so, before = sparse.innermost(x) is x, x.clone()
        layer = sparsify(nn.Conv2d(5, 6, 3), .5)
        loss = layer(x).square().sum()
        x.zero_()
        if lies_so:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()
        else:  # copied: the gradient is that of the old input
            loss.backward()
            grad, layer.values.grad = layer.values.grad, None
            layer(before).square().sum().backward()
            assert torch.equal(grad, layer.values.grad)


def test_batch_norm_may_learn_where_nothing_else_does():
    ours = sparsify(chain(), .5).eval()
    ours[0].requires_grad_(False)
    dense = densify(copy.deepcopy(ours))
    x = torch.rand(4, 5, 8, 8)
    ours(x).square().sum().backward(), dense(x).square().sum().backward()
    assert is_close(ours[1].weight.grad, dense[1].weight.grad) and is_close(ours[1].bias.grad, dense[1].bias.grad)


def test_statistics_as_a_plain_average():
    "Momentum None, and torch.optim.swa_utils.update_bn, which sets it."
    dense = chain()
    dense[1].momentum = None
    ours = sparsify(copy.deepcopy(dense), .5)
    with torch.no_grad(): dense[0].weight.mul_(ours[0].mask)
    batches = [torch.rand(5, 5, 8, 8) for _ in range(3)]
    for x in batches: ours(x), dense(x)
    assert is_close(ours[1].running_mean, dense[1].running_mean) and is_close(ours[1].running_var, dense[1].running_var)
    for model in (ours, dense): torch.optim.swa_utils.update_bn(batches[:2], model)
    assert is_close(ours[1].running_mean, dense[1].running_mean) and ours[1].num_batches_tracked == 2


def test_pooling_that_is_asked_for_more():
    torch.manual_seed(0)
    x = torch.rand(4, 5, 9, 9)
    model = sparsify(nn.Sequential(nn.Conv2d(5, 5, 3), nn.AdaptiveAvgPool2d(1), nn.ReLU(inplace=True)), .5)
    model(x).sum().backward()  # in place, right after the pooling
    model = sparsify(nn.Sequential(nn.Conv2d(5, 5, 3), nn.MaxPool2d(2, return_indices=True)), .5)
    (ours, places), (theirs, same_places) = model(x), densify(copy.deepcopy(model))(x)
    assert is_close(ours, theirs) and torch.equal(places, same_places)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_come_out_as_from_the_dense_layer(bad):
    torch.manual_seed(0)
    dense, mask = masked(nn.Conv2d(2, 3, 3, padding=1), 1.)  # 0 · Inf is NaN: a masked weight is no absent one
    x = torch.randn(20, 2, 6, 6)
    x[3, 1, 2, 2] = bad
    assert is_close(SparseConv2d(dense, mask)(x), dense(x))
    dense = chain(2, 3)
    ours = sparsify(copy.deepcopy(dense), 1.)  # batch-norm spreads it over its channels, ReLU keeps a NaN
    assert torch.equal(ours(x).isnan(), dense(x).isnan()) and ours(x).isnan().any()


def test_results_are_equal_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            for model in (sparsify(cnn(width=8), .2), next(residual_networks())[2].float()):
                for _ in range(3):
                    model.zero_grad()
                    model(torch.rand(70, 3, 28, 28)).square().sum().backward()
                results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    finally: torch.set_num_threads(before)
    for i in (2, 3, 4, 5): assert all(torch.equal(a, b) for a, b in zip(results[i % 2], results[i], strict=True))


def test_samples_lie_innermost_and_any_module_takes_them():
    out = sparsify(nn.Conv2d(2, 3, 3), .5)(torch.rand(7, 2, 6, 6))
    assert out.shape == (7, 3, 4, 4) and out.stride() == (1, 112, 28, 7)
    out.relu_()  # in place, as ResNets do
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.MaxPool2d(2, return_indices=False), nn.Conv2d(4, 4, 1),
                          nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    ours, x = sparsify(copy.deepcopy(dense), .5), torch.randn(9, 2, 12, 12)
    with torch.no_grad():
        for name, mask in StaticSparse(ours, None).masks.items(): dense.get_parameter(name).mul_(mask)
    g = torch.randn(9, 3)
    for a, b in zip(gradients(ours, x, g)[:2], gradients(dense, x, g)[:2]): assert is_close(a, b)


# ------------------------------------------------------------------------------------ sparsify, densify

def test_densify_gives_the_same_network_back():
    torch.manual_seed(0)
    dense = nn.Sequential(cnn(width=8), nn.Linear(10, 4)).eval()
    dense[1].weight.requires_grad_(False)
    before = copy.deepcopy(dense)
    back = densify(sparsify(dense, .3, seed=5))
    assert repr(back) == repr(before) and back is dense and not back[0].training and not back[1].weight.requires_grad
    masks = StaticSparse(before, None, .3, seed=5).masks
    for name, p in before.named_parameters():
        assert torch.equal(back.get_parameter(name), p)  # masked, to the bit
        if name in masks: assert p.ne(0).sum() == masks[name].sum()


def test_only_values_are_parameters():
    model = sparsify(cnn(width=8), .1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 3, 28, 28)).sum().backward()
    optimizer.step()
    kept = round(.1 * sum(w.numel() for w in maskable(cnn(width=8)).values()))
    held = [layer.values for layer in model.modules() if isinstance(layer, SparseConv2d)]
    assert sum(v.numel() for v in held) == kept
    assert all(t.numel() in (1, v.numel()) for v in held for t in [v.grad, *optimizer.state[v].values()])
    largest = max(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert largest < 1000 < max(w.numel() for w in maskable(cnn(width=8)).values())  # no dense weight anywhere


def test_saved_copied_pickled_and_converted():
    torch.manual_seed(0)
    model, x = sparsify(cnn(width=4), .3), torch.rand(20, 3, 28, 28)
    model(x).sum().backward()  # what kernels need is made
    with evaluating(model), torch.no_grad():
        expected = model(x)
        other = sparsify(cnn(width=4), .3, seed=9)
        with evaluating(other):
            other(x)
            other.load_state_dict(model.state_dict())  # positions too, in place
            assert torch.equal(other(x), expected)
        twin, stream = copy.deepcopy(model), io.BytesIO()
        assert torch.equal(twin(x), expected)
        assert twin[0].norm[0] is twin[1] is not model[1]
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        torch.save(model, stream)
        stream.seek(0)
        assert torch.equal(torch.load(stream, weights_only=False)(x), expected)
        assert is_close(copy.deepcopy(model).double()(x.double()).float(), expected)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < .05 * expected.abs().max()
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(model(x.bfloat16()), model(x.bfloat16().float()))


def test_the_trained_copy_leaves_the_original_alone():
    model = sparsify(cnn(width=4), .3)
    twin = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), .1)
    twin(torch.rand(20, 3, 28, 28)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert not torch.equal(twin[1].running_mean, model[1].running_mean)


def test_frozen_values_get_no_gradient():
    model = sparsify(cnn(width=4), .3)
    model[0].values.requires_grad_(False)
    model(torch.rand(20, 3, 28, 28)).sum().backward()
    assert model[0].values.grad is None and model[3].values.grad is not None


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def with_embedding():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Embedding(4, 3))
    model[1].weight = model[0].weight
    return model


def pruned():
    return nn.Sequential(prune.random_unstructured(nn.Linear(3, 3), "weight", .5))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("model, says", [
    (with_embedding(), "1 shares its weight with 0"), (pruned(), "0 has hooks or a weight that is computed"),
    (nn.Sequential(seen(nn.Linear(3, 3))), "0 has hooks"), (nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3))), "0 has hooks"),
    (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))), "0 is a Parametrized"),
    (nn.Sequential(nn.Linear(1 << 16, 1 << 15, device="meta")), "0 has 2,147,483,648 weights"),
    (nn.Sequential(nn.Conv1d(2, 3, 3)), "0 is a Conv1d"), (nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2, 3, 3)), "1 is a ConvTranspose2d"),
    (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")), "0 pads with 'reflect'"),
    (nn.MultiheadAttention(4, 2), "out_proj is a NonDynamicallyQuantizableLinear"), (tied(), "1 shares its weight with 0"),
    (nn.Sequential(nn.LazyLinear(3)), "0 is a LazyLinear"), (nn.ReLU(), "ReLU has no conv or linear layer")])
def test_refused_by_name(model, says):
    with pytest.raises(ValueError, match=says): sparsify(model, .5)


@pytest.mark.parametrize("shape", [(3, 2, 8), (3, 4, 8, 8), (3, 2, 2, 8)])
def test_input_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=f"{'×'.join(map(str, shape[1:]))}|pixels"): sparsify(nn.Conv2d(2, 3, 3), .5)(torch.rand(shape))


def test_input_of_another_dtype():
    with pytest.raises(ValueError, match="float64; expected torch.float32"): sparsify(nn.Linear(4, 3), .5)(torch.rand(2, 4).double())


def test_density_is_said_once():
    model = sparsify(nn.Linear(4, 3), .5)
    with pytest.raises(ValueError, match="stored sparse already"): StaticSparse(model, None, .5)
    with pytest.raises(ValueError, match="^the model is stored sparse already: densify it first$"): sparsify(model, .5)
    with pytest.raises(ValueError, match="density is None"): StaticSparse(nn.Linear(4, 3), None)


def test_a_module_in_two_places_is_one_layer():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    model = sparsify(nn.Sequential(layer, nn.ReLU(), layer), .5)
    assert model[0] is model[2] and isinstance(model[0], SparseConv2d)
    model(torch.rand(4, 3, 5, 5)).sum().backward()


# ------------------------------------------------------------------------------------ drop and grow, two storages

def two_storages(kind, **kwargs):
    "The same network, masked and stored sparse, with their optimizers and methods."
    torch.manual_seed(0)
    dense = cnn(width=8).double()
    ours = sparsify(copy.deepcopy(dense), .1, seed=3)
    optimizers = [torch.optim.SGD(model.parameters(), .02, momentum=.9) for model in (dense, ours)]
    return ((dense, optimizers[0], kind(dense, optimizers[0], .1, seed=3, **kwargs)),
            (ours, optimizers[1], kind(ours, optimizers[1], seed=3, **kwargs)))


@pytest.mark.parametrize("kind", [SET, RigL])
def test_a_run_takes_the_same_course_on_both_storages(kind):
    data = torch.Generator().manual_seed(1)
    x, y = torch.rand(400, 3, 28, 28, generator=data).double(), torch.randint(0, 10, (400,), generator=data)
    x[torch.arange(400), :, y] += 1  # something to learn
    weights = torch.where(y < 2, 8., 1.)
    runs, draws, moved = two_storages(kind, delta_t=10, t_end=225), torch.Generator().manual_seed(2), 0
    first = runs[0][2].masks
    for step in range(1, 301):
        index, losses = torch.multinomial(weights, 32, True, generator=draws), []
        for model, optimizer, method in runs:
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            method.before_step(), optimizer.step(), method.after_step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        if step % 10 == 0:
            masks = [method.masks for _, _, method in runs]
            assert masks[0].keys() == masks[1].keys()
            for name, mask in masks[0].items(): assert torch.equal(mask, masks[1][name]), (step, name)
    assert runs[0][2].updates == runs[1][2].updates == 22
    assert any(not torch.equal(mask, first[name]) for name, mask in masks[0].items()) and losses[0] < 1
    weight, layer = runs[0][0][3].weight, runs[1][0][3]
    assert is_close(layer.dense(), weight, 1e-4)
    momentum = [optimizer.state[p]["momentum_buffer"] for (_, optimizer, _), p in zip(runs, (weight, layer.values))]
    assert is_close(layer.dense(momentum[1]), momentum[0], 1e-4)


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
def test_the_dense_gradient_that_rigl_sees(padding):
    torch.manual_seed(0)
    dense, mask = masked(nn.Conv2d(4, 6, (4, 3), padding=padding, groups=2), .2)
    layer, x = SparseConv2d(copy.deepcopy(dense), mask), torch.randn(20, 4, 8, 9)
    layer.wanted = True
    for _ in range(2):  # gradients add up over backward passes, as .grad does
        (layer(x).square().sum()).backward()
        (dense(x).square().sum()).backward()
    assert is_close(layer.gradient(), dense.weight.grad)
    with pytest.raises(ValueError, match="after backward"): layer.gradient()


def test_the_first_layer_too_has_a_dense_gradient():
    torch.manual_seed(0)
    dense = chain()
    ours, x, g = sparsify(copy.deepcopy(dense), .3), torch.randn(20, 5, 8, 8), torch.randn(20, 6, 4, 4)
    with torch.no_grad(): dense[0].weight.mul_(ours[0].mask)
    ours[0].wanted = True
    ours(x).backward(g), dense(x).backward(g)
    assert is_close(ours[0].gradient(), dense[0].weight.grad, 1e-4)
    assert is_close(ours[0].values.grad, dense[0].weight.grad[ours[0].mask], 1e-4)


def test_a_zero_value_keeps_its_place():
    model = sparsify(nn.Linear(8, 8), .5)
    with torch.no_grad(): model.values.zero_()
    positions = model.positions.clone()
    model(torch.rand(4, 8)).sum().backward()
    assert model.values.grad.ne(0).all() and torch.equal(model.positions, positions)
    assert model.mask.sum() == 32 and sparsify(densify(nn.Sequential(model)), 1.)[0].positions.numel() == 64


def test_between_updates_nothing_dense_is_made():
    model = sparsify(cnn(width=4), .3)
    rigl = RigL(model, torch.optim.SGD(model.parameters(), .1), delta_t=3, t_end=10)
    wanted = []
    for _ in range(7):
        wanted.append(model[0].wanted)
        model(torch.rand(9, 3, 28, 28)).sum().backward()
        assert bool(model[0].caught) == model[0].wanted
        rigl.before_step(), rigl.optimizer.step(), rigl.after_step()
        assert not model[0].caught
    assert wanted == [False, False, True, False, False, True, False]


def test_full_layers_and_copies_keep_nothing():
    "Nobody would ever ask them for it."
    torch.manual_seed(0)
    model = sparsify(cnn(width=4), .3)
    rigl = RigL(model, torch.optim.SGD(model.parameters(), .1), delta_t=1, t_end=10)
    assert model[11].mask.all() and not model[11].wanted and model[0].wanted
    twin = copy.deepcopy(model)
    for m in (model, twin): m(torch.rand(9, 3, 28, 28)).sum().backward()
    assert not model[11].caught and model[0].caught and not twin[0].wanted and not twin[0].caught
    model[0].wanted = True
    assert not model[0].caught  # what an abandoned step has left is forgotten


def test_what_was_wanted_before_forward_counts():
    layer, x = sparsify(nn.Conv2d(2, 3, 3), .5), torch.rand(4, 2, 5, 5)
    loss = layer(x).sum()
    layer.wanted = True
    loss.backward()
    assert not layer.caught


@pytest.mark.parametrize("kind", [SET, RigL])
def test_frozen_layers_exchange_nothing(kind):
    for model, _, method in two_storages(kind, delta_t=1, t_end=10):
        before = method.masks
        frozen = dict(model.named_modules())["3"]
        (frozen.values if hasattr(frozen, "values") else frozen.weight).requires_grad_(False)
        for _ in range(2):
            model(torch.rand(9, 3, 28, 28).double()).square().sum().backward()
            method.before_step(), method.optimizer.step(), method.after_step()
            model.zero_grad()
        assert method.updates == 2 and torch.equal(method.masks["3.weight"], before["3.weight"])
        assert not torch.equal(method.masks["6.weight"], before["6.weight"])


def test_a_pickled_run_goes_on_as_if_nothing_had_been():
    "Model, optimizer and method pickled together, one step before an update."
    run, x = two_storages(RigL, delta_t=2, t_end=10)[1], torch.rand(9, 3, 28, 28).double()
    def step(model, optimizer, method):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        method.before_step(), optimizer.step(), method.after_step()
    step(*run)
    twin = pickle.loads(pickle.dumps(run))
    for each in (run, twin): step(*each)
    assert run[2].updates == twin[2].updates == 1
    assert all(torch.equal(v, twin[0].state_dict()[name]) for name, v in run[0].state_dict().items())


def test_the_dense_gradient_where_no_weight_leads():
    "RigL can bring a channel to life that has lost all of its weights."
    torch.manual_seed(0)
    dense = chain()
    ours, x, g = sparsify(copy.deepcopy(dense), .01), torch.randn(70, 5, 8, 8), torch.randn(70, 6, 4, 4)
    with torch.no_grad(): dense[0].weight.mul_(ours[0].mask)
    ours[0].wanted = True
    ours(x).backward(g), dense(x).backward(g)
    alive = ours[0].mask.flatten(1).any(1)
    assert not alive.all() and alive.any()
    found, expected = ours[0].gradient(), dense[0].weight.grad
    for part in (alive, ~alive): assert is_close(found[part], expected[part], 1e-3)


def test_the_dense_gradient_of_a_layer_that_scatters():
    torch.manual_seed(0)
    dense, mask = masked(nn.Conv2d(2, 3, 3), .3)
    layer, x = SparseConv2d(copy.deepcopy(dense), mask).bfloat16(), torch.randn(20, 2, 6, 6).bfloat16()
    layer.wanted = True
    layer(x).float().square().sum().backward()
    dense.bfloat16()(x).float().square().sum().backward()
    assert is_close(layer.gradient(), dense.weight.grad, 1e-2)


# ------------------------------------------------------------------------------------ threads, memory, caches

def test_lent_memory_is_not_hoarded(monkeypatch):
    monkeypatch.setattr(kernels, "spare", {})
    monkeypatch.setattr(kernels, "held", 0)
    for _ in range(3): kernels.empty((1 << 30, 2), np.uint8)
    assert kernels.held == sum(size * len(free) for size, free in kernels.spare.items()) <= 5 << 30
    for size in range(1 << 18, (1 << 18) + 50): kernels.empty((size,), np.uint8)
    assert len(kernels.spare) <= 33


def test_a_forked_process_has_threads_of_its_own():
    "Its parent's do not live there; tasks left to them would never let go of their arrays."
    x, y, ones = np.ones((4, 300_000), np.float32), np.zeros((4, 300_000), np.float32), np.ones(4, np.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        double = lambda: kernels.run(kernels.scale_channels, x, y, x[:0], 0 * ones, 2 * ones, ones, np.float32(0))
        double()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                y[:] = 0
                assert not kernels.workers
                double()
                assert (y == 3).all() and kernels.workers[0].is_alive()
                status = 0
            finally: os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    finally: torch.set_num_threads(before)


def test_memory_is_lent_again_only_when_nobody_looks():
    first = kernels.empty((512, 512), np.float32)
    tensor, address = torch.from_numpy(first)[3:], first.ctypes.data
    del first
    second = kernels.empty((512, 512), np.float32)
    assert second.ctypes.data != address
    del tensor
    assert kernels.empty((512, 512), np.float32).ctypes.data == address


def test_kernels_work_where_nothing_can_be_cached(tmp_path):
    code = ("import numpy as np, numba.core.caching as c\n"
            "c.CacheImpl._locator_classes = []\n"  # as where no folder can be written
            "from rest_nb import kernels\n"
            "kernels.wait(np.zeros(2, np.int64), 0)\n"
            "print(type(kernels.wait._cache).__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["NullCache"], done.stderr


def test_who_compiles_computes_as_those_who_load(tmp_path):
    "To the bit: forward, all gradients, an update of the masks."
    code = ("import hashlib, torch\n"
            "from rest_nb import masks, models, sparse\n"
            "found = hashlib.sha256()\n"
            "for make, size in ((models.resnet18, 32), (models.cnn, 28)):\n"
            "    torch.manual_seed(0)\n"
            "    model = sparse.sparsify(make(10, width=32), density=.05)\n"
            "    optimizer = torch.optim.SGD(model.parameters(), .1)\n"
            "    rigl = masks.RigL(model, optimizer, delta_t=1, t_end=3)\n"
            "    for _ in range(2):\n"
            "        optimizer.zero_grad()\n"
            "        model(torch.rand(40, 3, size, size)).logsumexp(1).sum().backward()\n"
            "        rigl.before_step(), optimizer.step(), rigl.after_step()\n"
            "    for tensor in model.state_dict().values(): found.update(tensor.numpy().tobytes())\n"
            "print(found.hexdigest())")
    run = lambda: subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path)), cwd=ROOT,
                                 capture_output=True, text=True).stdout
    files = lambda: sorted(p.name for p in tmp_path.rglob("*.nbc"))
    assert not files()
    first, compiled = run(), files()
    assert compiled and run() == first and files() == compiled


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@cuda
def test_cuda_computes_the_same():
    torch.manual_seed(0)
    here = sparsify(cnn(width=8), .2)
    there, x = copy.deepcopy(here).cuda(), torch.rand(30, 3, 28, 28)
    out, out2 = here(x), there(x.cuda())
    assert is_close(out2.cpu(), out, 1e-3)
    out.square().sum().backward(), out2.square().sum().backward()
    for a, b in zip(here.parameters(), there.parameters()): assert is_close(b.grad.cpu(), a.grad, 1e-2)


def test_a_sparse_layer_says_its_sizes_as_the_ordinary_one_does():
    "Code that builds on a model asks its layers: `model.fc.in_features`."
    conv, linear = nn.Conv2d(6, 8, (3, 5), groups=2), nn.Linear(7, 3)
    ours = sparsify(nn.Sequential(copy.deepcopy(conv), copy.deepcopy(linear)), .5)
    for name in ("in_channels", "out_channels", "kernel_size", "groups"): assert getattr(ours[0], name) == getattr(conv, name)
    for name in ("in_features", "out_features"): assert getattr(ours[1], name) == getattr(linear, name)
    assert not hasattr(ours[1], "in_channels") and not hasattr(ours[0], "in_features")
