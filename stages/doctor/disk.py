"""The cache root: can it be written, do renames and locks hold there, how much room, on what kind of file system."""

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
"""Free bytes below which a store of some thousand images does not fit."""
TOO_LITTLE = 2**27
"""Free bytes below which hardly a shard fits."""

NETWORK = {
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "9p", "virtiofs", "lustre", "beegfs", "gpfs", "ceph",
    "glusterfs", "afs", "pvfs2", "orangefs", "ocfs2", "gfs2",
}  # fmt: skip
"""Types of file systems that other machines may write at the same time."""

_TRY = (
    "import sys\n"
    "from filelock import FileLock, Timeout\n"
    "try:\n    FileLock(sys.argv[1]).acquire(blocking=False)\n"
    "except Timeout:\n    sys.exit(7)\n"
)
_REFUSED = 7


def check_writable(root: Path) -> Finding:
    """Write a file below the cache root, rename it, read it back, and take everything away again."""
    with probe_folder(root) as folder:
        atomic_write(folder / "probe", b"1")
        atomic_write(folder / "probe", b"2")
        if (folder / "probe").read_bytes() != b"2":
            raise StorageError(f"{root} gives back other bytes than were written.", repair="Choose another disk.")
    return Finding(name="cache root", status="ok", detail=str(root))


def check_locks(root: Path) -> Finding:
    """Whether a lock that this process holds keeps another process out, and lets it in afterwards."""
    with probe_folder(root) as folder:
        path = folder / "probe.lock"
        with FileLock(path):
            held = _other_process(path)
        free = _other_process(path)
    if held != _REFUSED or free != 0:
        what = "do not keep a second process out" if held != _REFUSED else "stay when they are given back"
        return Finding(
            name="file locks",
            status="fail",
            detail=f"file locks in {root} {what}: two extractions would write the same shard",
            repair="Set FPT_CACHE_DIR to a folder on another file system, or mount this one with locks.",
        )
    return Finding(name="file locks", status="ok", detail="hold between processes")


def _other_process(path: Path) -> int:
    done = subprocess.run([sys.executable, "-c", _TRY, str(path)], capture_output=True, timeout=30, check=False)
    return done.returncode


def check_space(root: Path) -> Finding:
    """Free bytes for a user without privileges."""
    free = shutil.disk_usage(_existing(root)).free
    status: Status = "fail" if free < TOO_LITTLE else "warn" if free < LITTLE else "ok"
    repair = "Free space, or set FPT_CACHE_DIR to a larger disk; `fpt extract --plan` says what a study needs."
    detail = f"{free / 2**30:,.1f} GiB free"
    return Finding(name="free space", status=status, detail=detail, repair="" if status == "ok" else repair)


def check_file_system(root: Path, mounts: Path = Path("/proc/self/mountinfo")) -> Finding:
    """Local, in memory, or shared with other machines (Linux)."""
    try:
        kind, source = file_system(_existing(root), mounts.read_text())
    except (OSError, LookupError):
        return Finding(name="file system", status="skipped", detail="this system does not say")
    detail = f"{kind} ({source})"
    if kind in NETWORK or (kind.startswith("fuse") and kind != "fuseblk"):
        return Finding(
            name="file system",
            status="warn",
            detail=f"{detail}: shared or in user space. Locks between machines depend on how it is mounted, training "
            "reads single rows, and mapped files may show an old state",
            repair="Set FPT_CACHE_DIR to a local disk and share with `fpt cache push` and `pull`.",
        )
    if kind in ("tmpfs", "ramfs"):
        return Finding(
            name="file system",
            status="warn",
            detail=f"{detail}: features lie in memory and are gone when the machine restarts",
            repair="Set FPT_CACHE_DIR to a disk.",
        )
    return Finding(name="file system", status="ok", detail=detail)


def file_system(path: Path, mounts: str) -> tuple[str, str]:
    """Type and source of the file system that holds `path`.

    Args:
        path: An existing path.
        mounts: Text of `/proc/self/mountinfo` (proc(5)): ... mount point at 5, `-`, type, source.

    Raises:
        LookupError: If no mount holds it.
    """
    place, best = path.resolve(), ("", "", -1)
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        fields, after = head.split(), tail.split()
        if len(fields) < 5 or len(after) < 2:
            continue
        point = Path(_plain(fields[4]))
        # Of two mounts on one point the later covers the earlier.
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
    """A folder of its own below the cache root; afterwards all is as it was, also where there was no root.

    Raises:
        StorageError: If it cannot be made.
    """
    made: list[Path] = []
    folder = root / f".doctor-{uuid4().hex}"
    try:
        with storage_errors(root):
            made = [each for each in (root, *root.parents) if not each.exists()]
            folder.mkdir(parents=True)
        yield folder
    except FileNotFoundError as error:  # such as below /proc, where nothing can be made
        raise StorageError(
            f"{root} cannot be made.", str(error.strerror), "Set FPT_CACHE_DIR to a folder that can be written."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in made:
            with suppress(OSError):  # somebody else's by now
                each.rmdir()
