from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from schemas.errors import StorageError
from stages.doctor import disk
from stages.doctor.disk import check_file_system, check_locks, check_space, check_writable, file_system, probe_folder

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
30 22 0:30 / /data\040sets rw,relatime shared:5 - nfs4 server:/export rw,local_lock=none
31 30 0:31 / /data\040sets/scratch rw - tmpfs tmpfs rw
32 22 0:32 / /lfs rw - lustre 10.0.0.1@tcp:/fs rw
33 22 0:33 / /remote rw - fuse.sshfs someone@host:/ rw
34 22 8:1 / /usb rw - fuseblk /dev/sdb1 rw
35 22 0:35 / /database rw - ext4 /dev/vdb rw
broken line
"""


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights: root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_cache_root_is_left_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    for check in (check_writable, check_locks):
        assert check(root).status == "ok"
        assert list(tmp_path.iterdir()) == []
    root.mkdir(parents=True)
    (root / "store").write_bytes(b"1")
    assert check_writable(root).status == "ok"
    assert [path.name for path in root.iterdir()] == ["store"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"):
        check_writable(tmp_path / "file" / "cache")
    root = tmp_path / "read-only"
    root.mkdir(mode=0o555)
    with nobody(), pytest.raises(StorageError, match="cannot be written"):
        check_writable(root)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_cannot_be_made() -> None:
    with pytest.raises(StorageError, match="FPT_CACHE_DIR"):
        check_writable(Path("/proc/fpt"))


def test_another_process_is_refused_while_the_lock_is_held(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with FileLock(path):
        assert disk._lock_elsewhere(path) == disk._REFUSED
    assert disk._lock_elsewhere(path) == 0


def test_locks_that_exclude_no_other_process_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Granted:  # what a mount without locks gives to everybody
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(disk, "FileLock", lambda path: Granted())
    finding = check_locks(tmp_path)
    assert finding.status == "fail"
    assert "second process" in finding.detail


@pytest.mark.parametrize(
    ("free", "status"), [(10, "fail"), (disk.TOO_LITTLE, "warn"), (disk.LITTLE - 1, "warn"), (disk.LITTLE, "ok")]
)
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())
    finding = check_space(tmp_path / "not" / "yet")
    assert finding.status == status
    assert bool(finding.repair) == (status != "ok")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/cache", "ext4"),
        ("/data sets/cache", "nfs4"),
        ("/data sets/scratch/cache", "tmpfs"),
        ("/data sets 2", "ext4"),
        ("/lfs/a", "lustre"),
        ("/database/cache", "ext4"),
    ],
)
def test_the_innermost_mount_counts(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS)[0] == kind


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("ext4", "ok"), ("xfs", "ok"), ("fuseblk", "ok"), ("overlay", "ok"), ("nfs", "warn"), ("nfs4", "warn"),
        ("cifs", "warn"), ("lustre", "warn"), ("fuse.sshfs", "warn"), ("tmpfs", "warn"),
    ],
)  # fmt: skip
def test_shared_and_volatile_file_systems_are_warned_of(tmp_path: Path, kind: str, status: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 254:0 / / rw - {kind} source rw\n")
    finding = check_file_system(tmp_path / "cache", mounts)
    assert finding.status == status
    assert kind in finding.detail
    assert bool(finding.repair) == (status != "ok")


def test_a_system_without_a_list_of_mounts(tmp_path: Path) -> None:
    assert check_file_system(tmp_path, tmp_path / "none").status == "skipped"


def test_a_probe_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), probe_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_bytes(b"1")
        raise ValueError("inside")
    assert list(tmp_path.iterdir()) == []
