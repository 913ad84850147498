"""Checkpoints: a process that is killed in earnest, and bits that must be those of one that was not."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from test_experiments import STUDY, make_root, split_of

from rest_nb import debiasing, training
from rest_nb.checkpoints import Checkpoint
from rest_nb.configs import configure
from rest_nb.experiments import run_seed
from rest_nb.rows import run_row
from rest_nb.training import Steps

LONG = dict(batch_size=16, steps=24, eval_every=4, delta_t=2, seeds=[1, 2], oracle=True)
PARTS = dict(
    REST=dict(sparsity="masks.RigL", reweighting="reweighting.sample"),
    ReW=dict(reweighting="reweighting.sample", dropout=.5),
    ITOP=dict(sparsity="pruning.ITOP", reweighting="reweighting.weigh"),
    Combined=dict(sparsity="pruning.DropBySensitivity + masks.RigL", reweighting="reweighting.sample", storage="masked"),
    Momentum=dict(sparsity="pruning.Momentum"),
    GMP=dict(sparsity="pruning.GMP", storage="masked"),
    LTR=dict(sparsity="masks.StaticSparse", initial="pruning.rewound"),
    SUBG=dict(reweighting="rules.subsampled"),
    GroupDRO=dict(reweighting="rules.group_dro(step_size=0.1)"),
    LfF=dict(reweighting="rules.lff"),
    DisEnt=dict(reweighting="disentangling.disent"),
    MRM=dict(sparsity="masks.StaticSparse", initial="debiasing.mrm"),
    DCWP=dict(sparsity="masks.StaticSparse", initial="debiasing.dcwp", reweighting="debiasing.contrasted"),
    votes=dict(sparsity="masks.RigL", reweighting="reweighting.sample", guess="guesses.votes(steps=12)"),
)


def study(method):
    "One row of a tiny study whose runs last long enough to be killed."
    return dict(STUDY, methods={"ERM": {}, "it": PARTS[method]}, settings={"blobs": STUDY["settings"]["blobs"]},
                common={k: v for k, v in STUDY["common"].items() if k not in LONG},
                budgets=dict(tiny=LONG))


def train(root, made, dies=None):
    "`made`: a file that tells how many steps and writes this process has made. `dies`: (before a \"step\", a \"write\" or when it is \"written\", which)."
    torch.set_num_threads(1)
    counts = dict(step=0, write=0)

    def watched(name, real):
        def call(*args):
            counts[name] += 1
            Path(made).write_text(json.dumps(counts))
            if dies == (name, counts[name]): os.kill(os.getpid(), signal.SIGKILL)
            found = real(*args)
            if (name, dies) == ("write", ("written", counts[name])): os.kill(os.getpid(), signal.SIGKILL)
            return found
        return call
    Steps.__next__, os.replace = watched("step", Steps.__next__), watched("write", os.replace)
    run_row(root, "tiny", "blobs", "it")


def result(root): return (root / "runs" / "tiny" / "rows" / "blobs-it.json").read_bytes()


def context():
    "Processes that start with all imports done and kernels loaded, and with no thread."
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["warm", "test_checkpoints", "test_parallel", "rest_nb.pruning", "rest_nb.debiasing", "rest_nb.disentangling"])
    with pytest.MonkeyPatch.context() as patch:  # that which starts them must find these tests
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        first = forks.Process(target=int)
        first.start(); first.join()
    return forks


@pytest.mark.parametrize("method", ["REST", "LfF"])
def test_a_row_killed_at_random_points_ends_in_the_same_bits(tmp_path, method):
    undisturbed, root = (make_root(tmp_path / name, study(method)) for name in ("undisturbed", "killed"))
    forks, draw, counts, made = context(), random.Random(method), tmp_path / "counts", []

    def run(root, dies=None):
        "Train in a process of its own: whether it was killed."
        process = forks.Process(target=train, args=(root, counts, dies))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0: made.append(json.loads(counts.read_text()))
        return process.exitcode != 0
    run(undisturbed)
    deaths = [("step", made[0]["step"]), ("write", made[0]["write"]), ("written", made[0]["write"])]  # from the first to the last
    kills = 0
    while kills < 10:
        kind, most = draw.choice(deaths)
        if run(root, (kind, draw.randint(1, most))): kills += 1
        else:  # this time it came to its end: begin anew
            assert result(root) == result(undisturbed)
            (root / "runs" / "tiny" / "rows" / "blobs-it.json").unlink()
            assert not any((root / ".parts").iterdir())  # else it would not
    run(root)
    assert result(root) == result(undisturbed)
    assert any(counts["step"] < made[0]["step"] for counts in made)  # what was put aside was not made again
    assert not any((root / ".parts").iterdir())


def test_a_row_killed_once_it_is_stored_leaves_nothing_that_another_would_take(tmp_path):
    root, forks = make_root(tmp_path, study("REST")), context()
    for dies in (("written", 16), None):  # seven for each of two seeds, its seconds, and the row
        process = forks.Process(target=train, args=(root, tmp_path / "counts", dies))
        process.start()
        process.join()
        assert (process.exitcode != 0) == bool(dies) and result(root)
        assert len(json.loads((root / "runs" / "tiny" / "seconds" / "blobs-it.json").read_text())["training"]) == 2
        assert bool(dies) == any((root / ".parts").iterdir())


class Killed(BaseException): pass


def all_splits(config):
    "Two hundred samples of each, so that every cell (y, a) has two."
    splits = {name: split_of(config)(name) for name in ("train", "valid", "test")}
    return {name: dataclasses.replace(split, a=(split.y + torch.arange(200) // 10) % 10) for name, split in splits.items()}


def dying(at):
    "Wraps steps: after so many in all, the run dies."
    def progress(steps):
        for step in steps:
            yield step
            if steps.number == at: raise Killed
    return progress


@pytest.mark.parametrize("method", PARTS)
def test_every_kind_of_part_goes_on_where_it_was(tmp_path, method):
    config = configure(study(method), "tiny", "blobs", "it")
    splits = all_splits(config)
    whole, _ = run_seed(config, 1, splits.get)
    checkpoint = lambda: Checkpoint(tmp_path / "run.checkpoint", dict(method=method), splits["train"])
    for at in (2, 6, 14):  # before the first checkpoint; in the middle; once more
        with pytest.raises(Killed): run_seed(config, 1, splits.get, dying(at), checkpoint())
        torch.manual_seed(99)  # another process has other numbers
    counted = []
    again, seconds = run_seed(config, 1, splits.get, lambda steps: counted.append(steps.number) or steps, checkpoint())
    assert counted == [12] and json.dumps(again) == json.dumps(whole) and seconds > 0


def test_what_was_trained_before_is_not_trained_again(tmp_path, monkeypatch):
    config = configure(study("votes"), "tiny", "blobs", "it")
    splits, made = all_splits(config), []
    checkpoint = lambda: Checkpoint(tmp_path / "run.checkpoint", {}, splits["train"])
    monkeypatch.setattr(training, "train_step", lambda *how, real=training.train_step, **named: made.append(1) or real(*how, **named))
    with pytest.raises(Killed): run_seed(config, 1, splits.get, dying(1), checkpoint())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"run.checkpoint-{number}" for number in (1, 2, 3)]
    assert len(made) == 3 * 12 + 1  # three that vote, and a step
    with pytest.raises(Killed): run_seed(config, 1, splits.get, dying(1), checkpoint())
    assert len(made) == 3 * 12 + 2


@pytest.mark.parametrize("method", ["MRM", "DCWP"])
def test_a_mask_is_learnt_on_from_where_it_was(tmp_path, monkeypatch, method):
    config = configure(study(method), "tiny", "blobs", "it")
    splits, called = all_splits(config), []
    checkpoint = lambda: Checkpoint(tmp_path / "run.checkpoint", {}, splits["train"])
    whole, _ = run_seed(config, 1, splits.get)

    def masked_call(*how, real=debiasing.masked_call):
        called.append(1)
        if len(called) == 11: raise Killed
        return real(*how)
    monkeypatch.setattr(debiasing, "masked_call", masked_call)
    with pytest.raises(Killed): run_seed(config, 1, splits.get, checkpoint=checkpoint())
    torch.manual_seed(99)
    again, _ = run_seed(config, 1, splits.get, checkpoint=checkpoint())
    assert json.dumps(again) == json.dumps(whole) and len(called) == 11 + 24 - 8  # evaluated every 4 steps


def test_what_a_mask_learns_from_is_drawn_on_from_where_it_was(tmp_path):
    "Images that are moved about: by the same numbers again."
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(40, 3), torch.randint(0, 2, (40,))
    batches, deaths = [torch.arange(20), torch.arange(20, 40)] * 5, []

    def learn(dies=0, checkpoint=None):
        noise = torch.Generator().manual_seed(5)
        def images(index):
            deaths.append(1)
            if len(deaths) == dies: raise Killed
            return x[index] + torch.randn(20, 3, generator=noise)
        return debiasing.learn_mask(model, batches, images, y, checkpoint=checkpoint, every=3, drawing=[noise])["weight"]
    whole = learn()
    deaths.clear()
    checkpoint = Checkpoint(tmp_path / "it", {})
    with pytest.raises(Killed): learn(8, checkpoint)
    assert torch.equal(learn(checkpoint=checkpoint), whole) and len(deaths) == 8 + 10 - 6


def test_a_file_is_one_object_and_what_is_apart(tmp_path):
    apart, generator = torch.zeros(100_000), torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    checkpoint = Checkpoint(tmp_path / "deep" / "it", dict(seed=1), apart)
    checkpoint.save([weight, torch.optim.SGD([weight], .1), generator, generator, apart, lambda: torch.rand(2, generator=generator)])
    expected = torch.rand(2, generator=generator), torch.rand(3)
    torch.manual_seed(5)
    found, optimizer, one, other, back, draw = checkpoint.load()
    assert torch.equal(found, weight) and found.stride() == weight.stride() and optimizer.param_groups[0]["params"][0] is found
    assert one is other and back is apart and checkpoint.path.stat().st_size < 100_000
    assert torch.equal(draw(), expected[0]) and torch.equal(torch.rand(3), expected[1])
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["it"]


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"", lambda b: b"no json\n" + b, lambda b: b"[]\n",
                                  lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:]])
def test_a_damaged_file_is_refused_by_name(tmp_path, capsys, harm):
    checkpoint = Checkpoint(tmp_path / "it", dict(seed=1))
    checkpoint.save([1, 2])
    assert checkpoint.load() == [1, 2]
    checkpoint.path.write_bytes(harm(checkpoint.path.read_bytes()))
    assert checkpoint.load() is None
    said = capsys.readouterr().err
    assert str(checkpoint.path) in said and "damaged" in said and said.count("\n") == 1


def test_a_foreign_file_is_refused_by_what_is_foreign(tmp_path, capsys):
    Checkpoint(tmp_path / "it", dict(seed=1, code="a", versions=(1, 2))).save("theirs")
    assert Checkpoint(tmp_path / "it", dict(seed=1, code="a", versions=[1, 2])).load() == "theirs"
    assert Checkpoint(tmp_path / "it", dict(seed=1, code="b", data="c", versions=[1, 2])).load() is None
    assert "of another run (other code, data)" in capsys.readouterr().err
    assert Checkpoint(tmp_path / "none", {}).load() is None and not capsys.readouterr().err


def test_a_reader_neither_writes_nor_clears(tmp_path):
    reader = Checkpoint(tmp_path / "it", {}, is_reader=True)
    reader.save("mine"), reader.part().save("mine")
    assert not [*tmp_path.iterdir()]
    Checkpoint(tmp_path / "it", {}).save("the first one's")
    reader.clear()
    assert reader.load() == "the first one's"


def test_a_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "it", {})
    checkpoint.save("earlier")
    monkeypatch.setattr(os, "replace", lambda *how: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"): checkpoint.save("later")
    assert checkpoint.load() == "earlier" and [path.name for path in tmp_path.iterdir()] == ["it"]


def test_parts_lie_beside_and_go_with_the_whole(tmp_path):
    whole = Checkpoint(tmp_path / "it", {})
    first, second = whole.part(), whole.part()
    for checkpoint in (whole, first, second, first.part()): checkpoint.save(0)
    (tmp_path / "other").touch()
    assert len([*tmp_path.iterdir()]) == 5
    whole.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
