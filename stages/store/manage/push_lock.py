"""Serialise pushes to a store behind a URL, which has no file locks, by a note that every push checks for."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from schemas.base import digest
from schemas.errors import TransferError
from stages.store.remote import RemoteStore


@contextmanager
def only_push(target: RemoteStore) -> Iterator[None]:
    """Reserve a remote store for one push.

    A push writes its note before it looks for others: of two pushes that start together, at least one sees the other
    and stops. Notes of dead processes of this machine are removed.

    Args:
        target: The remote store, whether or not it exists.

    Raises:
        TransferError: If another push is under way.
    """
    fs, folder, host = target.remote.fs, target.place("locks"), platform.node()
    prefix = f"push-{digest(host)[:12]}-"
    mine = f"{prefix}{os.getpid()}.json"
    note = {"host": host, "pid": os.getpid(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    fs.makedirs(folder, exist_ok=True)
    fs.pipe_file(f"{folder}/{mine}", json.dumps(note).encode())
    try:
        fs.invalidate_cache(folder)
        names = {str(name).rsplit("/", 1)[-1] for name in fs.ls(folder, detail=False)}
        for name in sorted(names - {mine}):
            if not (name.startswith("push-") and name.endswith(".json")):
                continue
            if name.startswith(prefix) and not _lives(name.removeprefix(prefix).removesuffix(".json")):
                with suppress(FileNotFoundError):
                    fs.rm(f"{folder}/{name}")
                continue
            raise TransferError(
                f"Another push to {target.remote.url} is under way.",
                f"Its note is {folder}/{name}: {_text(target, f'{folder}/{name}')}",
                "Wait until it has finished. If it was killed, delete its note. Then run the same command again.",
            )
        yield
    finally:
        # If the connection is lost the note stays; the next push from this machine removes it.
        with suppress(Exception):
            fs.rm(f"{folder}/{mine}")


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _text(target: RemoteStore, path: str) -> str:
    with suppress(FileNotFoundError):
        return str(target.remote.fs.cat_file(path).decode(errors="replace"))
    return "gone by now"
