"To compute as a plainer processor does."
import json
import os
import subprocess
import sys

import pytest
import torch

from rest_nb import __main__ as commands
from rest_nb.processors import PLAINER, compute_as

needs_avx2 = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this processor has no AVX2")


@pytest.fixture
def environ(monkeypatch):
    "An environment that no other test sees, without what may be set here."
    own = {name: value for name, value in os.environ.items() if name not in ("REST_NB_VECTORS", *PLAINER["AVX2"])}
    monkeypatch.setattr(os, "environ", own)
    return own


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"vectors are 'AVX3'; expected one of AVX2"): compute_as("AVX3")


def test_what_this_processor_lacks_is_not_pretended(environ, monkeypatch):
    monkeypatch.setattr("rest_nb.processors.binding.get_host_cpu_features", lambda: dict(neon=True))
    before = dict(environ)
    compute_as("AVX2")
    assert environ == before


def test_commands_begin_without_what_has_looked_at_the_processor_already():
    "`search` computes in its own process."
    code = "import sys, rest_nb.__main__; assert not {'torch', 'numba'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_avx2
def test_kernels_of_half_the_width_compute_the_same_as_pytorch():
    "Batches that fill the narrower registers, and such that do not; PyTorch is the oracle, in double precision."
    code = """if True:
        from rest_nb.processors import compute_as
        compute_as("AVX2")
        import copy, torch
        from torch import nn
        from rest_nb.kernels import LANES
        from rest_nb.sparse import densify, sparsify
        assert (LANES, torch.backends.cpu.get_cpu_capability()) == (8, "AVX2")
        torch.manual_seed(0)
        ours = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)), .3).double()
        theirs = densify(copy.deepcopy(ours))
        for batch in (1, 7, 8, 9, 64, 75):
            x, y = (torch.rand(batch, 3, 9, 9, dtype=torch.double).requires_grad_() for _ in range(2))
            y.data.copy_(x)
            a, b = ours(x), theirs(y)
            a.square().sum().backward(), b.square().sum().backward()
            assert torch.allclose(a, b) and torch.allclose(x.grad, y.grad), batch
        print("same")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


def stored(path, **versions):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(versions=versions)))


@needs_avx2
@pytest.mark.parametrize("asked, made_by, computes_as", [
    (None, "AVX2", "AVX2"), (None, "AVX512", None), (None, None, None), (None, "nothing stored", None), ("AVX2", "AVX512", "AVX2"), ("AVX2", "nothing stored", "AVX2")])
def test_a_row_is_made_again_by_what_made_it(environ, monkeypatch, tmp_path, asked, made_by, computes_as):
    if made_by != "nothing stored": stored(tmp_path / "runs/tiny/rows/blobs-ERM.json", **dict(vectors=made_by) if made_by else {})
    if asked: environ["REST_NB_VECTORS"] = asked
    seen = []
    monkeypatch.setattr(commands, "project_root", lambda: tmp_path)
    def read_params(path):
        seen.append({name: os.environ.get(name) for name in PLAINER["AVX2"]})
        raise ValueError("far enough")
    monkeypatch.setattr("rest_nb.configs.read_params", read_params)
    assert commands.main(["row", "tiny", "blobs", "ERM"]) == 1
    assert seen == [PLAINER["AVX2"] if computes_as else dict.fromkeys(PLAINER["AVX2"])]


@needs_avx2
@pytest.mark.parametrize("words, path", [
    (["row", "tiny", "blobs", "ERM"], "tiny/rows/blobs-ERM.json"), (["search", "blobs", "ERM"], "search/blobs-ERM.json"),
    (["looks"], "cpu/rows/cmnist-0005-REST.json")])
def test_each_command_that_trains_looks_where_its_result_is_stored(environ, monkeypatch, tmp_path, words, path):
    def made(*args, **options): raise ValueError(os.environ.get("ATEN_CPU_CAPABILITY"))
    for name in ("rest_nb.configs.read_params", "rest_nb.rows.ready", "rest_nb.__main__.execute"): monkeypatch.setattr(name, made)
    stored(tmp_path / "runs" / path, vectors="AVX512")
    with pytest.raises(ValueError, match="None"): commands.COMMANDS[words[0]](tmp_path, *words[1:])
    stored(tmp_path / "runs" / path, vectors="AVX2")
    with pytest.raises(ValueError, match="avx2"): commands.COMMANDS[words[0]](tmp_path, *words[1:])


@pytest.mark.parametrize("lacks", [True, False])
def test_who_cannot_make_a_row_as_it_was_made_is_told(environ, monkeypatch, tmp_path, capsys, lacks):
    stored(tmp_path / "blobs-ERM.json", vectors="AVX512")
    monkeypatch.setattr("rest_nb.processors.binding.get_host_cpu_features", lambda: dict(avx2=True, avx512f=not lacks))
    commands.as_stored(tmp_path / "blobs-ERM.json")
    told = "blobs-ERM.json was made with AVX-512, which this processor lacks: if it must be made again, its digits will be others\n"
    assert capsys.readouterr().err == (told if lacks else "") and not environ.keys() & PLAINER["AVX2"].keys()


def test_an_unknown_name_in_the_environment_is_one_line(environ, capsys):
    environ["REST_NB_VECTORS"] = "avx3"
    assert commands.main(["check"]) == 1
    assert capsys.readouterr().err == "rest_nb check: vectors are 'avx3'; expected one of AVX2\n"
