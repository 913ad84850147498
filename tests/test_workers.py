"""Workers: two processes of this machine, one of which is killed in earnest."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import dask
import pytest
from test_checkpoints import result, study
from test_experiments import make_root, write_params

from rest_nb import workers
from rest_nb.processors import PLAINER, has
from rest_nb.rows import THREADS
from rest_nb.workers import client, do_all, train


def environment(name):
    del name
    import torch
    return os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads(), os.getpid()


def wait_or_fail(word):
    if word == "bad": raise ValueError(f"{word} is no word")
    time.sleep(.05)
    return word


@pytest.fixture(scope="module")
def two():
    with client(2) as workers: yield workers


def test_workers_compute_with_as_many_threads_as_a_row_does(two):
    found = two.gather(two.map(environment, range(4)))
    assert {threads for threads, *_ in found} == {str(THREADS)}
    assert {count for _, count, _ in found} == {THREADS} and os.getpid() not in {pid for *_, pid in found}


def test_others_go_on_where_one_fails_and_all_are_told(two):
    told = []
    failed = do_all(two, wait_or_fail, [("a",), ("bad",), ("b",)], told.append)
    assert [*failed] == [("bad",)] and "bad is no word" in str(failed["bad",])
    assert len(told) == 3 and sum("FAILED" in line for line in told) == 1 and told[-1].startswith("3 of 3: ")
    assert all("min for all that is left" in line for line in told) and "about 0 min" in told[-1]


def test_workers_leave_it_to_others_to_tell_of_failures(two):
    def is_told():
        before = logging.getLogger("distributed.worker").isEnabledFor(logging.WARNING)
        workers.begin()
        return before, logging.getLogger("distributed.worker").isEnabledFor(logging.ERROR)
    assert two.submit(is_told).result() == (True, False)


def test_nothing_to_do_is_done(two): assert do_all(two, wait_or_fail, []) == {}


def test_where_no_scheduler_is_an_error_says_so():
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(OSError), client("tcp://127.0.0.1:1"): pass
    with pytest.raises(ValueError, match="^0 workers; expected 1"), client(0): pass


def test_workers_of_a_scheduler_at_an_address_are_found(two):
    with client(two.scheduler.address) as found: assert do_all(found, wait_or_fail, [("a",)], lambda line: None) == {}


def test_a_row_whose_worker_is_killed_is_finished_by_another(tmp_path, two):
    "What is stored is what one process would have stored."
    undisturbed, root = (make_root(tmp_path / name, study("REST")) for name in ("undisturbed", "killed"))
    failed = do_all(two, run_or_die, [(str(root), "dies", "tiny", "blobs", "it")], lambda line: None)
    alone = multiprocessing.get_context("forkserver").Process(target=run_or_die, args=(str(undisturbed), "lives", "tiny", "blobs", "it"))
    alone.start(); alone.join()
    assert failed == {} and result(root) == result(undisturbed)
    assert (root / "pids").read_text().count("\n") == 2  # two processes have worked on it


def run_or_die(root, fate, *row):
    "Work on a row. If that is its fate, the first process that does dies at its first step after a checkpoint."
    from pathlib import Path

    from rest_nb.training import Steps
    with open(Path(root) / "pids", "a+") as file:
        file.write(f"{os.getpid()}\n")
        file.seek(0)
        is_first = len(file.readlines()) == 1
    if fate == "dies" and is_first:
        step = Steps.__next__

        def watched(self):
            if any((Path(root) / ".parts").glob("*.checkpoint")): os.kill(os.getpid(), signal.SIGKILL)
            return step(self)
        Steps.__next__ = watched
    workers.row(root, *row)


def test_a_budget_that_is_none_is_refused_before_a_worker_starts(tmp_path):
    root = make_root(tmp_path / "project", study("REST"))
    with pytest.raises(ValueError, match="no 'tinny' in budgets; expected one of tiny"): train(root, 2, ["tiny", "tinny"])


def test_a_study_is_what_is_pending_and_searches_come_first(tmp_path, monkeypatch):
    tiny = study("REST")
    tiny["grids"] = dict(ERM=dict(lr=[.01, .05]), it=dict(lr=[.01, .05]))
    tiny["budgets"] = dict(tiny=tiny["budgets"]["tiny"], search=dict(tiny["budgets"]["tiny"], seeds=[7]),
                           rivals=dict(tiny["budgets"]["tiny"], tuned=True))
    root, asked = make_root(tmp_path / "project", study("REST")), []
    write_params(root, tiny)
    (root / "runs" / "search").mkdir(parents=True)

    def inline(client, function, tasks, told):
        for task in tasks:
            asked.append((function.func.__name__, *task))
            if function.func.__name__ == "search":
                (root / "runs" / "search" / f"{'-'.join(task)}.json").write_text(json.dumps(dict(winner=dict(lr=.05))))
        return {("blobs", "it"): ValueError("no")} if function.func.__name__ == "search" else {}
    monkeypatch.setattr(workers, "do_all", inline)
    monkeypatch.setattr(workers, "client", lambda where, vectors: contextlib.nullcontext())
    failed = train(root, 2, ["tiny", "rivals", "tiny"])  # a budget that is named twice is trained once
    assert asked == [("search", "blobs", "ERM"), ("search", "blobs", "it"), ("row", "tiny", "blobs", "ERM"), ("row", "tiny", "blobs", "it"),
                     ("row", "rivals", "blobs", "ERM")]  # the other has no settings yet
    assert [*failed] == [("blobs", "it")]
    asked.clear()
    made = {("search", "blobs", "it"), ("row", "tiny", "blobs", "ERM"), ("row", "rivals", "blobs", "it")}
    monkeypatch.setattr(workers, "held", lambda root: made)
    train(root, 2, ["tiny", "rivals"])
    assert asked == [("search", "blobs", "ERM"), ("row", "tiny", "blobs", "it"), ("row", "rivals", "blobs", "ERM")]


@pytest.mark.parametrize("where, has, expected", [
    (2, True, [(None, ["new", "wide", "old"]), ("AVX2", ["plain", "plain too"])]), ("tcp://there:1", True, [(None, ["new", "wide", "plain", "old", "plain too"])]),
    (2, False, [(None, ["new", "wide", "plain", "old", "plain too"])])])
def test_what_is_stored_is_made_again_by_what_made_it(tmp_path, monkeypatch, where, has, expected):
    monkeypatch.delenv("REST_NB_VECTORS", raising=False)
    stored = dict(wide=dict(vectors="AVX512"), plain=dict(vectors="AVX2"), old={}, **{"plain too": dict(vectors="AVX2")})
    for name, versions in stored.items(): (tmp_path / f"{name}.json").write_text(json.dumps(dict(versions=versions)))
    done = []
    monkeypatch.setattr(workers, "has", lambda vectors: has)
    monkeypatch.setattr(workers, "client", lambda where, vectors: contextlib.nullcontext((where, vectors)))
    monkeypatch.setattr(workers, "do_all", lambda client, function, tasks, told: done.append((client, tasks)) or {tasks[0]: function})
    failed = workers.do_as_stored(where, "error", {(name,): tmp_path / f"{name}.json" for name in ("new", "wide", "plain", "old", "plain too")}, print)
    assert done == [((where, vectors), [(name,) for name in names]) for vectors, names in expected]
    assert failed == {(names[0],): "error" for _, names in expected}


@pytest.mark.skipif(not has("AVX2"), reason="this processor has no plainer one that it could pass for")
def test_workers_compute_by_the_vector_instructions_they_are_given():
    def found():
        import torch
        return torch.backends.cpu.get_cpu_capability(), os.environ.get("NUMBA_CPU_NAME")
    with client(1, "AVX2") as workers: assert workers.submit(found).result() == ("AVX2", PLAINER["AVX2"]["NUMBA_CPU_NAME"])
    assert "NUMBA_CPU_NAME" not in os.environ  # Dask had set it here, too: the next workers would have inherited it


def test_dvc_tells_what_is_made(tmp_path):
    def dvc(*args): subprocess.run([sys.executable, "-m", "dvc", *args], cwd=tmp_path, check=True, capture_output=True)
    assert workers.held(tmp_path) == set()
    dvc("init", "--no-scm")
    (tmp_path / "nested").mkdir()
    for folder, commands in ((".", ["row tiny red ERM", "row tiny red REST", "table tiny"]), ("nested", ["search red ERM"])):
        for i, command in enumerate(commands): (tmp_path / folder / f"made{i}").write_text("1"), (tmp_path / folder / f"from{i}").write_text("1")
        (tmp_path / folder / "dvc.yaml").write_text(json.dumps(dict(stages={f"stage{i}": dict(cmd=f"python -m rest_nb {command}", deps=[f"from{i}"], outs=[f"made{i}"])
                                                                            for i, command in enumerate(commands)})))
    assert workers.held(tmp_path) == set()
    dvc("commit", "--force")
    dvc("commit", "--force", "nested/dvc.yaml")
    assert workers.held(tmp_path) == {("row", "tiny", "red", "ERM"), ("row", "tiny", "red", "REST"), ("search", "red", "ERM")}
    (tmp_path / "from1").write_text("2")
    assert workers.held(tmp_path) == {("row", "tiny", "red", "ERM"), ("search", "red", "ERM")}
