"Frozen networks: PyTorch's own, dense, in evaluation, with zeros for weights that are not there, are the oracle."
import copy
import operator
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune  # noqa: F401

from rest_nb import inference, training
from rest_nb.batches import Transform, assemble
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
            if draw(st.booleans()): layers.append(draw(st.sampled_from([nn.ReLU, nn.ReLU6]))())
        if kind == "max": layers.append(nn.MaxPool2d(kernel := pick(1, 3), pick(1, 3), pick(0, kernel // 2), ceil_mode=draw(st.booleans())))
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
    assert sum(int(mask.sum()) for mask in masks.values()) == sum(len(s.values) for s in freeze(compact).steps if s.values is not None) == len(freeze(compact).values)


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
            case "added in place":
                y += self.other(x)
                return self.last(y).relu()
            case "in place": return self.norm(self.other(x)).add_(y).relu_().flatten(start_dim=1)
            case "late": return self.last(self.relu(self.norm(y))) + self.last(self.other(x))
            case "floor of a floor": return torch.relu(self.relu(y)) + self.relu(self.norm(self.relu(y)))
            case "input floored": return self.relu(x) + x
            case "input returned": return x


@pytest.mark.parametrize("way", ["floored and not", "normed and not", "through dropout", "dropout forks", "two sums", "sum read twice", "norm of a sum", "floored first", "in place", "added in place", "late",
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
    steps, volumes = [inference.Step("read", "x", result=0)], {}
    for i in range(1, n):
        pick = lambda: data.draw(st.integers(0, i - 1))
        steps.append(inference.Step("convolve", "c", pick(), i, added=pick() if data.draw(st.booleans()) else None))
    steps.append(inference.Step("write", "out", n - 1, n))
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


def hooked(which, how):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    getattr(model if which is None else model[which], how)(lambda *args: None)
    return model


def replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].forward = lambda x: x
    return model


class Stubborn(nn.Dropout):
    def train(self, mode=True): return super().train(True)


class Two(nn.Module):
    def forward(self, x, y): return x + y


@pytest.mark.parametrize("model, said", [
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), "1 is a GELU"), (nn.Sequential(nn.Softmax(1)), "0 is a Softmax"),
    (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), "0 has padding_mode='circular'; expected 'zeros'"),
    (nn.Sequential(nn.MaxPool2d(2, dilation=2)), "dilation=2"), (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "return_indices=True"),
    (nn.Sequential(nn.AvgPool2d(3, padding=1)), "averages over padding"), (nn.Sequential(nn.AvgPool2d(3, ceil_mode=True)), "ceil_mode=False"),
    (nn.Sequential(nn.AvgPool2d(3, divisor_override=4)), "divisor_override=4"),
    (nn.Sequential(nn.Flatten(2)), "start_dim=2"), (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "0 has no running statistics"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), "1 takes what is not flat"), (nn.Sequential(nn.Flatten(), nn.Conv2d(3, 4, 3)), "1 takes what is flat"),
    (nn.Sequential(nn.Flatten(), nn.BatchNorm2d(3)), "1 takes what is flat"), (nn.Sequential(Stubborn(.5)), "drops out"),
    (nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))), "0 has hooks"), (nn.Sequential(nn.utils.prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", .5)), "0 has hooks"),
    (hooked(0, "register_forward_hook"), "0 has hooks"), (hooked(1, "register_forward_pre_hook"), "1 has hooks"),
    (hooked(None, "register_forward_hook"), "the model has hooks"), (replaced(), "0 has hooks, or a forward() of its own"),
    (sparsify(hooked(1, "register_forward_hook"), .5), "1 has hooks"),
    (Calls(torch.sigmoid), "sigmoid"), (Calls(lambda y: y + y), "two different activations"), (Calls(lambda y: y + 1), "two different activations"),
    (Calls(lambda y: torch.add(y, y.relu(), alpha=2)), "two different activations"),
    (Calls(lambda y: y.mean((2, 3)) + y.mean((2, 3), True)), "adds what is flat and what is not"), (Calls(lambda y: y.mean(2)), "no mean over (2, 3)"), (Calls(lambda y: y.mean()), "no mean over (2, 3)"),
    (Calls(lambda y: torch.flatten(y)), "start_dim=0"), (Calls(lambda y: y.flatten(start_dim=2)), "start_dim=2"),
    (Calls(lambda y: y.relu_() + y), "relu_ changes in place"), (Calls(lambda y: F.relu(y, True) + y), "relu changes in place"),
    (Calls(lambda y: F.relu(y, inplace=True) + y), "relu changes in place"), (Calls(lambda y: torch.relu(y.add_(torch.relu(y))) + y), "add_ changes in place"),
    (Calls(lambda y: operator.iadd(z := y, y.relu()) + z), "iadd changes in place"),
    (Calls(lambda y: y if y.sum() > 0 else -y), "cannot be followed"), (Calls(lambda y: (y, y)), "something else than one activation"), (Calls(lambda y: y[0]), "getitem"),
    (Calls(lambda y: y.shape[0]), "something else than one activation"), (Calls(lambda y: y.view(y.size(0), y.size(1), -1)), "another size than that of the batch"),
    (Calls(lambda y: y.view(-1, 2, 2)), "another shape than N×K"), (Calls(lambda y: F.dropout(y)), "drops out"), (Calls(lambda y: F.max_pool2d(y, 2, dilation=2)), "dilation=2"),
    (Two(), "y is another input"), (None, "model is a NoneType"),
    (nn.Conv2d(3, 4, 3).bfloat16(), "torch.bfloat16"), (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).double()), "torch.float32, torch.float64"),
])
def test_what_cannot_be_frozen_says_so(model, said):
    with pytest.raises(ValueError) as error: freeze(model)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_layers_that_stay_in_training_are_refused():
    class Stays(nn.Sequential):
        def train(self, mode=True): return super().train(mode) if mode else self
    with pytest.raises(ValueError, match="0 stays in training mode"): freeze(nn.Sequential(Stays(nn.Conv2d(3, 4, 3), nn.Dropout(.5))).train())


class Tricky(nn.Module):
    "torch.fx sees no tensor here, and takes the other way."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x): return self.conv(x).relu() if isinstance(x, torch.Tensor) else self.conv(x)


def test_answers_that_differ_from_the_models_are_found_where_images_are_given():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, 8)
    with pytest.raises(ValueError, match="what cannot be followed"): freeze(Tricky(), x)
    model = lived(cnn(width=4)).float().train()
    assert torch.equal(freeze(model, torch.rand(5, 3, 28, 28))(x := torch.rand(2, 3, 28, 28)), freeze(model)(x)) and model.training and model[1].training


@pytest.mark.parametrize("does", [
    lambda y: F.max_pool2d(F.relu(y), 2), lambda y: F.max_pool2d(y, 3, stride=2, padding=1, ceil_mode=True), lambda y: F.avg_pool2d(F.relu6(y), 2, 1),
    lambda y: F.avg_pool2d(y, 3, padding=1, count_include_pad=False), lambda y: F.adaptive_avg_pool2d(y, (2, None)).flatten(1), lambda y: torch.flatten(y, 1, -1),
    lambda y: y.flatten(start_dim=1, end_dim=-1), lambda y: y.mean([2, 3]), lambda y: torch.mean(y, dim=(-1, -2), keepdim=True), lambda y: y.view(y.size(0), -1),
    lambda y: y.contiguous().reshape(y.shape[0], -1).relu(), lambda y: torch.reshape(y, (-1, 4 * 10 * 9)), lambda y: y.view(y.size()[0], 360), lambda y: F.dropout(y, training=False),
    lambda y: F.relu(torch.flatten(y, 1)) + y.flatten(1)])
def test_functions_do_as_their_layers(does):
    torch.manual_seed(0)
    model = Calls(does).double()
    with torch.no_grad(): model.conv.weight.mul_(20)  # beyond 6
    assert agree(model, torch.randn(5, 3, 12, 11).double())


class Optional(nn.Module):
    "What a user writes, with what is not asked for here."
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=(1,), stride=(2,)), nn.BatchNorm2d(8), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x, mask=None, shall_tell=False):
        size = x.shape
        del size
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        if mask is not None: x = x * mask
        x = F.dropout(x.view(-1, 8 * 4 * 4), training=self.training)
        return (x, self.fc(x)) if shall_tell else self.fc(x)


def test_tutorial_code_is_taken():
    torch.manual_seed(0)
    model = lived(Optional())
    assert agree(model, torch.rand(7, 3, 16, 16).double())
    with pytest.raises(ValueError, match="images are 3×20×16: fc gets 8×5×4, expected 128 features"): freeze(model)(torch.rand(7, 3, 20, 16).double())


@pytest.mark.parametrize("name, size", [("mobilenet_v2", 32), ("vgg11_bn", 32), ("alexnet", 64), ("mnasnet0_5", 32), ("resnext50_32x4d", 32)])
def test_networks_of_torchvision(name, size):
    import torchvision
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    model = nn.Sequential(*[*model.features][:9]) if name in ("vgg11_bn", "alexnet") else model  # their last layers are large
    assert agree(thinned(model.float(), .2), torch.randn(3, 3, size, size), 1e-4)


def test_a_layer_alone_is_a_network():
    torch.manual_seed(0)
    assert agree(nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 5, 5).double()) and agree(nn.Linear(4, 3).double(), torch.randn(2, 4).double())
    assert agree(sparsify(nn.Linear(40, 3).double(), .5), torch.randn(2, 40).double()) and agree(nn.ReLU(), torch.randn(2, 4))


def test_flattened_pixels_are_not_normed_as_channels():
    "One channel of four pixels, or as many channels as pixels: batch-norm after Flatten is of each number by itself."
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4).double()
    one = lived(nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="2 gets 1×2×2, expected 4 channels"): freeze(one)(x)
    assert agree(lived(nn.Sequential(nn.Conv2d(3, 6, 4), nn.Flatten(), nn.BatchNorm1d(6), nn.ReLU())), x)


def test_means_over_many_pixels_are_as_exact_as_pytorchs():
    x = torch.full((1, 1, 600, 700), .1)
    found = freeze(nn.Sequential(nn.AdaptiveAvgPool2d(1)))(x).item()
    assert abs(found / .1 - 1) < 3e-5  # one after another: 2e-3


def test_weights_that_batch_norm_makes_zero_are_gone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with torch.no_grad(): model[1].weight[:3] = 0
    assert len(freeze(model).values) == 27 and agree(model, torch.randn(2, 3, 5, 5), 1e-5)


def test_it_is_a_module_that_stays_as_it_is(frozen):
    images = torch.randint(0, 256, (5, 3, 32, 32)).byte()
    assert torch.equal(training.ask(frozen, images), frozen(assemble(images))) and not frozen.training
    assert torch.equal(nn.Sequential(frozen, nn.Softmax(1))(assemble(images)), frozen(assemble(images)).softmax(1))
    for change in (frozen.double, frozen.half, lambda: frozen.to("meta")):
        with pytest.raises(ValueError, match="stays as it is"): change()


def test_plans_of_this_processor_are_not_put_aside(frozen):
    frozen(torch.rand(1, 3, 32, 32))
    assert frozen.plans and pickle.loads(pickle.dumps(frozen)).plans == {} == copy.deepcopy(frozen).plans
    with pytest.raises(ValueError, match="^a frozen network is more than its state"): frozen.load_state_dict(frozen.state_dict())
    for size in range(20, 30): frozen(torch.rand(1, 3, size, size))
    assert len(frozen.plans) == 4


def test_threads_freeze_one_after_another():
    torch.manual_seed(0)
    model, x, failed = cnn(width=2).eval(), torch.rand(2, 3, 28, 28), []
    def often():
        try:
            for _ in range(10): freeze(model)
        except Exception as error: failed.append(error)
    threads = [threading.Thread(target=often) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed and torch.allclose(model(x), freeze(model)(x), atol=1e-5)


@pytest.mark.parametrize("images, said", [
    (torch.rand(2, 3, 32, 32).double(), "float64"), (torch.rand(2, 4, 32, 32), "images are 4×32×32: conv1 gets 4×32×32, expected 3 channels"),
    (torch.rand(3, 32, 32), "expected torch.float32, N×C×H×W"), (torch.rand(2, 3), "expected torch.float32, N×C×H×W"),
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


class Drawn(nn.Module):
    "Up to ten calls, each on any activation that is there by now."
    KINDS = dict(conv=lambda: nn.Conv2d(4, 4, 3, padding=1), norm=lambda: nn.BatchNorm2d(4), relu=nn.ReLU, relu_=lambda: nn.ReLU(inplace=True), drop=nn.Dropout,
                 pool=lambda: nn.MaxPool2d(3, 1, 1), add=nn.Identity, add_=nn.Identity, iadd=nn.Identity)

    def __init__(self, draw, kinds):
        super().__init__()
        self.calls = [(draw(st.sampled_from(kinds)), draw(st.integers(0, i)), draw(st.integers(0, i))) for i in range(draw(st.integers(1, 9)))]
        self.layers = nn.ModuleList(self.KINDS[kind]() for kind, *_ in self.calls)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        made = [x]
        for layer, (kind, a, b) in zip(self.layers, self.calls):
            y = made[a]
            if kind == "add": y = y + made[b]
            elif kind == "add_": y = y.add_(made[b])
            elif kind == "iadd": y += made[b]
            else: y = layer(y)
            made.append(y)
        return self.last(y)


@pytest.mark.parametrize("is_in_place", [False, True])
def test_drawn_networks_are_answered_as_by_pytorch_or_refused(is_in_place):
    counts = dict(answered=0, refused=0)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.data())
    def check(data):
        torch.manual_seed(data.draw(st.integers(0, 999)))
        model = lived(Drawn(data.draw, [kind for kind in Drawn.KINDS if is_in_place or kind not in ("relu_", "add_", "iadd")]))
        x = torch.randn(3, 4, 5, 6).double()
        try: freeze(model)
        except ValueError as error:
            assert "changes in place" in str(error) or "two different" in str(error)
            counts["refused"] += 1
        else:
            with torch.no_grad(): expected = copy.deepcopy(model).eval()(x.clone())
            assert (freeze(model)(x) - expected).abs().max() <= 1e-11 * max(1, expected.abs().max().item())
            counts["answered"] += 1
    check()
    assert counts["answered"] > 100 and counts["refused"] > 30, counts


@given(st.sampled_from([1, 3, inference.LANES, 2 * inference.LANES + 1]), st.integers(1, 3), st.integers(1, 19), st.integers(1, 19), st.integers(0, 9999))
def test_bytes_are_taken_as_a_table_says(n, channels, height, width, seed):
    torch.manual_seed(seed)
    transform = Transform(mean=(.1, .2, .3)[:channels], std=(.5, .4, .2)[:channels])
    model = thinned(lived(nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())), .5).float()
    x = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)
    frozen = freeze(model, table=transform.table(channels))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (transform.mean, transform.std))
    assert torch.equal(frozen(x), frozen((x.float() / 255 - mean) / std))   # by the definition of both
    assert torch.equal(frozen(x), frozen(x.to(memory_format=torch.channels_last)))
    assert (frozen(x) - model.eval()((x.float() / 255 - mean) / std)).abs().max() < 1e-4


def test_bytes_without_a_table_or_with_another_are_refused():
    model, x, table = cnn(width=4).eval(), torch.zeros(2, 3, 28, 28, dtype=torch.uint8), torch.arange(256).expand(3, 256)
    with pytest.raises(ValueError, match="uint8"): freeze(model)(x)
    with pytest.raises(ValueError, match="uint8"): freeze(model, x)
    with pytest.raises(ValueError, match="table is 1×256, but the network takes 3 channels"): freeze(model, table=table[:1])
    with pytest.raises(ValueError, match="but the network takes vectors"): freeze(nn.Sequential(nn.Linear(3, 2)), table=table)
    for wrong in (table[:, :255], table[0], table[:0], table.numpy(), table.to(torch.complex64), Transform()):
        with pytest.raises(ValueError, match="expected a real tensor C×256"): freeze(model, table=wrong)
    frozen = freeze(model.double(), table=table)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x + 7), frozen(torch.full_like(x, 7).double()))


def test_a_table_is_copied_and_answers_to_bytes_are_compared():
    torch.manual_seed(0)
    model, x, table = lived(cnn(width=4)).float().eval(), torch.randint(0, 256, (9, 3, 28, 28), dtype=torch.uint8), torch.randn(3, 256)
    frozen = freeze(model, x, table)
    before = frozen(x)
    assert before.std() > 0
    table.zero_()
    assert torch.equal(frozen(x), before)

    class Twofold(nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, x): return self.model(x) if isinstance(x, torch.fx.Proxy) else 2 * self.model(x)
    with pytest.raises(ValueError, match="otherwise than the model"): freeze(Twofold(), x, torch.randn(3, 256))


@pytest.mark.parametrize("order", [1, -1])
def test_images_that_begin_flat_are_taken(order):
    torch.manual_seed(0)

    class Fork(nn.Module):
        def __init__(self): super().__init__(); self.flat, self.conv = nn.Linear(3 * 4 * 4, 6), nn.Conv2d(3, 6, 4)
        def forward(self, x):
            parts = [self.flat(x.flatten(1)), self.conv(x).flatten(1)] if order > 0 else [self.conv(x).flatten(1), self.flat(x.view(x.size(0), -1))]
            return parts[0] + parts[1]
    assert agree(Fork().double(), torch.randn(5, 3, 4, 4).double())
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double()
    assert agree(model, torch.randn(5, 3, 4, 4).double()) and agree(model, torch.randn(5, 48).double())
    x, table = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8), torch.arange(256).double().expand(3, 256)
    assert torch.equal(freeze(model, x, table)(x), freeze(model)(x.double()))


def test_images_whose_answers_are_not_finite_or_none_are_compared_all_the_same():
    class Other(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(1, 1, 1, bias=False)
        def forward(self, x): return self.conv(x) if isinstance(x, torch.fx.Proxy) else self.conv(x).relu()
    model, x = Other(), torch.tensor([[[[1., 2.], [-1., -2.]]]])
    for odd in (float("nan"), float("inf")):
        image = x.clone()
        image[..., 0, 0] = odd
        freeze(model.conv, image)
        with pytest.raises(ValueError, match="otherwise than the model"): freeze(model, image * (1 if model.conv.weight > 0 else -1))
    freeze(model, x[:0])


@pytest.mark.parametrize("width", range(1, 34))
def test_rows_of_any_width_are_cut_into_tiles(width):
    torch.manual_seed(width)
    model = lived(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()))
    assert agree(thinned(model, .6), torch.randn(3, 2, 4, width).double())
