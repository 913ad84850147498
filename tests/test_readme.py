"The README says what runs/ holds, and its code runs."
import re
from pathlib import Path

from rest_nb.results import MARKS, all_rows, ends, readme_table, with_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_table_is_that_of_the_stored_runs():
    assert with_table(README, readme_table(ROOT)) == README
    assert README.index(MARKS[1]) < 3500  # on the first screen


def test_the_worst_group_is_shown_where_it_is_another_than_the_conflicting_one():
    shown = [run["selected"] for rows in all_rows(ROOT).values() for row in ends(rows).values() for run in row["runs"]]
    assert ("worst group" in readme_table(ROOT).split("\n")[0]) == any(run["worst_group"] != run["conflicting"] for run in shown)


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        assert len(block.strip().splitlines()) <= 12
        exec(compile(block, "README.md", "exec"), {})


def test_commands_are_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets


def test_map_names_every_notebook():
    links = set(re.findall(r"\(nbs/([\w]+\.ipynb)\)", README))
    assert links == {p.name for p in (ROOT / "nbs").glob("*.ipynb")}
