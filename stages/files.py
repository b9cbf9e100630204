"""Files that are either whole or not there, and disk errors that say what to do."""

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

_AGAIN = "then run the same command again: finished work is kept."

_MEANING = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EACCES: "Permission denied",
    errno.EPERM: "The system does not allow it",
    errno.EROFS: "The file system is read-only",
    errno.ENOTDIR: "A part of the path is a file where a folder is needed",
    errno.EISDIR: "A folder is where a file belongs",
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
    """Write a file so that it is either the old one or the whole new one, also after a crash.

    A link at `path` is replaced, never written through: the target may belong to someone else, such as DVC's cache.
    Folders above `path` are made.

    Raises:
        StorageError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    # In the same folder: a rename is atomic within one file system only. Hidden, so that no listing takes it for data.
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # "xb" and not tempfile: that makes files that only their owner can read, and caches are shared.
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def open_regular(path: Path | str) -> int:
    """Open a regular file, or a link to one, for reading and return its descriptor.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read, or is a folder, FIFO, socket or device, which could block or never end.
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer; regular files ignore it.
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
    """Return what a path leads to, such as "a named pipe", or None for a regular file. Links are followed.

    Raises:
        OSError: The path does not exist or cannot be reached.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "a special file")


def require_regular_file(path: Path, error: type[FptError] = StorageError) -> None:
    """Refuse folders, pipes, sockets and devices before anything opens them: a read could wait forever or never end.

    Args:
        path: Links are followed.
        error: Raised instead of `StorageError` where another leaf of the error tree fits; takes state, cause, repair.

    Raises:
        FptError: Of the type `error`.
        OSError: The path does not exist or cannot be reached.
    """
    if kind := irregular(path):
        raise error(f"{path} is {kind}, not a regular file.", "", "Choose a regular file.")


def read_small(path: Path, limit: int, error: type[FptError] = StorageError) -> bytes:
    """Read a small regular file completely.

    Args:
        path: Links are followed.
        limit: Largest size, in bytes; a larger file is refused before it is read.
        error: As in `require_regular_file`.

    Raises:
        FptError: Of the type `error`: it is no regular file, or it is too large.
        OSError: It does not exist or cannot be read.
    """
    require_regular_file(path, error)
    with os.fdopen(open_regular(path), "rb") as file:
        # One byte more: a file that grows is refused as well.
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path} is larger than {limit / 2**20:g} MiB.", "", "Check that it is the right file.")
    return data


def sha256_file(path: Path) -> str:
    """Sha256 (hex) of a regular file's content, read in small pieces.

    Raises:
        OSError: Where the file cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses within the block into a `StorageError` about `path`.

    Full disk, quota, permissions, read-only file system, a file in the place of a folder and input/output errors are
    turned. Other errors pass: a missing or already existing file means something else to each caller.

    Args:
        path: The file or folder that is being written.

    Raises:
        StorageError: With state, cause and repair.
    """
    try:
        yield
    except OSError as error:
        # A `StorageError` from within is told already: it carries no errno, so it passes as it is.
        if error.errno not in _MEANING:
            raise
        raise _storage_error(path, error.errno) from error


def _storage_error(path: Path, code: int) -> StorageError:
    cause = f"{_MEANING[code]}."
    if code in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path)
        if free is not None:
            cause = f"{_MEANING[code]} ({free / 2**20:,.0f} MiB free)."
        repair = f"Free space there, or choose another disk (FPT_CACHE_DIR for cached features), {_AGAIN}"
    elif code == errno.EIO:
        repair = "Check the disk, or choose another one (FPT_CACHE_DIR for cached features)."
    else:
        repair = f"Make it writable, or choose another folder (FPT_CACHE_DIR for cached features), {_AGAIN}"
    return StorageError(f"{path} cannot be written.", cause, repair)


def _free_bytes(path: Path) -> int | None:
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself last through a power cut. Some network file systems do not offer it: the file is whole
    # all the same.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
