"Ranking: order, intervals and multiples, by hand."

import dataclasses
import json
import math
import re

import matplotlib
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_experiments import STORED, small, split_of

from rest_nb import ranking
from rest_nb.data import BiasedDataset
from rest_nb.experiments import Run
from rest_nb.ranking import (RULES, compared, front, guesses_table, interval, is_told, load_searches, of_seeds, places, prices, ranking_figure,
                             ratios, run_seconds, searched, starred, stopped, times)

matplotlib.use("agg")


def stored(accuracies, flops, oracle=None, **config):
    "A row: conflicting accuracies of its seeds, selected; with labels left out ten points less; what it cost."
    config = dict(dict(sparsity="dense", reweighting="none", guess="labels", initial="random", afterwards="none", conflict_ratio=.01), **config)
    runs = [dict(seed=seed, selected=dict(conflicting=c, aligned=1 - c), average=dict(conflicting=c - .1), last=dict(conflicting=.5))
            for seed, c in enumerate(accuracies)]
    if oracle: runs = [dict(run, oracle=dict(conflicting=oracle)) for run in runs]
    return dict(config=config, cost=dict(training_flops=flops), runs=runs)


ROWS = {("red", "ERM"): stored([.1, .1, .1], 200), ("red", "REST"): stored([.5, .6, .7], 10, sparsity="masks.RigL", reweighting="reweighting.sample"),
        ("red", "JTT"): stored([.3, .3, .6], 500, oracle=.9, reweighting="reweighting.sample", guess="guesses.errors(steps=3)"),
        ("blue", "ERM"): stored([.9, .9, .9], 400, conflict_ratio=.5)}
HALF = 4.302652729911275 / math.sqrt(3)  # Student's t for two degrees of freedom: half a 95 % interval of three, in sd


def test_the_best_comes_first_with_its_interval_and_its_price():
    seconds = {("red", "ERM"): 10., ("red", "REST"): 4.}
    table = ranking.ranking(ROWS, "red", seconds, dict(methods=dict(ERM=dict(seconds=2.), JTT=dict(seconds=3.)))).fillna("").set_index("method")
    assert [*table.index] == ["REST", "JTT", "ERM"]
    half = HALF * 10  # sd is 10 points
    assert table[RULES["selected"]]["REST"] == f"60.0 ± {half:.1f}" and table[RULES["average"]]["REST"] == f"50.0 ± {half:.1f}"
    assert table.aligned["REST"] == f"40.0 ± {half:.1f}"
    assert table[RULES["oracle"]].to_dict() == dict(REST="", JTT="90.0 ± 0.0", ERM="")
    assert table.FLOPs.to_dict() == dict(REST="0.05×", JTT="2.50×", ERM="1.00×")
    assert table.seconds.to_dict() == dict(REST="0.40×", JTT="–", ERM="1.00×") and set(table.n) == {3}
    assert table.step.to_dict() == dict(REST="–", JTT="1.50×", ERM="1.00×") and {*ranking.ranking(ROWS, "red").step} == {"–"}
    assert [*ranking.ranking(ROWS, "blue").method] == ["ERM"] and times(ROWS, ("blue", "ERM")) == 1


def test_seconds_are_means_of_what_was_stored(tmp_path):
    folder = tmp_path / "runs" / "cpu" / "seconds"
    folder.mkdir(parents=True)
    (folder / "red-REST.json").write_text(json.dumps(dict(training=[1., 2., 6.])))
    assert run_seconds(tmp_path, "cpu", ROWS) == {("red", "REST"): 3.}
    elsewhere = dict(ROWS["red", "REST"], versions=dict(precision="fp32"))  # without bf16, as ERM was not
    assert run_seconds(tmp_path, "cpu", ROWS | {("red", "REST"): elsewhere}) == {}
    assert run_seconds(tmp_path, "cpu", {("red", "ERM"): elsewhere, ("red", "REST"): elsewhere}) == {("red", "REST"): 3.}


@pytest.mark.parametrize("config, told", [
    (dict(), False), (dict(reweighting="reweighting.sample"), True), (dict(reweighting="rules.group_dro(step_size=0.1)"), True),
    (dict(reweighting="reweighting.sample", guess="guesses.errors(steps=3)"), False), (dict(reweighting="rules.lff"), False),
    (dict(reweighting="rules.balanced", guess="guesses.errors(steps=3)"), True),  # asks for cells whatever is guessed
    (dict(reweighting="disentangling.disent(dis=0.1)"), False), (dict(initial="debiasing.mrm"), False),
    (dict(initial="debiasing.dcwp(penalty=1.0)"), True), (dict(afterwards="guesses.dfr"), True)])
def test_who_is_told_who_conflicts(config, told): assert is_told(stored([1], 1, **config)["config"]) == told


@pytest.mark.parametrize("method", [method for method in STORED["budgets"]["rivals"]["methods"] if method != "Chance"])  # who asks how many conflict, and no more
def test_who_is_told_reads_labels_when_it_trains(method, monkeypatch):
    "A split that notes who asks for its attributes. (That it is noted how good a guess was is no reading.)"
    asked = []

    class Noting(BiasedDataset):
        def __getattribute__(self, name):
            if name in ("a", "is_conflicting"): asked.append(name)
            return super().__getattribute__(name)
    monkeypatch.setattr("rest_nb.guesses.noted", lambda run, guess: guess)
    config = small(method)
    config = dataclasses.replace(config, conflict_ratio=.9, guess=re.sub(r"steps=\d+", "steps=1", config.guess))  # samples in each of 100 cells
    train, valid = (Noting(split.x, split.y, split.a) for split in map(split_of(config, 1000), ("train", "valid")))
    run = Run(config, 4, train)
    asked.clear()
    for _ in run.begin().steps: pass
    run.call("afterwards", run.model, valid)
    assert bool(asked) == is_told(dataclasses.asdict(config))


def test_the_figure_has_a_mark_for_each_method_where_it_belongs():
    ax, = ranking_figure(ROWS, "red").axes
    marks = {note.get_text(): note.xy for note in ax.texts}
    assert marks == {"ERM": (1, pytest.approx(.1)), "REST": (.05, pytest.approx(.6)), "JTT": (2.5, pytest.approx(.4))}
    lines = {tuple(line.get_xdata()): line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())}
    assert set(lines) == {(1,), (.05,), (2.5,)}
    assert lines[2.5,].get_markerfacecolor() == "white" != lines[.05,].get_markerfacecolor()
    assert lines[.05,].get_color() != lines[2.5,].get_color() and ax.get_xscale() == "log"
    dotted, = (line for line in ax.lines if line.get_linestyle() == ":")
    assert [*dotted.get_xdata()] == [.05]  # REST is cheapest and best


def test_the_front_is_who_is_not_beaten_at_its_cost():
    reached = dict(f=(.1, 1), a=(.2, 1), b=(.5, 3), c=(.4, 4), d=(.5, 8), e=(.7, 9))  # mean and cost
    rows = {("red", m): stored([mean - .1, mean, mean + .1], flops) for m, (mean, flops) in reached.items()} | {("red", "ERM"): stored([.6], 9)}
    assert front(rows, "red") == ["a", "b", "e"]  # c: b is better for less; d: as good as b, for more; f: as cheap as a; ERM: e
    assert front(rows | {("blue", "x"): stored([1.], 1)}, "red") == ["a", "b", "e"]
    assert front(rows, "red", {("red", "c"): 1, ("red", "d"): 2, ("red", "b"): 3}) == ["c", "d"]  # by another cost, of those that have it


def test_the_price_of_a_rule_is_a_mean_over_methods_of_a_mean_over_seeds():
    runs = lambda selected, average, last: [dict(selected=dict(conflicting=s), average=dict(conflicting=a), last=dict(conflicting=e))
                                            for s, a, e in zip(selected, average, last)]
    rows = {("red", "A"): dict(config=dict(conflict_ratio=.01), runs=runs([.5, .7], [.4, .6], [.4998, .7])),
            ("red", "B"): dict(config=dict(conflict_ratio=.01), runs=runs([.2, .2], [.4, .2], [.1, .1]))}
    other = {("blue", "A"): dict(config=dict(conflict_ratio=.5), runs=runs([.1], [.9], [.9]))}
    assert prices(rows | other).groupby("conflict ratio").points.agg(list).to_dict() == {.01: ["+0.0", "-5.0"], .5: ["+80.0", "+80.0"]}
    table = prices(rows).set_index("selected by")
    assert [*table.index] == [RULES["average"], "none: the last state"]  # no oracle where none is stored
    assert table.loc[RULES["average"]].to_dict() == {"conflict ratio": .01, "methods": 2, "points": "+0.0", "least": "A -10.0", "most": "B +10.0"}
    assert table.loc["none: the last state"].to_dict() == {"conflict ratio": .01, "methods": 2, "points": "-5.0", "least": "B -10.0", "most": "A +0.0"}
    rows["red", "B"]["runs"] = [dict(run, oracle=dict(conflicting=.9)) for run in rows["red", "B"]["runs"]]
    oracle = prices(rows).set_index("selected by").loc[RULES["oracle"]]
    assert oracle.methods == 1 and oracle.points == "+70.0" and oracle.least == oracle.most == "B +70.0"


def test_ratios_are_those_of_the_settings():
    assert ratios(ROWS) == dict(red=.01, blue=.5)
    with pytest.raises(ValueError, match="red and green share the conflict ratio 0.01"): ratios(ROWS | {("green", "ERM"): stored([.1], 1)})


def test_pairs_are_compared_seed_by_seed_and_starred_where_zero_is_left_out():
    rows = {("red", "A"): stored([.5, .7, .9], 1), ("red", "B"): stored([.4, .6, .8], 1), ("red", "C"): stored([.9, .5, .7], 1)}
    table = compared(rows, [("A", "B"), ("B", "A"), ("A", "C")], states=("selected", "average"))
    assert [*table.columns] == [(.01, "selected"), (.01, "average"), ("", "n")] and [*table.index] == ["A - B", "B - A", "A - C"]
    assert [*table[.01, "selected"]][:2] == ["+10.0 ± 0.0 **", "-10.0 ± 0.0 **"] == [*table[.01, "average"]][:2]
    sd = math.sqrt((40 ** 2 + 20 ** 2 + 20 ** 2) / 2)  # of -40, +20, +20
    assert table[.01, "selected"]["A - C"] == f"+0.0 ± {HALF * sd:.1f}"
    assert [*table["", "n"]] == ["3"] * 3
    wider = rows | {("blue", "A"): stored([.5, .7], 1, conflict_ratio=.5), ("blue", "B"): stored([.4, .6, .8], 1, conflict_ratio=.5)}
    assert [*compared(wider, [("A", "B")])["", "n"]] == ["3, 2"]  # by ratio; only seeds that both have


def test_a_second_star_is_for_what_survives_all_that_is_asked_of_such_states():
    "For two degrees of freedom p = 1 - t / √(t² + 2): t = 7 gives 0.0198, which Holm's method takes times 1, 2 or 3 questions, and of them 0.0594 is too much."
    spread = 7 / math.sqrt(3)
    rows = {("red", "A"): stored([.5, .5, .5], 1), ("red", "B"): stored([.5 - .02 * (spread + d) for d in (-1, 0, 1)], 1),
            ("red", "C"): stored([.5 - .02 * (spread + d) for d in (0, 1, -1)], 1)}
    ends = lambda *pairs: [cell.split(f"{2 * HALF:.1f}")[1] for cell in compared(rows, pairs, ["selected", "average"])[.01, "selected"]]
    assert ends(("A", "B")) == [" **"] and ends(("A", "B"), ("A", "C")) == [" **", " **"]
    assert ends(("A", "B"), ("A", "C"), ("B", "A")) == [" *", " *", " *"]  # what is asked of averages does not count


def test_what_stopping_early_adds_is_selected_less_last_seed_by_seed():
    rows = {("red", "A"): stored([.5, .7, .9], 1), ("blue", "A"): stored([.6, .6, .6], 1, conflict_ratio=.5)}
    table = stopped(rows, ["A"])
    assert [*table.columns] == [.01, .5] and table.loc["A"].tolist() == [f"+20.0 ± {HALF * 20:.1f}", "+10.0 ± 0.0 **"]


@given(st.lists(st.tuples(st.floats(.01, .5), st.floats(.001, .5)), min_size=1, max_size=6))
def test_stars_are_by_the_interval_and_by_holm_over_all_that_are_asked(drawn):
    "Three seeds each: a mean and a spread. Holm by its definition: the smallest p times m, the next times m - 1, …, until one is too large."
    asked = {number: of_seeds([mean - spread, mean, mean + spread]) for number, (mean, spread) in enumerate(drawn)}
    p = {number: 1 - t / math.sqrt(t ** 2 + 2) for number, (mean, spread) in enumerate(drawn) for t in [mean * math.sqrt(3) / spread]}  # two degrees of freedom
    assume(all(abs(value * times - .05) > 1e-9 for value in p.values() for times in range(1, 7)))
    firm, left = set(), len(p)
    for number in sorted(p, key=p.get):
        if p[number] * left >= .05: break
        firm.add(number)
        left -= 1
    for number, cell in starred(asked).items():
        assert cell.endswith("**") == (number in firm) and cell.endswith("*") == (p[number] < .05)


def test_guesses_are_shown_with_what_became_of_them():
    guess = lambda precision, guessed: dict(guess=dict(precision=precision, guessed=guessed, recall=.5, conflicting=40))
    rows = dict(ROWS)
    rows["red", "JTT"] = dict(rows["red", "JTT"], runs=[dict(run, notes=guess(*g)) for run, g in
                                                        zip(rows["red", "JTT"]["runs"], [(.1, 200), (.2, 100), (.3, 60)])])
    del rows["blue", "ERM"]
    table = guesses_table(rows, ["REST", "JTT"]).set_index("method")
    assert table.loc["JTT", ["precision", "recall", "guessed", "conflicting"]].tolist() == ["20.0", "50.0", "120", "40"]
    assert set(table.loc["REST", ["precision", "recall", "guessed", "conflicting"]]) == {"–"}
    sd = math.sqrt((10 ** 2 + 10 ** 2 + 20 ** 2) / 2)  # of 30, 30, 60
    assert table[RULES["selected"]]["JTT"] == f"40.0 ± {HALF * sd:.1f}" and table[RULES["average"]]["JTT"] == f"30.0 ± {HALF * sd:.1f}"


def test_an_interval_is_in_percent(): assert interval([.4, .5, .6]) == f"50.0 ± {HALF * 10:.1f}"


def search(worths, winner, **grid):
    "What a search stores: as many candidates as `worths`, along `grid`."
    fields = [dict(zip(grid, values)) for values in zip(*grid.values())]
    return dict(candidates=[dict(fields=f, worst_group=w) for f, w in zip(fields, worths, strict=True)], winner=fields[winner])


def test_what_was_tried_and_who_won():
    searches = {("red", "ERM"): search([.2, .48], 1, lr=[.01, .02]), ("blue", "ERM"): search([.5, -1.], 0, lr=[.01, .02]),
                ("red", "JTT"): search([.1, .3, .2, .3], 1, lr=[.01, .01, .02, .02], guess=["guesses.errors(steps=9)", "guesses.errors(steps=5)"] * 2)}
    table = searched(searches).fillna("")
    assert table.loc["ERM"].to_dict() == {"tried": "lr 0.01 0.02", "red": "lr 0.02", "red, valid": "48 (20)",
                                          "blue": "lr 0.01", "blue, valid": "50 (failed)"}
    assert table.loc["JTT"].to_dict() == {"tried": "lr 0.01 0.02, errors(steps=9) errors(steps=5)", "red": "lr 0.01, errors(steps=5)",
                                          "red, valid": "30 (10)", "blue": "", "blue, valid": ""}


def test_searches_are_read_and_a_missing_one_is_named(tmp_path):
    folder = tmp_path / "runs" / "search"
    folder.mkdir(parents=True)
    empty = dict(common={}, settings={}, methods={}, budgets={})
    (tmp_path / "params.yaml").write_text(json.dumps(dict(empty, grids=dict.fromkeys(("ERM", "REST", "JTT"), dict(lr=[1, 2])))))
    stored = lambda name: dict(candidates=[dict(fields=dict(lr=lr)) for lr in (1, 2)], winner=name)
    for name in ("red-ERM", "red-REST", "red-JTT"): (folder / f"{name}.json").write_text(json.dumps(stored(name)))
    with pytest.raises(FileNotFoundError, match="blue-ERM.json is missing: `make rivals`"): load_searches(tmp_path, ROWS)
    assert load_searches(tmp_path, [("red", "JTT")]) == {("red", "JTT"): stored("red-JTT")}
    (tmp_path / "params.yaml").write_text(json.dumps(dict(empty, grids=dict(JTT=dict(lr=[1, 3])))))
    with pytest.raises(ValueError, match="red-JTT.json tried other settings than grids.JTT .*: `make rivals`"): load_searches(tmp_path, [("red", "JTT")])


@given(st.lists(st.tuples(st.floats(1, 499), st.floats(1, 499)), min_size=1, max_size=32), st.integers(5, 80))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_names_lie_within_the_frame_and_over_no_mark_nor_one_another(spots, width):
    spots, frame = dict(enumerate(spots)), (0, 0, 500, 500)
    found = places(spots, dict.fromkeys(spots, width), frame, height=10)
    apart = lambda p, q, dx, dy: abs(p[0] - q[0]) >= dx - 1e-9 or abs(p[1] - q[1]) >= dy - 1e-9
    for name, (left, middle) in found.items():
        assert 0 <= left <= 500 - width and 5 <= middle <= 495
        assert all(apart((left, middle), other, width, 10) for o, other in found.items() if o != name)
        assert all(apart((left + width / 2, middle), spot, width / 2 + 4, 9) for spot in spots.values())


@pytest.mark.parametrize("spots, found", [
    (dict(a=(50, 80), b=(50, 20)), dict(a=(58, 80), b=(58, 20))), (dict(a=(95, 50)), dict(a=(67, 50))),  # no room at its right
    (dict(a=(50, 50), b=(50, 51)), dict(b=(58, 51), a=(22, 50)))], ids=["free", "edge", "crowd"])
def test_names_take_the_nearest_place_at_their_right_then_left(spots, found):
    assert places(spots, dict.fromkeys(spots, 20), (0, 0, 100, 100)) == found
