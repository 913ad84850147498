"""Training: against a loop written by hand, and definitions of what is selected, and when who is called."""
import copy
import dataclasses
import functools
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from rest_nb import training
from rest_nb.batches import CIFAR, assemble
from rest_nb.data import BiasedDataset
from rest_nb.configs import Config
from rest_nb.experiments import run_seed
from rest_nb.models import cnn
from rest_nb.training import ask, autocast, fit, logits_of, train_step, validate


def blobs(n, seed):
    "Noise with a bright square whose place tells the class; a third of the bias attributes conflict."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=g)
    x = torch.randint(0, 100, (n, 3, 28, 28), generator=g, dtype=torch.uint8)
    for i, t in enumerate(y.tolist()):
        top, left = 8 * (t // 4), 7 * (t % 4)
        x[i, :, top:top + 8, left:left + 7] += 100
    return BiasedDataset(x, y, torch.where(torch.rand(n, generator=g) < 1 / 3, (y + 1) % 10, y))


TRAIN, VALID = blobs(200, 0), blobs(90, 1)


def small(seed=0):
    torch.manual_seed(seed)
    return cnn(width=4)


def sgd(model, lr=.05, **kwargs): return torch.optim.SGD(model.parameters(), lr, **kwargs)


def some_batches(steps):
    return list(torch.randint(200, (steps, 16), generator=torch.Generator().manual_seed(5)))


def weights_of(model): return copy.deepcopy(dict(model.named_parameters()))


# --- the loop ------------------------------------------------------------------------------------------

def by_hand(model, batches, sample_weight, lr, momentum, decay, eval_every):
    "Momentum SGD on a weighted loss, without optimizer, scheduler, autocast. What each evaluation sees."
    speed, losses, seen = {}, [], []
    for step, index in enumerate(batches):
        model.train()
        x = TRAIN.x[index].to(torch.float32) / 255
        loss = (sample_weight[index] * F.cross_entropy(model(x), TRAIN.y[index], reduction="none")).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), gradients):
                speed[p] = momentum * speed[p] + gradient if p in speed else gradient
                p -= lr * decay ** step * speed[p]
        losses.append(loss.item())
        if (step + 1) % eval_every == 0:
            model.eval()
            with torch.no_grad(): right = model(VALID.x.float() / 255).argmax(1) == VALID.y
            groups = VALID.y == VALID.a, VALID.y != VALID.a
            aligned, conflicting = (right[members].float().mean().item() for members in groups)
            seen.append(dict(step=step + 1, loss=sum(losses[-eval_every:]) / eval_every, aligned=aligned,
                             conflicting=conflicting, worst_group=min(aligned, conflicting),
                             state=copy.deepcopy(model.state_dict())))
    return seen


def test_fit_is_the_plain_loop():
    # Weighted by index, decaying rate, momentum, batch norm, a step after the last evaluation, a model that
    # comes in eval mode: whatever fit forgets (zero_grad, train, index, scheduler, mean of losses) shows.
    model, twin, batches = small().eval(), small(), some_batches(10)
    w = torch.linspace(.1, 3, 200)
    optimizer = sgd(model, momentum=.9)
    fitted = fit(model, optimizer, TRAIN, VALID, batches, eval_every=3,
                 scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, .8),
                 loss=lambda logits, y, i: (w[i] * F.cross_entropy(logits, y, reduction="none")).mean())
    seen = by_hand(twin, batches, w, lr=.05, momentum=.9, decay=.8, eval_every=3)
    assert len(fitted.history) == len(seen) == 3
    for ours, theirs in zip(fitted.history, seen):
        for name in ("step", "loss", "aligned", "conflicting", "worst_group"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (theirs["step"], name)
    best = max(seen, key=lambda s: (s["worst_group"], s["step"]))
    assert fitted.best["worst_group"][0] == best["step"]
    torch.testing.assert_close(fitted.best["worst_group"][1], best["state"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-3, atol=1e-5)  # its last


def test_plain_cross_entropy_is_the_default_loss():
    model = small()
    expected = F.cross_entropy(copy.deepcopy(model)(TRAIN.x[:16].float() / 255), TRAIN.y[:16]).item()
    assert train_step(model, sgd(model), TRAIN, torch.arange(16)) == pytest.approx(expected, rel=1e-5)


def test_scheduler_is_stepped_once_a_step():
    model, calls = small(), []
    scheduler = SimpleNamespace(step=lambda: calls.append(1))
    fit(model, sgd(model), TRAIN, VALID, some_batches(5), eval_every=2, scheduler=scheduler)
    assert len(calls) == 5


class Spy:
    "A hook, or the optimizer around whose step hooks are called; logs what it sees of the network."
    def __init__(self, name, log, model): self.name, self.log, self.model = name, log, model
    def see(self, what):
        weight = self.model[0].weight
        self.log.append((f"{self.name} {what}", weight.detach().clone(), weight.grad.clone()))
    def before_step(self): self.see("before")
    def after_step(self): self.see("after")


def test_hooks_are_called_around_the_optimizer_step():
    model, log = small(), []
    optimizer, hooks = sgd(model), [Spy("a", log, model), Spy("b", log, model)]
    plain, inner = optimizer.step, Spy("optimizer", log, model)
    optimizer.step = lambda: (inner.see("in"), plain())
    for index in some_batches(2): train_step(model, optimizer, TRAIN, index, hooks=hooks)
    assert [event for event, *_ in log] == ["a before", "b before", "optimizer in", "a after", "b after"] * 2
    for start in (0, 5):
        (_, w0, g0), _, (_, w1, _), (_, w2, _), _ = log[start:start + 5]
        assert g0.abs().sum() > 0, "before_step comes after backward: RigL reads the gradient there"
        assert torch.equal(w0, w1) and not torch.equal(w1, w2), "weights change between the two"


def test_what_a_hook_does_counts():
    # A hook that removes the gradient freezes the network; what it writes into a weight afterwards stays.
    model, expected = small(), weights_of(small())
    hook = SimpleNamespace(before_step=lambda: [p.grad.zero_() for p in model.parameters()],
                           after_step=lambda: model[-1].bias.data.fill_(7))
    fit(model, sgd(model), TRAIN, VALID, some_batches(2), eval_every=2, hooks=[hook])
    expected[f"{len(model) - 1}.bias"] = torch.full((10,), 7.)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


# --- selection -----------------------------------------------------------------------------------------

def answers(aligned_right, conflicting_right):
    "Logits on `QUIZ` with so many of its aligned and of its conflicting samples right."
    right = torch.cat([torch.arange(96) < aligned_right, torch.arange(4) < conflicting_right])
    return F.one_hot(torch.where(right, QUIZ.y, QUIZ.y + 2), 10).float()  # 2: neither target nor attribute


# 96 aligned, 4 conflicting: reading nothing but the bias is right 96 times in 100.
QUIZ = BiasedDataset(torch.zeros(100, 3, 2, 2, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64),
                     (torch.arange(100) >= 96).long())


def fit_scripted(script, **kwargs):
    "Fit a counter, each evaluation answered by the next logits of `script`: the Fit, and what each saw."
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 10))
        def forward(self, x): return self.weight.expand(len(x), 10)

    model, queue, states, asked = Counter(), list(script), [], []
    def scripted(model, x, precision="none given", inputs=None):
        states.append(model.weight.detach().clone())
        asked.append((x, precision))
        return queue.pop(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ask", scripted)
        batches = [torch.arange(4)] * (2 * len(script))
        fitted = fit(model, sgd(model, lr=1.), QUIZ, QUIZ, batches, eval_every=2, **kwargs)
    assert not queue
    return fitted, states, asked


def test_zero_is_zero():
    # The mended defect: a first network that sees only the bias has worst-group accuracy 0 (average .96) and
    # must lose against one with .25 (average .49).
    fitted, *_ = fit_scripted([answers(96, 0), answers(48, 1), answers(24, 0)])
    assert [h["worst_group"] for h in fitted.history] == [0, .25, 0]
    assert fitted.best["worst_group"][0] == 4


def test_zeros_only_go_to_the_last():
    # All equal to 0, averages falling: the tie goes to the last, not to the best average.
    assert fit_scripted([answers(96, 0), answers(60, 0), answers(10, 0)])[0].best["worst_group"][0] == 6


def test_the_average_selects_another_state():
    fitted, states, _ = fit_scripted([answers(96, 2), answers(72, 3), answers(96, 2), answers(90, 0)], keep=True)
    assert fitted.best["unbiased"][0] == 6 and torch.equal(fitted.best["unbiased"][1]["weight"], states[2])
    assert [*fitted.states] == [2, 4, 6, 8]
    assert all(torch.equal(state["weight"], seen) for state, seen in zip(fitted.states.values(), states))


def test_states_are_kept_for_who_asks_only():
    assert fit_scripted([answers(1, 1)] * 3)[0].states == {}


def test_nothing_is_selected_or_kept_before_select_from():
    # The best comes first, and is not what the network shall be yet.
    fitted, states, _ = fit_scripted([answers(96, 4), answers(48, 1), answers(24, 1)], select_from=4, keep=True)
    assert {rule: step for rule, (step, _) in fitted.best.items()} == dict(worst_group=6, unbiased=4)
    assert [*fitted.states] == [4, 6] and len(fitted.history) == 3
    assert fit_scripted([answers(96, 4), answers(48, 1)], select_from=2)[0].best["worst_group"][0] == 2
    with pytest.raises(ValueError, match="from step 5 on"): fit_scripted([answers(96, 4), answers(48, 1)], select_from=5)


def test_nothing_is_selected_before_a_hook_says_so():
    "GMP is dense at first; its earlier states are none to select, in whose loop ever."
    class Hook:
        select_from = 4
        def before_step(self): pass
        def after_step(self): pass

    class Plain(Hook): select_from = 0
    script = [answers(96, 4), answers(48, 1), answers(24, 1)]
    assert fit_scripted(script, hooks=[Plain(), Hook()])[0].best["worst_group"][0] == 6
    assert fit_scripted(script, hooks=[Plain()])[0].best["worst_group"][0] == 2
    assert fit_scripted(script[:2], hooks=[Hook()])[0].best["unbiased"][0] == 4
    assert fit_scripted(script, hooks=[Hook()], select_from=6)[0].best["unbiased"][0] == 6


def test_a_frozen_part_stays_frozen_and_a_resting_model_trains():
    model = small()
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.eval()
    before, others = norm.running_mean.clone(), [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m is not norm]
    moved = [other.running_mean.clone() for other in others]
    fit(model, sgd(model), TRAIN, VALID, some_batches(4), eval_every=2)
    assert torch.equal(norm.running_mean, before) and not norm.training
    assert not any(torch.equal(other.running_mean, old) for other, old in zip(others, moved))
    model.eval()
    fit(model, sgd(model), TRAIN, VALID, some_batches(2), eval_every=2)
    assert not torch.equal(norm.running_mean, before) and all(module.training for module in model.modules())


def test_the_average_does_not_select_for_the_worst_group():
    fitted, *_ = fit_scripted([answers(96, 2), answers(72, 3), answers(96, 2)])
    assert [h["unbiased"] for h in fitted.history] == [.98, .75, .98] and fitted.best["worst_group"][0] == 4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 96), st.integers(0, 4)), min_size=1, max_size=8))
def test_selected_is_the_best_worst_group_and_the_latest_of_ties(script):
    fitted, states, _ = fit_scripted([answers(*rights) for rights in script])
    worst = [min(aligned / 96, conflicting / 4) for aligned, conflicting in script]
    best = max(range(len(worst)), key=lambda i: (worst[i], i))
    assert fitted.best["worst_group"][0] == 2 * (best + 1)
    # A copy of that moment: the counter moves at every step, so a reference would hold the last weights.
    assert torch.equal(fitted.best["worst_group"][1]["weight"], states[best])
    assert [h["step"] for h in fitted.history] == [2 * (i + 1) for i in range(len(worst))]


def test_the_weights_of_the_scripted_model_do_move():
    # Else the test above could not tell a copy from a reference.
    _, states, _ = fit_scripted([answers(1, 1)] * 3)
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


@pytest.mark.parametrize("precision", training.PRECISIONS)
def test_validation_is_asked_in_the_precision_of_training(precision):
    _, _, asked = fit_scripted([answers(1, 1)] * 2, precision=precision)
    assert [how for _, how in asked] == [precision] * 2 and all(x is QUIZ.x for x, _ in asked)


def test_fewer_batches_than_eval_every_are_refused():
    model = small()
    with pytest.raises(ValueError, match="eval_every = 4"):
        fit(model, sgd(model), TRAIN, VALID, some_batches(3), eval_every=4)
    assert fit(model, sgd(model), TRAIN, VALID, some_batches(4), eval_every=4).best["worst_group"][0] == 4


# --- a loss that is no number --------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(wrong):
    model, batches, seen = small(), some_batches(5), []
    optimizer, log = sgd(model, momentum=.9), []

    def loss(logits, y, index):
        seen.append(weights_of(model))
        return F.cross_entropy(logits, y) * (wrong if len(seen) == 3 else 1)
    with pytest.raises(FloatingPointError) as caught:
        fit(model, optimizer, TRAIN, VALID, batches, eval_every=1, loss=loss, hooks=[Spy("a", log, model)])
    message = str(caught.value)
    assert "step 3" in message and str(batches[2][:4].tolist()) in message and str(wrong) in message
    assert "\n" not in message
    assert len(seen) == 3 and len(log) == 4, "neither a further step nor a hook of the failed one"
    assert all(torch.equal(p, seen[2][name]) for name, p in model.named_parameters())
    assert not torch.equal(seen[2]["0.weight"], seen[1]["0.weight"])  # the steps before did change them


# --- asking --------------------------------------------------------------------------------------------

def normalised():
    "A network whose batch-norm statistics are far from any batch's: train and eval mode answer differently."
    model = small()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, .3)
            nn.init.uniform_(layer.running_var, .05, 2)
    return model


def plain_logits(model, x):
    "All images at once, in eval mode."
    with torch.no_grad(): return copy.deepcopy(model).eval()(x.float() / 255)


@pytest.mark.parametrize("n", [1, 999, 1000, 1001, 2345])
def test_ask_is_the_network_on_the_whole_split(n):
    # It asks a thousand at a time: none may be lost, repeated or out of place at the seams.
    x = torch.randint(256, (n, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    model = normalised().train()
    logits, expected = ask(model, x), plain_logits(model, x)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_ask_uses_batch_norm_in_eval_mode():
    model = normalised().train()
    before, together = copy.deepcopy(model.state_dict()), ask(model, VALID.x)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "statistics moved"
    alone = torch.cat([ask(model, x) for x in VALID.x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)  # neighbours do not count
    with torch.no_grad(): in_train_mode = model(VALID.x.float() / 255)
    assert (together - in_train_mode).abs().max() > .01  # else the two modes could not be told apart here


@pytest.mark.parametrize("mode, frozen", [(True, []), (False, []), (True, [1, 4])])
def test_ask_restores_the_mode(mode, frozen):
    # Also where a user froze two batch norms; also when the network raises, here on images of two channels.
    model = small().train(mode)
    for layer in frozen: model[layer].eval()
    before = [m.training for m in model.modules()]
    ask(model, VALID.x)
    assert [m.training for m in model.modules()] == before
    with pytest.raises(RuntimeError): ask(model, VALID.x[:, :2])
    assert [m.training for m in model.modules()] == before


def test_validate_counts_by_group():
    # Accuracy and mean cross-entropy of each group, from log-probabilities, sample by sample.
    model = normalised()
    fit(model, sgd(model), TRAIN, VALID, some_batches(12), eval_every=12)  # so that some answers are right
    p = plain_logits(model, VALID.x).softmax(1)
    groups = dict(aligned=[i for i in range(90) if VALID.y[i] == VALID.a[i]],
                  conflicting=[i for i in range(90) if VALID.y[i] != VALID.a[i]])
    found = validate(model, VALID)
    for name, members in groups.items():
        losses = [-math.log(p[i, VALID.y[i]].item()) for i in members]
        rights = [p[i].argmax() == VALID.y[i] for i in members]
        assert found[f"{name}_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4), name
        assert found[name] == pytest.approx(sum(rights) / len(rights)) and found[f"{name}_n"] == len(members)
    assert found["worst_group"] == min(found["aligned"], found["conflicting"]) < found["unbiased"]


def test_validate_without_conflicting_samples():
    aligned = BiasedDataset(VALID.x, VALID.y, VALID.y)
    found = validate(small(), aligned)
    assert math.isnan(found["conflicting_loss"]) and math.isnan(found["conflicting"])
    assert math.isfinite(found["aligned_loss"]) and found["worst_group"] == found["aligned"]


# --- input and precision -------------------------------------------------------------------------------

def recorder(log):
    "Inputs that are bytes halved, and a log of how they were asked for."
    def inputs(x, index=None, generator=None):
        log.append((x, index, generator))
        return (x if index is None else x[index]).float() / 510
    return inputs


def test_images_are_scaled_and_stay_in_place_unless_told_otherwise():
    model, seen = small(), []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    index = torch.tensor([7, 7, 199, 0])
    train_step(model, sgd(model), TRAIN, index)
    ask(model, VALID.x)
    for x, expected in zip(seen, (TRAIN.x[index], VALID.x), strict=True):
        assert torch.equal(x, expected.float().div_(255)) and x.is_contiguous(memory_format=torch.channels_last)


def test_training_moves_images_and_asking_does_not():
    # All that goes into the network comes from `inputs`; the generator is for the steps of training only.
    model, log, shown, g = small(), [], [], torch.Generator()
    model.register_forward_pre_hook(lambda _, x: shown.append(x[0].max().item()))
    batches = some_batches(4)
    fit(model, sgd(model), TRAIN, VALID, batches, eval_every=2, inputs=recorder(log), generator=g)
    assert [generator for *_, generator in log] == [g, g, None] * 2
    assert [x is TRAIN.x for x, *_ in log] == [True, True, False] * 2
    assert all(torch.equal(a, b) for a, b in zip([log[i][1] for i in (0, 1, 3, 4)], batches))
    assert all(torch.equal(log[i][0], VALID.x) and log[i][1] is None for i in (2, 5))
    assert len(shown) == 6 and 0 < max(shown) <= .5
    twin, plain = small(), small()
    fit(twin, sgd(twin), TRAIN, VALID, batches, eval_every=2, inputs=recorder([]))
    fit(plain, sgd(plain), TRAIN, VALID, batches, eval_every=2)
    assert torch.equal(twin[0].weight, model[0].weight) and not torch.equal(plain[0].weight, model[0].weight)


def test_a_generator_makes_training_another_and_the_same_again():
    ends = []
    for seed in (0, 0, 1, None):
        model = small()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        fit(model, sgd(model), TRAIN, VALID, some_batches(3), eval_every=3, generator=generator,
            inputs=functools.partial(assemble, transform=CIFAR))
        ends.append(model[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[3])


@pytest.fixture
def emulated(monkeypatch):
    "bf16 even where the processor has none: a small network can wait."
    monkeypatch.setattr(training, "has_bf16", lambda: True)


def test_bf16_is_torchs_autocast_and_fp32_is_plain(emulated):
    model, x = normalised().eval(), TRAIN.x
    with torch.no_grad():
        plain, theirs = model(x.float() / 255), logits_of(model, x, "fp32")
        with torch.autocast("cpu", torch.bfloat16): rounded = model(x.float() / 255).float()
        ours = logits_of(model, x, "bf16")
    torch.testing.assert_close(theirs, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, rounded, rtol=.02, atol=.02)
    assert ours.dtype == theirs.dtype == torch.float32
    assert not torch.equal(ours, theirs), "bf16 changes nothing"


def test_precision_reaches_training_and_leaves_the_weights_in_fp32(emulated):
    ends = {}
    for precision in training.PRECISIONS:
        model = small()
        fit(model, sgd(model), TRAIN, VALID, some_batches(4), eval_every=4, precision=precision)
        ends[precision] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(ends["fp32"], ends["bf16"])
    torch.testing.assert_close(ends["fp32"], ends["bf16"], rtol=0, atol=.1)  # but it is the same training


@pytest.mark.parametrize("device, has, rounded", [("cpu", True, True), ("cpu", False, False), ("cuda", False, True)])
def test_a_processor_without_bf16_computes_in_fp32(monkeypatch, device, has, rounded):
    contexts = []
    monkeypatch.setattr(training, "has_bf16", lambda: has)
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: contexts.append((*args, enabled)))
    for precision in training.PRECISIONS: autocast(torch.device(device), precision)
    assert contexts == [(device, torch.bfloat16, False), (device, torch.bfloat16, rounded)]


def test_bf16_is_had_where_the_processor_says_so():
    flags = next((line.split() for line in open("/proc/cpuinfo") if line.startswith("flags")), []) if Path("/proc/cpuinfo").is_file() else []
    if not flags: pytest.skip("no list of what this processor can do")
    needed = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}
    assert training.has_bf16() == (needed <= {*flags})


def test_unknown_precision_is_refused():
    model, before = small(), weights_of(small())
    tries = [lambda: autocast(torch.device("cpu"), "fp16"), lambda: logits_of(model, VALID.x, "fp16"),
             lambda: ask(model, VALID.x, "fp16"), lambda: validate(model, VALID, "fp16"),
             lambda: train_step(model, sgd(model), TRAIN, torch.arange(8), precision="fp16"),
             lambda: fit(model, sgd(model), TRAIN, VALID, some_batches(2), eval_every=1, precision="fp16")]
    for attempt in tries:
        with pytest.raises(ValueError, match="precision is 'fp16'.*fp32.*bf16"): attempt()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- the test split ------------------------------------------------------------------------------------

@pytest.mark.parametrize("sparsity", ["dense", "masks.RigL"])
def test_the_test_split_is_asked_for_once_and_after_the_last_step(sparsity):
    log, given_out = [], {"train": TRAIN, "valid": VALID, "test": blobs(50, 2)}

    def split(name):
        log.append(name)
        return given_out[name]

    def progress(batches):
        for batch in batches:
            yield batch
            log.append("step")  # reached when the next batch is asked for: the step is over
    config = Config(width=4, batch_size=16, steps=6, eval_every=2, density=.3, sparsity=sparsity, oracle=True)
    run_seed(config, 41, split, progress)
    assert sorted(log[:2]) == ["train", "valid"] and log[2:] == ["step"] * 6 + ["test"]
    assert not [name for name in inspect.signature(fit).parameters if "test" in name]


# --- selecting without attributes ----------------------------------------------------------------------

def test_without_attributes_the_average_is_told_and_selects():
    "By the same network asked with attributes, of which the average does not ask."
    known, model = small(), small()
    blind = dataclasses.replace(VALID, a=None)
    told = fit(known, sgd(known), TRAIN, VALID, some_batches(12), eval_every=3)
    fitted = fit(model, sgd(model), dataclasses.replace(TRAIN, a=None), blind, some_batches(12), eval_every=3)
    assert [*fitted.best] == ["unbiased"] and fitted.best["unbiased"][0] == told.best["unbiased"][0]
    for entry, other in zip(fitted.history, told.history, strict=True):
        assert entry == {name: other[name] for name in ("step", "loss", "unbiased", "unbiased_n")}
    right = sum(int(model.eval()(VALID.x[i:i + 1].float() / 255).argmax() == VALID.y[i]) for i in range(len(VALID)))
    assert validate(model, blind) == dict(unbiased=right / len(VALID), unbiased_n=len(VALID))


@pytest.mark.parametrize("conflict, said", [(0, "0 of 90"), (1, "90 of 90")])
def test_validation_with_one_group_only_is_refused_before_the_first_step(conflict, said):
    model, lone = small(), dataclasses.replace(VALID, a=(VALID.y + conflict) % 10)
    before = weights_of(model)
    with pytest.raises(ValueError, match=f"{said} validation samples conflict"): fit(model, sgd(model), TRAIN, lone, some_batches(3), eval_every=1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_evaluation_every_0_steps_is_refused():
    model = small()
    with pytest.raises(ValueError, match="eval_every is 0; expected 1 step"): fit(model, sgd(model), TRAIN, VALID, some_batches(3), eval_every=0)
