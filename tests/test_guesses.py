"""Guesses and last layers: scikit-learn's precision, recall and logistic regression are the oracle; votes are counted."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_score, recall_score
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from rest_nb.configs import Config
from rest_nb.data import BiasedDataset
from rest_nb.experiments import Run
from rest_nb import guesses
from rest_nb.guesses import by_confidence, by_error, by_vote, last_layer, logistic_regression, precision_recall
from rest_nb.guesses import retrain_last_layer
from rest_nb.masks import RigL
from rest_nb.models import cnn, evaluating, resnet18
from rest_nb.reweighting import cross_entropy, sample_weights, shuffled_batches, weighted_batches
from rest_nb.rules import cells, generalised_cross_entropy, subsample, toy
from rest_nb.sparse import SparseLinear, densify, sparsify

relaxed = settings(max_examples=50, deadline=None, derandomize=True)


def seeded(seed): return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------- guesses

@relaxed
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20))
def test_precision_and_recall_are_scikit_learns(pairs):
    guess, truth = torch.tensor(pairs, dtype=torch.bool).view(-1, 2).T
    result = precision_recall(guess, truth)
    assert result["guessed"] == sum(g for g, _ in pairs) and result["conflicting"] == sum(t for _, t in pairs)
    for name, score in (("precision", precision_score), ("recall", recall_score)):
        theirs = score(truth, guess, zero_division=np.nan) if pairs else math.nan
        assert result[name] == pytest.approx(theirs, nan_ok=True)


@relaxed
@given(st.integers(0, 10**6), st.floats(.01, 1))
def test_errors_and_confidence_by_definition(seed, below):
    g = seeded(seed)
    logits, y = 3 * torch.randn(20, 4, generator=g), torch.randint(4, (20,), generator=g)
    p = np.exp(logits.double().numpy())
    p = (p / p.sum(1, keepdims=True))
    target = p[np.arange(20), y.numpy()]
    assert by_error(logits, y).tolist() == [bool((p[i] > target[i]).any()) for i in range(20)]
    assert by_confidence(logits, y, below).tolist() == (target < below).tolist()


@relaxed
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5), st.data())
def test_votes_are_counted(votes, data):
    at_least = data.draw(st.integers(1, len(votes)))
    assert by_vote(torch.tensor(votes), at_least).tolist() == [sum(column) >= at_least for column in zip(*votes)]


X, Y, A = toy(4000, .02, seeded(0))
FRESH = toy(8000, .5, seeded(1))


def learn(batches, loss=cross_entropy, seed=0, sparse=lambda model, optimizer: None, hidden=()):
    torch.manual_seed(seed)
    model = nn.Sequential(*(layer for width in hidden for layer in (nn.Linear(2, width), nn.ReLU())), nn.Linear((2, *hidden)[-1], 2))
    optimizer = torch.optim.SGD(model.parameters(), .5)
    method = sparse(model, optimizer)
    for index in batches:
        optimizer.zero_grad()
        loss(model(X[index]), Y[index], index).backward()
        if method: method.before_step()
        optimizer.step()
        if method: method.after_step()
    return model


def shuffled(steps, seed=2): return shuffled_batches(len(Y), 100, steps, seeded(seed))


def worst_cell(model):
    x, y, a = FRESH
    right = (model(x).argmax(1) == y).double()
    return min(right[(y == t) & (a == v)].mean().item() for t in (0, 1) for v in (0, 1))


@pytest.mark.parametrize("guess", [
    lambda: by_error(learn(shuffled(100))(X), Y),
    lambda: by_confidence(learn(shuffled(300), generalised_cross_entropy())(X), Y),
    lambda: by_vote(torch.stack([by_error(learn(shuffled(60, s), seed=s)(X), Y) for s in range(3)]), 2),
], ids=["error", "confidence", "vote"])
def test_biased_networks_find_who_conflicts_and_no_label_is_needed(guess):
    guess = guess()
    found = precision_recall(guess, Y != A)
    assert found["precision"] > .9 and found["recall"] > .9
    evenly = lambda: weighted_batches(sample_weights(guess, 50), 100, 600, seeded(2))
    assert worst_cell(learn(shuffled(600))) < .5 and worst_cell(learn(evenly())) > .93
    rigl = dict(hidden=[32], sparse=lambda model, optimizer: RigL(model, optimizer, .3, delta_t=20, t_end=400))  # REST on the guess
    assert worst_cell(learn(shuffled(600), **rigl)) < .8 and worst_cell(learn(evenly(), **rigl)) > .9


# ------------------------------------------------------------------------------------- last layers

@pytest.mark.parametrize("C", [.01, 1, 30])
def test_the_regression_is_scikit_learns(C):
    x, y = torch.randn(90, 4, generator=seeded(0)).double(), torch.arange(90) % 3
    x[:, 0] += y
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(x, y)
    weight, bias = logistic_regression(x, y, 3, C)
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


def three_classes(n=60, seed=0):
    "Images of three grey levels, noisily, and a network that has seen none."
    y = torch.arange(n) % 3
    x = (y[:, None, None, None] / 3 + torch.randn(n, 3, 16, 16, generator=seeded(seed)) / 2)
    torch.manual_seed(0)
    model = cnn(num_classes=3, width=4)
    model(x)  # batch-norm has seen something
    return x, y, model


def by_sklearn(model, x, y, parts, C):
    "Probabilities of the mean regression over `parts`, on the features of all but the last layer."
    with torch.no_grad(), evaluating(model): features = model[:-1](x).double().numpy()
    scaled = StandardScaler().fit_transform(features)
    fits = [LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(scaled[part], y[part]) for part in parts]
    logits = np.mean([scaled @ f.coef_.T + f.intercept_ for f in fits], axis=0)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def answers(model, x):
    with torch.no_grad(), evaluating(model): return model(x).softmax(1)


def test_the_new_layer_is_scikit_learns_on_the_same_features():
    # Groups of equal size: every balanced part is the whole.
    x, y, model = three_classes()
    new = retrain_last_layer(model, x.__getitem__, y, y, seeded(0), C=.3, draws=2)
    np.testing.assert_allclose(answers(new, x), by_sklearn(model, x, y, [np.arange(60)], .3), atol=1e-4)


def test_layers_of_several_balanced_parts_are_averaged():
    x, y, model = three_classes()
    groups = cells(y, torch.arange(60) < 12)  # 4 and 16 of each class
    g = seeded(5)
    parts = [subsample(groups, g) for _ in range(3)]
    assert [len(part) for part in parts] == [24] * 3
    new = retrain_last_layer(model, x.__getitem__, y, groups, seeded(5), C=.3, draws=3)
    np.testing.assert_allclose(answers(new, x), by_sklearn(model, x, y, parts, .3), atol=1e-4)


@pytest.mark.parametrize("storage", ["dense", "compact"])
def test_only_the_last_layer_is_new_and_only_in_the_copy(storage):
    x, y, model = three_classes()
    if storage == "compact": model = sparsify(model, .5)
    model.train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    new = retrain_last_layer(model, x.__getitem__, y, y, seeded(0), draws=1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and all(not layer._forward_hooks for net in (model, new) for layer in net.modules())
    assert type(new[-1]) is nn.Linear and [type(layer) for layer in new[:-1]] == [type(layer) for layer in model[:-1]]
    torch.testing.assert_close(new[:-1].state_dict(), model[:-1].state_dict(), rtol=0, atol=0)
    new(x).sum().backward()  # it can be trained on
    assert new[-1].weight.grad is not None


def test_compact_or_not_is_no_difference():
    x, y, model = three_classes()
    compact = sparsify(model, .5)
    assert type(compact[-1]) is SparseLinear
    dense = densify(copy.deepcopy(compact))
    news = [retrain_last_layer(net, x.__getitem__, y, y, seeded(0), draws=1) for net in (compact, dense)]
    torch.testing.assert_close(answers(news[0], x), answers(news[1], x), rtol=1e-3, atol=1e-4)


def test_other_networks_than_sequences():
    torch.manual_seed(0)
    model, x = resnet18(num_classes=3, width=4), torch.randn(12, 3, 32, 32)
    head, features = last_layer(model, x.__getitem__, 12)
    assert head is model.fc and features.shape == (12, 32) and features.dtype == torch.float64
    new = retrain_last_layer(model, x.__getitem__, torch.arange(12) % 3, torch.arange(12) % 3, seeded(0), draws=1)
    assert new.fc.weight.shape == (3, 32) and not torch.equal(new.fc.weight, model.fc.weight)
    line = nn.Linear(2, 2)
    assert retrain_last_layer(line, X.__getitem__, Y, Y, seeded(0), draws=1) is not line


def test_features_of_more_images_than_one_pass_takes():
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    _, features = last_layer(model, X.__getitem__, 2500)
    torch.testing.assert_close(features.float(), model[:2](X[:2500]).detach())


def test_a_feature_that_never_changes_does_no_harm():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad(): model[0].bias[1], model[0].weight[1] = -1, 0  # a dead unit
    new = retrain_last_layer(model, X.__getitem__, Y, cells(Y, A), seeded(0), draws=1)
    assert new[2].weight.isfinite().all() and new[2].weight[:, 1].abs().max() == 0


def test_a_new_last_layer_mends_the_shortcut():
    erm = learn(shuffled(600))
    x, y, a = toy(3000, .02, seeded(9))
    new = retrain_last_layer(erm, x.__getitem__, y, cells(y, a), seeded(0))
    assert worst_cell(erm) < .5 and worst_cell(new) > .93


# --------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("guess", [torch.zeros(5).bool(), torch.ones(5).bool()])
def test_a_guess_that_tells_nobody_apart_is_refused(guess):
    with pytest.raises(ValueError, match=f"^guessed that {int(guess.sum())} of 5 samples conflict; expected some"):
        guesses.noted(SimpleNamespace(), guess)


def test_how_good_a_guess_is_goes_into_the_notes():
    run = SimpleNamespace(notes={}, train=SimpleNamespace(is_conflicting=torch.tensor([True, True, False, False, False])))
    some = torch.arange(5) > 0
    assert guesses.noted(run, some) is some
    assert run.notes["guess"] == dict(precision=1 / 4, guessed=4, recall=1 / 2, conflicting=2)


class Headless(nn.Module):
    "A linear layer that is not asked last."
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x): return self.first(self.second(x))


yes = torch.tensor([True])


@pytest.mark.parametrize("call, message", [
    (lambda: precision_recall(yes, torch.tensor([True, False])), "1 guesses, 2 samples"),
    (lambda: by_confidence(X, Y, 0), "below is 0"),
    (lambda: by_confidence(X, Y, 1.5), "below is 1.5"),
    (lambda: by_vote(yes[None], 2), "at_least is 2; expected 1 to the 1 guesses"),
    (lambda: by_vote(yes[None], 0), "at_least is 0"),
    (lambda: last_layer(nn.Sequential(nn.ReLU()), X.__getitem__, 4), "Sequential has no linear layer"),
    (lambda: last_layer(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), X.__getitem__, 4), "Sequential does not end in"),
    (lambda: last_layer(Headless(), X.__getitem__, 4), "Headless does not end in"),
    (lambda: logistic_regression(X.double(), Y, 2, C=0), "C is 0"),
    (lambda: logistic_regression(X.double(), Y, 4), r"classes \[2, 3\] have no sample"),
    (lambda: retrain_last_layer(nn.Linear(2, 2), X.__getitem__, Y, Y * 2, seeded(0)), r"groups \[1\] have no sample"),
])
def test_bad_input_is_refused_in_a_line(call, message):
    with pytest.raises(ValueError, match=message) as caught: call()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- on the harness

def tiny(n=300):
    "Noise in 3 classes, brighter in the channel that is its attribute; a tenth conflicts."
    y = torch.arange(n) % 3
    a = torch.where(torch.arange(n) % 10 == 0, (y + 1) % 3, y)
    x = torch.randint(0, 156, (n, 3, 28, 28), generator=seeded(3))
    x[torch.arange(n), a] += 100
    return BiasedDataset(x.byte(), y, a, 10)


def run_of(**fields):
    return Run(Config(width=4, batch_size=20, lr=.05, steps=6, eval_every=3, conflict_ratio=.1, precision="fp32", **fields), 5, tiny())


def trained(steps, seed=5, loss=cross_entropy):
    "The logits of a network trained by a loop written out."
    torch.manual_seed(seed)
    model, data, generator = cnn(width=4).to(memory_format=torch.channels_last), tiny(), seeded(seed)
    optimizer = torch.optim.SGD(model.parameters(), .05, .9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for index in shuffled_batches(300, 20, steps, generator):
        optimizer.zero_grad()
        loss(model(data.x[index] / 255), data.y[index], index).backward()
        optimizer.step()
        schedule.step()
    with evaluating(model), torch.no_grad(): return model(data.x / 255)


def test_guesses_on_the_harness_are_those_of_loops_written_out():
    y = tiny().y
    for text, expected, networks in (
            ("guesses.errors(steps=30)", trained(30).argmax(1) != y, 1),
            ("guesses.doubts(steps=30, q=0.4, below=0.1)",
             trained(30, loss=generalised_cross_entropy(.4)).softmax(1)[torch.arange(300), y] < .1, 1),
            ("guesses.votes(steps=20, members=3, at_least=2)",
             sum((trained(20, seed).argmax(1) != y).int() for seed in (5001, 5002, 5003)) >= 2, 3)):
        run = run_of(guess=text, reweighting="reweighting.sample", sparsity="masks.RigL")
        setup = run.prepare()
        assert (run.is_conflicting != expected).sum() <= 1 and 0 < expected.sum() < 300  # rounding may move one
        steps = 20 if "votes" in text else 30
        assert (run.trained, run.asked) == (networks * steps * 20, networks * 300)
        assert len(list(setup["batches"])) == 6


def test_a_guess_by_chance_on_the_harness():
    run = run_of(guess="guesses.by_chance")
    assert run.is_conflicting.sum() == 30 and not torch.equal(run.is_conflicting, run.train.is_conflicting)
    assert torch.equal(run.is_conflicting, run_of(guess="guesses.by_chance").is_conflicting) and run.trained == 0


@pytest.mark.parametrize("storage", ["compact", "masked"])
def test_dfr_on_the_harness(storage):
    config = dict(sparsity="masks.RigL", density=.3, storage=storage, afterwards="guesses.dfr(C=0.5)")
    run, valid = run_of(**config), tiny(200)
    valid = BiasedDataset(valid.x, valid.y, valid.a, 3)
    run.model = with_classes(3)
    model = run.prepare()["model"]
    new, again = (run.call("afterwards", model, valid) for _ in range(2))
    groups = cells(valid.y, valid.is_conflicting)
    assert run.asked == 2 * 200  # each time
    expected = retrain_last_layer(model, lambda index: valid.x[index] / 255, valid.y, groups, seeded(5), C=.5)
    with torch.no_grad(), evaluating(new), evaluating(again), evaluating(expected), evaluating(model):
        x = valid.x / 255
        torch.testing.assert_close(new(x), expected(x), rtol=1e-3, atol=1e-4)
        assert torch.equal(new(x), again(x)) and not torch.allclose(new(x), model(x), atol=.1)


def with_classes(n):
    torch.manual_seed(5)
    return cnn(num_classes=n, width=4).to(memory_format=torch.channels_last)
