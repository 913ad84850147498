"Ranking: order, intervals and multiples, by hand."

import json
import math

import matplotlib
import pytest

from rest_nb import ranking
from rest_nb.ranking import RULES, is_told, ranking_figure, run_seconds, times

matplotlib.use("agg")


def stored(accuracies, flops, oracle=None, **config):
    "A row: conflicting accuracies of its seeds, selected; with labels left out ten points less; what it cost."
    config = dict(dict(sparsity="dense", reweighting="none", guess="labels", initial="random", afterwards="none"), **config)
    runs = [dict(selected=dict(conflicting=c), average=dict(conflicting=c - .1)) for c in accuracies]
    if oracle: runs = [dict(run, oracle=dict(conflicting=oracle)) for run in runs]
    return dict(config=config, cost=dict(training_flops=flops), runs=runs)


ROWS = {("red", "ERM"): stored([.1, .1, .1], 200), ("red", "REST"): stored([.5, .6, .7], 10, sparsity="masks.RigL", reweighting="reweighting.sample"),
        ("red", "JTT"): stored([.3, .3, .6], 500, oracle=.9, reweighting="reweighting.sample", guess="guesses.errors(steps=3)"),
        ("blue", "ERM"): stored([.9, .9, .9], 400)}


def test_the_best_comes_first_with_its_interval_and_its_price():
    seconds = {("red", "ERM"): 10., ("red", "REST"): 4.}
    table = ranking.ranking(ROWS, "red", seconds).fillna("").set_index("method")
    assert [*table.index] == ["REST", "JTT", "ERM"]
    half = 4.302652729911275 * 10 / math.sqrt(3)  # Student's t for two degrees of freedom; sd is 10 points
    assert table[RULES["selected"]]["REST"] == f"60.0 ± {half:.1f}" and table[RULES["average"]]["REST"] == f"50.0 ± {half:.1f}"
    assert table[RULES["oracle"]].to_dict() == dict(REST="", JTT="90.0 ± 0.0", ERM="")
    assert table.FLOPs.to_dict() == dict(REST="0.05×", JTT="2.50×", ERM="1.00×")
    assert table.seconds.to_dict() == dict(REST="0.40×", JTT="–", ERM="1.00×") and set(table.n) == {3}
    assert [*ranking.ranking(ROWS, "blue").method] == ["ERM"] and times(ROWS, ("blue", "ERM")) == 1


def test_seconds_are_means_of_what_was_stored(tmp_path):
    folder = tmp_path / "runs" / "cpu" / "seconds"
    folder.mkdir(parents=True)
    (folder / "red-REST.json").write_text(json.dumps(dict(training=[1., 2., 6.])))
    assert run_seconds(tmp_path, "cpu", ROWS) == {("red", "REST"): 3.}


@pytest.mark.parametrize("config, told", [
    (dict(), False), (dict(reweighting="reweighting.sample"), True), (dict(reweighting="rules.group_dro(step_size=0.1)"), True),
    (dict(reweighting="reweighting.sample", guess="guesses.errors(steps=3)"), False), (dict(reweighting="rules.lff"), False),
    (dict(reweighting="rules.balanced", guess="guesses.errors(steps=3)"), True),  # asks for cells whatever is guessed
    (dict(reweighting="disentangling.disent(dis=0.1)"), False), (dict(initial="debiasing.mrm"), False),
    (dict(initial="debiasing.dcwp(penalty=1.0)"), True), (dict(afterwards="guesses.dfr"), True)])
def test_who_is_told_who_conflicts(config, told): assert is_told(stored([1], 1, **config)["config"]) == told


def test_the_figure_has_a_mark_for_each_method_where_it_belongs():
    ax, = ranking_figure(ROWS, "red").axes
    marks = {note.get_text(): note.xy for note in ax.texts}
    assert marks == {"ERM": (1, pytest.approx(.1)), "REST": (.05, pytest.approx(.6)), "JTT": (2.5, pytest.approx(.4))}
    lines = {tuple(line.get_xdata()): line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())}
    assert lines[2.5,].get_markerfacecolor() == "white" != lines[.05,].get_markerfacecolor()
    assert lines[.05,].get_color() != lines[2.5,].get_color() and ax.get_xscale() == "log"
