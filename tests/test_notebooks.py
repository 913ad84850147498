"""Notebooks: what is stored is what was executed, clean, whole or not at all; commands fail in one line."""
import copy
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from faults import full_while_renaming, full_while_writing
from hypothesis import given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import rest_nb.data
from rest_nb.__main__ import COMMANDS, main, page_of
from rest_nb.data import SPLITS, BiasedDataset, load
from rest_nb.notebooks import clean, dump, execute, project_root, write

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUNS = sorted(p for p in (ROOT / "runs").rglob("*.ipynb")
              if not p.name.endswith(".failed.ipynb") and ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(autouse=True)
def quiet_kernels(monkeypatch):
    "Kernels of small tests take one thread each; the debugger's warning about frozen modules is not ours."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def code(source, **metadata): return new_code_cell(source, metadata=metadata)


def notebook(path, *sources):
    "Write a notebook of code cells; the first is tagged `parameters`."
    cells = [code(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    write(clean(new_notebook(cells=cells)), path)
    return path


# --- clean -----------------------------------------------------------------------------------------------

def executed(clock):
    "A notebook as papermill leaves it: clocks in every place that has room for one."
    shown = [new_output("stream", name="stdout", text="a\n"), new_output("stream", name="stdout", text="b\n"),
             new_output("stream", name="stderr", text=f"99 % at {clock}"),
             new_output("display_data", data={"image/png": "iVBORw0="}, metadata={"made": clock}),
             new_output("execute_result", data={"text/plain": "3"}, metadata={"made": clock})]
    cells = [new_markdown_cell("# Title", metadata={"papermill": {"start_time": clock}, "tags": ["kept"]}),
             code("'never run'"), code("print('a')", tags=["parameters"], papermill={"end_time": clock}),
             code("3", execution={"iopub.execute_input": clock}, collapsed=clock > "12")]
    for number, cell in enumerate(cells):
        cell.id = f"id-{number}"
        if number > 1: cell.update(execution_count=int(clock[:2]) + number, outputs=copy.deepcopy(shown))
        for output in cell.get("outputs", []):
            if "execution_count" in output: output.execution_count = cell.execution_count
    return new_notebook(cells=cells, metadata={"papermill": {"duration": clock}, "widgets": {"at": clock},
                                               "language_info": {"name": "python", "version": clock}})


def test_two_runs_are_the_same_file():
    assert dump(executed("08:15")) != dump(executed("23:59"))
    assert dump(clean(executed("08:15"))) == dump(clean(executed("23:59")))
    assert "23" not in dump(clean(executed("23:59")))


def test_what_says_something_is_kept():
    nb = clean(executed("08:15"))
    nbformat.validate(nb)
    assert [c.id for c in nb.cells] == ["id-0", "id-1", "id-2", "id-3"]
    assert [c.source for c in nb.cells] == ["# Title", "'never run'", "print('a')", "3"]
    assert [dict(c.metadata) for c in nb.cells] == [{"tags": ["kept"]}, {}, {"tags": ["parameters"]}, {}]
    for cell in nb.cells[2:]:
        stream, image, result = cell.outputs
        assert (stream.name, stream.text) == ("stdout", "a\nb\n")
        assert image.data == {"image/png": "iVBORw0="} and result.data == {"text/plain": "3"}


def test_cells_that_ran_are_counted_from_one():
    # nbval asks for it; a cell that never ran keeps no number, and a result carries its cell's.
    nb = clean(executed("08:15"))
    assert [c.get("execution_count") for c in nb.cells] == [None, None, 1, 2]
    assert [c.outputs[-1].execution_count for c in nb.cells[2:]] == [1, 2]


def test_only_injected_cells_get_a_fixed_name():
    # papermill gives the cell that it injects a random id at every run.
    nb = new_notebook(cells=[new_code_cell("x = 1", id="mine"),
                             new_code_cell("x = 2", id="4f1c", metadata={"tags": ["injected-parameters"]})])
    assert [c.id for c in clean(nb).cells] == ["mine", "injected"]


streams = st.builds(lambda name, text: new_output("stream", name=name, text=text),
                    st.sampled_from(["stdout", "stderr"]), st.text("ab\n", min_size=1, max_size=3))
pictures = st.builds(lambda x: new_output("display_data", data={"text/plain": x}), st.sampled_from("xyz"))
errors = st.just(new_output("error", ename="E", evalue="v", traceback=["t"]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(streams, pictures, errors), max_size=8))
def test_stdout_is_joined_and_never_across_another_output(given_outputs):
    cell = new_code_cell("x", execution_count=5, outputs=copy.deepcopy(given_outputs))
    nb = clean(new_notebook(cells=[cell]))
    heard = [o for o in given_outputs if o.get("name") != "stderr"]
    expected = []
    for is_stream, group in itertools.groupby(heard, lambda o: o.output_type == "stream"):
        group = list(group)
        expected += ["".join(o.text for o in group)] if is_stream else group
    assert [o.text if o.output_type == "stream" else o for o in nb.cells[0].outputs] == expected
    once = dump(nb)
    assert dump(clean(nbformat.reads(once, 4))) == once  # cleaning what is clean changes nothing


# --- execute ---------------------------------------------------------------------------------------------

def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_an_executed_notebook_is_whole_and_the_same_again(tmp_path, capsys):
    place = tmp_path / "place"
    place.mkdir()
    source = notebook(tmp_path / "a.ipynb", "x = 1", "import os, sys, time; print(x, os.getcwd()[-5:])",
                      "print('bar at', time.time(), file=sys.stderr); print('more')", "{'x': x}")
    before, target = source.read_bytes(), tmp_path / "out" / "b.ipynb"
    target.parent.mkdir()
    target.with_suffix(".failed.ipynb").write_text("of an earlier run")
    execute(source, target, cwd=place, x=21)
    nb, first = nbformat.read(target, 4), target.read_text()
    said = [o.get("text", o.get("data")) for c in nb.cells for o in c.outputs]
    assert said == ["21 place\n", "more\n", {"text/plain": "{'x': 21}"}]
    assert [c.metadata.get("tags") for c in nb.cells][:2] == [["parameters"], ["injected-parameters"]]
    told = capsys.readouterr().err
    assert "bar at" in told and "Executing" not in told
    execute(source, target, cwd=place, progress=True, x=21)
    assert "Executing" in (told := capsys.readouterr().err) and "5/5" in told
    assert target.read_text() == first == dump(clean(nbformat.read(target, 4)))
    assert files(tmp_path) == ["a.ipynb", "out/b.ipynb"] and source.read_bytes() == before


def test_without_a_folder_it_runs_in_the_callers(tmp_path, monkeypatch):
    # So `project_root()` in a row's notebook is that of the `python -m rest_nb` which runs it. In place, too.
    monkeypatch.chdir(tmp_path)
    source = notebook(tmp_path / "a.ipynb", "import os; print(os.getcwd())")
    execute(source, source)
    assert nbformat.read(source, 4).cells[0].outputs[0].text == f"{tmp_path.resolve()}\n"


def test_parameters_that_would_be_ignored_are_refused(tmp_path):
    source = tmp_path / "a.ipynb"
    write(new_notebook(cells=[code("x = 1"), code("y = 1", tags=["other"])]), source)
    with pytest.raises(ValueError, match="a.ipynb has no cell tagged `parameters`: x, y would be ignored"):
        execute(source, tmp_path / "b.ipynb", x=2, y=3)
    assert files(tmp_path) == ["a.ipynb"]


@pytest.mark.parametrize("says", ["no such number", "two\\n  lines"])  # `main` makes one line of two
def test_a_cell_that_raises(tmp_path, says):
    source = notebook(tmp_path / "a.ipynb", "print('so far')", f"raise ValueError('{says}')", "print(0)")
    target = tmp_path / "out" / "b.ipynb"
    target.parent.mkdir()
    target.write_text("the earlier result")
    with pytest.raises(RuntimeError) as caught: execute(source, target)
    message = str(caught.value)
    assert all(word in message for word in ("a.ipynb", "ValueError", says.split("\\n")[0], "b.failed.ipynb"))
    assert target.read_text() == "the earlier result"
    assert files(tmp_path) == ["a.ipynb", "out/b.failed.ipynb", "out/b.ipynb"]
    failed = nbformat.read(tmp_path / "out" / "b.failed.ipynb", 4)
    outputs = [c.outputs for c in failed.cells if c.cell_type == "code"]
    assert outputs[0][0].text == "so far\n" and outputs[1][0].ename == "ValueError" and outputs[2] == []


def test_a_kernel_that_is_killed_leaves_the_earlier_result(tmp_path):
    # As the system kills it when memory runs out.
    source = notebook(tmp_path / "a.ipynb", "import os; print('so far')", "os._exit(9)")
    target = tmp_path / "b.ipynb"
    target.write_text("the earlier result")
    with pytest.raises(RuntimeError, match="b.ipynb: its kernel died.*b.failed.ipynb"): execute(source, target)
    assert "so far" in (tmp_path / "b.failed.ipynb").read_text()
    assert target.read_text() == "the earlier result" and not [p for p in files(tmp_path) if ".part" in p]


def test_a_first_run_that_fails_leaves_no_target(tmp_path):
    source = notebook(tmp_path / "a.ipynb", "1 / 0")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"): execute(source, tmp_path / "b.ipynb")
    assert files(tmp_path) == ["a.ipynb", "b.failed.ipynb"]


@pytest.mark.parametrize("full", [full_while_writing, full_while_renaming])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, full):
    path = notebook(tmp_path / "a.ipynb", "1")
    before = path.read_bytes()
    full(monkeypatch)
    with pytest.raises(OSError, match="No space left"): write(executed("08:15"), path)
    with pytest.raises(OSError, match="No space left"): write(executed("08:15"), tmp_path / "new.ipynb")
    assert path.read_bytes() == before and files(tmp_path) == ["a.ipynb"]


def test_the_project_root_is_the_nearest_folder_with_dvc_yaml(tmp_path):
    inner = tmp_path / "clone" / "nbs" / "deep"
    inner.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no dvc.yaml in .*deep or above"): project_root(inner)
    for folder in (tmp_path / "clone", tmp_path):  # the outer one last: the nearer one must win
        (folder / "dvc.yaml").touch()
        assert project_root(inner) == project_root(tmp_path / "clone") == (tmp_path / "clone").resolve()


# --- what is stored --------------------------------------------------------------------------------------

def complaints(path):
    "What is wrong with a notebook that should be stored as it was executed."
    nb = nbformat.read(path, 4)
    ran = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    wrong = [f"{c.id}: {o.ename}: {o.evalue}" for c in ran for o in c.outputs if o.output_type == "error"]
    if [c.execution_count for c in ran] != [*range(1, len(ran) + 1)]: wrong.append("not every cell ran")
    if path.read_text() != dump(clean(nb)): wrong.append("not clean: python -m rest_nb clean, or rerun")
    return wrong


@pytest.mark.parametrize("path", [p for p in NBS if p.name[0] in "023"], ids=lambda p: p.stem)
def test_library_reading_and_example_notebooks_are_stored_executed(path): assert complaints(path) == []


def test_the_looks_are_stored_executed(): assert complaints(ROOT / "runs" / "looks" / "looks.ipynb") == []


@pytest.mark.parametrize("path", [p for p in RUNS if p.parts[-3] != "speed" and p.parent.name != "looks"], ids=lambda p: p.relative_to(ROOT / "runs").as_posix())
def test_runs_are_stored_executed_with_the_parameters_of_their_place(path):
    assert complaints(path) == []
    injected = [c for c in nbformat.read(path, 4).cells if c.metadata.get("tags") == ["injected-parameters"]]
    assert [c.id for c in injected] == ["injected"]
    found, place = {}, path.relative_to(ROOT / "runs")
    exec(injected[0].source, found)
    assert found["budget"] == place.parts[0]
    if place.parts[1] == "rows": assert f"{found['setting']}-{found['method']}" == path.stem


@pytest.mark.parametrize("path", [p for p in NBS if p.name[0] == "1"], ids=lambda p: p.stem)
def test_experiments_are_parameterised_and_store_no_output(path):
    nb = nbformat.read(path, 4)
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].cell_type == "code"
    assert not [c.id for c in nb.cells if c.get("outputs") or c.get("execution_count") is not None]
    assert path.read_text() == dump(clean(nb))


def test_there_are_experiments_and_library_notebooks():
    assert {p.name[0] for p in NBS} >= {"0", "1", "2"}  # else the tests above would look at nothing


def test_the_last_cell_of_the_commands_can_be_executed(tmp_path):
    # In a notebook `__name__` is "__main__", too: this cell must not start the command line there.
    nb = nbformat.read(next(p for p in NBS if p.stem.endswith("commands")), 4)
    cell = [c.source for c in nb.cells if "__main__\"" in c.source and c.source.startswith("#| export")][-1]
    execute(notebook(tmp_path / "a.ipynb", "import sys\ndef main(): return 2", cell), tmp_path / "b.ipynb")
    assert complaints(tmp_path / "b.ipynb") == []


# --- commands --------------------------------------------------------------------------------------------

STUDY = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture
def project(tmp_path, monkeypatch):
    "An empty project that we stand in: the study's params.yaml and the experiments' notebooks, no data."
    root = tmp_path / "project"
    (root / "nbs").mkdir(parents=True)
    (root / "dvc.yaml").touch()
    shutil.copy(ROOT / "params.yaml", root)
    for path in NBS:
        if path.name[0] == "1": shutil.copy(path, root / "nbs")
    monkeypatch.chdir(root)
    return root


def failure(capsys, *words):
    "What a failing command says on stderr, checked to be one line; its status, to be 1."
    status = main(list(words))
    said = capsys.readouterr().err
    assert status == 1 and said.startswith(f"rest_nb {words[0]}: ")
    assert said.endswith("\n") and len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize("words", [["magic"], [], ["row", "quick"], ["clean"], ["check", "on"]], ids=" ".join)
def test_a_command_line_that_makes_no_sense_exits_with_2(project, capsys, words):
    with pytest.raises(SystemExit) as stopped: main(words)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped: main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for name, function in COMMANDS.items(): assert name in said and function.__doc__, name


def test_check_is_silent_where_all_is_well(project, capsys):
    assert main(["check"]) == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words, said", [
    (["row", "quick", "cmnist-0005", "MAGIC"], ["params.yaml", "'MAGIC'", "methods", "REST"]),
    (["row", "quick", "MAGIC", "REST"], ["params.yaml", "'MAGIC'", "settings", "cmnist-0005"]),
    (["row", "MAGIC", "cmnist-0005", "REST"], ["params.yaml", "'MAGIC'", "budgets", "quick"]),
    (["sets", "MAGIC"], ["params.yaml", "'MAGIC'", "settings", "cmnist-0005"]),
    (["table", "quick"], ["runs/quick/rows/cmnist-0005-ERM.json is missing", "dvc repro quick"]),
    (["show", "quick"], ["runs/quick/rows/cmnist-0005-ERM.json is missing", "dvc repro quick"]),
    (["show", "MAGIC"], ["params.yaml", "'MAGIC'", "budgets", "quick"]),
    (["page", "MAGIC"], ["params.yaml", "'MAGIC'", "budgets", "rivals"]),
    (["page", "rivals"], ["runs/rivals/rows/cmnist-0005-ERM.json is missing"]),
    (["seconds", "MAGIC"], ["params.yaml", "'MAGIC'", "budgets", "quick"]),
    (["seconds", "rivals"], ["budgets.rivals is tuned", "runs/search/cmnist-0005-ERM.json"]),
    (["clean", "nbs/99_none.ipynb"], ["nbs/99_none.ipynb"])], ids=lambda v: " ".join(v[:4]))
def test_known_failures_are_one_line(project, capsys, words, said):
    line = failure(capsys, *words)
    assert all(word in line for word in said), line
    assert not list(project.rglob("*.failed.ipynb"))  # no notebook was begun


@pytest.mark.parametrize("budget, source, target, parameters, in_readme", [
    ("cpu", "nbs/20_colored_mnist.ipynb", "nbs/20_colored_mnist.ipynb", dict(budget="cpu"), True),
    ("quick", "nbs/20_colored_mnist.ipynb", "runs/quick/20_colored_mnist.ipynb", dict(budget="quick"), False),
    ("faces", "nbs/22_objects_and_faces.ipynb", "nbs/22_objects_and_faces.ipynb", {}, True),
    ("rivals", "nbs/23_methods.ipynb", "nbs/23_methods.ipynb", {}, False)])
def test_a_page_is_executed_in_its_place(project, monkeypatch, budget, source, target, parameters, in_readme):
    from rest_nb import __main__ as commands, results
    executed = []
    monkeypatch.setattr(commands, "execute", lambda *places, **given: executed.append((*places, given)))
    monkeypatch.setattr(results, "load_rows", lambda root, name: {})
    monkeypatch.setattr(results, "readme_table", lambda root: "new")
    (project / "README.md").write_text(before := f"a {results.MARKS[0]}\nold\n{results.MARKS[1]} b")
    assert main(["page", budget]) == 0
    assert executed == [(project / source, project / target, dict(parameters, progress=True))]
    assert (project / "README.md").read_text() == (before.replace("old", "new") if in_readme else before)


@pytest.mark.parametrize("text", [
    "", "- a\n- b", "common: {}", "common: {lr: [", yaml.safe_dump(dict(STUDY, methods={"REST": 5})),
    yaml.safe_dump(dict(STUDY, methods={"REST": {"densty": .1}})),
    yaml.safe_dump(dict(STUDY, budgets={"quick": dict(STUDY["budgets"]["quick"], seeds=41)})),
    yaml.safe_dump(dict(STUDY, common=dict(STUDY["common"], lr=0)))],
    ids=["empty", "list", "no sections", "no YAML", "no mapping", "misspelt", "seeds no list", "lr"])
@pytest.mark.parametrize("words", [["check"], ["row", "quick", "cmnist-0005", "REST"]], ids=" ".join)
def test_a_broken_params_yaml_is_one_line(project, capsys, text, words):
    (project / "params.yaml").write_text(text)
    assert "params.yaml" in failure(capsys, *words)
    assert not (project / "runs").exists()  # nothing was begun


def test_a_missing_params_yaml_is_one_line(project, capsys):
    (project / "params.yaml").unlink()
    assert "params.yaml" in failure(capsys, "check")


def test_outside_of_a_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no dvc.yaml" in failure(capsys, "check")


def test_a_row_without_its_set_says_how_to_make_it(project, monkeypatch, capsys):
    # Through papermill and a kernel: the one line comes last, after the progress bar's.
    status = main(["row", "tiny", "cmnist-0005", "REST"])
    said = capsys.readouterr().err
    assert status == 1 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("rest_nb row: 11_row.ipynb: FileNotFoundError: ")
    assert all(word in last for word in ("cmnist-0005.npz is missing", "dvc repro sets", ".failed.ipynb"))
    assert files(project / "runs") == ["tiny/rows/cmnist-0005-REST.failed.ipynb"]


def test_the_status_reaches_the_shell():
    command = [sys.executable, "-m", "rest_nb", "row", "quick", "cmnist-0005", "MAGIC"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("rest_nb row: params.yaml has no 'MAGIC' in methods")


def test_sets_are_built_as_params_say(project, monkeypatch, capsys):
    # The data's own knobs, conflict_ratio, severity and data_seed, act here: a stand-in sees what arrives.
    study = copy.deepcopy(STUDY)
    study["settings"]["mine"] = dict(conflict_ratio=.25, severity=2, data_seed=7, upweight=3)
    (project / "params.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["sets", "mine"]) == 1 and "no budget with 'mine' among its settings" in capsys.readouterr().err
    study["budgets"]["tiny"]["settings"].append("mine")
    (project / "params.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    asked, made = [], {}

    def stand_in(root, split, **knobs):
        asked.append((root, split, knobs))
        g = torch.Generator().manual_seed(len(asked))
        y, a = torch.randint(10, (2, 40), generator=g)
        made[split] = BiasedDataset(torch.randint(256, (40, 3, 28, 28), generator=g, dtype=torch.uint8), y, a)
        return made[split]
    monkeypatch.setattr(rest_nb.data, "colored_mnist", stand_in)
    assert main(["sets", "mine"]) == 0
    knobs = dict(conflict_ratio=.25, severity=2, seed=7)
    assert asked == [(project / "data", split, knobs) for split in SPLITS]
    for split in SPLITS:
        stored = load(project / "sets" / "mine.npz", split)
        assert all(torch.equal(getattr(stored, name), getattr(made[split], name)) for name in "xya")
    counts = json.loads((project / "runs" / "sets" / "mine.json").read_text())
    assert counts == {s: dict(images=40, conflicting=int((d.y != d.a).sum())) for s, d in made.items()}
    assert (project / "runs" / "sets" / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_clean_strips_experiments_and_keeps_what_others_say(project):
    for name in ("10_a.ipynb", "20_b.ipynb"): write(executed("08:15"), project / name)
    assert main(["clean", "10_a.ipynb", "20_b.ipynb"]) == 0
    experiment, page = (nbformat.read(project / name, 4) for name in ("10_a.ipynb", "20_b.ipynb"))
    assert not [c for c in experiment.cells if c.get("outputs") or c.get("execution_count")]
    assert [c.source for c in experiment.cells] == [c.source for c in page.cells]
    assert dump(page) == (project / "20_b.ipynb").read_text() == dump(clean(executed("08:15")))


@pytest.mark.parametrize("budget, page", [("cpu", ("20_colored_mnist.ipynb", True)), ("tiny", ("20_colored_mnist.ipynb", False)),
                                          ("audit-005", ("2a_audit.ipynb", True)), ("widths-objects", ("27_width.ipynb", True)), ("rivals", ("23_methods.ipynb", True))])
def test_each_budget_has_the_page_that_shows_it(budget, page):
    assert page_of(budget) == page and (ROOT / "nbs" / page[0]).is_file()
