"""Checks of the cache root: writing, renaming, file locks, free space, and the type of its file system."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from schemas.doctor import Finding, Status
from schemas.errors import StorageError
from stages.files import atomic_write, storage_errors

LITTLE = 5 * 2**30
"""Below this many free bytes a store of a few thousand images does not fit."""
TOO_LITTLE = 2**27
"""Below this many free bytes hardly a single shard fits."""

NETWORK = {
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "9p", "virtiofs", "lustre", "beegfs", "gpfs", "ceph",
    "glusterfs", "afs", "pvfs2", "orangefs", "ocfs2", "gfs2",
}  # fmt: skip
"""Types of file systems to which other machines may write at the same time."""

_LOCK_PROGRAM = (
    "import sys\n"
    "from filelock import FileLock, Timeout\n"
    "try:\n    FileLock(sys.argv[1]).acquire(blocking=False)\n"
    "except Timeout:\n    sys.exit(7)\n"
)
_REFUSED = 7


def check_writable(root: Path) -> Finding:
    """Write a file below the cache root, rename it, read it back, and remove everything again."""
    with probe_folder(root) as folder:
        atomic_write(folder / "probe", b"1")
        atomic_write(folder / "probe", b"2")
        if (folder / "probe").read_bytes() != b"2":
            raise StorageError(f"{root} returns other bytes than were written.", repair="Choose another disk.")
    return Finding(name="cache root", status="ok", detail=str(root))


def check_locks(root: Path) -> Finding:
    """Check that a lock of this process excludes another process, and no longer does once it is released."""
    with probe_folder(root) as folder:
        path = folder / "probe.lock"
        with FileLock(path):
            while_locked = _lock_elsewhere(path)
        after_release = _lock_elsewhere(path)
    if while_locked != _REFUSED or after_release != 0:
        fault = "do not exclude a second process" if while_locked != _REFUSED else "persist after they are released"
        return Finding(
            name="file locks",
            status="fail",
            detail=f"file locks in {root} {fault}: two extractions would write the same shard",
            repair="Set FPT_CACHE_DIR to a folder on another file system, or mount this one with locks.",
        )
    return Finding(name="file locks", status="ok", detail="work between processes")


def _lock_elsewhere(path: Path) -> int:
    """Return the exit status of another process that tries to take a lock."""
    program = [sys.executable, "-c", _LOCK_PROGRAM, str(path)]
    return subprocess.run(program, capture_output=True, timeout=30, check=False).returncode


def check_space(root: Path) -> Finding:
    """Check the free space available to an unprivileged user."""
    free = shutil.disk_usage(_existing(root)).free
    status: Status = "fail" if free < TOO_LITTLE else "warn" if free < LITTLE else "ok"
    repair = "Free space, or set FPT_CACHE_DIR to a larger disk; `fpt extract --plan` shows what a study needs."
    detail = f"{free / 2**30:,.1f} GiB free"
    return Finding(name="free space", status=status, detail=detail, repair="" if status == "ok" else repair)


def check_file_system(root: Path, mounts: Path = Path("/proc/self/mountinfo")) -> Finding:
    """Check whether the file system is local, in memory, or shared with other machines (Linux)."""
    try:
        kind, source = file_system(_existing(root), mounts.read_text())
    except (OSError, LookupError):
        return Finding(name="file system", status="skipped", detail="unknown on this operating system")
    detail = f"{kind} ({source})"
    if kind in NETWORK or (kind.startswith("fuse") and kind != "fuseblk"):
        return Finding(
            name="file system",
            status="warn",
            detail=f"{detail}: shared or in user space. Whether locks work between machines depends on the mount "
            "options, reading single rows in training is slow, and memory-mapped files may be outdated",
            repair="Set FPT_CACHE_DIR to a local disk and share with `fpt cache push` and `pull`.",
        )
    if kind in ("tmpfs", "ramfs"):
        return Finding(
            name="file system",
            status="warn",
            detail=f"{detail}: features are kept in memory and lost when the machine restarts",
            repair="Set FPT_CACHE_DIR to a disk.",
        )
    return Finding(name="file system", status="ok", detail=detail)


def file_system(path: Path, mounts: str) -> tuple[str, str]:
    """Return type and source of the file system of `path`.

    Args:
        path: An existing path.
        mounts: Text of `/proc/self/mountinfo` (proc(5)): the fifth field is the mount point; `-`, type and source
            follow later.

    Raises:
        LookupError: If no mount contains it.
    """
    place, best = path.resolve(), ("", "", -1)
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        fields, after = head.split(), tail.split()
        if len(fields) < 5 or len(after) < 2:
            continue
        point = Path(_plain(fields[4]))
        # The later of two mounts on the same point hides the earlier one.
        if place.is_relative_to(point) and len(point.parts) >= best[2]:
            best = (after[0], _plain(after[1]), len(point.parts))
    if best[2] < 0:
        raise LookupError(str(path))
    return best[0], best[1]


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


@contextmanager
def probe_folder(root: Path) -> Iterator[Path]:
    """Create a temporary folder below the cache root and remove it afterwards, with the root if that is new.

    Raises:
        StorageError: If it cannot be created.
    """
    made: list[Path] = []
    folder = root / f".doctor-{uuid4().hex}"
    try:
        with storage_errors(root):
            made = [each for each in (root, *root.parents) if not each.exists()]
            folder.mkdir(parents=True)
        yield folder
    except FileNotFoundError as error:  # such as below /proc
        raise StorageError(
            f"{root} cannot be created.", str(error.strerror), "Set FPT_CACHE_DIR to a writable folder."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in made:
            with suppress(OSError):  # another process uses it by now
                each.rmdir()
