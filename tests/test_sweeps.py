"Sweeps: tables and pictures of invented rows, against means and intervals by hand."
import math
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from rest_nb import sweeps
from rest_nb.models import NETWORKS, cnn


def row(shares, density, **roles):
    config = dict(dict(sparsity="dense", reweighting="none", conflict_ratio=.005, density=density, upweight=80), **roles)
    return dict(config=config, runs=[dict(seed=seed, selected=dict(conflicting=share), last=dict(conflicting=0.)) for seed, share in enumerate(shares)])


SPARSE = dict(sparsity="masks.RigL(delta_t=10)")
ROWS = {("a", "RigL-d1"): row([.1, .2, .3], .1, **SPARSE), ("a", "RigL-d01"): row([.5, .5, .5], .01, **SPARSE),
        ("a", "REST-d1"): row([.6, .8], .1, **SPARSE, reweighting="reweighting.sample")}


@pytest.fixture
def lines(): return sweeps.varied(ROWS, variant=sweeps.family, density=lambda config: config["density"])


@pytest.mark.parametrize("sparsity, reweighting, name", [("dense", "none", "ERM"), ("dense", "rules.lff", "ReW"), ("masks.SET", "none", "RigL"), ("masks.RigL", "reweighting.weigh", "REST")])
def test_the_four_families(sparsity, reweighting, name): assert sweeps.family(dict(sparsity=sparsity, reweighting=reweighting)) == name


def test_an_option_comes_before_the_field():
    config = dict(sparsity="masks.RigL(delta_t=10)", reweighting="none", delta_t=40, upweight=80)
    assert sweeps.option(config, "sparsity", "delta_t") == 10
    assert sweeps.option(config, "reweighting", "upweight") == 80
    assert sweeps.option(dict(config, sparsity="masks.RigL"), "sparsity", "delta_t") == 40


def test_each_line_has_what_varies_in_its_row(lines):
    assert lines.density.tolist() == [.1] * 3 + [.01] * 3 + [.1] * 2 and lines.variant.tolist() == ["RigL"] * 6 + ["REST"] * 2
    assert lines.conflicting.tolist() == [.1, .2, .3, .5, .5, .5, .6, .8]
    assert set(sweeps.varied(ROWS, "last").conflicting) == {0.}


def test_the_table_has_means_and_intervals(lines):
    table = sweeps.sweep_table(lines, "density")
    assert list(table.index) == [.01, .1] and list(table.columns) == ["RigL", "REST"]
    assert table.loc[.01].tolist() == ["50.0 ± 0.0 (3)", "–"]
    assert table.loc[.1].tolist() == ["20.0 ± 24.8 (3)", "70.0 ± 127.1 (2)"]  # t(2) 4.303 × 10 / √3; t(1) 12.706 × 14.14 / √2


def test_the_picture_has_a_line_for_each_variant(lines):
    figure = sweeps.sweep_figure(lines, "density")
    ax, = figure.axes
    drawn = {bars.get_label(): bars[0].get_xydata().tolist() for bars in ax.containers}
    assert drawn == {"RigL": [[.01, .5], [.1, pytest.approx(.2)]], "REST": [[.1, pytest.approx(.7)]]}
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.01", "0.1"] and ax.get_xscale() == "log"
    assert len(sweeps.sweep_figure(lines, "density", panels="conflict_ratio").axes) == 1
    plt.close("all")


def test_what_reweighting_adds_is_taken_seed_by_seed():
    made = dict(ERM=[.1, .2, .3], ReW=[.3, .5, .7], RigL=[.1, .1, .1], REST=[.4, .2, .6])
    rows = {("a", method): row(shares, .1) for method, shares in made.items()} | {("b", method): row([.5, .5], .1) for method in made}
    rows["a", "REST"]["runs"].reverse()  # seeds in another order are the same seeds
    told = sweeps.interactions(rows)
    # dense .2 .3 .4; sparse .3 .1 .5; difference .1 -.2 .1: t(2) 4.303 × 10, 20, 17.32 points / √3
    assert told.loc["a"].tolist() == ["+30.0 ± 24.8 *", "+30.0 ± 49.7", "+0.0 ± 43.0", 3]
    assert told.loc["b"].tolist() == ["+0.0 ± 0.0"] * 3 + [2]
    assert set(sweeps.interactions(rows, "last").loc["a"]) == {"+0.0 ± 0.0", 3}


COUNTED = {.0005: (.0009, .0014, .0014), .005: (.0085, .0144, .0149), .01: (.0171, .0290, .0300), .05: (.1040, .1494, .1503),
           .1: (.1674, .2935, .2942), .5: (.674, .809, .809)}  # ERK's forward FLOPs, dense ones 1, worked out apart from this project


@pytest.mark.parametrize("column, network, classes, size", [(0, "cnn", 10, 28), (1, "resnet18", 10, 32), (2, "resnet18", 2, 128)])
def test_savings_are_those_worked_out_apart(column, network, classes, size):
    found = sweeps.savings(NETWORKS[network](classes), (3, size, size), COUNTED)
    assert found.inference.to_dict() == pytest.approx({density: shares[column] for density, shares in COUNTED.items()}, abs=.0005)


def test_savings_by_hand():
    "Convolutions of 4 weights at 9 positions and of 4 at 1, a linear weight, 3 biases and 2 parameters of batch-norm."
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 2), torch.nn.BatchNorm2d(1), torch.nn.Conv2d(1, 1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(1, 1))
    found = sweeps.savings(model, (1, 4, 4), [1, 5 / 9], delta_t=4)  # 5 of the 9 weights: the linear one, by ERK dense, and two of each
    assert found.loc[1].tolist() == [1, 1, 1]
    kept = 2 * 9 + 2 * 1 + 1
    assert found.loc[5 / 9].tolist() == pytest.approx([10 / 14, kept / 41, (3 * kept * 3 + 2 * kept + 41) / (12 * 41)])


def test_a_cost_that_is_not_known_is_no_point():
    lines = pd.DataFrame(dict(variant=["A", "A", "A", "B"], seed=[1, 2, 1, 1], conflicting=[.2, .4, .6, .8], ms=[1., 1., None, 2.], FLOPs=[1, 1, 2, 3]))
    figure = sweeps.cost_figure(lines, ["FLOPs", "ms"])
    points = [[list(zip(*(each.get_data()))) for each in (container[0] for container in ax.containers)] for ax in figure.axes]
    assert np.allclose(points[0][0], [(1, .3), (2, .6)]) and np.allclose(points[1][0], [(1, .3)]) and np.allclose(points[1][1], [(2, .8)])
    assert [ax.get_xlabel() for ax in figure.axes] == ["FLOPs", "ms"]


def test_each_line_of_a_panel_has_a_colour_of_its_own():
    "Named methods keep theirs, others take none of these."
    fig, ax = plt.subplots()
    names = ["another", "ERM", "ReW", "one more", "RigL", "REST"]
    sweeps.draw(ax, pd.DataFrame([dict(variant=name, width=w, conflicting=.5) for name in names for w in (1, 2)]), "width", "variant", "conflicting")
    assert len({container[0].get_color() for container in ax.containers}) == len(names)
    plt.close(fig)


def test_where_weights_lie_in_percent():
    "Means over three seeds by hand; the last layer's outputs are classes."
    runs = [dict(places=dict(travel=t, explored=t / 10, dead=dict(first=d, second=1 - d, last=1.))) for t, d in ((.1, 0.), (.2, .5), (.6, .7))]
    stored = dict(config=dict(density=.05), runs=runs, overlap=dict(found=[.1, .2, .3, .4, .5, .6], by_chance=[.05] * 6))
    table = sweeps.places_table(dict(SET=stored, RigL=stored))
    assert list(table.index) == ["SET", "RigL"]
    assert table.loc["SET"].to_dict() == pytest.approx({"density": 5, "travel": 30, "explored": 3, "overlap": 35, "by chance": 5, "dead, layer 1": 40, "dead, layer 2": 60})
    spread = sweeps.places_table(dict(SET=stored), "sd").loc["SET"]
    assert spread.travel == pytest.approx(100 * statistics.stdev([.1, .2, .6])) and spread["dead, layer 1"] == pytest.approx(100 * statistics.stdev([0, .5, .7]))


def test_an_option_that_is_no_field_is_read_from_the_part():
    assert sweeps.option(dict(sparsity="pruning.ITOP(longer=2)"), "sparsity", "longer") == 2
    with pytest.raises(KeyError): sweeps.option(dict(sparsity="masks.SET"), "sparsity", "longer")


def test_reweighting_adds_to_the_seeds_that_all_four_have():
    rows = {("a", name): row(shares, .02) for name, shares in dict(ERM=[.1, .2, .9], ReW=[.3, .4], RigL=[.0, .1], REST=[.5, .6]).items()}
    found = sweeps.interactions(rows).loc["a"]
    assert found["dense"] == "+20.0 ± 0.0 **" and found["sparse - dense"] == "+30.0 ± 0.0 **" and found.n == 2
    with pytest.raises(ValueError, match="a has no RigL; expected all of ERM, ReW, RigL, REST"):
        sweeps.interactions({name: stored for name, stored in rows.items() if name[1] != "RigL"})


def test_layers_have_the_densities_of_erk():
    "By definition: the weights kept are the share asked for, and layers that are not full stand to one another as (Σ of the sizes) / (Π of the sizes)."
    model = cnn(width=8)
    found = sweeps.layer_densities(model, [.02, .1])
    shapes = [weight.shape for weight in model.state_dict().values() if weight.dim() > 1]
    assert list(found.columns) == [f"layer {n + 1}" for n in range(len(shapes))]
    for density, shares in found.iterrows():
        assert sum(share * math.prod(shape) for share, shape in zip(shares, shapes)) == pytest.approx(density * sum(map(math.prod, shapes)), abs=len(shapes))
        scales = [share / (sum(shape) / math.prod(shape)) for share, shape in zip(shares, shapes) if share < 1]
        assert max(scales) == pytest.approx(min(scales), rel=.05) and len(scales) > 1
