"Frozen networks: PyTorch's own, dense, in evaluation, with zeros for weights that are not there, are the oracle."
import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from rest_nb import inference
from rest_nb.inference import Followed, freeze
from rest_nb.masks import StaticSparse
from rest_nb.models import cnn, resnet, resnet18
from rest_nb.sparse import sparsify


def lived(model):
    "As if trained: batch-norms with statistics and weights, in double precision."
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(.5, 2)
            if layer.affine: layer.weight.data.uniform_(-1.5, 1.5), layer.bias.data.uniform_(-1, 1)
    return model.double()


@torch.no_grad()
def thinned(model, share):
    "Weights at zero but for a `share` of them."
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)): layer.weight.mul_(torch.rand_like(layer.weight) < share)
    return model


@torch.no_grad()
def agree(model, x, relative=1e-11):
    "Is the frozen answer the model's?"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ours, theirs = freeze(model)(x), copy.deepcopy(model).eval()(x)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and not ours.requires_grad
    assert (ours - theirs).abs().max() <= relative * max(theirs.abs().max().item(), 1e-30)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())  # left as it was
    return True


@st.composite
def chains(draw):
    "A network of up to four layers of any kind, and images that it can take."
    pick = lambda low, high: draw(st.integers(low, high))
    torch.manual_seed(pick(0, 9999))
    channels, size = pick(1, 4), [pick(4, 24), pick(4, 24)]
    x = torch.randn(draw(st.sampled_from([1, 3, inference.LANES, 2 * inference.LANES + 1])), channels, *size).double()
    layers = []
    for i in range(pick(1, 5)):
        kind = draw(st.sampled_from(["conv", "conv", "norm"] + ["max", "mean", "all", "relu", "drop"] * (i > 0)))
        if kind == "conv":
            kernel, stride, dilation = ((pick(1, 4), pick(1, 4)), (pick(1, 3), pick(1, 3)), (pick(1, 2), pick(1, 2)))
            padding = draw(st.sampled_from([(pick(0, 3), pick(0, 3)), "valid"] + (["same"] if stride == (1, 1) else [])))
            groups = draw(st.sampled_from([n for n in (1, 2, 3) if channels % n == 0]))
            layers.append(nn.Conv2d(channels, groups * pick(1, 5), kernel, stride, padding, dilation, groups, bias=draw(st.booleans())))
            channels = layers[-1].out_channels
            if draw(st.booleans()): layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
            if draw(st.booleans()): layers.append(nn.ReLU())
        if kind == "max": layers.append(nn.MaxPool2d(kernel := pick(1, 3), pick(1, 3), pick(0, kernel // 2)))
        if kind == "mean": layers.append(nn.AvgPool2d((pick(1, 3), pick(1, 3)), pick(1, 3)))
        if kind == "all": layers.append(nn.AdaptiveAvgPool2d(draw(st.sampled_from([1, 2, (3, None), (None, 2)]))))
        if kind == "norm": layers.append(nn.BatchNorm2d(channels))
        if kind == "relu": layers.append(nn.ReLU(inplace=True))
        if kind == "drop": layers.append(nn.Dropout(.5))
    model = lived(nn.Sequential(*layers)).eval()
    try: features = copy.deepcopy(model)(x.clone())
    except RuntimeError: features = None  # too small
    if features is not None and draw(st.booleans()):
        model.extend([nn.Flatten(), nn.Linear(features[0].numel(), pick(1, 5)).double()])
    return thinned(model, draw(st.sampled_from([0, .1, .5, 1]))), x, features is not None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(chains())
def test_any_chain_of_layers_is_answered_as_by_pytorch(case):
    model, x, is_large_enough = case
    if is_large_enough: assert agree(model, x)
    else:
        with pytest.raises(ValueError, match="×".join(map(str, x.shape[1:]))): freeze(model)(x)


def bottleneck(width=4):
    from torchvision.models.resnet import Bottleneck, ResNet
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7)
    model.conv1, model.bn1, model.inplanes = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), width
    for i in range(4): setattr(model, f"layer{i + 1}", model._make_layer(Bottleneck, width * 2 ** i, 1, stride=1 + (i > 0)))
    model.fc = nn.Linear(32 * width, 7)
    return model


@pytest.mark.parametrize("make", [lambda: resnet18(width=8), lambda: resnet([1, 2, 1, 1], width=4, stem="cifar"), bottleneck, lambda: cnn(width=8)])
@pytest.mark.parametrize("size", [28, 37])
def test_residual_networks_are_answered_as_by_pytorch(make, size):
    torch.manual_seed(0)
    assert agree(thinned(lived(make()), .1), torch.randn(5, 3, size, size + 3).double())


def test_networks_stored_sparse_under_masks_and_dense_answer_alike():
    torch.manual_seed(0)
    dense, x = lived(resnet18(width=8)).float(), torch.rand(9, 3, 32, 32)
    compact = sparsify(copy.deepcopy(dense), .05)
    masked = copy.deepcopy(dense)
    masks = {name: layer.mask for name, layer in compact.named_modules() if hasattr(layer, "mask")}
    StaticSparse(masked, torch.optim.SGD(masked.parameters(), .1), .05)
    assert agree(compact, x, 1e-5) and agree(masked, x, 1e-5) and agree(dense, x, 1e-5)
    for name, mask in masks.items(): dense.get_submodule(name).weight.data.mul_(mask)
    assert torch.equal(freeze(dense)(x), freeze(compact)(x))
    assert sum(int(mask.sum()) for mask in masks.values()) == sum(len(s.values) for s in freeze(compact).steps if s.values is not None)


class Forked(nn.Module):
    "Values that several read, in every order that could go wrong."
    def __init__(self, way):
        super().__init__()
        self.way, self.conv, self.other = way, nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.norm, self.relu, self.drop, self.last = nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        y = self.conv(x)
        match self.way:
            case "floored and not": return self.relu(y) + y
            case "normed and not": return y + self.norm(y)
            case "through dropout": return self.last(self.relu(self.drop(y))) + self.last(y)
            case "dropout forks": return self.relu(z := self.drop(y)) + z
            case "two sums": return torch.relu(y + self.other(x)) + self.other(x)
            case "sum read twice": return F.relu(z := y.add(self.other(x))) + z
            case "norm of a sum": return self.norm(y + self.other(x)) + y
            case "floored first": return y + self.relu(self.norm(self.other(x)))
            case "in place": return self.norm(self.other(x)).add_(y).relu_().flatten(start_dim=1)
            case "late": return self.last(self.relu(self.norm(y))) + self.last(self.other(x))
            case "floor of a floor": return torch.relu(self.relu(y)) + self.relu(self.norm(self.relu(y)))
            case "input floored": return self.relu(x) + x
            case "input returned": return x


@pytest.mark.parametrize("way", ["floored and not", "normed and not", "through dropout", "dropout forks", "two sums", "sum read twice", "norm of a sum", "floored first", "in place", "late",
                                 "floor of a floor", "input floored", "input returned"])
def test_values_that_several_read(way):
    torch.manual_seed(0)
    assert agree(thinned(lived(Forked(way)), .6), torch.randn(11, 2, 9, 7).double())


def test_what_is_nowhere_floored_may_be_negative_and_nan_and_infinity_stay():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d((1, 2)))
    with torch.no_grad(): model[0].weight.fill_(1), model[0].bias.zero_()
    x = torch.tensor([[[[np.nan, 3], [3, np.nan], [np.inf, -np.inf], [-3, -4]]]], dtype=torch.float32)
    with torch.no_grad(): expected = model(x)
    assert torch.equal(freeze(model)(x).nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9)) and expected.isnan().sum() == 2
    assert torch.equal(freeze(nn.Sequential(nn.MaxPool2d((1, 2))))(x)[0, 0, 2:], torch.tensor([[np.inf], [-3]]))


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    return freeze(sparsify(lived(resnet18(width=8)).float(), .1))


def test_an_answer_depends_on_its_image_only(frozen):
    images = torch.rand(3 * inference.LANES + 5, 3, 32, 32)
    answers, threads = frozen(images), torch.get_num_threads()
    for n in (1, inference.LANES - 1, inference.LANES, len(images)):
        for first in (0, 7):
            assert torch.equal(frozen(images[first:first + n]), answers[first:first + n])
    innermost = images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert torch.equal(frozen(innermost), answers) and torch.equal(frozen(images.to(memory_format=torch.channels_last)), answers)
    assert torch.equal(frozen(images.clone().requires_grad_()), answers)
    try:
        for n in (2, 3):
            torch.set_num_threads(n)
            for _ in range(5): assert torch.equal(frozen(images), answers)
    finally: torch.set_num_threads(threads)


def test_images_of_other_sizes_follow_one_another(frozen):
    images = torch.rand(2, 3, 40, 24)
    first = frozen(images)
    frozen(torch.rand(2, 3, 32, 32))
    assert torch.equal(frozen(images), first) and len(frozen.plans) >= 2


def test_nobody_asks(frozen): assert frozen(torch.rand(0, 3, 32, 32)).shape == (0, 10)


def test_what_was_put_aside_answers_alike(frozen):
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(images), frozen(images))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_values_that_are_still_to_be_read_do_not_overlap(data):
    n = data.draw(st.integers(2, 8))
    steps, volumes = [inference.Step("read", result=0)], {}
    for i in range(1, n):
        pick = lambda: data.draw(st.integers(0, i - 1))
        steps.append(inference.Step("convolve", pick(), i, added=pick() if data.draw(st.booleans()) else None))
    steps.append(inference.Step("write", n - 1, n))
    for i in range(n): volumes[i] = inference.LANES * data.draw(st.integers(1, 9))
    begins, top = inference.places(steps, volumes)
    held = lambda i: range(i, max([i] + [t for t, step in enumerate(steps) if i in (step.source, step.added)]) + 1)
    for i in range(n):
        assert inference.LANES <= begins[i] and begins[i] + volumes[i] <= top  # the first numbers are nobody's
        for j in range(i):
            if set(held(i)) & set(held(j)): assert begins[i] >= begins[j] + volumes[j] or begins[j] >= begins[i] + volumes[i]


class Calls(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does, self.conv = does, nn.Conv2d(3, 4, 3)

    def forward(self, x): return self.does(self.conv(x))


@pytest.mark.parametrize("model, said", [
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), "1 is a GELU"),
    (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), "0 has padding_mode='circular'; expected 'zeros'"),
    (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), "ceil_mode=True"), (nn.Sequential(nn.MaxPool2d(2, dilation=2)), "dilation=2"),
    (nn.Sequential(nn.AvgPool2d(3, padding=1)), "averages over padding"), (nn.Sequential(nn.AvgPool2d(3, divisor_override=4)), "divisor_override=4"),
    (nn.Sequential(nn.Flatten(2)), "start_dim=2"), (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "0 has no running statistics"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), "1 takes what is not flat"),
    (Calls(torch.sigmoid), "sigmoid"), (Calls(lambda y: y + y), "two different values"), (Calls(lambda y: y + 1), "two different values"),
    (Calls(lambda y: torch.add(y, y, alpha=2)), "call_function: add"), (Calls(lambda y: torch.flatten(y)), "flatten(x, 1)"), (Calls(lambda y: y.flatten(start_dim=2)), "flatten(x, 1)"),
    (Calls(lambda y: y.relu_() + y), "relu_ changes in place"), (Calls(lambda y: F.relu(y, True) + y), "relu changes in place"),
    (Calls(lambda y: F.relu(y, inplace=True) + y), "relu changes in place"), (Calls(lambda y: torch.relu(y.add_(torch.relu(y))) + y), "add_ changes in place"),
    (Calls(lambda y: y if y.sum() > 0 else -y), "cannot be followed"), (Calls(lambda y: (y, y)), "output"),
    (nn.Conv2d(3, 4, 3).bfloat16(), "torch.bfloat16"), (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).double()), "torch.float32, torch.float64"),
])
def test_what_cannot_be_frozen_says_so(model, said):
    with pytest.raises(ValueError) as error: freeze(model)
    assert said in str(error.value) and "expected" in str(error.value) + "expected" * ("frozen network has" in str(error.value) or "followed" in str(error.value))


@pytest.mark.parametrize("images, said", [
    (torch.rand(2, 3, 32, 32).double(), "float64"), (torch.rand(2, 4, 32, 32), "4×32×32"), (torch.rand(3, 32, 32), "expected torch.float32, N×C×H×W"),
    (torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "uint8")])
def test_images_that_no_network_takes(frozen, images, said):
    with pytest.raises(ValueError, match=said): frozen(images)


def test_vectors_are_taken():
    torch.manual_seed(0)
    model = lived(nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 3)))
    assert agree(model, torch.randn(5, 6).double())
    assert agree(lived(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))), torch.randn(5, 2, 4, 4).double())


def test_what_a_convolutions_result_takes_part_in_is_done_by_it():
    "A residual network makes one step for each convolution, pooling and linear layer, and none for batch-norm, ReLU and addition."
    kinds = [step.kind for step in Followed(resnet18(width=2).eval()).steps]
    assert kinds.count("convolve") == 21 and kinds.count("pool") == 2 and len(kinds) == 25
