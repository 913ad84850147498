"Search: as many candidates for each, one rule, and a test split that stays closed."

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from test_experiments import STUDY, make_root, split_of

from rest_nb import search
from rest_nb.configs import configure, named, read_params
from rest_nb.data import load
from rest_nb.experiments import run_seed
from rest_nb.reweighting import cross_entropy
from rest_nb.rows import rehearse, run_row
from rest_nb.search import candidates, judge, search_row, without_test

ROOT = Path(__file__).parents[1]
GRIDS = dict(ERM=dict(lr=[.001, .05]), ReW=dict(upweight=[1, 20]))
SEARCHED = dict(copy.deepcopy(STUDY), grids=GRIDS)
SEARCHED["budgets"]["search"] = dict(STUDY["budgets"]["tiny"], seeds=[7])


@pytest.fixture
def root(tmp_path): return make_root(tmp_path / "project", SEARCHED)


def stored(root, method="ERM"): return json.loads((root / "runs" / "search" / f"blobs-{method}.json").read_text())


def scripted(monkeypatch, worths):
    "Candidates are worth what stands in `worths`, by learning rate; returns those that were asked for."
    asked = []
    def told(config, split, progress, checkpoint):
        asked.append(config.lr)
        if worths[config.lr] is None: raise KeyboardInterrupt
        return dict(worst_group=worths[config.lr], conflicting_loss=1., unbiased=.5, conflicting=.5, step=2)
    monkeypatch.setattr(search, "judge", told)
    monkeypatch.setattr(search, "rehearse", lambda *how: "rehearsed")
    return asked


def test_candidates_are_all_combinations():
    grids = dict(A=dict(lr=[1, 2], width=[3, 4]), B=dict(lr=[1, 2, 3, 4]))
    assert candidates(dict(grids=grids), "A") == [dict(lr=l, width=w) for l, w in ((1, 3), (1, 4), (2, 3), (2, 4))]


@pytest.mark.parametrize("grids, said", [
    (None, "no 'A' in grids"), (dict(B=dict(lr=[1])), "no 'A' in grids; expected one of B"),
    (dict(A=dict(lr=[1, 2]), B=dict(lr=[1])), "grids.B has 1 configurations and A 2"),
    (dict(A=dict(lr=[])), "grids.A is {'lr': []}"), (dict(A=dict(lr=1)), "grids.A is"), (dict(A=[1]), "grids.A is [1]")])
def test_a_grid_that_is_none_is_named(grids, said):
    with pytest.raises(ValueError) as caught: candidates(dict(grids=grids), "A")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_winner_is_the_best_on_validation_and_the_first_of_ties(root, monkeypatch):
    params = copy.deepcopy(SEARCHED)
    params["grids"] = dict(ERM=dict(lr=[.1, .2, .3, .4]))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    scripted(monkeypatch, {.1: .3, .2: .6, .3: .6, .4: .1})
    assert search_row(root, "blobs", "ERM")["winner"] == {"lr": .2}
    assert [c["worst_group"] for c in stored(root)["candidates"]] == [.3, .6, .6, .1]
    assert configure(read_params(root / "params.yaml") | dict(budgets=dict(tiny=dict(params["budgets"]["tiny"], tuned=True))),
                     "tiny", "blobs", "ERM").lr == .2


def test_of_equals_the_smaller_loss_of_conflicting_images_wins_and_what_diverged_never(root, monkeypatch):
    params = copy.deepcopy(SEARCHED)
    params["grids"] = dict(ERM=dict(lr=[.1, .2, .3]))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    worths = {.1: (-1., 0., -1.), .2: (0., 3., .9), .3: (0., 2., .5)}  # the second follows the colour further
    monkeypatch.setattr(search, "rehearse", lambda *how: "rehearsed")
    monkeypatch.setattr(search, "judge", lambda config, split, progress, checkpoint: dict(
        zip(("worst_group", "conflicting_loss", "unbiased"), worths[config.lr]), conflicting=0., step=1, why="the loss is nan"))
    assert search_row(root, "blobs", "ERM")["winner"] == {"lr": .3}
    (root / "runs" / "search" / "blobs-ERM.json").unlink()
    worths.update({.2: (-1., 0., -1.), .3: (-1., 0., -1.)})
    with pytest.raises(FloatingPointError, match="blobs ERM: no candidate came to its end: the loss is nan"): search_row(root, "blobs", "ERM")


@pytest.mark.parametrize("grid, said", [(dict(rl=[1, 2]), "grids.ERM: .*rl"), (dict(lr=[0, 1]), "grids.ERM: lr is 0")])
def test_a_grid_of_what_is_no_configuration_is_named(grid, said):
    with pytest.raises(ValueError, match=said): search.configurations(dict(SEARCHED, grids=dict(ERM=grid)), "blobs", "ERM")


def test_a_tuned_row_is_trained_with_what_has_won(root):
    "Search, then row, as the stages do."
    params = dict(SEARCHED, budgets=dict(SEARCHED["budgets"], tiny=dict(SEARCHED["budgets"]["tiny"], tuned=True, methods=["ERM"], settings=["blobs"])))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    winner = search_row(root, "blobs", "ERM")["winner"]
    row = run_row(root, "tiny", "blobs", "ERM")
    assert winner["lr"] in GRIDS["ERM"]["lr"] and row["config"]["lr"] == winner["lr"]


def test_a_candidate_is_judged_by_its_best_evaluation():
    config = configure(SEARCHED, "search", "blobs", "ReW")
    history = run_seed(config, 7, split_of(config))[0]["history"]
    best = max(history, key=lambda h: (h["worst_group"], h["step"]))
    assert judge(config, split_of(config)) == {name: best[name] for name in ("worst_group", "conflicting_loss", "unbiased", "conflicting", "step")}
    assert judge(dataclasses.replace(config, lr=1e30), split_of(config))["worst_group"] < 0
    before = dataclasses.replace(config, lr=1e30, guess="guesses.errors(steps=4)")  # what is trained before diverges
    assert judge(before, split_of(config))["worst_group"] < 0


def test_a_guess_that_tells_nobody_apart_is_worth_less_than_any():
    config = configure(SEARCHED, "search", "blobs", "ReW")
    found = judge(dataclasses.replace(config, guess="guesses.doubts(steps=1, below=1.0)"), split_of(config))
    assert found["worst_group"] < 0 and "guessed that 200 of 200" in found["why"]


def test_a_search_is_rehearsed_by_all_that_its_runs_compute(monkeypatch):
    config = configure(SEARCHED, "search", "blobs", "ReW")
    rehearsed = lambda: rehearse(search.tried_out, config, split_of(config))
    before = rehearsed()
    assert before == rehearsed()
    monkeypatch.setattr("rest_nb.experiments.cross_entropy", lambda logits, y, index: 1.0001 * cross_entropy(logits, y, index))
    assert rehearsed() != before  # no accuracy has changed


def test_the_real_search_never_reads_the_test_split(root, monkeypatch):
    read = []
    monkeypatch.setattr(search, "load", lambda path, name: read.append(name) or load(path, name))
    result = search_row(root, "blobs", "ERM")
    assert set(read) == {"train", "valid"} and len(result["candidates"]) == 2 and result == stored(root)
    with pytest.raises(PermissionError, match="test split"): without_test(lambda name: name)("test")
    assert without_test(lambda name: name)("valid") == "valid"


def test_what_a_candidate_is_given_has_no_test_split(root, monkeypatch):
    seen = []
    def judged(config, split, progress, checkpoint):
        if config.steps != 20:  # a rehearsal has training images in its place
            with pytest.raises(PermissionError): split("test")
        seen.append(split("valid"))
        return dict(worst_group=0., conflicting_loss=1., unbiased=0., conflicting=0., step=1)
    monkeypatch.setattr(search, "judge", judged)
    search_row(root, "blobs", "ERM")
    assert len(seen) == 2


def test_a_search_that_died_goes_on_where_it_was(root, monkeypatch):
    with monkeypatch.context() as patch:
        scripted(patch, {.001: .2, .05: None})
        with pytest.raises(KeyboardInterrupt): search_row(root, "blobs", "ERM")
    asked = scripted(monkeypatch, {.001: .9, .05: .3})
    assert search_row(root, "blobs", "ERM")["winner"] == {"lr": .05} and asked == [.05]  # .2 was known, .9 is not asked
    assert not (root / ".parts" / "search-blobs-ERM.json").exists()


def test_a_candidate_that_died_goes_on_from_its_last_evaluation(root, monkeypatch):
    whole, made = search_row(root, "blobs", "ERM"), []
    (root / "runs" / "search" / "blobs-ERM.json").unlink()
    left = root / ".parts" / "search-blobs-ERM-1.checkpoint"
    left.write_text("whoever died when it was done")

    def ticking(steps, *how):
        for step in steps:
            made.append(steps.number)
            if len(made) == 7: raise KeyboardInterrupt
            yield step
    monkeypatch.setattr(search, "ticking", ticking)
    with pytest.raises(KeyboardInterrupt): search_row(root, "blobs", "ERM")
    torch.manual_seed(99)
    assert search_row(root, "blobs", "ERM") == whole
    assert made == [1, 2, 3, 4] + [1, 2, 3] + [3, 4]  # the second candidate was evaluated at its second step
    assert not any((root / ".parts").iterdir())


def test_what_was_tried_with_other_code_is_tried_again(root, monkeypatch):
    with monkeypatch.context() as patch:
        scripted(patch, {.001: .2, .05: None})
        with pytest.raises(KeyboardInterrupt): search_row(root, "blobs", "ERM")
    asked = scripted(monkeypatch, {.001: .9, .05: .3})
    monkeypatch.setattr("rest_nb.rows.code_hash", lambda config: "another")
    monkeypatch.setattr(search, "rehearse", lambda *how: "another")
    assert search_row(root, "blobs", "ERM")["winner"] == {"lr": .001} and asked == [.001, .05]


@pytest.mark.parametrize("same", [True, False])
def test_only_other_code_is_rehearsed(root, monkeypatch, same):
    scripted(monkeypatch, {.001: .2, .05: .3})
    before, rehearsed = search_row(root, "blobs", "ERM"), []
    monkeypatch.setattr(search, "rehearse", lambda *how: rehearsed.append(how) or "rehearsed")
    if not same: monkeypatch.setattr("rest_nb.rows.code_hash", lambda config: "another")
    assert search_row(root, "blobs", "ERM") == (before if same else before | dict(code="another"))
    assert len(rehearsed) == (not same)


def test_what_another_rule_judged_is_judged_again(root, monkeypatch):
    asked = scripted(monkeypatch, {.001: .2, .05: .3})
    with monkeypatch.context() as patch:
        patch.setattr(search, "RULE", "another")
        search_row(root, "blobs", "ERM")
    search_row(root, "blobs", "ERM")
    assert asked == [.001, .05] * 2


def test_what_was_found_stays_and_only_what_is_new_is_tried(root, monkeypatch):
    asked = scripted(monkeypatch, {.001: .2, .05: .3, .1: .4})
    before = search_row(root, "blobs", "ERM")
    assert search_row(root, "blobs", "ERM") == before and asked == [.001, .05]
    grids = dict(GRIDS, ERM=dict(lr=[.001, .1]))
    (root / "params.yaml").write_text(yaml.safe_dump(dict(SEARCHED, grids=grids)))
    assert search_row(root, "blobs", "ERM")["winner"] == {"lr": .1} and asked == [.001, .05, .1]


def test_the_study_tries_six_of_each_method_and_the_same_rates():
    params = read_params(ROOT / "params.yaml")
    assert list(params["grids"]) == named(params, "rivals", "methods") == named(params, "search", "methods")
    rates = params["grids"]["ERM"]["lr"]
    assert all(grid["lr"] in ([rates] if list(grid) == ["lr"] else [rates[1:4], rates[1:3], rates[2:4]]) for grid in params["grids"].values())
    for method in params["grids"]:
        tried = candidates(params, method)
        assert len(tried) == 6
        base = configure(params, "search", "cmnist-0005", method)
        assert len({dataclasses.replace(base, **fields) for fields in tried}) == 6  # each is a configuration, and another
        roles = {name: text.split("(")[0] for fields in tried for name, text in fields.items() if type(text) is str}
        assert all(getattr(base, name).split("(")[0] == said for name, said in roles.items())  # another option, not another method
