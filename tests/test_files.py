"""Files are whole or not there, whatever stops a save; nothing of a file that is read stays tied to the disk."""

import errno
import json
import os
import stat
import subprocess
import sys
import time

import pytest
import torch

from kvstack import UseError, WriteError
from kvstack import files as writing
from kvstack.files import parsed_json, read_tensors, write_bytes, write_tensors

unix = pytest.mark.skipif(os.name == "nt", reason="permissions, links and locks of Unix")
nobody_special = pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_file(number, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    write_bytes(path, b"old")

    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UseError, match=rf"cache' cannot be written: {os.strerror(number)}\. What was there is unchanged"
    ):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["cache"]


@unix
def test_a_file_that_may_not_grow(tmp_path):
    """A real limit of the system: the file would be larger than this process may write."""
    import resource

    path = tmp_path / "cache"
    write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(WriteError, match="cannot be written: File too large"):
            write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["cache"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(WriteError, match=r"is a folder\. Name a file in it"):
        write_bytes(tmp_path, b"new")
    with pytest.raises(UseError, match=r"is not a file\. Again"):
        read_tensors(tmp_path, UseError, "cache", "Again.")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "cache", b"new")
    with pytest.raises(UseError, match="cannot be read"):
        read_tensors(tmp_path / "file" / "cache", UseError, "cache", "Again.")


@pytest.mark.parametrize("name", ["n" * 300, "with\0null"])
def test_names_that_no_file_can_have(name, tmp_path):
    with pytest.raises(WriteError, match="cannot be written"):
        write_bytes(tmp_path / name, b"new")
    with pytest.raises(UseError):
        read_tensors(tmp_path / name, UseError, "cache", "Again.")


def test_a_name_as_long_as_names_may_be(tmp_path):
    for name in ("n" * 250, "ä" * 120):
        write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


@unix
@nobody_special
def test_a_folder_that_may_only_be_read(tmp_path):
    path = tmp_path / "folder" / "cache"
    write_bytes(path, b"old")
    path.parent.chmod(0o500)
    try:
        with pytest.raises(WriteError, match="cannot be written: Permission denied"):
            write_bytes(path, b"new")
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == b"old"


@unix
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640, 0o444, 0o777])
def test_permissions_are_kept(mode, tmp_path):
    path = tmp_path / "cache"
    write_bytes(path, b"old")
    path.chmod(mode)
    write_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@unix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_files_obey_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "cache", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o666 & ~mask


@unix
def test_a_link_stays(tmp_path):
    """What it points to is replaced, there or not yet there, with links on the way."""
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "cache", tmp_path / "link", tmp_path / "second"
    link.symlink_to("far/cache")
    second.symlink_to("link")
    for data in (b"one", b"two"):
        write_bytes(second, data)
        assert target.read_bytes() == data
        assert link.is_symlink()
        assert second.is_symlink()
    assert names(tmp_path / "far") == ["cache"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(WriteError):
        write_bytes(loop, b"new")
    assert loop.is_symlink()


@unix
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="is not an ordinary file"):
        write_bytes(tmp_path / "pipe", b"new")
    with pytest.raises(UseError, match="is not a file"):
        read_tensors(tmp_path / "pipe", UseError, "cache", "Again.")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


WRITES = """
import os, sys, time
from kvstack.files import write_bytes
def wait(handle):
    print("writing", flush=True)
    time.sleep(600)
os.fsync = wait
from pathlib import Path
write_bytes(Path(sys.argv[1]), b"half")
"""


@unix
def test_what_a_killed_save_left_is_removed(tmp_path):
    """By the next save of the same file, not while the process lives, and nothing else in the folder."""
    path = tmp_path / "cache"
    others = [".cache.settings", ".cache.0123abcd", ".cachf.0123abcd.kvstack-part", "cache.0123abcd.kvstack-part"]
    for other in others:
        (tmp_path / other).write_bytes(b"mine")
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        (partial,) = set(names(tmp_path)) - set(others)
        write_bytes(path, b"one")
        assert names(tmp_path) == sorted([*others, partial, "cache"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    write_bytes(path, b"two")
    assert names(tmp_path) == sorted([*others, "cache"])
    assert path.read_bytes() == b"two"


def test_saves_at_once(tmp_path):
    """Threads that write one file: it is always one of them, whole, and nothing is left."""
    from threading import Thread

    path, faults, end = tmp_path / "cache", [], time.monotonic() + 1

    def write(number):
        while time.monotonic() < end:
            try:
                write_bytes(path, bytes([number]) * 5000)
                data = path.read_bytes()
                assert len(data) == 5000
                assert len(set(data)) == 1
            except Exception as error:
                faults.append(error)

    threads = [Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert names(tmp_path) == ["cache"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_nothing(error, tmp_path, monkeypatch):
    def stop(handle):
        raise error

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(error):
        write_bytes(tmp_path / "cache", b"new")
    assert names(tmp_path) == []


# ---- reading


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.empty(0, 4, dtype=torch.int32), "c": torch.tensor(7).half()}


def test_what_is_read_is_what_safetensors_reads(tmp_path):
    from safetensors.torch import load_file

    every = TENSORS | {str(dtype): torch.ones(3).to(dtype) for dtype in writing.DTYPES.values()}
    write_tensors(tmp_path / "file", every, {"some": "thing"})
    metadata, tensors = read_tensors(tmp_path / "file", UseError, "cache", "")
    assert metadata == {"some": "thing"}
    expected = load_file(tmp_path / "file")
    assert tensors.keys() == expected.keys() == every.keys()
    for name, x in tensors.items():
        assert (x.dtype, x.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(x.flatten().view(torch.uint8), expected[name].flatten().view(torch.uint8))


def test_tensors_do_not_change_with_the_file(tmp_path):
    """A file that is truncated while its tensors are in use ends the process where it is mapped into memory."""
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(100_000)}, {})
    _, tensors = read_tensors(path, UseError, "cache", "")
    with open(path, "r+b") as file:
        file.truncate(10)
    assert float(tensors["a"].sum()) == 100_000


def header(**changes):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return {"a": entry}


BAD = {
    "short": b"\1",
    "long header": (2**63).to_bytes(8, "little") + b"{}",
    "no json": (2).to_bytes(8, "little") + b"{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a type": header(dtype="F33"),
    "a type that is no word": header(dtype=[]),
    "a shape": header(shape=[2, -3]),
    "a shape that is no list": header(shape=6),
    "true": header(shape=[True, 6]),
    "another size": header(shape=[2, 4]),
    "huge": header(shape=[2**62, 2**62]),
    "huge and empty": header(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "a hole": header(data_offsets=[4, 28]),
    "beyond": header(shape=[2**40], data_offsets=[0, 2**42]),
    "backwards": header(data_offsets=[24, 0]),
    "places": header(data_offsets=[0]),
    "more": header(more=1),
    "metadata": {"__metadata__": {"a": 1}},
    "metadata that is a list": {"__metadata__": []},
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_safetensors(name, tmp_path):
    data = BAD[name]
    if isinstance(data, dict):
        head = json.dumps(data).encode()
        data = len(head).to_bytes(8, "little") + head + bytes(24)
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UseError, match=r"file' is damaged or not a cache: .*\. Again\."):
        read_tensors(tmp_path / "file", UseError, "cache", "Again.")


@pytest.mark.parametrize("text", ["NaN", '{"a": 1, "a": 2}', "[" * 100_000, "{", "1" * 5000, b"\xff", ""])
def test_json_that_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parsed_json(text)
