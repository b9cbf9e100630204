"""Atomic writes, and explanations of disk errors."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from pathlib import Path

import pytest

from schemas.errors import DataError, StorageError
from stages.files import atomic_write, irregular, read_small, require_regular_file, sha256_file, storage_errors


def test_writes_reads_and_digests(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert sha256_file(path) == hashlib.sha256(b"two").hexdigest()
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic_write(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"old"
    assert not (tmp_path / "link").is_symlink()


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        atomic_write(tmp_path / "a", b"new")
    assert "disk is full" in caught.value.cause and "MiB free" in caught.value.cause
    assert "again" in caught.value.repair
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk() -> None:
    full = Path("/dev/full")
    with pytest.raises(StorageError, match="disk is full"), storage_errors(full), full.open("wb", buffering=0) as file:
        file.write(b"x")


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    uid = os.geteuid()
    try:
        if uid == 0:
            os.seteuid(65534)
        with pytest.raises(StorageError) as caught:
            atomic_write(tmp_path / "a", b"")
    finally:
        if uid == 0:
            os.seteuid(0)
        tmp_path.chmod(0o755)
    assert "Permission denied" in str(caught.value) and str(tmp_path / "a") in caught.value.state


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError, match="a file instead of a folder"):
        atomic_write(tmp_path / "a" / "b" / "c", b"")


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EPERM, errno.EROFS, errno.EIO])
def test_other_refusals(tmp_path: Path, code: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert caught.value.state and caught.value.cause and caught.value.repair
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), storage_errors(tmp_path):
        (tmp_path / "a").touch()
        (tmp_path / "a").touch(exist_ok=False)
    first = StorageError("told already")
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise first
    assert caught.value is first


def test_only_regular_files_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is limited to about 100 bytes
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo("pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    kinds = {"file": None, "link": None, "pipe": "a named pipe", "to-pipe": "a named pipe", ".": "a folder"}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        kinds |= {"socket": "a socket", "/dev/zero": "a device"}
        for name, kind in kinds.items():
            assert irregular(Path(name)) == kind
            if kind is None:
                require_regular_file(Path(name))
                assert read_small(Path(name), 5) == b"12345"
                continue
            with pytest.raises(StorageError, match=f"is {kind}, not a regular file"):
                require_regular_file(Path(name))
            with pytest.raises(DataError, match=f"is {kind}"):
                read_small(Path(name), 5, DataError)
    with pytest.raises(FileNotFoundError):
        require_regular_file(tmp_path / "nowhere")


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"1" * (2**20 + 1))
    assert len(read_small(tmp_path / "large", 2**20 + 1)) == 2**20 + 1
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_small(tmp_path / "large", 2**20, DataError)
