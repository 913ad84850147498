"Disks that fill: ways for a write to fail half-way."
import contextlib
import errno
import os
import resource
from pathlib import Path


@contextlib.contextmanager
def full_disk(room):
    "The kernel refuses to let any file grow beyond `room` bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_while_writing(monkeypatch):
    real = Path.write_text

    def write_half(path, text, *args, **kwargs):
        real(path, text[:len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", write_half)


def full_while_renaming(monkeypatch):
    def refuse(*paths): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", refuse)
