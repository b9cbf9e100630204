"""Write files atomically, open regular files only, and turn disk errors into messages with a repair."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from schemas.errors import FptError, StorageError

_RERUN = "then run the same command again: finished work is kept."

_MEANING = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EACCES: "Permission denied",
    errno.EPERM: "The system does not allow it",
    errno.EROFS: "The file system is read-only",
    errno.ENOTDIR: "A component of the path is a file instead of a folder",
    errno.EISDIR: "A folder is in the place of the file",
    errno.EIO: "The disk reported an input/output error",
}

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is either the old or the complete new one.

    A link at `path` is replaced, never followed: its target may belong to someone else, such as DVC's cache. Missing
    parent folders are created.

    Raises:
        StorageError: The disk is full or the folder cannot be written; no temporary file is left behind.
    """
    # In the same folder, because a rename is atomic only within a file system; hidden, so that listings skip it.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Not tempfile, whose files only their owner can read: caches are shared.
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def open_regular(path: Path | str) -> int:
    """Open a regular file, or a link to one, for reading and return its descriptor.

    Raises:
        FileNotFoundError: If it does not exist.
        OSError: If it cannot be read, or is a folder, FIFO, socket or device, which could block or never end.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer; regular files ignore the flag.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def read_regular(path: Path | str) -> bytes:
    """Return the content of a regular file; raises like `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def irregular(path: Path) -> str | None:
    """Return the type of a path that is not a regular file, such as "a named pipe", else None. Links are followed.

    Raises:
        OSError: The path does not exist or cannot be accessed.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a special file")


def require_regular_file(path: Path, error: type[FptError] = StorageError) -> None:
    """Refuse folders, pipes, sockets and devices before they are opened: reading them could block or never end.

    Args:
        path: The path; links are followed.
        error: Type of the error to raise; its arguments are state, cause and repair.

    Raises:
        FptError: The path is not a regular file; of the type `error`.
        OSError: The path does not exist or cannot be accessed.
    """
    if kind := irregular(path):
        raise error(f"{path} is {kind}, not a regular file.", "", "Choose a regular file.")


def read_small(path: Path, limit: int, error: type[FptError] = StorageError) -> bytes:
    """Read a small regular file completely.

    Args:
        path: The path; links are followed.
        limit: Largest size in bytes.
        error: Type of the error to raise, as in `require_regular_file`.

    Raises:
        FptError: The file is too large or not a regular file; of the type `error`.
        OSError: It does not exist or cannot be read.
    """
    require_regular_file(path, error)
    with os.fdopen(open_regular(path), "rb") as file:
        # One byte more than allowed, to detect larger files without relying on their reported size.
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path} is larger than {limit / 2**20:g} MiB.", "", "Check that it is the right file.")
    return data


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of a regular file, read in small pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert disk errors within the block into a `StorageError` about `path`.

    Covers a full disk, quota, permissions, a read-only file system, a file in the place of a folder, and input/output
    errors. Other errors pass through: what a missing or existing file means depends on the caller.

    Args:
        path: The file or folder that is being written.

    Raises:
        StorageError: With state, cause and repair.
    """
    try:
        yield
    except OSError as error:
        # A `StorageError` raised within the block has no errno and passes through unchanged.
        if error.errno not in _MEANING:
            raise
        raise _storage_error(path, error.errno) from error


def _storage_error(path: Path, code: int) -> StorageError:
    cause = f"{_MEANING[code]}."
    if code in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path)
        if free is not None:
            cause = f"{_MEANING[code]} ({free / 2**20:,.0f} MiB free)."
        repair = f"Free space there, or choose another disk (FPT_CACHE_DIR for cached features), {_RERUN}"
    elif code == errno.EIO:
        repair = "Check the disk, or choose another one (FPT_CACHE_DIR for cached features)."
    else:
        repair = f"Make it writable, or choose another folder (FPT_CACHE_DIR for cached features), {_RERUN}"
    return StorageError(f"{path} cannot be written.", cause, repair)


def _free_bytes(path: Path) -> int | None:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def _sync_folder(folder: Path) -> None:
    # Makes the rename survive a power cut. Some network file systems do not support this; the file is complete anyway.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
