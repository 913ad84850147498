"Sweeps: tables and pictures of invented rows, against means and intervals by hand."
import matplotlib.pyplot as plt
import pytest

from rest_nb import sweeps


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
