"Results: what a table divides by, and what is said where a row is missing."
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from rest_nb.configs import DATASETS
from rest_nb.results import METHOD_COLOURS, SETS, accuracy_figure, colours, columns, differences, ends, interval, load_rows, means, table

ROOT = Path(__file__).parents[1]
ACCURACIES = dict.fromkeys(("conflicting", "worst_group", "worst_cell", "unbiased"), .5)


def stored(parameters, kept, dense, flops, ratio=.01):
    "A row of one seed; its cost: parameters of its dense network and those kept, training FLOPs of both."
    cost = dict(parameters=parameters, kept_parameters=kept, dense_training_flops=dense, training_flops=flops)
    return dict(config=dict(conflict_ratio=ratio), cost=cost, runs=[dict(seed=1, selected=ACCURACIES)])


def test_costs_are_multiples_of_erm_on_the_same_setting():
    rows = {("red", "ERM"): stored(1000, 1000, 80, 80), ("red", "Sparse"): stored(1000, 20, 80, 4),
            ("red", "Narrow"): stored(30, 30, 5, 5), ("blue", "ERM"): stored(500, 500, 10, 10), ("blue", "Narrow"): stored(50, 50, 5, 5)}
    found = table(rows)
    assert [*found.parameters] == ["1.000×", "0.020×", "0.030×", "1.000×", "0.100×"]
    assert [*found.FLOPs] == ["1.000×", "0.050×", "0.062×", "1.000×", "0.500×"]


def test_without_erm_costs_are_multiples_of_the_rows_own_dense_network():
    found = table({("red", "Sparse"): stored(1000, 20, 80, 4), ("red", "Narrow"): stored(30, 30, 5, 5)})
    assert [*found.parameters] == ["0.020×", "1.000×"] and [*found.FLOPs] == ["0.050×", "1.000×"]


def test_means_are_over_seeds_by_setting_and_method():
    row = lambda *shares: dict(config=dict(conflict_ratio=.01), runs=[
        dict(seed=n, selected=dict(ACCURACIES, conflicting=share)) for n, share in enumerate(shares)])
    found = means({("red", "ERM"): row(.2, .4), ("red", "REST"): row(.5), ("blue", "ERM"): row(.8, 1.)})
    assert {s: {m: round(v["conflicting"], 9) for m, v in of.items()} for s, of in found.items()} == {
        "red": {"ERM": .3, "REST": .5}, "blue": {"ERM": .9}}
    assert set(found["red"]["ERM"]) == set(ACCURACIES) and found["blue"]["ERM"]["unbiased"] == .5


def test_differences_are_seed_by_seed_and_of_the_group_asked_for():
    "Of .1, .2, .3: mean .2, sd .1, so ± 4.303 × .1 / √3, and t = 3.46, p = .074 with 2 degrees of freedom; asked once more, doubled by Holm."
    run = lambda n, share: dict(seed=n, **{state: dict(ACCURACIES, worst_group=share, conflicting=.5) for state in ("selected", "last")})
    rows = {("red", name): dict(config=dict(conflict_ratio=.01), runs=[run(n, share) for n, share in enumerate(shares)])
            for name, shares in dict(A=(.3, .5, .7), B=(.2, .3, .4), C=(.2, .3, .4)).items()}
    found = differences(rows, [("A", "B"), ("A", "C")], "worst_group")
    assert [*found.selected] == [*found["last"]] == ["+20.0 ± 24.8"] * 2 and [*found.p] == ["0.148"] * 2 and [*found.n] == [3, 3]
    assert differences(rows, [("A", "B")]).selected.item() == "+0.0 ± 0.0"


def test_accuracies_come_with_the_interval_of_their_mean():
    "Of .1, .2, .3, as above; one seed has none."
    row = stored(1, 1, 1, 1)
    row["runs"] = [dict(seed=n, selected=dict(ACCURACIES, conflicting=share)) for n, share in enumerate((.1, .2, .3))]
    assert table({("red", "ERM"): row}).conflicting.item() == interval([.1, .2, .3]) == "20.0 ± 24.8"
    assert table({("red", "ERM"): stored(1, 1, 1, 1)}).conflicting.item() == f"{100 * ACCURACIES['conflicting']:.1f}"


def test_many_panels_stand_four_in_a_row(): assert [columns(panels) for panels in (1, 2, 4, 5, 7)] == [1, 2, 2, 4, 4]


def test_the_readme_shows_the_ends_of_many_conflict_ratios():
    rows = {(str(ratio), "ERM"): stored(1, 1, 1, 1, ratio) for ratio in (.02, .005, .05, .01)}
    assert [*ends(rows)] == [("0.005", "ERM"), ("0.05", "ERM")]
    assert [*ends({("0.02", "ERM"): rows["0.02", "ERM"]})] == [("0.02", "ERM")]


def test_every_data_set_has_a_name(): assert set(SETS) == set(DATASETS)


def test_a_missing_row_says_which_pipeline_makes_it(tmp_path):
    text = "{common: {}, settings: {red: {}, blue: {}}, methods: {A: {}}, budgets: {short: {}, own: {}, own-more: {}}}"
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "runs" / "own").mkdir(parents=True)
    (tmp_path / "runs" / "own" / "dvc.yaml").touch()
    with pytest.raises(FileNotFoundError, match="runs/short/rows/red-A.json is missing: `dvc repro short-rows` makes it"): load_rows(tmp_path, "short")
    (tmp_path / "runs" / "short" / "rows").mkdir(parents=True)
    (tmp_path / "runs" / "short" / "rows" / "blue-A.json").write_text("{}")
    assert load_rows(tmp_path, "short", ["blue"]) == {("blue", "A"): {}}
    with pytest.raises(FileNotFoundError, match="red-A.json is missing: `dvc repro runs/own/dvc.yaml:own` makes it"): load_rows(tmp_path, "own")
    with pytest.raises(FileNotFoundError, match="`dvc repro runs/own/dvc.yaml:own-more-rows` makes it"): load_rows(tmp_path, "own-more")
    with pytest.raises(ValueError, match="no 'long' in budgets; expected one of short, own, own-more"): load_rows(tmp_path, "long")
    (tmp_path / "params.yaml").write_text(text.replace("short", "tiny"))
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "dvc.yaml").touch()
    with pytest.raises(FileNotFoundError, match="`dvc repro .ci/dvc.yaml:tiny` makes it, or by itself `python -m rest_nb row tiny red A`"): load_rows(tmp_path, "tiny")


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "nbs").glob("2*.ipynb"))], ids=lambda path: path.stem)
def test_no_sentence_is_left_open(path):
    assert "TODO" not in re.sub(r'"image/png": "[^"]*"', "", path.read_text())  # a picture's bytes in base64 may spell it


def test_who_was_not_timed_has_a_dash_and_the_others_their_seconds():
    rows = {("red", name): stored(1, 1, 1, 1) for name in ("ERM", "Mine")}
    seconds = dict(methods=dict(ERM=dict(seconds=2.), ReW=dict(seconds=1.)))
    assert [*table(rows, seconds).seconds] == ["1.00×", "–"]
    assert [*table(rows, dict(methods=dict(Mine=dict(seconds=1.)))).seconds] == ["–", "–"]


def test_a_difference_to_nobody_is_refused():
    run = lambda seed: dict(seed=seed, **{state: ACCURACIES for state in ("selected", "last")})
    rows = {("red", name): dict(config=dict(conflict_ratio=.01), runs=[run(seed)]) for name, seed in (("ERM", 1), ("REST", 1), ("Late", 2))}
    for pair in (("REST", "ERN"), ("REST", "Late")):
        with pytest.raises(ValueError, match=f"red: REST and {pair[1]} share no seed; expected two of ERM, REST, Late"): differences(rows, [pair])


def test_methods_of_ones_own_have_a_colour_in_the_pictures():
    tested = pd.DataFrame([dict(method=name, conflicting=.5, conflict_ratio=.01) for name in ("ERM", "Mine", "Yours")])
    figure = accuracy_figure(tested)
    drawn = {tuple(points.get_facecolor()[0]) for points in figure.axes[0].collections if len(points.get_offsets())}
    assert len(drawn) == 3 and to_rgba(METHOD_COLOURS["ERM"]) in drawn
    many = colours([f"method {n}" for n in range(20)])
    assert len(many) == 20 and not set(many.values()) & set(METHOD_COLOURS.values())
    plt.close("all")
