"""Experiments: every knob is live, every wrong one is refused by name, every row is whole and the same again.

Oracles: a training loop written by hand, counts worked on paper, Python's own parser, and bytes on disk.
"""
import ast
import copy
import dataclasses
import hashlib
import json
import math
import platform
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faults import full_while_renaming, full_while_writing
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import rest_nb
from rest_nb.__main__ import untuned
from rest_nb import configs, experiments, masks, metrics, rows as keeping, timing, training
from rest_nb.configs import ROLES, Config, configure, named, part, read_params, rows
from rest_nb.data import SPLITS, UNIFORM, BiasedDataset, assign_attributes, colour, save
from rest_nb.experiments import Run, cost, run_seed
from rest_nb.masks import maskable
from rest_nb.models import cnn
from rest_nb.reweighting import UPWEIGHT
from rest_nb.rows import code_hash, code_of, computes_as, pending, rehearse, row_path, run_row, stamp, write_json
from rest_nb.timing import time_methods
from rest_nb.training import fit

ROOT = Path(__file__).parents[1]
STORED = untuned(yaml.safe_load((ROOT / "params.yaml").read_text()))  # no winner of a search must be there yet
FIELDS = [field.name for field in dataclasses.fields(Config)]


def split_of(config, n=200):
    "A stand-in for Colored MNIST: bright squares for digits, biased and coloured as `colored_mnist` does it."
    def split(name):
        y = np.arange(n) % 10
        grey = np.random.default_rng(SPLITS.index(name)).integers(0, 60, (n, 28, 28)).astype(np.uint8)
        for i, t in enumerate(y): grey[i, 8 * (t // 4):8 * (t // 4) + 8, 7 * (t % 4):7 * (t % 4) + 7] += 180
        seeds = config.data_seed, round(config.conflict_ratio * 1e6), SPLITS.index(name)
        rng = np.random.default_rng(seeds)
        a = assign_attributes(y, UNIFORM if name == "test" else config.conflict_ratio, 10, rng)
        return BiasedDataset(*map(torch.from_numpy, (colour(grey, a, config.severity, rng), y, a)))
    return split


BASE = Config(conflict_ratio=.1, upweight=10, sparsity="masks.RigL", reweighting="reweighting.sample", density=.3, storage="masked", width=4,
              lr=.05, batch_size=16, precision="fp32", steps=8, eval_every=4, seeds=(1,))  # masks: at 2, 4
WIDE_ENOUGH = 8  # for a ResNet: without AVX-512 torch 2.13 dies in training narrower ones (it writes beyond the gradient of a 1×1 convolution)


def outcome(config):
    "All that a run of every seed of `config` says, but for the seed's own number, as text."
    runs = [run_seed(config, seed, split_of(config))[0] for seed in config.seeds]
    return json.dumps([{name: value for name, value in run.items() if name != "seed"} for run in runs])


# --- knobs -----------------------------------------------------------------------------------------------

ANOTHER = dict(dataset="cifar10c", network="resnet18", conflict_ratio=.3, severity=1, data_seed=1, upweight=30, sparsity="masks.SET", reweighting="reweighting.weigh",
               density=.2, storage="compact", distribution="uniform", delta_t=3, t_end=1.0, drop_fraction=.3, width=5, lr=.02,
               momentum=.5, weight_decay=.1, batch_size=20, precision="bf16", steps=12, eval_every=2,
               seeds=(2,), initial="stand_in.last", guess="stand_in.first", afterwards="stand_in.swapped", dropout=.5, oracle=True, places=True, device="cuda")


@pytest.fixture(autouse=True, scope="module")
def stand_in():
    "A room of rest_nb with one part for each role that has no part of its own in these tests."
    def last(run, count=40):
        return {name: torch.arange(w.numel()).view(w.shape) >= w.numel() - count for name, w in masks.maskable(run.model).items()}
    def first(run, count=50): return torch.arange(len(run.train)) < count
    def swapped(run, model, valid):
        assert len(valid) == 200
        return Reader()
    class Reader(torch.nn.Module):
        "Looks where the square of each class is."
        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x):
            return torch.stack([x[:, :, 8 * (t // 4):8 * (t // 4) + 8, 7 * (t % 4):7 * (t % 4) + 7].mean((1, 2, 3))
                                for t in range(10)], 1)
    room = types.ModuleType("rest_nb.stand_in")
    vars(room).update(last=last, first=first, swapped=swapped, number=5)
    sys.modules["rest_nb.stand_in"] = room
    yield room
    part.cache_clear()
    del sys.modules["rest_nb.stand_in"]


@pytest.fixture(scope="module")
def base_outcome(): return outcome(BASE)


def test_a_run_is_the_same_again(base_outcome):
    # What the tests below call a change must be the knob's doing: what was drawn before must not matter.
    torch.manual_seed(99)
    torch.rand(7)
    assert outcome(BASE) == base_outcome


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_live(field, base_outcome, monkeypatch):
    if field == "precision": monkeypatch.setattr(training, "has_bf16", lambda: True)  # emulated, if need be
    # A field without another value in the table fails here: no knob goes untested.
    assert ANOTHER[field] != getattr(BASE, field)
    if field == "device" and not torch.cuda.is_available(): return  # refused, see below
    if field == "network":
        wide = dataclasses.replace(BASE, width=WIDE_ENOUGH)
        assert outcome(dataclasses.replace(wide, network=ANOTHER["network"])) != outcome(wide)
    else: assert outcome(dataclasses.replace(BASE, **{field: ANOTHER[field]})) != base_outcome


@pytest.mark.parametrize("field, choices", [
    ("sparsity", ["dense", "masks.StaticSparse", "masks.SET", "masks.RigL"]), ("storage", configs.STORAGE),
    ("distribution", configs.DISTRIBUTIONS), ("reweighting", ["none", "reweighting.sample", "reweighting.weigh"]),
    ("precision", configs.PRECISIONS), ("network", configs.NETWORKS)])
def test_every_choice_is_another_run(field, choices, monkeypatch):
    if field == "precision": monkeypatch.setattr(training, "has_bf16", lambda: True)
    base = dataclasses.replace(BASE, width=WIDE_ENOUGH) if field == "network" else BASE
    outcomes = {outcome(dataclasses.replace(base, **{field: choice})) for choice in choices}
    assert len(outcomes) == len(choices) > 1


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError): BASE.lr = 1.0
    assert isinstance(Config(seeds=[1, 2]).seeds, tuple)  # a list from YAML could be appended to
    assert hash(Config(seeds=[1, 2])) == hash(Config(seeds=(1, 2)))


nan, inf = float("nan"), float("inf")
WRONG = [(field, value) for field, values in dict(
    conflict_ratio=[-.1, 1.5, nan, "0.1", None, True], density=[0, 1.5, -1, 1e-6, nan, "0.05", True],
    t_end=[-.1, 1.5, nan], drop_fraction=[-.1, 1.1, nan],
    dataset=["magic", "", None, 3, ["cmnist"], "utkface"], network=["magic", None, "CNN"],
    severity=[0, 6, 4.0, True], sparsity=["magic", "", None, 3, "rigl", "masks.Rigl", "masks.erk", "masks.RigL(2)", "masks.SET + masks.magic"], storage=["sparse", None], distribution=["magic", ["erk"]],
    reweighting=["magic", None, "reweighting.magic", "magic.sample"], precision=["fp16", 16],
    initial=["magic", "stand_in.number", "stand_in.last", 3], guess=["none", "stand_in.first(magic=3)", None],
    device=["gpu", "cuda:0", None, 0], afterwards=["labels", "stand_in.swapped()()", True], dropout=[-.1, 1.0, 1.5, nan, "0.5"], oracle=[0, 1, "yes", None],
    upweight=[0, -1, nan, inf, "80"], lr=[0, -.1, nan, inf, "0.1", None, True, [.1]],
    momentum=[-.1, nan, inf, "0.9"], weight_decay=[-.1, nan, inf, "0"], delta_t=[0, -1, 1.5],
    width=[0, -4, 4.0, True], batch_size=[0, -1, 16.0], steps=[0, -10, 10.0, "10", True, 7],
    eval_every=[0, -5, 5.0, 3], data_seed=[-1, .5, "0", True],
    seeds=[(), (1, 1), (1, 1.0), 41, "41", None, (1.5,), (True,), ("1",), ([1],)]
).items() for value in values]


@pytest.mark.parametrize("field, value", WRONG, ids=lambda v: repr(v))
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError) as caught: Config(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    # By the first word `configure` finds the place. (eval_every 3 and 10 steps clash: name either.)
    # Faces have no severity: 4 is wrong there, and is named.
    if value == "utkface": assert message == "severity is 4; expected one of 0"
    else: assert message.startswith(f"{field} is ") or (field, value) == ("eval_every", 3), message


@pytest.mark.parametrize("field, value", [
    ("conflict_ratio", 0.0), ("conflict_ratio", 1.0), ("density", 1.0), ("t_end", 0.0), ("t_end", 1.0),
    ("drop_fraction", 0.0), ("drop_fraction", 1.0), ("upweight", 2.5), ("upweight", 1), ("lr", 1),
    ("momentum", 0.0), ("weight_decay", 0), ("steps", 5), ("delta_t", 100), ("seeds", (0, 1))], ids=repr)
def test_the_ends_of_ranges_are_allowed(field, value):
    assert getattr(Config(**{field: value}), field) == value


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(FIELDS), st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.integers(-9, 9),
    st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(), st.none(), max_size=1)))
def test_whatever_yaml_can_hold_is_taken_or_refused_in_one_line(field, value):
    try: Config(**{field: value})
    except ValueError as error: assert field in str(error) and "\n" not in str(error)


# --- params.yaml -----------------------------------------------------------------------------------------

STUDY = dict(
    common=dict(ROLES, dropout=0.0, density=.3, storage="compact", distribution="erk", t_end=.75, drop_fraction=.5, width=4, lr=.05, momentum=.9,
                weight_decay=0.0, precision="fp32", device="cpu", places=False),
    settings=dict(blobs=dict(dataset="cmnist", network="cnn", conflict_ratio=.2, severity=4, data_seed=0, upweight=10),
                  rare=dict(dataset="cmnist", network="cnn", conflict_ratio=.1, severity=4, data_seed=0, upweight=20)),
    methods=dict({name: copy.deepcopy(STORED["methods"][name]) for name in ("ERM", "ReW", "RigL", "REST")}, SET=dict(sparsity="masks.SET", reweighting="none"),
                 Static=dict(sparsity="masks.StaticSparse", reweighting="none")),
    budgets=dict(tiny=dict(batch_size=16, steps=4, eval_every=2, delta_t=1, seeds=[1, 2], oracle=False)))  # masks: at 1, 2


def edited(section, name=None, entry=None, **fields):
    "STUDY with `fields` laid over one of its entries, or with that entry replaced."
    study = copy.deepcopy(STUDY)
    if entry is not None: study[section][name] = entry
    if fields: (study[section][name] if name else study[section]).update(fields)
    return study


def refusal(study, budget="tiny", setting="blobs", method="REST"):
    "What `configure` says, checked to be one line that begins with the file."
    with pytest.raises(ValueError) as caught: configure(study, budget, setting, method)
    message = str(caught.value)
    assert message.startswith("params.yaml") and "\n" not in message, message
    return message


def test_a_configuration_is_its_four_places_laid_together():
    fields = STUDY["common"] | STUDY["settings"]["rare"] | STUDY["methods"]["REST"] | STUDY["budgets"]["tiny"]
    assert set(fields) == set(FIELDS)  # no default can stand in for one of them
    found = dataclasses.asdict(configure(STUDY, "tiny", "rare", "REST"))
    assert found == dict(fields, seeds=(1, 2))


def test_an_entry_may_be_empty():
    # `ERM:` alone is YAML for null; all of its fields may be the common ones.
    for empty in ({}, None):
        study = copy.deepcopy(STUDY)
        study["methods"]["REST"] = empty
        assert configure(study, "tiny", "blobs", "REST") == configure(STUDY, "tiny", "blobs", "ERM")


@pytest.mark.parametrize("names, said", [
    (("huge", "blobs", "REST"), ["'huge'", "budgets", "tiny"]),
    (("tiny", "MNIST", "REST"), ["'MNIST'", "settings", "blobs", "rare"]),
    (("tiny", "blobs", "rest"), ["'rest'", "methods", "REST"])], ids=["budget", "setting", "method"])
def test_unknown_names(names, said):
    message = refusal(STUDY, *names)
    assert all(word in message for word in said), message


@pytest.mark.parametrize("study, said", [
    (edited("methods", "REST", densty=.1), ["methods.REST", "'densty'", "did you mean 'density'?"]),
    (edited("common", step=1), ["common", "'step'", "did you mean 'steps'?"]),
    (edited("methods", "REST", upweight=1), ["'upweight'", "settings.blobs", "methods.REST"]),
    (edited("budgets", "tiny", conflict_ratio=.1), ["'conflict_ratio'", "settings.blobs", "budgets.tiny"]),
    (edited("budgets", "tiny", sparsity="masks.SET"), ["'sparsity'", "methods.REST", "budgets.tiny"]),
    (edited("common", lr=0), ["common: lr is 0"]),
    (edited("common", density=1e-6), ["common: density is 1e-06"]),
    (edited("settings", "blobs", upweight="10"), ["settings.blobs: upweight is '10'"]),
    (edited("methods", "REST", sparsity="magic"), ["methods.REST: sparsity is 'magic'", "module.name", "or dense"]),
    (edited("methods", "REST", sparsity="masks.Rigl"), ["methods.REST: sparsity is 'masks.Rigl'", "did you mean 'RigL'?"]),
    (edited("budgets", "tiny", steps=4.0), ["budgets.tiny: steps is 4.0"]),
    (edited("budgets", "tiny", eval_every=3), ["budgets.tiny: steps is 4", "eval_every (3)"]),
    (edited("budgets", "tiny", seeds=[1, 1]), ["budgets.tiny: seeds is [1, 1]"]),
    (edited("budgets", "tiny", seeds=41), ["budgets.tiny", "seeds", "41"]),
    (edited("methods", "REST", entry="rigl"), ["methods.REST", "'rigl'"]),
    (edited("methods", "REST", entry=["rigl"]), ["methods.REST", "rigl"]),
    (edited("methods", "REST", entry=5), ["methods.REST", "5"]),
    (edited("methods", "REST", entry=False), ["methods.REST", "False"]),
    (edited("methods", "REST", entry=[]), ["methods.REST", "[]"]),
    (edited("methods", "REST", entry={5: 1}), ["methods.REST", "5"]),
    (edited("methods", "REST", entry={None: 1}), ["methods.REST", "None"])],
    ids=lambda v: " ".join(v) if type(v) is list else "")
def test_a_mistake_is_named_with_its_place(study, said):
    message = refusal(study)
    assert all(word in message for word in said), message


def test_nothing_is_suggested_for_what_is_like_nothing():
    assert "did you mean" not in refusal(edited("methods", "REST", zzz=1))


def test_names_that_are_no_text():
    # `yes:` and `0005:` are a boolean and a number in YAML; saying so must not fail itself.
    assert "'MAGIC'" in refusal(edited("methods", 5, entry={}), method="MAGIC")


@pytest.mark.parametrize("text, said", [
    ("", "common"), ("- common\n- settings\n", "common"), ("common", "common"), ("5", "common"),
    *((yaml.safe_dump({k: v for k, v in STUDY.items() if k != section}), section) for section in STUDY),
    *((yaml.safe_dump({**STUDY, section: wrong}), section) for section in STUDY for wrong in (["a"], "a"))],
    ids=lambda v: v[:12])
def test_a_file_that_lacks_a_section(tmp_path, text, said):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ValueError) as caught: read_params(tmp_path / "params.yaml")
    message = str(caught.value)
    assert "params.yaml" in message and said in message and "\n" not in message


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "params.yaml").write_text("common: {lr: 1\nsettings: {")
    with pytest.raises((ValueError, yaml.YAMLError), match="params.yaml"):
        read_params(tmp_path / "params.yaml")


def test_rows_are_settings_by_methods():
    found = rows(STUDY, "tiny")
    methods = ("ERM", "ReW", "RigL", "REST", "SET", "Static")
    assert list(found) == [(s, m) for s in ("blobs", "rare") for m in methods]
    assert found["rare", "SET"].upweight == 20 and found["blobs", "REST"].sparsity == "masks.RigL"


def test_a_method_may_say_otherwise_what_is_common():
    study = edited("methods", "REST", width=5, weight_decay=.1)
    found = {method: configure(study, "tiny", "blobs", method) for method in ("ERM", "REST")}
    assert [(c.width, c.weight_decay) for c in found.values()] == [(4, 0.0), (5, .1)]


def test_a_budget_may_say_otherwise_what_is_common_or_a_setting_says():
    assert configure(edited("budgets", "tiny", width=9), "tiny", "blobs", "REST").width == 9
    assert configure(edited("budgets", "tiny", upweight=5), "tiny", "blobs", "REST").upweight == 5
    assert "'severity' stands both in settings.blobs and in budgets.tiny" in refusal(edited("budgets", "tiny", severity=5))
    assert "'sparsity' stands both in methods.REST and in budgets.tiny" in refusal(edited("budgets", "tiny", sparsity="dense"), method="REST")


def test_the_papers_budget_is_the_papers():
    found = [config for budget in ("paper", "paper-objects", "paper-faces") for config in rows(read_params(ROOT / "params.yaml"), budget).values()]
    assert {(c.device, c.batch_size, len(c.seeds)) for c in found} == {("cuda", 256, 5)}
    assert {(c.dataset, c.conflict_ratio, c.lr, c.steps // c.eval_every) for c in found} == {
        *(("cmnist", ratio, .01, 100) for ratio in (.005, .01, .02, .05)),
        *(("cifar10c", ratio, .001, 100) for ratio in (.005, .01, .02, .05)), ("utkface", .005, .001, 100)}


def test_names_that_could_have_been_meant_are_few_and_near():
    assert configs.some(["ERM", "ReW"]) == "ERM, ReW"
    names = [f"M{number}" for number in range(20)] + ["REST-w80"]
    assert configs.some(names, "REST-w8").startswith("REST-w80, M0, ") and configs.some(names).endswith("M11, …")


def test_a_budget_may_be_for_some_methods_only():
    study = edited("budgets", "tiny", methods=["REST"])
    assert [*rows(study, "tiny")] == [("blobs", "REST"), ("rare", "REST")]
    assert "'ERM' is none of its methods, REST" in refusal(study, method="ERM")
    assert "budgets.tiny: methods is ['MAGIC']; expected a list of ERM" in refusal(edited("budgets", "tiny", methods=["MAGIC"]))


def test_what_a_search_has_won_goes_before_all_where_a_budget_is_tuned(tmp_path):
    (tmp_path / "runs" / "search").mkdir(parents=True)
    (tmp_path / "runs" / "search" / "blobs-REST.json").write_text(json.dumps(dict(winner=dict(lr=.7, upweight=3), candidates=[])))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(edited("budgets", "tiny", tuned=True)))
    params = read_params(tmp_path / "params.yaml")
    found = configure(params, "tiny", "blobs", "REST")
    assert found == dataclasses.replace(configure(STUDY, "tiny", "blobs", "REST"), lr=.7, upweight=3)
    with pytest.raises(ValueError, match=r"budgets.tiny is tuned, but there is no runs/search/blobs-ERM.json"):
        configure(params, "tiny", "blobs", "ERM")
    untuned = params | dict(budgets=dict(tiny=dict(params["budgets"]["tiny"], tuned=False)))
    assert configure(untuned, "tiny", "blobs", "REST") == configure(STUDY, "tiny", "blobs", "REST")
    params["winners"]["blobs-REST"]["lr"] = -1
    with pytest.raises(ValueError, match="runs/search/blobs-REST.json: lr is -1"): configure(params, "tiny", "blobs", "REST")


def test_a_budget_may_be_for_some_settings_only():
    study = edited("budgets", "tiny", settings=["rare"])
    assert [*rows(study, "tiny")] == [("rare", m) for m in study["methods"]] and rows(study, "tiny").items() <= rows(STUDY, "tiny").items()
    assert "'blobs' is none of its settings, rare" in refusal(study)
    for wrong in (["rare", "MAGIC"], "rare", [], None, 5):
        assert f"budgets.tiny: settings is {wrong!r}; expected a list of blobs, rare" in refusal(edited("budgets", "tiny", settings=wrong))


@pytest.mark.parametrize("dataset, network, size, classes", [("cifar10c", "resnet18", 32, 10), ("utkface-64", "resnet18-cifar", 64, 2)])
def test_a_row_of_another_set_and_network(dataset, network, size, classes):
    "The network has the set's classes and costs what its size says; images are moved in training, not in testing."
    config = Config(dataset=dataset, network=network, severity=5 if dataset == "cifar10c" else 0, sparsity="masks.RigL", reweighting="reweighting.sample",
                    width=4, density=.1, batch_size=16, steps=4, eval_every=2, delta_t=2)
    y = torch.arange(40) % classes
    noise = BiasedDataset(torch.randint(0, 256, (40, 3, size, size)).byte(), y, y.roll(1), classes)
    setup = Run(config, 0, noise).prepare()
    assert setup["model"].fc.shape == (classes, 32)
    seen = [setup["inputs"](noise.x, torch.tensor([3, 3]), generator=setup["generator"]) for _ in range(6)]
    assert len({image.numpy().tobytes() for pair in seen for image in pair}) > 1 and seen[0].stride(0) == 1
    still = setup["inputs"](noise.x, torch.tensor([3]))
    mean, std = (torch.tensor(v)[:, None, None] for v in ([.4914, .4822, .4465], [.2023, .1994, .2010]))
    assert torch.equal(still[0], (noise.x[3].float() / 255 - mean) / std)
    result, _ = run_seed(config, 1, lambda split: noise)
    assert result["spent"]["updates"] == 1 and result["last"]["unbiased_n"] == 40
    counted = cost(config, [result["spent"]])
    macs = {"resnet18": 16, "resnet18-cifar": 64}[network] ** 2 * 3 * 4 * {"resnet18": 49, "resnet18-cifar": 9}[network]  # of the stem
    assert counted["dense_flops"] > 2 * macs


# --- the study -------------------------------------------------------------------------------------------

ALL = [(budget, s, m) for budget, entry in STORED["budgets"].items() for s in entry["settings"]
       for m in entry.get("methods", STORED["methods"])]


@pytest.mark.parametrize("budget, setting, method", ALL)
def test_a_row_of_the_study(budget, setting, method):
    places = [STORED["common"], *(STORED[section][name] for section, name in zip(
        ("settings", "methods", "budgets"), (setting, method, budget)))]
    common, *others = ({*place} - {"settings", "methods", "tuned"} for place in places)
    assert set().union(common, *others) == set(FIELDS)  # no default
    setting_says, method_says, budget_says = others
    assert not method_says & (setting_says | budget_says)
    assert not setting_says & budget_says or budget.startswith("paper")  # other batches and rates, said to be
    config = configure(STORED, budget, setting, method)
    assert config.upweight == UPWEIGHT[config.conflict_ratio]
    if budget not in ("tiny", "paper-faces") and config.sparsity == "masks.RigL":
        rest = config.t_end * config.steps
        updates = [s for s in range(1, config.steps + 1) if s % config.delta_t == 0 and s < rest]
        assert len(updates) >= 10 and 10 * config.delta_t <= rest  # a mask that hardly moved would be no RigL


def test_the_comment_counts_the_mask_updates():
    # params.yaml says how many there are per budget; the numbers were worked out once and must stay true.
    lines = (ROOT / "params.yaml").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("budgets:"))
    said = " ".join(lines[first:first + 2])
    counted = {}
    for name, budget in STORED["budgets"].items():
        rest = STORED["common"]["t_end"] * budget["steps"]
        counted[name] = math.ceil(rest / budget["delta_t"]) - 1
    tiny, quick, paper, objects, faces, others = map(int, re.findall(r"\d+", said))
    assert counted == dict.fromkeys(counted, others) | {"tiny": tiny, "quick": quick, "paper": paper, "paper-objects": objects, "paper-faces": faces}


def test_names_hold_no_dot():
    # DVC reads a dot as a step into a mapping.
    assert not [n for section in ("settings", "methods", "budgets") for n in STORED[section] if "." in str(n)]


def test_the_methods_are_the_two_by_two():
    assert {name: STORED["methods"][name] for name in FOUR} == dict(
        ERM={}, ReW=dict(reweighting="reweighting.sample"), RigL=dict(sparsity="masks.RigL"),
        REST=dict(sparsity="masks.RigL", reweighting="reweighting.sample"))
    assert all(STORED["common"][role] == said for role, said in ROLES.items())


FOUR = ["ERM", "ReW", "RigL", "REST"]


def small(method, **changes):
    "A method of the study on a network of width 4, for a few steps."
    search = {name: value for name, value in STORED["budgets"]["search"].items() if name != "methods"}
    tiny = configure(STORED | dict(budgets=dict(search=search)), "search", next(iter(STORED["settings"])), method)
    tiny = dataclasses.replace(tiny, conflict_ratio=.1, width=4, density=.3, batch_size=16)
    return dataclasses.replace(tiny, steps=8, eval_every=4, delta_t=2, **changes)


@pytest.mark.parametrize("method", [*STORED["budgets"]["rivals"]["methods"], "REST-every10", "REST-toend", "ReW-w5", "REST-loss", "REST-stale", "REST-moved"])
def test_every_method_of_the_study_runs_and_keeps_to_its_density(method):
    "All on one harness: what is dense stays so, what is sparse ends at the density asked for, what costs extra says so."
    few = {"REST-votes": "steps=3, at_least=3"}.get(method, "steps=3" + ", below=0.1" * method.endswith("doubts"))  # after which some are right
    shorter = {name: re.sub(r"delta_t=\d+", "delta_t=3", re.sub(r"steps=\d+", few, text)) for name, text in STORED["methods"][method].items() if type(text) is str}
    config = dataclasses.replace(small(method), conflict_ratio=.9, **shorter)  # samples in each of 100 cells
    result, _ = run_seed(config, 4, split_of(config, 1000))
    spent, weights = result["spent"], 2912 if config.width == 4 else None
    if method == "DisEnt": assert spent["kept"] > 2 * 2912
    elif config.sparsity != "dense": assert spent["kept"] == 874 + 66
    elif weights: assert spent["kept"] == weights + 66
    trains_more = config.guess in ("labels", "guesses.by_chance") and config.reweighting != "rules.lff" and config.initial in (
        "random", "pruning.magnitude")
    assert (spent["trained"] == 0) == trains_more
    assert (spent["updates"] > 0) == (config.sparsity not in ("dense", "masks.StaticSparse"))
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("method", [m for m in STORED["budgets"]["rivals"]["methods"] if not m.startswith("Narrow")])
@pytest.mark.parametrize("dataset, network, size, classes", [("cifar10c", "resnet18", 32, 10), ("utkface-64", "resnet34", 64, 2)])
def test_every_method_runs_on_other_sets_and_networks(method, dataset, network, size, classes):
    few = "steps=1" + ", below=0.1" * method.endswith("doubts")  # after which some are right
    shorter = {name: re.sub(r"steps=\d+", few, text) for name, text in STORED["methods"][method].items() if type(text) is str}
    config = dataclasses.replace(small(method), dataset=dataset, network=network, severity=5 if classes == 10 else 0, steps=4, eval_every=2, width=WIDE_ENOUGH, **shorter)
    n = 10 * classes ** 2
    y, a = torch.arange(n) % classes, torch.arange(n) // classes % classes  # every cell
    noise = BiasedDataset(torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)).byte(), y, a, classes)
    result, _ = run_seed(config, 4, lambda split: noise)
    weights = sum(w.numel() for w in maskable(config.untrained()).values())
    if config.sparsity == "dense" or method == "DisEnt": assert result["spent"]["kept"] >= weights
    else: assert result["spent"]["kept"] < .4 * weights + sum(p.numel() for p in config.untrained().parameters()) - weights
    assert result["last"]["unbiased_n"] == n


def test_the_narrow_controls_are_as_large_as_rest():
    """Their widths, by the CNN's own counts: 160 w² + 88 w weights; and, at 196, 49, 9 and 1 positions,
    2720 w² + 9448 w multiply-accumulates."""
    width = {name: STORED["methods"][name]["width"] for name in ("NarrowFLOPs", "NarrowParameters")}
    stored = json.loads((ROOT / "runs" / "cpu" / "rows" / "cmnist-0005-REST.json").read_text())["cost"]
    flops, kept = lambda w: 2 * (2720 * w * w + 9448 * w), lambda w: 160 * w * w + 88 * w
    assert flops(64) == stored["dense_flops"] and kept(64) == 660_992
    nearest = lambda count, wanted: min(range(1, 65), key=lambda w: abs(count(w) - wanted))
    assert width == dict(NarrowFLOPs=nearest(flops, stored["flops"]), NarrowParameters=nearest(kept, .02 * 660_992))


@pytest.mark.parametrize("method, kept", [("ERM", 2912), ("ReW", 2912), ("RigL", 874), ("REST", 874)])
def test_sparse_rows_keep_exactly_the_density_and_dense_rows_all(method, kept):
    # 4·3·16 + 8·4·16 + 16·8·16 + 10·16 = 2912 weights; round(0.3 × 2912) = 874.
    config = small(method, storage="masked")
    setup = Run(config, 3, split_of(config)("train")).prepare()
    weights = maskable(setup["model"])

    def count():
        masks = setup["hooks"][0].masks if setup["hooks"] else {name: w != 0 for name, w in weights.items()}
        assert not any(w[~masks[name]].any() for name, w in weights.items()), "a weight outside the mask"
        return sum(int(mask.sum()) for mask in masks.values())
    assert count() == kept == sum(int((w != 0).sum()) for w in weights.values())
    fit(valid=split_of(config)("valid"), eval_every=8, **setup)
    assert count() == kept and [hook.updates for hook in setup["hooks"]] == ([2] if kept == 874 else [])


@pytest.mark.parametrize("method", ["RigL", "REST"])
def test_both_storages_start_and_end_alike(method):
    ends = []
    for storage in configs.STORAGE:
        config = small(method, storage=storage, precision="fp32", momentum=0.)
        setup = Run(config, 3, split_of(config)("train")).prepare()
        hook, = setup["hooks"]
        start = hook.masks
        fitted = fit(valid=split_of(config)("valid"), eval_every=4, **setup)
        ends.append((start, hook.updates, sum(int(mask.sum()) for mask in hook.masks.values()), [h["loss"] for h in fitted.history]))
    (start, *_), (start2, *_) = ends
    assert all(torch.equal(mask, start2[name]) for name, mask in start.items()) and start.keys() == start2.keys()
    assert ends[0][1:3] == ends[1][1:3] == (2, 874) and ends[0][3] == pytest.approx(ends[1][3], rel=1e-3)


def keep(batches, steps):
    "Pass steps on, and keep a copy of their batches."
    real = steps.batches
    steps.batches = (batches.append(batch.clone()) or batch for batch in real)
    return steps


def drawn(config, seed=5):
    "The batches of one run."
    batches = []
    run_seed(config, seed, split_of(config), lambda source: keep(batches, source))
    return torch.stack(batches)


def test_methods_differ_in_nothing_else():
    # Pairs that differ in sparsity only see the same batches for a seed, and all start from the same weights.
    batches = {method: drawn(small(method)) for method in FOUR}
    assert torch.equal(batches["ERM"], batches["RigL"]) and torch.equal(batches["ReW"], batches["REST"])
    assert not torch.equal(batches["ERM"], batches["ReW"])
    assert not torch.equal(batches["ERM"], drawn(small("ERM"), seed=6))
    train = split_of(small("ERM"))("train")
    setups = {method: Run(small(method, storage="masked"), 5, train).prepare() for method in FOUR}
    start = {method: maskable(setup["model"]) for method, setup in setups.items()}
    for name, dense in start["ERM"].items():
        sparse = dense * setups["REST"]["hooks"][0].masks[name]
        assert torch.equal(dense, start["ReW"][name])
        assert torch.equal(sparse, start["REST"][name]) and torch.equal(sparse, start["RigL"][name])


def test_a_seed_is_of_everything():
    # Another seed: other weights, other batches, another mask. Else n seeds would be fewer than n runs.
    train = split_of(small("REST"))("train")
    a, b = (Run(small("REST"), seed, train).prepare() for seed in (5, 6))
    a_masks, b_masks = a["hooks"][0].masks, b["hooks"][0].masks
    partial = [name for name, mask in a_masks.items() if not mask.all()]  # ERK leaves small layers whole
    assert len(partial) >= 2 and not any(torch.equal(a_masks[name], b_masks[name]) for name in partial)
    assert not any(torch.equal(x, y) for x, y in zip(a["batches"], b["batches"], strict=True))
    a, b = (maskable(Run(small("ERM"), seed, train).prepare()["model"]) for seed in (5, 6))
    for name in a: assert not torch.equal(a[name], b[name])


@pytest.mark.parametrize("method", ["ReW", "REST"])
def test_it_is_the_conflicting_samples_that_are_drawn_more_often(method):
    config = small(method, upweight=10 ** 9)
    train = split_of(config)("train")
    assert (train.y != train.a)[drawn(config)].all()
    even = (train.y != train.a)[drawn(small(method, upweight=1))].float().mean()
    assert even < .5  # a tenth of the samples, when all count the same


# --- a run -----------------------------------------------------------------------------------------------

def by_hand(config, seed, batches):
    "A dense run in plain torch on given batches: what validation and test said every `eval_every` steps."
    data = {name: split_of(config)(name) for name in SPLITS}
    weight = torch.where(data["train"].y != data["train"].a, float(config.upweight), 1.)
    if config.reweighting == "none": weight = torch.ones(200)
    torch.manual_seed(seed)
    model, losses, seen = cnn(width=config.width), [], []
    decay = dict(momentum=config.momentum, weight_decay=config.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), **decay)

    def groups(name):
        right = model.eval()(data[name].x.float() / 255).argmax(1) == data[name].y
        aligned, conflicting = (right[members].float().mean().item() for members in
                                (data[name].y == data[name].a, data[name].y != data[name].a))
        return dict(aligned=aligned, conflicting=conflicting, worst_group=min(aligned, conflicting))
    for step, index in enumerate(batches):
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2
        logits = model.train()(data["train"].x[index].float() / 255)
        each = F.cross_entropy(logits, data["train"].y[index], reduction="none")
        loss = (weight[index] * each).mean() / weight.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % config.eval_every == 0:
            seen.append(dict(step=step + 1, loss=losses[-1], valid=groups("valid"), test=groups("test")))
    return seen


@pytest.mark.parametrize("reweighting", ["none", "reweighting.weigh"])
def test_a_dense_run_is_a_plain_torch_loop(reweighting):
    # The whole of run_seed: initial weights by seed, cosine from lr to zero, momentum, decay, weighted loss,
    # the selected and the last state on the test split. A high rate, so that a step in the middle is best.
    config = dataclasses.replace(BASE, sparsity="dense", reweighting=reweighting, conflict_ratio=.3, lr=.5,
                                 upweight=3, weight_decay=.01, steps=10, eval_every=1)
    batches = []
    result, seconds = run_seed(config, 6, split_of(config), lambda source: keep(batches, source))
    seen = by_hand(config, 6, batches)
    best = max(seen, key=lambda s: (s["valid"]["worst_group"], s["step"]))
    assert len(batches) == 10 and result["best_step"] == best["step"]
    for name in ("aligned", "conflicting", "worst_group"):
        assert result["selected"][name] == pytest.approx(best["test"][name]), name
        assert result["last"][name] == pytest.approx(seen[-1]["test"][name]), name
        assert [h[name] for h in result["history"]] == pytest.approx([s["valid"][name] for s in seen]), name
    assert [h["loss"] for h in result["history"]] == pytest.approx([s["loss"] for s in seen], rel=1e-3)
    assert best["test"] != seen[-1]["test"]  # else selected and last could be confused
    assert result["seed"] == 6 and result["spent"]["updates"] == 0 and seconds > 0


@pytest.mark.parametrize("sparsity, updates", [("dense", 0), ("masks.StaticSparse", 0), ("masks.SET", 2), ("masks.RigL", 2)])
def test_a_run_counts_its_mask_updates(sparsity, updates):
    # Steps 2 and 4; the masks rest from step 0.75 × 8 = 6 on.
    config = dataclasses.replace(BASE, sparsity=sparsity)
    assert run_seed(config, 1, split_of(config))[0]["spent"]["updates"] == updates


def test_what_is_pruned_in_training_is_selected_when_it_is_pruned():
    # Updates at 2, 4 and 6 of 8 steps, evaluations at each: only from 6 on the density is the final one.
    config = dataclasses.replace(BASE, sparsity="pruning.GMP", reweighting="none", t_end=.9, eval_every=1, oracle=True)
    run = Run(config, 1, split_of(config)("train"))
    fitted = run.begin(keep=True).go_on(split_of(config)("valid"), 1)
    kept = {step: sum(int((state[name] != 0).sum()) for name in maskable(run.model)) for step, state in fitted.states.items()}
    assert [*kept] == [6, 7, 8] and {*kept.values()} == {round(run.spent()["kept"] - sum(
        p.numel() for name, p in run.model.named_parameters() if name not in maskable(run.model)))}
    assert all(step >= 6 for step, _ in fitted.best.values())


@pytest.mark.parametrize("precision", configs.PRECISIONS)
def test_the_test_split_is_asked_in_the_precision_of_training(monkeypatch, precision):
    asked, real = [], experiments.ask
    monkeypatch.setattr(experiments, "ask", lambda model, x, *how: asked.append(how) or real(model, x, *how))
    result, _ = run_seed(dataclasses.replace(BASE, precision=precision), 1, split_of(BASE))
    states = {BASE.steps, result["best_step"], result["average_step"]}  # the last one, and those selected with labels and without
    assert [how[0] for how in asked] == [precision] * len(states)  # each is asked once


def test_a_run_is_plain_numbers():
    result, _ = run_seed(BASE, 1, split_of(BASE))
    assert json.loads(json.dumps(result)) == result  # neither tensors nor tuples, nor NaN on these data


@pytest.mark.parametrize("sparsity, updates, flops", [
    # Positions 14², 7², 3², 1; multiply-accumulates 192·196 + 512·49 + 2048·9 + 160 = 81,312 for one image.
    ("dense", 0, 3 * 162_624 * 8), ("masks.SET", 2, "3 sparse"), ("masks.RigL", 2, "2 updates need the dense gradient")])
@pytest.mark.parametrize("storage", configs.STORAGE)
def test_cost_is_counted_by_hand(sparsity, updates, flops, storage):
    config = dataclasses.replace(BASE, sparsity=sparsity, storage=storage)
    spent = run_seed(config, 1, split_of(config))[0]["spent"]
    found = cost(config, [spent])
    assert spent["updates"] == updates and spent["trained"] == spent["asked"] == 0
    # Beside the 2,912 weights, which no mask covers: 2 × 28 of batch norm and 10 biases.
    assert found["parameters"] == 2912 + 66
    assert found["kept_parameters"] == (2912 if sparsity == "dense" else 874) + 66
    dense, sparse = found["dense_flops"], found["flops"]
    assert dense == 2 * 81_312 and found["dense_training_flops"] == 3 * dense * 8
    assert sparse == dense if sparsity == "dense" else 0 < sparse < dense
    if sparsity != "dense":  # the masks' positions, layer by layer; ERK keeps the small layers whole
        # scale (873.6 - 160) / 67 once the last layer is full: 159.8, 213.0 and 340.8 of the others
        kept = [160, 213, 341, 160]
        assert sum(kept) == 874 and sparse == 2 * (kept[0] * 196 + kept[1] * 49 + kept[2] * 9 + kept[3])
    if sparsity == "masks.SET": flops = 3 * sparse * 8
    if sparsity == "masks.RigL": flops = 3 * sparse * 6 + (2 * sparse + dense) * 2
    assert found["training_flops"] == flops


def test_images_of_other_networks_are_in_the_cost():
    spent = dict(average_flops=1000, flops=900, kept=1, dense_gradients=0, trained=0, asked=0)
    alone, aided = (cost(BASE, [spent, dict(spent, **more)]) for more in ({}, dict(trained=160, asked=32)))
    # 160 images trained on and 32 asked about, at 162,624 FLOPs forward, over batches of 16, in one of two seeds
    assert aided["training_flops"] - alone["training_flops"] == 162_624 * (3 * 160 + 32) / 16 / 2


# --- roles ------------------------------------------------------------------------------------------------

def test_a_part_is_what_its_text_says():
    assert part("masks.RigL") == (masks.RigL, {})
    assert part("stand_in.last(count=7)")[1] == {"count": 7}
    both, options = part("masks.RigL + masks.SET(delta_t=3)")
    assert both.__mro__[1:3] == (masks.RigL, masks.SET) and options == {"delta_t": 3}
    assert part("masks.RigL + masks.SET")[0] is part("masks.RigL + masks.SET")[0]


@pytest.mark.parametrize("text, said", [
    ("RigL", "module.name"), ("masks.", "module.name"), ("masks.RigL)", "module.name"), ("a.b.c", "module.name"),
    ("magic.RigL", "no module 'magic'"), ("masks.Rigl", "did you mean 'RigL'?"), ("stand_in.number", "no 'number'"),
    ("masks.RigL(2)", "option=value"), ("masks.RigL(delta_t=)", "option=value"), ("masks.RigL(delta_t=os)", "option=value"),
    ("masks.RigL(**{})", "option=value"), ("stand_in.last(size=3)", "takes no 'size', but run, count")])
def test_what_is_no_part_is_named(text, said):
    with pytest.raises(ValueError) as caught: part(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("storage", configs.STORAGE)
def test_first_masks_are_those_of_their_role(storage):
    config = dataclasses.replace(BASE, storage=storage, initial="stand_in.last(count=30)", sparsity="masks.StaticSparse")
    setup = Run(config, 3, split_of(config)("train")).prepare()
    for mask in setup["hooks"][0].masks.values():
        assert mask.sum() == 30 and mask.flatten()[-30:].all()
    # 30 weights in each of four layers, seen at 196, 49, 9 and 1 positions.
    spent = run_seed(config, 3, split_of(config))[0]["spent"]
    assert spent["flops"] == spent["average_flops"] == 2 * 30 * (196 + 49 + 9 + 1) and spent["kept"] == 4 * 30 + 66


def test_an_option_of_a_part_goes_before_the_field_of_that_name():
    config = dataclasses.replace(BASE, sparsity="masks.RigL(delta_t=1)")  # updates at 1 … 5
    assert run_seed(config, 1, split_of(config))[0]["spent"]["updates"] == 5


def test_a_guess_takes_the_place_of_labels():
    config = dataclasses.replace(BASE, guess="stand_in.first(count=20)", upweight=10 ** 9)
    assert (drawn(config) < 20).all()
    train = split_of(config)("train")
    blind = BiasedDataset(train.x, train.y, None)
    assert Run(config, 1, blind).is_conflicting.sum() == 20  # nobody has asked for labels
    with pytest.raises(ValueError): Run(dataclasses.replace(config, guess="labels"), 1, blind).is_conflicting


def test_what_comes_afterwards_is_tested_but_not_validated():
    plain, swapped = (run_seed(dataclasses.replace(BASE, afterwards=said), 1, split_of(BASE))[0]
                      for said in ("none", "stand_in.swapped"))
    assert plain["history"] == swapped["history"] and plain["best_step"] == swapped["best_step"]
    assert plain["last"]["unbiased"] < .5 < swapped["last"]["unbiased"]


def test_pretraining_is_a_plain_run_of_the_same_first_weights():
    config = dataclasses.replace(BASE, dropout=0., upweight=3)
    train, batches = split_of(config)("train"), []
    run = Run(config, 6, train)
    first = copy.deepcopy(run.model.state_dict())
    model = run.pretrain(steps=5)
    assert all(torch.equal(value, first[name]) for name, value in run.model.state_dict().items())  # the run's own waits
    plain = dataclasses.replace(config, sparsity="dense", reweighting="none", steps=5, eval_every=5)
    other = Run(plain, 6, train)
    setup = other.prepare()
    fit(valid=split_of(config)("valid"), eval_every=5, **setup)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in setup["model"].state_dict().items())
    assert (run.trained, run.asked) == (5 * 16, 0)
    logits = run.ask(model)
    assert logits.shape == (200, 10) and (run.trained, run.asked) == (80, 200)
    seeded = run.pretrain(seed=7, steps=5)
    assert not torch.equal(seeded[0].weight, model[0].weight) and run.trained == 160


def test_the_oracle_is_the_best_on_the_test_split_and_selection_does_not_know(monkeypatch):
    config = dataclasses.replace(BASE, steps=12, eval_every=2, lr=.3)
    plain, _ = run_seed(config, 2, split_of(config))
    told, _ = run_seed(dataclasses.replace(config, oracle=True), 2, split_of(config))
    assert {name: told[name] for name in plain} == plain and set(told) - set(plain) == {"oracle", "oracle_step"}
    assert told["oracle"]["worst_group"] >= max(told[name]["worst_group"] for name in ("selected", "average", "last"))
    assert told["oracle_step"] in [h["step"] for h in told["history"]]
    best = max(plain["history"], key=lambda h: (h["unbiased"], h["step"]))
    assert plain["average_step"] == best["step"]


# --- what a result depends on ----------------------------------------------------------------------------

def imports(name):
    "The modules of rest_nb that rest_nb/`name`.py imports anywhere, as Python's parser sees them."
    found = set()
    for node in ast.walk(ast.parse((ROOT / "rest_nb" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (["rest_nb"] if node.level else []) + (node.module.split(".") if node.module else [])
            if parts[0] != "rest_nb": continue
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rest_nb.")}
    return found


def test_what_is_drawn_more_often_is_not_weighted_too():
    config = small("ReW")
    train, index = split_of(config)("train"), torch.arange(16)
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    loss = Run(config, 5, train).prepare()["loss"](logits, train.y[index], index)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, train.y[index]).item())


def test_code_is_all_that_rows_import():
    closure, new = set(), {"rows"}
    while new:
        closure |= new
        new = {other for name in new for other in imports(name)} - closure
    assert {"masks", "shim"} <= closure  # the parser saw `from . import masks`, and what models imports
    assert set(code_of()) == closure and list(code_of()) == sorted(closure)
    assert "sources" not in closure  # another way to fetch images makes no row stale


def test_the_code_of_a_method_is_in_the_hash_too():
    found = code_of("rules.GroupDRO(step_size=.1)", "masks.RigL")
    assert set(found) - set(code_of()) == {"rules"} and set(code_of("guesses.by_error")) - set(code_of()) == {"guesses", "rules"}


def test_the_code_hash_sees_these_modules_and_no_others(tmp_path, monkeypatch):
    shutil.copytree(Path(rest_nb.__file__).parent, tmp_path / "rest_nb")
    monkeypatch.setattr(rest_nb, "__file__", str(tmp_path / "rest_nb" / "__init__.py"))
    hashes = [code_hash(BASE)]
    for name in code_of():
        with open(tmp_path / "rest_nb" / f"{name}.py", "a") as file: file.write("#")
        hashes.append(code_hash(BASE))
    assert len(set(hashes)) == len(code_of()) + 1
    for name in ("results", "notebooks", "timing", "__main__", "rules", "sources"):
        with open(tmp_path / "rest_nb" / f"{name}.py", "a") as file: file.write("#")
    assert code_hash(BASE) == hashes[-1]  # a new figure makes no row stale


# --- a row -----------------------------------------------------------------------------------------------

def make_root(folder, study=STUDY):
    "A project in `folder`: params.yaml and the set of setting `blobs`."
    folder.mkdir(exist_ok=True)
    write_params(folder, study)
    config = configure(study, "tiny", "blobs", "ERM")
    save(folder / "sets" / "blobs.npz", {name: split_of(config)(name) for name in SPLITS})
    return folder


def write_params(root, study): (root / "params.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


@pytest.fixture
def root(tmp_path): return make_root(tmp_path / "project")


def row(root, method="REST"): return run_row(root, "tiny", "blobs", method)


def stored(root, method="REST"): return root / "runs" / "tiny" / "rows" / f"blobs-{method}.json"


def seconds_of(root): return json.loads((root / "runs" / "tiny" / "seconds" / "blobs-REST.json").read_text())


def leftovers(root):
    "Files that should not outlive a row."
    return [p for p in root.rglob("*") if p.suffix == ".part" or (p.parent.name == ".parts" and p.is_file())]


def test_what_is_no_json_is_named(root):
    row(root)
    stored(root).write_text("")
    with pytest.raises(ValueError, match=r"blobs-REST.json is damaged \(Expecting value.*\): delete it$"): row(root)


def spy_on_seeds(monkeypatch, dies_at=None):
    "The seeds that are trained from now on, rehearsals aside; one of them may be killed as Ctrl-C kills it."
    trained, real = [], run_seed

    def watched(config, seed, *rest):
        if config.steps == 20: return real(config, seed, *rest)
        if seed == dies_at: raise KeyboardInterrupt
        trained.append(seed)
        return real(config, seed, *rest)
    monkeypatch.setattr(keeping, "run_seed", watched)
    return trained


def test_a_row_carries_all_that_it_depends_on(root):
    returned, found = row(root), json.loads(stored(root).read_text())
    assert found == json.loads(json.dumps(returned))
    assert [found[name] for name in ("budget", "setting", "method")] == ["tiny", "blobs", "REST"]
    config = configure(STUDY, "tiny", "blobs", "REST")
    assert found["config"] == (STUDY["common"] | STUDY["settings"]["blobs"] | STUDY["methods"]["REST"]
                               | STUDY["budgets"]["tiny"])
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:2]))
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["versions"]["numpy"] == np.__version__
    assert found["data"] == hashlib.sha256((root / "sets" / "blobs.npz").read_bytes()).hexdigest()[:16]
    assert found["versions"]["threads"] == torch.get_num_threads()
    assert found["code"] == code_hash(config) and found["cost"]["kept_parameters"] == 874 + 66
    for run, seed in zip(found["runs"], (1, 2), strict=True):
        assert run == json.loads(json.dumps(run_seed(config, seed, split_of(config))[0]))
        assert run["seed"] == seed and run["spent"]["updates"] == 2 and [h["step"] for h in run["history"]] == [2, 4]
        assert run["selected"]["conflicting_n"] == 180  # 0.9 of the 200 test images
    assert not leftovers(root)


def test_seconds_lie_beside_the_row_not_in_it(root):
    row(root)
    taken = seconds_of(root)
    assert len(taken["training"]) == 2 and min(taken["training"]) > 0
    assert 10 ** 7 < taken["peak_memory"] < 10 ** 12  # bytes: more than ten megabytes, less than a terabyte
    assert not {"seconds", "machine", "training", "peak_memory"} & set(json.loads(stored(root).read_text()))


@pytest.mark.parametrize("method", STUDY["methods"])
def test_a_row_is_the_same_to_the_byte(root, tmp_path, method):
    row(root, method)
    first = stored(root, method).read_bytes()
    row(root, method)
    row(make_root(tmp_path / "elsewhere"), method)
    assert stored(root, method).read_bytes() == stored(tmp_path / "elsewhere", method).read_bytes() == first


def test_a_row_that_died_goes_on_where_it_was(root, tmp_path, monkeypatch):
    row(make_root(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        assert spy_on_seeds(patch, dies_at=2) == []
        with pytest.raises(KeyboardInterrupt): row(root)
    assert not stored(root).exists() and len(leftovers(root)) == 1  # seed 1, put aside
    trained = spy_on_seeds(monkeypatch)
    row(root)
    assert trained == [2]
    assert stored(root).read_bytes() == stored(tmp_path / "undisturbed").read_bytes()
    assert not leftovers(root)
    assert len(seconds_of(root)["training"]) == 2


class Bar:
    "Stands in for tqdm and keeps what it is told."
    bars = []
    def __init__(self, total, file, disable, initial=0, **look):
        self.total, self.done, self.file, self.told = total, initial, file, []
        if not disable: Bar.bars.append(self)
    def __enter__(self): return self
    def __exit__(self, *error): return False
    def set_description_str(self, text, refresh): self.text = text
    def set_postfix_str(self, text, refresh=True): self.told.append(text)
    def update(self, n=1): self.done += n


def test_the_progress_bar_counts_all_that_is_left(root, monkeypatch):
    # Twelve rows of two seeds of four steps; then one less; a seed that was put aside counts as done at once.
    monkeypatch.setattr(keeping, "tqdm", Bar)
    monkeypatch.setattr(Bar, "bars", [])
    row(root, "ERM")
    with monkeypatch.context() as patch:
        spy_on_seeds(patch, dies_at=2)
        with pytest.raises(KeyboardInterrupt): row(root, "ReW")
    row(root, "ReW")
    row(root, "ReW")  # stays: no bar
    stored(root, "ReW").unlink()
    row(root, "ReW")
    assert [bar.total for bar in Bar.bars] == [12 * 8, 11 * 8, 11 * 8, 11 * 8]
    assert [bar.done for bar in Bar.bars] == [8, 4, 8, 8]
    assert "seed 2/2" in Bar.bars[-1].text and "ReW" in Bar.bars[-1].text
    assert all(bar.file is sys.stderr for bar in Bar.bars)  # which `clean` takes out of a notebook


def test_the_progress_bar_tells_the_epoch():
    "Of two steps and a half: the third step begins in the first, the fourth in the second. Taken up after the first step."
    class Counted:
        number = 1
        def __iter__(self): return self
        def __next__(self):
            if self.number == 6: raise StopIteration
            self.number += 1
            return self.number, 0.
    bar = Bar(6, sys.stderr, disable=True)
    assert [number for number, _ in keeping.ticking(Counted(), bar, 2.5)] == [2, 3, 4, 5, 6]
    assert bar.told == ["epoch 1", "epoch 1", "epoch 2", "epoch 2", "epoch 3"] and bar.done == 6


def other_config(root, monkeypatch): write_params(root, edited("common", lr=.04))
def other_code(root, monkeypatch):
    for name in ("code_hash", "rehearse"): monkeypatch.setattr(keeping, name, lambda *how: "another")
def other_data(root, monkeypatch): monkeypatch.setattr(keeping, "file_hash", lambda path: "another")
def other_python(root, monkeypatch): monkeypatch.setattr(platform, "python_version", lambda: "9.9.9")


@pytest.mark.parametrize("change", [other_config, other_code, other_data, other_python])
def test_what_was_made_otherwise_is_not_taken_over(root, monkeypatch, change):
    with monkeypatch.context() as patch:
        spy_on_seeds(patch, dies_at=2)
        with pytest.raises(KeyboardInterrupt): row(root)
    change(root, monkeypatch)
    trained = spy_on_seeds(monkeypatch)
    row(root)
    assert trained == [1, 2] and not leftovers(root)


@pytest.mark.parametrize("change", [other_config, other_code, other_data, other_python])
def test_a_row_made_otherwise_is_trained_again(root, monkeypatch, change):
    row(root)
    change(root, monkeypatch)
    trained = spy_on_seeds(monkeypatch)
    row(root)
    assert trained == [1, 2]


def test_the_code_that_made_a_row_is_not_rehearsed_again(root, monkeypatch):
    def refuse(*how): raise AssertionError("rehearsed")
    before = row(root)
    monkeypatch.setattr(keeping, "rehearse", refuse)
    assert row(root) == before
    monkeypatch.setattr(keeping, "code_hash", lambda config: "another")
    with pytest.raises(AssertionError, match="rehearsed"): row(root)


@pytest.mark.parametrize("field", ["config", "versions", "data", "code"])
def test_what_is_told_of_another_run_is_no_rehearsal_of_this(field):
    made = dict(config=dict(lr=.1), versions=dict(threads=2), data="d", code="c")
    stored = dict(made, rehearsal="r", runs=[])
    assert keeping.rehearsal_of(stored, made) == "r"
    assert keeping.rehearsal_of(dict(stored, **{field: "another"}), made) is None
    assert keeping.rehearsal_of({name: value for name, value in stored.items() if name != field}, made) is None
    assert keeping.rehearsal_of({}, made) is None


def test_a_row_stays_where_other_code_computes_the_same(root, monkeypatch):
    before, taken = row(root), seconds_of(root)
    monkeypatch.setattr(keeping, "code_hash", lambda config: "another")
    monkeypatch.setattr(keeping, "cost", lambda config, spent: dict(counted=len(spent)))  # counted anew
    trained = spy_on_seeds(monkeypatch)
    after = row(root)
    assert trained == [] and after == before | dict(code="another", cost=dict(counted=2)) and after["trained_by"] == before["code"]
    assert json.loads(stored(root).read_text()) == json.loads(json.dumps(after)) and seconds_of(root) == taken


@pytest.mark.parametrize("first, then", [(True, True), (False, True), (True, False)])
def test_seconds_are_alone_only_if_all_were(root, first, then):
    run_row(root, "tiny", "blobs", "REST", is_alone=first)
    write_params(root, edited("budgets", "tiny", seeds=[1, 2, 3]))
    run_row(root, "tiny", "blobs", "REST", is_alone=then)
    assert len(seconds_of(root)["training"]) == 3 and seconds_of(root)["is_alone"] == (first and then)


def test_more_seeds_are_trained_to_those_that_are_stored(root, tmp_path, monkeypatch):
    before, taken = row(root), seconds_of(root)["training"]
    for seeds, missing in ([1, 2, 3], [3]), ([1, 3], []):
        write_params(root, edited("budgets", "tiny", seeds=seeds))
        with monkeypatch.context() as patch:
            patch.setattr(keeping, "code_hash", lambda config: "another")
            trained = spy_on_seeds(patch)
            after = row(root)
        assert trained == missing and not leftovers(root)
        assert len(seconds_of(root)["training"]) == len(seeds) and seconds_of(root)["training"][0] == taken[0]
    undisturbed = make_root(tmp_path / "undisturbed")
    write_params(undisturbed, edited("budgets", "tiny", seeds=[1, 3]))
    whole = row(undisturbed)
    assert after == whole | dict(code="another", trained_by=f"{before['code']} another")
    write_params(root, edited("budgets", "tiny", seeds=[3, 1]))
    trained = spy_on_seeds(monkeypatch)
    row(root)
    assert trained == [3, 1]  # rehearsed by its first seed, which is another


def test_rows_are_trained_by_as_many_threads_on_any_machine():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(keeping.THREADS + 1)
        keeping.ready()
        assert torch.get_num_threads() == keeping.THREADS == 2
    finally: torch.set_num_threads(before)


# --- where weights came to lie ---

@pytest.mark.parametrize("storage", ["compact", "masked"])
def test_places_are_told_of_the_last_state_whatever_is_selected(storage, monkeypatch):
    config = dataclasses.replace(small("REST"), places=True, storage=storage, t_end=1., steps=6, eval_every=2, delta_t=1)
    split = split_of(config)
    run = Run(config, 1, split("train"))
    fitted = run.begin()
    fitted.go_on(split("valid"), config.eval_every)
    last = {name: mask.flatten().nonzero().flatten().tolist() for name, mask in run.hooks[0].masks.items()}
    monkeypatch.setattr(training.Fit, "evaluate", first_stays)  # selected is the state of step 2, whose masks are others
    result, _ = run_seed(config, 1, split)
    assert result["best_step"] == 2 and result["places"]["kept"] == last and 0 < result["places"]["travel"] < 1
    without, _ = run_seed(dataclasses.replace(config, places=False), 1, split)
    assert result == without | dict(places=result["places"])  # who watches changes nothing


def test_a_row_tells_how_the_places_of_its_seeds_meet(root, monkeypatch):
    "Killed between seeds or not; if one is to be trained, all are, as what is stored has no positions."
    asked = dict(edited("budgets", "tiny", places=True, seeds=[1, 2, 3]))
    write_params(root, asked)
    config = configure(asked, "tiny", "blobs", "REST")
    with monkeypatch.context() as patch:
        spy_on_seeds(patch, dies_at=3)
        with pytest.raises(KeyboardInterrupt): row(root)
    found = row(root)
    alone = [run_seed(config, seed, split_of(config))[0]["places"] for seed in config.seeds]
    kept = [{(name, place) for name, places in told.pop("kept").items() for place in places} for told in alone]
    assert [run["places"] for run in found["runs"]] == alone
    assert found["overlap"]["found"] == pytest.approx([len(kept[i] & kept[j]) / len(kept[i]) for i in range(3) for j in range(3) if i != j])
    met = lambda one, other: sum(other["densities"][name] for name, _ in one)
    assert found["overlap"]["by_chance"] == pytest.approx([met(kept[i], alone[j]) / len(kept[i]) for i in range(3) for j in range(3) if i != j])
    trained = spy_on_seeds(monkeypatch)
    monkeypatch.setattr(keeping, "code_hash", lambda config: "another")
    assert row(root) == found | dict(code="another") and trained == []
    write_params(root, edited("budgets", "tiny", places=True, seeds=[1, 2]))
    fewer = row(root)
    assert trained == [1, 2] and fewer["overlap"] == dict(zip(fewer["overlap"], ([found["overlap"][name][i] for i in (0, 2)] for name in fewer["overlap"])))


def test_a_dense_row_has_no_places(root):
    plain = row(root, "ReW")
    write_params(root, edited("budgets", "tiny", places=True))
    asked = row(root, "ReW")
    assert asked == plain | dict(config=dict(plain["config"], places=True))


def test_an_upweight_may_be_the_methods_own():
    drawn = [Run(dataclasses.replace(small("ReW"), upweight=upweight, reweighting=part), 1, split_of(small("ReW"))("train")).prepare()["batches"]
             for upweight, part in ((7., "reweighting.sample"), (80., "reweighting.sample(upweight=7)"), (80., "reweighting.sample"))]
    own, said, usual = (torch.cat(list(batches)) for batches in drawn)
    assert own.equal(said) and not own.equal(usual)
    config = dataclasses.replace(small("ReW"), reweighting="reweighting.weigh(upweight=3)")
    train, logits, index = split_of(config)("train"), torch.randn(8, 10), torch.arange(8)
    weights = 1 + 2. * train.is_conflicting
    wanted = (weights[index] / weights.mean() * torch.nn.functional.cross_entropy(logits, train.y[index], reduction="none")).mean()
    assert Run(config, 1, train).prepare()["loss"](logits, train.y[index], index).item() == pytest.approx(wanted.item())


def rehearsed(method="REST", **changes):
    config = dataclasses.replace(configure(STUDY, "tiny", "blobs", method), **changes)
    return rehearse(lambda short, split: run_seed(short, 1, split)[0], config, split_of(config))


BEHAVIOURS = {
    "growth": (masks.RigL, "grow_scores", lambda self, layer: -layer.gradient().abs()),
    "drop": (masks.SET, "drop_scores", lambda self, layer: -layer.weight.abs() if hasattr(layer, "weight") else -layer.dense(layer.values).abs()),
    "selection": (training.Fit, "evaluate", lambda fitted, *how: first_stays(fitted, *how)),
    "accuracy": (experiments, "group_accuracy", lambda *how: dict(metrics.group_accuracy(*how), unbiased=0.)),
    "loss": (experiments, "cross_entropy", lambda *how: 2 * F.cross_entropy(*how[:2])),
    "count": (Run, "spent", lambda self: dict(updates=0)),
}


def first_stays(fitted, *how, evaluate=training.Fit.evaluate):
    best = dict(fitted.best)
    evaluate(fitted, *how)
    fitted.best |= best


def test_a_rehearsal_has_mask_updates_even_where_a_method_asks_for_few(monkeypatch):
    before = rehearsed(sparsity="masks.RigL(delta_t=160)")
    monkeypatch.setattr(*BEHAVIOURS["growth"])
    assert rehearsed(sparsity="masks.RigL(delta_t=160)") != before


def test_on_a_gpu_the_code_is_its_own_rehearsal():
    config = dataclasses.replace(BASE, device="cuda")
    assert rehearse(None, config, None) == code_hash(config)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_rehearsal_sees_what_changes(monkeypatch, name):
    before = rehearsed()
    assert before == rehearsed() and len(before) == 16
    monkeypatch.setattr(*BEHAVIOURS[name])
    assert rehearsed() != before


def test_a_rehearsal_sees_what_comes_afterwards_and_what_is_guessed():
    assert len({rehearsed(), rehearsed(afterwards="stand_in.swapped"), rehearsed(guess="stand_in.first")}) == 3


def test_a_rehearsal_is_short_and_leaves_the_test_split_alone():
    config, seen = configure(STUDY, "tiny", "blobs", "REST"), []
    split = split_of(config)
    def play(short, cut):
        seen.append(short)
        train, test = cut("train"), cut("test")
        assert torch.equal(test.x, train.x[:1000]) and torch.equal(cut("valid").x, split("valid").x)
        return {}
    def closed(name):
        assert name != "test"
        return split(name)
    rehearse(play, dataclasses.replace(config, steps=4000, eval_every=400), closed)
    assert seen[0] == dataclasses.replace(config, steps=20, eval_every=10, delta_t=4, oracle=True)


def test_what_was_stored_before_a_field_came_had_its_default():
    made = dict(stamp(BASE, "no such file"), rehearsal="b")
    old = dict(made, config={name: value for name, value in made["config"].items() if name != "device"})
    assert computes_as(old, made) and not computes_as(old, dict(made, config=dict(made["config"], device="cuda")))


def test_a_run_without_its_gpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(BASE, device="cuda")
    with pytest.raises(RuntimeError, match="^device is cuda, but torch finds no GPU .*: set device to cpu$"): Run(config, 1, split_of(config)("train"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("parts", [{}, dict(sparsity="masks.RigL", reweighting="reweighting.sample"), dict(reweighting="rules.lff"),
                                   dict(sparsity="masks.StaticSparse", initial="debiasing.dcwp(steps=2)", reweighting="reweighting.weigh"),
                                   dict(sparsity="masks.SET", initial="pruning.snip", guess="guesses.by_chance"),
                                   dict(reweighting="disentangling.disent"), dict(afterwards="guesses.dfr")])
def test_a_run_on_a_gpu_has_the_same_counts(parts):
    here, there = (run_seed(dataclasses.replace(BASE, device=device, **parts), 1, split_of(BASE))[0] for device in configs.DEVICES)
    assert here["spent"] == there["spent"] and here["history"][0]["loss"] == pytest.approx(there["history"][0]["loss"], rel=.05)


def test_what_cannot_be_rehearsed_is_nobodys():
    def play(short, split): raise ValueError("too short")
    assert rehearse(play, BASE, split_of(BASE)) is None
    made = dict(stamp(BASE, "no such file"), rehearsal="b")
    assert computes_as(dict(made, code="c", runs=[]), made) and not computes_as(dict(made, config=dict(made["config"], lr=9)), made)
    assert not computes_as(dict(made, rehearsal=None), dict(made, rehearsal=None)) and not computes_as({}, made)


def test_a_part_is_of_one_row_only(root, monkeypatch):
    # Another method's seed 1 lies aside; ours must be trained all the same.
    with monkeypatch.context() as patch:
        spy_on_seeds(patch, dies_at=2)
        with pytest.raises(KeyboardInterrupt): row(root, "RigL")
    trained = spy_on_seeds(monkeypatch)
    row(root, "REST")
    assert trained == [1, 2]


def test_a_missing_set_says_how_to_make_it(root):
    with pytest.raises(FileNotFoundError, match="rare.npz is missing: .*dvc repro sets"):
        run_row(root, "tiny", "rare", "ERM")
    assert not leftovers(root) and not (root / "runs").exists()


@pytest.mark.parametrize("full", [full_while_writing, full_while_renaming])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, full):
    path = tmp_path / "result.json"
    write_json(path, {"earlier": 1})
    before = path.read_bytes()
    full(monkeypatch)
    with pytest.raises(OSError, match="No space left"): write_json(path, {"later": [0] * 1000})
    with pytest.raises(OSError, match="No space left"): write_json(tmp_path / "new.json", {"first": 1})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("full", [full_while_writing, full_while_renaming])
def test_a_row_on_a_full_disk_keeps_the_earlier_result(root, monkeypatch, full):
    row(root)
    before = stored(root).read_bytes()
    write_params(root, edited("common", lr=.04))
    with monkeypatch.context() as patch:
        full(patch)
        with pytest.raises(OSError, match="No space left"): row(root)
    assert stored(root).read_bytes() == before and all(path.suffix == ".checkpoint" for path in leftovers(root))
    row(root)  # there is room again
    assert stored(root).read_bytes() != before and not leftovers(root)


def test_json_can_be_read_in_a_diff(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": 1, "b": [2]})
    assert (tmp_path / "deep" / "a.json").read_text() == '{\n "a": 1,\n "b": [\n  2\n ]\n}\n'


# --- what is left to do ----------------------------------------------------------------------------------

BLOBS = [("blobs", method) for method in STUDY["methods"]]
RARE = [("rare", method) for method in STUDY["methods"]]


def test_pending_counts_what_is_missing(root):
    assert pending(root, STUDY, "tiny") == BLOBS + RARE
    row(root, "RigL")
    row(root, "ERM")
    assert pending(root, STUDY, "tiny") == [r for r in BLOBS if r[1] not in ("ERM", "RigL")] + RARE


def test_by_which_vector_instructions_a_row_was_made_is_told():
    told = lambda device: stamp(dataclasses.replace(BASE, device=device), "no such file")["versions"].get("vectors")
    assert told("cpu") == torch.backends.cpu.get_cpu_capability() and told("cuda") is None


def test_a_repaired_python_is_no_other_one(monkeypatch):
    "3.11.2 and 3.11.7 trained the same rows, to the bit."
    before = stamp(BASE, "no such file")
    for version, is_same in {f"{sys.version_info[0]}.{sys.version_info[1]}.99": True, f"{sys.version_info[0]}.{sys.version_info[1] + 1}.0": False}.items():
        monkeypatch.setattr(platform, "python_version", lambda: version)
        assert (stamp(BASE, "no such file") == before) is is_same


def other_hash(root, monkeypatch): monkeypatch.setattr(keeping, "code_hash", lambda config: "another")


def test_what_fp32_stood_in_for_is_told(monkeypatch):
    told = lambda **change: stamp(dataclasses.replace(BASE, **change), "no such file")["versions"].get("precision")
    monkeypatch.setattr(keeping, "has_bf16", lambda: True)
    assert told(precision="bf16") is None
    monkeypatch.setattr(keeping, "has_bf16", lambda: False)
    assert told(precision="bf16") == "fp32" and told(precision="fp32") is None and told(precision="bf16", device="cuda") is None


@pytest.mark.parametrize("change", [other_hash, other_data, other_python])
def test_what_other_code_made_is_pending(root, monkeypatch, change):
    row(root, "ERM")
    change(root, monkeypatch)
    assert ("blobs", "ERM") in pending(root, STUDY, "tiny")


@pytest.mark.parametrize("study, still_good", [
    (edited("common", lr=.04), []),
    (edited("settings", "blobs", upweight=11), []),
    (edited("budgets", "tiny", seeds=[1]), []),
    (edited("settings", "rare", upweight=11), ["ERM", "ReW"]),
    (edited("methods", "ReW", reweighting="reweighting.weigh"), ["ERM"])],
    ids=["common", "setting", "budget", "other setting", "method"])
def test_a_change_makes_pending_what_it_touches(root, study, still_good):
    for method in ("ERM", "ReW"): row(root, method)
    left = pending(root, study, "tiny")
    assert [m for m in ("ERM", "ReW") if ("blobs", m) not in left] == still_good


def test_a_row_whose_search_is_lost_is_pending_and_stops_no_other(root):
    tuned = edited("budgets", "tiny", tuned=True)
    for method in ("ERM", "ReW"): row(root, method)
    left = pending(root, tuned | dict(winners={"blobs-ERM": {}}), "tiny")
    assert ("blobs", "ERM") not in left and ("blobs", "ReW") in left


def test_settings_of_a_budget_that_is_none_are_refused():
    with pytest.raises(ValueError, match="params.yaml has no 'tyni' in budgets; expected one of tiny"): named(STUDY, "tyni", "settings")


def test_a_result_without_a_stamp_is_pending(root):
    # An older version of the project may have stored less; its file must not stop the row from being made.
    path = row_path(root, "tiny", "blobs", "ERM")
    write_json(path, {"runs": []})
    assert ("blobs", "ERM") in pending(root, STUDY, "tiny")
    row(root, "ERM")
    assert ("blobs", "ERM") not in pending(root, STUDY, "tiny")


# --- seconds ---------------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    "A step takes a second, and an update of masks five more: a busy machine tells nobody what takes time."
    now, update = [0.], masks.SET.update
    def tick(seconds): now[0] += seconds
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "stepper", lambda setup, made=timing.stepper: lambda step=made(setup): (tick(1), step()))
    monkeypatch.setattr(masks.SET, "update", lambda self: (tick(5), update(self)))


def test_methods_are_timed_in_turns(root, clock):
    found = time_methods(root, "tiny", "blobs", rounds=2)
    assert found == json.loads((root / "runs" / "tiny" / "seconds" / "steps.json").read_text())
    assert list(found["methods"]) == list(STUDY["methods"])
    assert found["rounds"] == 2 and found["setting"] == "blobs"
    for method, taken in found["methods"].items():
        assert taken["step"] == 1 and taken["update"] == (5 if method in ("RigL", "REST", "SET") else 0), method  # static masks rest
    assert found["batch"] == 0 and found["machine"]["threads"] == torch.get_num_threads()


def test_a_step_carries_its_share_of_the_updates(root, clock):
    # Steps 4 and 8 of 16: at step 12, t_end, masks rest.
    write_params(root, edited("budgets", "tiny", steps=16, delta_t=4))
    taken = time_methods(root, "tiny", "blobs", rounds=1)["methods"]["RigL"]
    assert taken["seconds"] == 1 + 5 * 2 / 16


@pytest.mark.parametrize("steps", [2, 24, 30, 60])
def test_runs_of_any_length_are_timed(root, clock, steps):
    "More steps are timed than a short one has, and none of a long one's evaluations."
    write_params(root, edited("budgets", "tiny", steps=steps, eval_every=1, delta_t=1))
    assert all(taken["step"] == 1 for taken in time_methods(root, "tiny", "blobs", rounds=1)["methods"].values())


def test_who_updates_at_times_of_his_own_is_timed_by_these(root, clock):
    "Every 2nd step of 16 before the 12th: 5 updates. Twice as long as every 4th: one, at step 8. GMP has its own way to update, which takes no time here."
    study = edited("budgets", "tiny", steps=16, delta_t=4)
    own = {"often": dict(sparsity="masks.RigL(delta_t=2)"), "rarely": dict(sparsity="pruning.ITOP(longer=2)"), "GMP": dict(sparsity="pruning.GMP", storage="masked")}
    write_params(root, dict(study, methods=own, budgets=dict(study["budgets"], tiny=dict(study["budgets"]["tiny"], methods=[*own]))))
    taken = time_methods(root, "tiny", "blobs", rounds=1)["methods"]
    assert {method: (found["step"], round((found["seconds"] - 1) * 16 / 5, 9)) for method, found in taken.items()} == {"often": (1, 5), "rarely": (1, 1), "GMP": (1, 0)}


def test_seconds_of_a_killed_row_that_was_not_alone_are_not_alone(root, monkeypatch):
    write_params(root, edited("budgets", "tiny", seeds=[1, 2]))
    with monkeypatch.context() as during:
        spy_on_seeds(during, dies_at=2)
        with pytest.raises(KeyboardInterrupt): run_row(root, "tiny", "blobs", "REST", is_alone=False)
    run_row(root, "tiny", "blobs", "REST", is_alone=True)
    assert len(seconds_of(root)["training"]) == 2 and not seconds_of(root)["is_alone"]


def test_a_file_that_changes_has_another_hash(tmp_path):
    path = tmp_path / "images"
    assert keeping.file_hash(path) is None
    for content in (b"red", b"blue", b"lilac"):
        path.write_bytes(content)
        assert keeping.file_hash(path) == keeping.file_hash(path) == hashlib.sha256(content).hexdigest()[:16]


def test_a_part_that_brings_what_nobody_reads_is_refused(monkeypatch):
    config = dataclasses.replace(BASE, reweighting="reweighting.sample")
    run = Run(config, 1, split_of(config)("train"))
    monkeypatch.setattr(run, "call", lambda role: dict(batch=[], loss=None))
    with pytest.raises(ValueError, match="reweighting.sample brings batch; expected batches, a loss, or both"): run.prepare()
