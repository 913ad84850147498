"Speed: who takes part, what is counted. No test measures time."
import pytest
import torch
from torch.nn import functional as F

from rest_nb import results, sparse, speed, training
from rest_nb.models import cnn


@pytest.fixture
def tiny(monkeypatch):
    "The CNN with few channels, as a network of its own."
    monkeypatch.setitem(speed.NETWORKS, "tiny", (lambda: cnn(width=4), 28))
    return "tiny"


@pytest.mark.parametrize("kind, stored, hooks, precision", [
    ("dense fp32", False, 0, "fp32"), ("dense bf16", False, 0, "bf16"), ("masked", False, 1, "fp32"), (.1, True, 0, "fp32")])
def test_contestants_are_what_their_names_say(tiny, kind, stored, hooks, precision):
    model, optimizer, found, used = speed.contestant(tiny, kind)
    assert (isinstance(model[0], sparse.SparseConv2d), len(found), used) == (stored, hooks, precision)
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_a_step_trains_and_inference_does_not(tiny):
    step = speed.training_step(tiny, .1, batch=32)
    losses = [step() for _ in range(30)]
    assert losses[-1] < .9 * losses[0]  # the same batch, learned by heart
    assert speed.inference(tiny, .1, batch=3)() is None


@pytest.mark.parametrize("is_frozen", [False, True])
def test_who_is_asked_is_frozen_or_not(tiny, monkeypatch, is_frozen):
    asked, real = [], speed.freeze
    def spied(model, **how):
        frozen = real(model, **how)
        return lambda x: asked.append(frozen(x)) or asked[-1]
    monkeypatch.setattr(speed, "freeze", spied)
    speed.inference(tiny, .1, batch=3, is_frozen=is_frozen)()
    if not is_frozen: assert asked == []
    else:
        usual = training.ask(speed.contestant(tiny, .1)[0], speed.noise(tiny, 3).x, inputs=speed.inputs(.1))
        assert torch.allclose(*asked, usual, atol=1e-5)


def test_state_is_counted_by_hand(tiny):
    dense = cnn(width=4)
    n, normed = sum(p.numel() for p in dense.parameters()), 2 * (4 + 8 + 16) + 10
    assert speed.state_bytes(tiny, "dense fp32") == 12 * n  # weight, gradient, momentum: 4 bytes each
    kept = round(.1 * (n - normed))
    # A kept weight: 12 bytes as above, position 4, (channel, tap) 8 forward and 8 backward, the order backward 4;
    # where rows and columns start: 8 for each channel in and out, and one more.
    channels = (3 + 4) + (4 + 8) + (8 + 16) + (16 + 10)
    assert speed.state_bytes(tiny, .1) == 36 * kept + 12 * normed + 8 * (channels + 2 * 4)


def test_the_limit_counts_what_lies_inside_the_image(tiny, monkeypatch):
    monkeypatch.setattr(speed, "alternate", lambda runs, rounds: dict.fromkeys(runs, 1.))
    lines = speed.layer_times(tiny, .3, dict(flops=1, bandwidth=1), batch=5)
    model, size = speed.contestant(tiny, .3)[0], 28
    assert [line["layer"] for line in lines] == ["0", "3", "6"]
    for line in lines:
        layer = model.get_submodule(line["layer"])
        # An image of ones under a weight of ones adds up what lies inside.
        inside = F.conv2d(torch.ones(1, layer.shape[1], size, size), layer.mask.float(), stride=2, padding=1).sum().item()
        assert line["flops"] == 2 * 5 * inside and line["weights"] == layer.mask.sum()
        assert line["bytes"] == 4 * 5 * (layer.shape[1] * size ** 2 + layer.shape[0] * (size // 2) ** 2)
        size //= 2


def test_measure_has_a_figure_for_everybody(tiny, monkeypatch):
    monkeypatch.setattr(speed, "peak_bytes", lambda network, kind, batch: 1)
    found = speed.measure(tiny, densities=(.1, .2), rounds=1, batch=4)
    for what in ("training", "inference", "single", "frozen inference", "frozen single", "state"):
        assert list(found[what]) == [*speed.RIVALS, "0.1", "0.2"] and min(found[what].values()) > 0
    assert found["frozen single"]["masked"] == found["single"]["masked"] and found["frozen single"]["0.1"] != found["single"]["0.1"]
    assert results.speed_ratios(found).loc["0.1", "masked"] == found["training"]["masked"] / found["training"]["0.1"]


def test_layers_table_says_what_binds():
    lines = [dict(layer="a", weights=1, seconds=4., flops=1., bytes=2.), dict(layer="b", weights=1, seconds=4., flops=3., bytes=2.)]
    table = results.layers_table(lines)
    assert table.binds.tolist() == ["bytes", "flops"] and table.of_limit.tolist() == [.5, .75]


def test_a_profile_adds_up_to_the_step(tiny, monkeypatch):
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    run = sparse.run
    found = speed.profile(tiny, .1, batch=8, rounds=2)
    assert sparse.run is run and {"first_forward", "gather", "normalise", "denormalise", "correlate"} <= {*found}
    # the clock moves by one at each look: a kernel takes 1, whatever lies between two kernels 1, and so the step
    calls = sum(found.values()) - found["other"] - found["step"]
    assert found["other"] == calls + 1 and found["step"] == 2 * calls + 1 and found["first_forward"] == 1 and found["normalise"] == 2
    table = results.profile_table({"tiny .1": found, "another": dict(other=1, step=2)})
    assert [*table.index][-2:] == ["other", "step"] and table.loc["gather"].tolist() == [1000 * found["gather"], 0]


def test_choices_ask_both_ways(monkeypatch):
    monkeypatch.setattr(speed, "alternate", once)
    asked, real = [], sparse.SparseConv2d.scatter
    monkeypatch.setattr(sparse.SparseConv2d, "scatter", lambda layer, x: asked.append(len(x)) or real(layer, x))
    lines = speed.choices(((60, 4, 5),), (.01, 1.), (1, 20))
    assert asked == [1, 20, 20] * 2 and [line["is_chosen"] for line in lines] == [False] * 3 + [True] * 3
    assert [(line["channels"], line["density"], line["batch"], line["training"]) for line in lines] == [
        (60, density, *how) for density in (.01, 1.) for how in ((1, False), (20, False), (20, True))]
    table = results.choices_table([dict(line, dense=3., kernels=2.) for line in lines])
    assert table.loc[.01, (60, False, 1)] == "1.50" and table.loc[1., (60, True, 20)] == "1.50*"


def test_bar():
    made_up = dict(networks=dict(CNN=dict(training={"dense fp32": 2., "dense bf16": 1., "masked": 3., "0.01": .5})))
    slower = dict(networks=dict(CNN=dict(training={"dense fp32": 2., "dense bf16": 2., "masked": 2., "0.01": .6})))
    table = results.bar_table(dict(here=made_up, there=slower), {("CNN", "0.01"): {"dense fp32": 4, "dense bf16": 3}})
    assert table.asked.tolist() == ["4×", "3×"]
    assert table.here.tolist() == ["4.0× ✓", "2.0×"] and table.there.tolist() == ["3.3×", "3.3× ✓"]
    with pytest.raises(FileNotFoundError, match="make speed"): results.load_speed("/nowhere", "avx2")


def once(runs, rounds=None):
    "In the place of `alternate`: everybody runs, and takes a second."
    for run in runs.values(): run()
    return dict.fromkeys(runs, 1.)


def test_limits_by_hand(monkeypatch):
    "A product of two 2048² matrices is 2 · 2048³ FLOPs; copying 2²⁵ floats reads and writes 4 bytes of each."
    monkeypatch.setattr(speed, "alternate", once)
    assert speed.limits() == dict(flops=2 ** 34, bandwidth=2 ** 28)


def test_growth_has_a_figure_for_every_value(monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "training_step", lambda network, kind, batch, **size: lambda: asked.append((network, kind, batch, size)))
    monkeypatch.setattr(speed, "alternate", once)
    found = speed.growth(density=.03)
    assert {what: [*values] for what, values in found.items()} == dict(
        batch=["64", "128", "256", "512"], width=["32", "64", "128"], density=["0.01", "0.02", "0.05", "0.1", "0.2"])
    assert ("CNN", .03, 64, {}) in asked and ("CNN", .03, 256, dict(width=128)) in asked and ("CNN", .2, 256, {}) in asked


def test_an_epoch_sees_every_image_once(monkeypatch):
    "25 images in batches of 10 are three steps; three more warm up."
    from rest_nb.configs import Config
    steps, real = [], speed.train_step
    monkeypatch.setattr(speed, "train_step", lambda *args, **how: steps.append(args[3]) or real(*args, **how))
    config = Config(width=4, batch_size=10, steps=20, sparsity="masks.RigL", density=.3)
    assert speed.epoch_seconds(config, speed.noise("CNN", 25)) > 0 and len(steps) == 6


def test_assembly_table_by_hand(tmp_path):
    (tmp_path / "runs" / "speed" / "avx512").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="make speed"): results.assembly_table(tmp_path)
    (tmp_path / "runs" / "speed" / "avx512" / "assembly.json").write_text('{"seconds": {"32": {"channels_last": 0.002, "torchvision, 0 workers": 0.05}}}')
    table = results.assembly_table(tmp_path)
    assert table["ms", "32"].tolist() == [2, 50] and table["times", "32"].tolist() == [1, 25]
