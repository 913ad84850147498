"""Disentangling: the paper's equations written out in numpy, gradients that must be zero, and points whose answer is known."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

from rest_nb.configs import Config
from rest_nb.cost import forward_flops
from rest_nb.data import BiasedDataset
from rest_nb.disentangling import DisEnt, Disentangled, encoder
from rest_nb.experiments import Run
from rest_nb.models import NETWORKS, with_dropout
from rest_nb.reweighting import cross_entropy, shuffled_batches
from rest_nb.rules import toy
from rest_nb.training import fit


def seeded(seed): return torch.Generator().manual_seed(seed)


def network(classes=3): return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes))


def made(seed=0, **options):
    "A model, its loss and a batch: samples 7, 2, 5, 9, 0 of twelve."
    torch.manual_seed(seed)
    model, y = Disentangled(network(), network()).double(), torch.arange(12) % 3
    options = dict(swap_from=0, generator=seeded(1)) | options
    return model, DisEnt(y, model, **options), torch.randn(12, 4, generator=seeded(seed)).double(), y, torch.tensor([7, 2, 5, 9, 0])


# ---------------------------------------------------------------------------------------- encoders

@pytest.mark.parametrize("name", NETWORKS)
def test_an_encoder_is_the_network_but_for_its_last_layer(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name](3, 4).eval(), torch.rand(2, 3, 32, 32)
    expected = model(x)
    features, head = encoder(with_dropout(model, .5).eval())
    torch.testing.assert_close(head(features(x)), expected)


def test_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match="^Sequential has no linear layer to leave out$"): encoder(nn.Sequential(nn.ReLU()))


# ----------------------------------------------------------------------------------- the equations

def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def written_out(model, x, y, order, dis, swap, swap_b, q):
    "L of a first batch in numpy, sample by sample, as the chapter has it; `order` None: no swap."
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    encode = lambda part: np.tanh(x @ state[f"{part}.0.weight"].T + state[f"{part}.0.bias"])
    z_i, z_b = encode("intrinsic"), encode("bias")
    p = lambda head, z_b: softmax(np.hstack([z_i, z_b]) @ state[f"{head}_head.weight"].T + state[f"{head}_head.bias"])
    ce = lambda p, y: np.array([-np.log(row[t]) for row, t in zip(p, y)])
    gce = lambda p, y: np.mean([(1 - row[t] ** q) / q for row, t in zip(p, y)])
    hard_b, hard_i = ce(p("bias", z_b), y), ce(p("intrinsic", z_b), y)
    weights = []
    for k, t in enumerate(y):  # over the largest of the class, as LfF
        b, i = (hard[k] / max(hard[y == t]) for hard in (hard_b, hard_i))
        weights.append(b / (b + i))
    value = np.mean(weights * hard_i) + dis * gce(p("bias", z_b), y)
    if order is not None:
        p_i, p_b = p("intrinsic", z_b[order]), p("bias", z_b[order])
        value += swap * (np.mean(weights * ce(p_i, y)) + swap_b * gce(p_b, y[order]))
    return value


@pytest.mark.parametrize("options", [dict(), dict(dis=3., swap=.5, swap_b=2., q=.4), dict(dis=0., swap=2., swap_b=0.)])
@pytest.mark.parametrize("swaps", [True, False])
def test_the_loss_is_the_equations_written_out(options, swaps):
    model, loss, x, y, index = made(swap_from=0 if swaps else 1, **options)
    order = torch.randperm(5, generator=seeded(1)).numpy() if swaps else None
    expected = written_out(model, x[index].numpy(), y[index].numpy(), order,
                           **dict(dis=1., swap=1., swap_b=1., q=.7) | options)
    value = loss(model(x[index]), y[index], index)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert order is None or (order != np.arange(5)).any()


def test_the_swap_begins_at_its_step():
    torch.manual_seed(0)
    values = {}
    for start in (0, 2, 9):
        model, loss, x, y, index = made(swap_from=start)
        values[start] = [loss(model(x[index]), y[index], index).item() for _ in range(4)]
    swapped = [a != b for a, b in zip(values[2], values[9])]
    assert swapped == [False, False, True, True] and values[0][0] > values[9][0]


def test_a_swap_with_oneself_is_no_swap():
    model, loss, x, y, index = made(swap_from=9, dis=1.)
    value = loss(model(x[index]), y[index], index)
    with torch.no_grad(): z_i, z_b = model.intrinsic(x[index]), model.bias(x[index])
    same = loss.swapped(model, z_i, z_b, weights_of(loss, index), y[index], y[index])
    assert same.item() == pytest.approx(value.item(), rel=1e-5)


def weights_of(loss, index):
    "W(x) from the averages, without moving them."
    largest = torch.stack([loss.averages[:, loss.y == t].amax(1) for t in range(3)], 1)
    b, i = loss.averages[:, index] / largest[:, loss.y[index]]
    return b / (b + i)


# ---------------------------------------------------------------------------------- stopped gradients

def reached(model, value):
    "The parts of the model that a gradient of `value` reaches, and whether it is anything but zero there."
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {name.split(".")[0] for name, g in zip(names, found) if g is not None and g.any()}


def test_each_head_teaches_one_encoder():
    model, loss, x, y, index = made()
    assert reached(model, cross_entropy(model(x), y, None)) == {"intrinsic", "intrinsic_head"}
    assert reached(model, cross_entropy(model.read_bias(*model.features), y, None)) == {"bias", "bias_head"}


@pytest.mark.parametrize("swap_from", [0, 9])
def test_without_the_biased_terms_only_the_intrinsic_half_learns(swap_from):
    model, loss, x, y, index = made(dis=0., swap_b=0., swap_from=swap_from)
    assert reached(model, loss(model(x[index]), y[index], index)) == {"intrinsic", "intrinsic_head"}
    model, loss, x, y, index = made(swap_b=1., swap_from=swap_from)
    value = loss(model(x[index]), y[index], index)
    assert reached(model, value) == {"intrinsic", "intrinsic_head", "bias", "bias_head"}


def test_the_biased_half_does_not_know_of_the_weights():
    # Its gradient is that of GCE alone, in L_dis and in L_swap, whatever the intrinsic head says.
    grads = []
    for scale in (1, 5):
        model, loss, x, y, index = made()
        model.intrinsic_head.weight.data *= scale
        loss(model(x[index]), y[index], index).backward()
        grads.append((model.bias[0].weight.grad.clone(), model.intrinsic[0].weight.grad.clone()))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=0)
    assert not torch.allclose(grads[0][1], grads[1][1])


# ------------------------------------------------------------------------------------------- limits

def test_features_are_kept_in_training_and_taken_by_the_loss():
    model, loss, x, y, index = made()
    logits = model(x[index])
    assert model.features is not None
    loss(logits, y[index], index)
    assert model.features is None and copy.deepcopy(model) is not model
    model.eval()
    torch.testing.assert_close(model(x[index]), logits)  # C_i([z_i; z_b])
    with pytest.raises(ValueError, match="^the model has kept no features"): loss(logits, y[index], index)


@pytest.mark.parametrize("name", ["dis", "swap", "swap_b"])
def test_a_negative_share_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} is -1.0; expected 0 or a number above it$"): made(**{name: -1.})


# ---------------------------------------------------------------------------------- on the harness

def tiny(n=120):
    y = torch.arange(n) % 3
    x = torch.randint(0, 256, (n, 3, 28, 28), generator=seeded(3))
    return BiasedDataset(x.byte(), y, torch.where(torch.arange(n) % 10 == 0, (y + 1) % 3, y))


@pytest.mark.parametrize("fields", [
    dict(), dict(precision="bf16"), dict(sparsity="masks.RigL", storage="masked"),
    dict(sparsity="masks.RigL", storage="compact"), dict(network="resnet18", sparsity="masks.RigL", storage="compact")])
def test_a_run_on_the_harness(fields):
    config = Config(reweighting="disentangling.disent(dis=0.5, start=0.5)", width=4, batch_size=20, steps=6, eval_every=3,
                    density=.3, conflict_ratio=.1, **dict(precision="fp32") | fields)
    run = Run(config, 5, tiny())
    first = copy.deepcopy(run.model)
    setup = run.prepare()
    model, loss = setup["model"], setup["loss"]
    if not config.sparsity.startswith("masks"):
        assert torch.equal(model.intrinsic[0].weight, first[0].weight) and not torch.equal(model.bias[0].weight, first[0].weight)
    assert loss.swap_from == 3 and loss.dis == .5
    fitted = fit(valid=run.train, eval_every=3, **setup)
    if config.sparsity == "dense":  # two networks
        assert run.spent()["flops"] == pytest.approx(2 * forward_flops(config.untrained(), (3, 28, 28))[0], rel=.02)
    assert loss.number == 6 and len(fitted.history) == 2 and not any("averages" in name for name in model.state_dict())
    if config.sparsity != "dense":
        assert run.hooks[0].updates == 2 and run.spent()["kept"] < .4 * sum(p.numel() for p in first.parameters()) * 2


def test_compact_and_masked_runs_agree():
    losses = []
    for storage in ("masked", "compact"):
        config = Config(reweighting="disentangling.disent(start=0.0)", width=4, batch_size=20, steps=6, eval_every=3, density=.3,
                        conflict_ratio=.1, precision="fp32", sparsity="masks.RigL", storage=storage)
        fitted = fit(valid=tiny(), eval_every=3, **Run(config, 5, tiny()).prepare())
        losses.append([row["loss"] for row in fitted.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# -------------------------------------------------------------------- points whose answer is known

def test_erm_takes_the_shortcut_and_disent_does_not():
    (x, y, _), (fresh_x, fresh_y, fresh_a) = toy(4000, .02, seeded(0)), toy(4000, .5, seeded(1))

    def worst_cell(kind):
        torch.manual_seed(7)
        plain = lambda: nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        model, loss = plain(), cross_entropy
        if kind == "disent":
            model = Disentangled(model, plain())
            loss = DisEnt(y, model, 200, seeded(7), dis=.1)
        optimizer = torch.optim.SGD(model.parameters(), .2)
        for index in shuffled_batches(4000, 100, 600, seeded(2)):
            optimizer.zero_grad()
            loss(model(x[index]), y[index], index).backward()
            optimizer.step()
        right = (model.eval()(fresh_x).argmax(1) == fresh_y).double()
        return min(right[(fresh_y == t) & (fresh_a == v)].mean().item() for t in (0, 1) for v in (0, 1))
    assert worst_cell("erm") < .7 and worst_cell("disent") > .8


def test_encoders_may_be_stored_sparse():
    from rest_nb.sparse import sparsify
    model = Disentangled(*(sparsify(NETWORKS["cnn"](3, 8), .3, seed=seed) for seed in range(2)))
    assert model(torch.rand(4, 3, 28, 28)).shape == (4, 3) and model.features[0].shape == (4, model.bias_head.in_features // 2)
