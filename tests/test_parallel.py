"""One run of two processes: gloo on this machine, against one process with the same batches."""
import pytest
import torch
from test_checkpoints import context, result, study
from test_experiments import make_root, split_of
from torch import distributed, nn
from torch.nn import functional as F

from rest_nb.configs import configure
from rest_nb.masks import SET, RigL
from rest_nb.parallel import Shared, is_first, processes, shares
from rest_nb.reweighting import shuffled_batches
from rest_nb.rows import run_row
from rest_nb.sparse import sparsify
from rest_nb.training import Steps


def meet(rank, n, folder, function, *args):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def by_two(folder, function, *args):
    "What each of two processes says."
    forks = context()
    both = [forks.Process(target=meet, args=(rank, 2, str(folder), function, *args)) for rank in (0, 1)]
    for process in both: process.start()
    for process in both:
        process.join(120)
        if process.exitcode is None: process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    return [torch.load(f"{folder}/{rank}.pt") for rank in (0, 1)]


def train(kind, storage, steps=12):
    "A network without batch-norm in double precision: weights, masks after each step, losses."
    torch.manual_seed(0 if is_first() else 1)  # the second begins with other weights, and gets the first's
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).double()
    density = .3
    if storage == "compact":
        sparsify(model, density)
        density = None
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    hooks = [Shared(model)] if processes() > 1 else []
    hooks.append(kind(model, optimizer, density, delta_t=3, t_end=steps, drop_fraction=.5, seed=3))
    batches = shuffled_batches(200, 40, steps, torch.Generator().manual_seed(5))
    data = split_of(CONFIG)("train")
    going = Steps(model, optimizer, data, shares(batches, steps) if processes() > 1 else batches, hooks=hooks,
                  inputs=lambda x, index=None, generator=None: x[index].double() / 255, loss=lambda logits, y, index: F.cross_entropy(logits, y))
    losses, masks = [], []
    for _, loss in going:
        losses.append(loss)
        masks.append({name: mask.clone() for name, mask in hooks[-1].masks.items()})
    return dict(weights=[p.detach() for p in model.parameters()], masks=masks, losses=losses, updates=hooks[-1].updates)


CONFIG = configure(study("REST"), "tiny", "blobs", "it")


@pytest.mark.parametrize("kind, storage", [(RigL, "masked"), (RigL, "compact"), (SET, "compact")])
def test_two_processes_do_what_one_does(tmp_path, kind, storage):
    alone, (first, second) = train(kind, storage), by_two(tmp_path, train, kind, storage)
    assert alone["updates"] == first["updates"] == 3
    for ours, theirs, mine in zip(first["masks"], second["masks"], alone["masks"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) and torch.equal(ours[name], mine[name]) for name in ours)
    assert any(not torch.equal(alone["masks"][0][name], alone["masks"][-1][name]) for name in alone["masks"][0])
    for a, b, c in zip(first["weights"], second["weights"], alone["weights"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)
    for a, b, c in zip(first["losses"], second["losses"], alone["losses"], strict=True):
        assert a != b and (a + b) / 2 == pytest.approx(c, rel=1e-6)  # logits are single precision


def row(root):
    from pathlib import Path
    return run_row(Path(root), "tiny", "blobs", "it")


def test_a_row_of_two_processes_is_stored_by_one_and_says_so(tmp_path):
    root = make_root(tmp_path / "project", study("REST"))
    first, second = by_two(tmp_path, row, str(root))
    assert first == second and first["versions"]["processes"] == 2 and result(root).count(b"history") == 2
    assert all(run["spent"]["updates"] == 8 for run in first["runs"])
    assert not any((root / ".parts").iterdir())


def test_parts_are_a_cut_of_every_batch(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)
        assert is_first() == (rank == 0)
        parts.append([*shares(shuffled_batches(20, 6, 4, torch.Generator().manual_seed(0)), 4)])
    for step, batch in enumerate(shuffled_batches(20, 6, 4, torch.Generator().manual_seed(0))):
        assert sorted(torch.cat([part[step] for part in parts]).tolist()) == sorted(batch.tolist())
        assert [len(part[step]) for part in parts] == [2, 2, 2]


def test_a_batch_that_cannot_be_cut_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="^7 samples in a batch; expected a multiple of the 3 processes"): next(shares([torch.arange(7)], 1))


def test_nobody_shares_without_a_group(): assert processes() == 1 and is_first()
