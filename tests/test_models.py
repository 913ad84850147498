"""Networks: torchvision's own ResNets as the judge, counts by hand and from the paper's facts."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from rest_nb.cost import forward_flops
from rest_nb.masks import maskable
from rest_nb.models import NETWORKS, cnn, resnet18, resnet34, with_dropout
from rest_nb.shim import load_torchvision
from rest_nb.sparse import SparseConv2d, sparsify

theirs = load_torchvision().models


def weights(model): return sum(w.numel() for w in maskable(model).values())


def macs(model, size): return forward_flops(model, (3, size, size))[0] // 2


@pytest.mark.parametrize("ours, judge, size, classes", [(resnet18, theirs.resnet18, 50, 2), (resnet34, theirs.resnet34, 32, 10)])
def test_resnets_are_torchvisions(ours, judge, size, classes):
    torch.manual_seed(0)
    ours, judge = ours(classes), judge(num_classes=classes)
    for module in ours.modules():  # statistics that differ from layer to layer, so that one in the wrong place shows
        if isinstance(module, nn.BatchNorm2d): nn.init.normal_(module.running_mean, 0, .2)
    judge.load_state_dict(ours.state_dict(), strict=True)
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), judge.eval()(x))
        assert torch.equal(ours.train()(x), judge.train()(x))
    assert [type(m) for m in ours.modules()] == [type(m) for m in judge.modules()]  # rest_nb.sparse goes by class


def test_resnets_start_as_torchvisions_do():
    # The same law of each weight: spreads agree layer by layer, though the draws differ.
    torch.manual_seed(0)
    ours, judge = resnet18(10).state_dict(), theirs.resnet18(num_classes=10).state_dict()
    assert list(ours) == list(judge)
    for name, tensor in judge.items():
        if tensor.ndim > 1: assert ours[name].std().item() == pytest.approx(tensor.std().item(), rel=.05), name
        elif not name.startswith("fc"): assert torch.equal(ours[name], tensor), name
    assert not torch.equal(ours["conv1.weight"], judge["conv1.weight"])


def test_counts_are_the_papers():
    assert weights(cnn(10)) == 660_992 and macs(cnn(10), 28) == 11_745_792
    assert weights(resnet18(10)) == 11_172_032
    assert macs(resnet18(10), 32) == pytest.approx(37.0e6, rel=.002)
    assert macs(resnet18(2), 128) == pytest.approx(592e6, rel=.001)


# Weights of the four groups of blocks, divided by w²: 3×3 convolutions, and 1×1 shortcuts where channels double.
GROUPS = {"resnet18": (36, 128, 512, 2048), "resnet34": (54, 272, 1664, 3200)}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from(["resnet18", "resnet34", "resnet18-cifar"]), st.integers(1, 40), st.integers(1, 20),
       st.sampled_from([32, 64]))
def test_counts_go_by_width(name, w, classes, size):
    model, stem = NETWORKS[name](classes, w), 9 if name.endswith("cifar") else 49
    groups = GROUPS[name.split("-")[0]]
    assert weights(model) == 3 * stem * w + sum(groups) * w ** 2 + 8 * w * classes
    after = 1 if stem == 9 else 4  # by how much the stem has shrunk the image
    positions = [(size // after // 2 ** i) ** 2 for i in range(4)]
    # where channels double, the image halves in the same block: all of a group's layers see one size
    expected = sum(g * n for g, n in zip(groups, positions)) * w ** 2 + 8 * w * classes
    assert macs(model, size) == expected + 3 * stem * w * (size // (1 if stem == 9 else 2)) ** 2


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(list(NETWORKS)), st.integers(1, 12), st.integers(1, 12))
def test_every_network_by_name_answers_and_learns(name, classes, width):
    model = NETWORKS[name](classes, width)
    logits = model(torch.rand(3, 3, 32, 32))
    assert logits.shape == (3, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_names_say_which_network():
    made = {name: network(10, 8) for name, network in NETWORKS.items()}
    assert list(made) == ["cnn", "resnet18", "resnet18-cifar", "resnet34"] and not any("." in name for name in made)
    assert isinstance(made["cnn"], nn.Sequential)
    assert [len(list(made[n].layer3)) for n in list(made)[1:]] == [2, 2, 6]
    assert made["resnet18"].conv1.stride == (2, 2) and isinstance(made["resnet18"].maxpool, nn.MaxPool2d)
    assert made["resnet18-cifar"].conv1.stride == (1, 1) and type(made["resnet18-cifar"].maxpool) is nn.Identity


@pytest.mark.parametrize("name", NETWORKS)
def test_all_batch_norms_are_done_by_compact_layers(name):
    # `sparse` knows a ResNet by its class: were the class another, each batch-norm would be a pass of its own.
    model = sparsify(NETWORKS[name](10, 8), .5)
    convolutions = [m for m in model.modules() if type(m) is SparseConv2d]
    assert convolutions and all(m.norm for m in convolutions)
    assert not [m for m in model.modules() if type(m) is nn.BatchNorm2d]


@pytest.mark.parametrize("network", [cnn, resnet18, resnet34])
@pytest.mark.parametrize("wrong, says", [
    (dict(width=0), "width is 0; expected a whole number, 1 or more"),
    (dict(width=-8), "width is -8"), (dict(width=64.0), "width is 64.0"), (dict(width=True), "width is True"),
    (dict(num_classes=0), "num_classes is 0")])
def test_sizes_that_do_not_work_are_refused_in_a_line(network, wrong, says):
    with pytest.raises(ValueError) as caught: network(**wrong)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="^stem is 'mnist'; expected one of imagenet, cifar$"): resnet18(stem="mnist")


def test_networks_can_be_measured_without_memory():
    with torch.device("meta"): model = resnet34(1000, width=512)
    assert weights(model) == 147 * 512 + 5190 * 512 ** 2 + 8 * 512 * 1000
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", list(NETWORKS))
def test_dropout_is_before_the_last_layer_and_in_training_only(name):
    torch.manual_seed(0)
    plain = NETWORKS[name](10, 8).eval()
    torch.manual_seed(0)
    model, seen = with_dropout(NETWORKS[name](10, 8), .25).eval(), []
    x = torch.rand(64, 3, 32, 32)
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].register_forward_pre_hook(lambda layer, inputs: seen.append(*inputs))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        [layer for layer in model.modules() if isinstance(layer, nn.Dropout)][-1].train()  # batch-norm stays as it is
        model(x)
    kept, alive = seen[1] != 0, seen[0] != 0
    assert torch.allclose(seen[1][kept], seen[0][kept] / .75)
    n = int(alive.sum())
    assert abs(int((alive & ~kept).sum()) - .25 * n) < 5 * (n * .25 * .75) ** .5 and n > 1000
