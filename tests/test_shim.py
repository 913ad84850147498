"torchvision beside a CPU torch: declared is what is missed, no more."

import sys

import pytest
import torch
from torch import library

from rest_nb import shim
from rest_nb.shim import load_torchvision

@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch):
    """`fake_torchvision(code)` makes `import torchvision` run that code; returns the operators declared.

    The code finds that list as `declared`. torch itself is left alone, and the real torchvision comes back.
    """
    load_torchvision()
    def drop():
        return {it: sys.modules.pop(it) for it in list(sys.modules) if it.split(".")[0] == "torchvision"}
    real, declared = drop(), []

    class Library:
        def __init__(self, namespace, kind): assert (namespace, kind) == ("torchvision", "FRAGMENT")
        def define(self, schema): declared.append(schema.split("(")[0])
    monkeypatch.setattr(shim, "_declared", {})
    monkeypatch.setattr(library, "Library", Library)
    monkeypatch.setattr(torch, "declared_by_test", declared, raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def install(code):
        init = f"from torch import declared_by_test as declared\nfrom torchvision import part\n{code}\n"
        part = "from torch import declared_by_test as declared\nseen = list(declared)\n"
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(init)
        (tmp_path / "torchvision" / "part.py").write_text(part)
        return declared
    yield install
    drop()
    sys.modules.update(real)


NEEDS = """for name in {}:
    if name not in declared: raise RuntimeError(f'operator torchvision::{{name}} does not exist')"""


def test_a_torchvision_that_imports_is_left_alone(fake_torchvision):
    declared = fake_torchvision("answer = 42")
    assert load_torchvision().answer == 42
    assert declared == [] and shim._declared == {}


def test_operators_are_declared_as_they_are_missed(fake_torchvision):
    declared = fake_torchvision(NEEDS.format(("nms", "qnms")))
    assert load_torchvision().part.seen == ["nms", "qnms"]  # its parts, too, are imported anew at each try
    assert declared == ["nms", "qnms"]
    assert set(shim._declared) == {"nms", "qnms"}  # held, else torch forgets them
    load_torchvision()
    assert declared == ["nms", "qnms"]


def test_qnms_alone_is_not_taken_for_nms(fake_torchvision):
    declared = fake_torchvision(NEEDS.format(("qnms",)))
    load_torchvision()
    assert declared == ["qnms"]


@pytest.mark.parametrize("code, message", [
    ("raise RuntimeError('the disk is on fire')", "on fire"),
    (NEEDS.format(("roi_align",)), "roi_align does not exist"),
    ("raise ImportError('libcudart.so')", "libcudart"),
])
def test_what_we_know_no_mend_for_is_raised(code, message, fake_torchvision):
    declared = fake_torchvision(code)
    with pytest.raises((RuntimeError, ImportError), match=message): load_torchvision()
    assert declared == []


def test_an_operator_missed_twice_is_raised_not_tried_for_ever(fake_torchvision):
    declared = fake_torchvision("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(RuntimeError, match="torchvision::nms"): load_torchvision()
    assert declared == ["nms"]


def test_the_real_torchvision_is_loaded_once_and_works():
    torchvision = load_torchvision()
    assert torchvision is load_torchvision() is sys.modules["torchvision"]
    assert torchvision.transforms.functional.hflip(torch.tensor([[[1, 2]]])).tolist() == [[[2, 1]]]
