"The rules of the house: who imports whom, what DVC depends on, what git holds."
import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from rest_nb.configs import configure, named, read_params
from rest_nb.masks import keep_counts, maskable
from rest_nb.results import load_rows
from rest_nb.rows import code_of

ROOT = Path(__file__).parents[1]
LIBRARY = {re.search(r"#\| default_exp (\S+)", nb.read_text())[1].split("\\n")[0].rstrip('",'): nb
           for nb in sorted((ROOT / "nbs").glob("0*.ipynb"))}


def imported(path):
    "The modules of rest_nb that a file imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            package, _, module = (("rest_nb." if node.level else "") + (node.module or "")).rstrip(".").partition(".")
            if package == "rest_nb": found |= {module} if module else {name.name for name in node.names}
    return found


def test_the_reader_of_imports_reads_them():
    assert {"sparse", "cost", "batches", "training"} <= imported(ROOT / "rest_nb" / "experiments.py")


def test_every_module_has_its_notebook():
    modules = {p.stem for p in (ROOT / "rest_nb").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(LIBRARY)


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_only_go_down_the_numbers(module):
    for other in imported(ROOT / "rest_nb" / f"{module}.py"):
        assert LIBRARY[other].name < LIBRARY[module].name, f"{module} imports {other}, from a higher notebook"


def test_training_has_never_heard_of_sparsity():
    assert imported(ROOT / "rest_nb" / "training.py") <= {"batches", "data", "metrics", "models", "parallel", "reweighting"}
    assert not re.search(r"mask|sparse|density|conflict_ratio|upweight", (ROOT / "rest_nb" / "training.py").read_text())


def test_import_rest_nb_is_light():
    code = "import rest_nb, sys; assert rest_nb.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def stages(): return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def rows_stage(budget):
    "Faces, rivals and the paper's own length have pipelines of their own."
    if budget.startswith("paper"): return yaml.safe_load((ROOT / "runs" / "paper" / "dvc.yaml").read_text())["stages"][f"{budget}-rows"]
    own = ROOT / "runs" / budget / "dvc.yaml"
    return yaml.safe_load(own.read_text())["stages"]["rows"] if own.is_file() else stages()[f"{budget}-rows"]


PAPER = ["paper", "paper-objects", "paper-faces"]
SWEEPS = ["densities", "upweights", "upweights-001", "upweights-002", "widths", "widths-objects", "dynamics", "audit", "audit-005", "audit-objects"]


def fields_of(budget):
    "What a stage must depend on in params.yaml, but for the lists of settings and methods: another method leaves the rows as they are."
    return {f"budgets.{budget}.{field}" for field in {*read_params(ROOT / "params.yaml")["budgets"][budget]} - {"settings", "methods"}}


def rooms_of(budget):
    "The modules that a budget's rows depend on: those that its methods name, and all that these import."
    params = read_params(ROOT / "params.yaml")
    methods = [params["methods"][name] for name in named(params, budget, "methods")]
    return code_of(*(text for method in methods for text in method.values() if type(text) is str and "." in text))


def code_told(budget): return json.loads((ROOT / "runs" / "code" / f"{budget}.json").read_text())


@pytest.mark.parametrize("budget", [*read_params(ROOT / "params.yaml")["budgets"]])
def test_the_code_of_a_budget_is_what_its_rows_use_and_no_other(budget):
    "And it is that of today: whoever changes a module has `dvc repro code` write its hash anew."
    besides = dict(search=["search"], looks=[*code_of("looks.answers"), "notebooks"])
    told = code_told(budget)
    assert set(told) == {f"rest_nb/{module}.py" for module in (*rooms_of(budget), *besides.get(budget, ["notebooks"]))}
    assert told == {path: hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16] for path in told}


def test_the_stage_that_writes_down_the_code_depends_on_all_of_it():
    deps = set(stages()["code"]["deps"])
    assert deps == {"params.yaml", *(path for budget in read_params(ROOT / "params.yaml")["budgets"] for path in code_told(budget))}


@pytest.mark.parametrize("budget", ["quick", "cpu", "objects", "faces", *SWEEPS, *PAPER])
def test_rows_depend_on_their_set_their_notebook_and_their_code(budget):
    assert set(rows_stage(budget)["deps"]) == {"sets/${item.setting}.npz", "nbs/11_row.ipynb", f"runs/code/{budget}.json"}


def test_the_search_and_the_ranking_depend_on_one_another():
    stages = yaml.safe_load((ROOT / "runs" / "rivals" / "dvc.yaml").read_text())["stages"]
    assert set(stages["search"]["deps"]) == {"sets/${item.setting}.npz", "runs/code/search.json"}
    assert set(stages["rows"]["deps"]) == {"sets/${item.setting}.npz", "nbs/11_row.ipynb", "runs/code/rivals.json", "runs/search/${item.setting}-${item.method}.json"}
    assert stages["search"]["matrix"] == stages["rows"]["matrix"] and "grids.${item.method}" in stages["search"]["params"]
    assert fields_of("search") <= {*stages["search"]["params"]}


@pytest.mark.parametrize("budget", ["quick", "cpu", "objects", "faces", "rivals", *SWEEPS, *PAPER])
def test_stages_are_the_rows_of_params(budget):
    stage = rows_stage(budget)
    assert stage["matrix"] == {kind: f"${{budgets.{budget}.{kind}s}}" for kind in ("setting", "method")}
    assert f"row {budget} " in stage["cmd"]
    assert f"budgets.{budget}" in stage["params"] or fields_of(budget) <= {*stage["params"]}
    assert [out for out in stage["outs"] if f"runs/{budget}/rows/${{item.setting}}-${{item.method}}.json" in out]


def test_networks_trained_again_depend_on_all_fields_of_their_budget():
    assert "budgets.looks" in stages()["looks"]["params"]
    params, looks = read_params(ROOT / "params.yaml"), {*stages()["looks"]["params"]}
    assert {param for param in looks if param.startswith("methods")} == {f"methods.{name}" for name in named(params, "looks", "methods")}


def test_networks_trained_again_depend_on_what_their_notebook_uses():
    assert set(stages()["looks"]["deps"]) == {"sets/cmnist-0005.npz", "nbs/15_looks.ipynb", "runs/code/looks.json"}
    assert {f"rest_nb/{module}.py" for module in imported_by_notebook(ROOT / "nbs" / "15_looks.ipynb")} <= set(code_told("looks"))


def imported_by_notebook(path):
    source = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    return {name for line in re.findall(r"^from rest_nb import (.+)$", source, re.M) for name in line.split(", ")} \
        | set(re.findall(r"^from rest_nb\.(\w+) import", source, re.M))


def test_every_sweep_has_its_accuracies(): assert stages()["sweeps"]["matrix"]["budget"] == SWEEPS


def test_make_study_trains_and_shows_every_sweep():
    recipe = (ROOT / "Makefile").read_text().split("\nstudy:")[1].split("\nrivals:")[0]
    at_once, = re.findall(r"train \$\(JOBS\) ([\w -]+)", recipe)
    assert {"cpu", "objects", "rivals", *SWEEPS} == set(at_once.split())
    made = re.findall(r"dvc repro --keep-going ([\w ]+) runs/rivals/dvc.yaml:rivals ", recipe)[0].split()
    ends = {name for name in stages() if not name.endswith("-rows") and not name.startswith(("raw", "sets", "code"))}  # what no other stage needs
    assert set(made) == ends and made[-1] == "looks"  # when the rows are there that it looks for


def test_every_set_is_built_and_every_setting_is_some_budgets():
    params = read_params(ROOT / "params.yaml")
    for stage, budget, dataset in (("sets", "paper", "cmnist"), ("sets-objects", "paper-objects", "cifar10c")):
        assert stages()[stage]["matrix"]["setting"] == f"${{budgets.{budget}.settings}}"
        assert set(named(params, budget, "settings")) == {name for name, setting in params["settings"].items() if setting["dataset"] == dataset}
    assert set(params["settings"]) == {name for budget in params["budgets"] for name in named(params, budget, "settings")}  # else no set can be built


def test_as_many_weights_at_another_width():
    params = read_params(ROOT / "params.yaml")
    for budget, setting, usual, weights, error in (("widths", "cmnist-0005", "cpu", 660_992, .001),         # the CNN, exactly
                                                   ("widths-objects", "cifar10c-0005", "objects", 11_172_032, .025)):  # ResNet-18, nearly
        kept = {name: sum(keep_counts(maskable(config.untrained()), config.density).values())
                for name in ("REST-width16-kept", "REST-width32-kept", "REST-width128-kept")
                for config in [configure(params, budget, setting, name)]}
        config = configure(params, usual, setting, "REST")
        assert sum(p.numel() for p in maskable(config.untrained()).values()) == weights
        assert all(abs(n / (.02 * weights) - 1) < error for n in kept.values()), kept
        assert (config.width, config.density) == (64, .02)


def test_no_face_is_in_git():
    "Neither the set nor a picture of it; counts may be."
    held = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert not [path for path in held if path.startswith("sets/") or re.search(r"(utkface|faces?)\S*\.(png|jpe?g|zip|npz)$", path)]
    for notebook in (ROOT / "runs" / "faces").rglob("*.ipynb"): assert "imshow" not in notebook.read_text()


def test_what_is_stored_tells_by_which_vector_instructions_it_was_made():
    "So that it can be made again by these (`__main__.as_stored`)."
    found = [path for kind in ("*/rows", "search") for path in (ROOT / "runs").glob(f"{kind}/*.json") if path.parts[-3] not in ("quick", "tiny")]
    assert len(found) > 300
    for path in found:
        told = json.loads(path.read_text())
        assert told["config"]["device"] != "cpu" or told["versions"]["vectors"] in ("AVX2", "AVX512"), path


def test_quick_is_cached_and_cpu_is_in_git():
    notebook, result = stages()["quick-rows"]["outs"]
    assert isinstance(notebook, str) and list(result.values()) == [{"persist": True}]  # it may stay (rows.run_row)
    for budget in ("cpu", "objects", "faces", *SWEEPS):
        notebook, result = (how for out in rows_stage(budget)["outs"] for how in out.values())
        assert notebook == {"cache": False} and result == {"cache": False, "persist": True}
    kept = subprocess.run(["git", "check-ignore", "runs/quick/x", "runs/cpu/x"], cwd=ROOT, capture_output=True, text=True).stdout
    assert kept.split() == ["runs/quick/x"]


def dvc(*args): return subprocess.run([sys.executable, "-m", "dvc", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_dvc_shows_the_stored_metrics():
    path = "runs/cpu/metrics.json"
    shown = json.loads(dvc("metrics", "show", "--json", path))
    assert shown[""]["data"][path]["data"] == json.loads((ROOT / path).read_text())


def test_dvc_plots_every_seed_in_the_panel_of_its_setting(tmp_path):
    page = (Path(dvc("plots", "show", "--out", str(tmp_path)).strip().removeprefix("file://"))).read_text()
    spec = json.loads(re.search(r"var spec = (\{.*?\});\n", page, re.S)[1])
    held = {(row["setting"], row["method"], int(row["seed"]), float(row["conflicting"])) for row in spec["data"]["values"]}
    assert spec["facet"]["field"] == "setting" and spec["spec"]["encoding"]["x"]["field"] == "method"
    assert held == {(setting, method, run["seed"], run["selected"]["conflicting"]) for budget in ("cpu", "objects")
                    for (setting, method), row in load_rows(ROOT, budget).items() for run in row["runs"]}


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_are_named_by_kind_and_small(path):
    assert re.fullmatch(r"[0-3][0-9a-f]_[a-z_]+", path.stem)
    assert path.stat().st_size < 500_000
    exports = "#| export" in "".join(c.source for c in nbformat.read(path, 4).cells)
    assert exports == path.name.startswith("0")  # experiments, pages and examples use the library; they do not add to it


def test_reading_notebooks_cannot_train():
    for page in (ROOT / "nbs").glob("2*.ipynb"):
        source = "\n".join(c.source for c in nbformat.read(page, 4).cells if c.cell_type == "code")
        assert imported_by_notebook(page) <= {"results", "notebooks", "metrics", "ranking", "sweeps", "audit", "models"}
        assert not re.search(r"import rest_nb|\bfit\(|run_row|\.backward", source)


def test_no_room_knows_a_method_by_name():
    "What a method is stands in params.yaml alone."
    names = read_params(ROOT / "params.yaml")["methods"]
    for path in (ROOT / "rest_nb").glob("*.py"):
        assert not re.search(r"\bmethod (==|!=|in) [(\[{]?[\"']", path.read_text()), path
        parts = {text.split("(")[0] for method in names.values() for text in method.values() if isinstance(text, str) and "." in text}
        assert not [part for part in parts if re.search(rf"[\"']{re.escape(part)}\b", path.read_text())], path  # nor a part: it is asked what it does
    text = (ROOT / "rest_nb" / "experiments.py").read_text() + (ROOT / "rest_nb" / "training.py").read_text()
    assert not [name for name in names if re.search(rf"\b{name}\b", text)]


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets == set(re.findall(r"make (\w+)", said))


def test_lock_pins_everything_that_pyproject_asks_for():
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[\w-]+", d)[0].lower() for d in project["dependencies"] + project["optional-dependencies"]["study"]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().lower().splitlines() if not line.startswith("#")]
    assert wanted <= {line.split("==")[0] for line in lines}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no local build, no address
