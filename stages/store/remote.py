"""A cache root somewhere else: any fsspec URL, laid out like a local one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from schemas.errors import FptError, TransferError
from schemas.features import FeatureSpec, FileDigest, ShardReceipt
from stages.store.layout import Store

PIECE = 2**22
"""Bytes copied at a time."""


@dataclass(frozen=True)
class Remote:
    """A cache root behind a URL."""

    fs: fsspec.AbstractFileSystem
    """Where it lies."""
    root: str
    """Path in it, without a slash at the end."""
    url: str
    """As it was given."""

    @property
    def local(self) -> Path | None:
        """The folder, where the URL names one of this machine."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def store(self, spec: FeatureSpec, shard_size: int) -> RemoteStore:
        """The store of a spec; it need not exist."""
        return RemoteStore(self, f"{self.root}/{spec.fingerprint[:16]}", spec, shard_size)


@dataclass(frozen=True)
class RemoteStore:
    """A store behind a URL."""

    remote: Remote
    """Its cache root."""
    path: str
    """Its folder."""
    spec: FeatureSpec
    """What its features are."""
    shard_size: int
    """Rows per shard."""

    def place(self, file: str) -> str:
        """Path of a file that is given relative to the store."""
        return f"{self.path}/{file}"

    def receipts(self) -> dict[int, ShardReceipt]:
        """Every receipt that parses and belongs here, by shard."""
        fs, folder = self.remote.fs, self.place("receipts")
        with transfer_errors(self.remote):
            if not fs.isdir(folder):
                return {}
            fs.invalidate_cache(folder)
            names = [name for name in fs.ls(folder, detail=False) if str(name).endswith(".json")]
            contents = fs.cat(names, on_error="omit") if names else {}
        found = {}
        for name, content in contents.items():
            try:
                receipt = ShardReceipt.model_validate_json(content)
            except ValidationError:
                continue
            if receipt.fingerprint == self.spec.fingerprint and name.endswith(f"/{receipt.shard:06d}.json"):
                found[receipt.shard] = receipt
        return found


def open_remote(url: str) -> Remote:
    """Find the file system of a URL or plain directory.

    Raises:
        TransferError: If the URL's protocol is unknown, or needs a package that is not installed.
    """
    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise TransferError(
            f"{url} cannot be opened: {error}",
            repair="Give a directory or a URL that fsspec knows, and install the package that it names.",
        ) from None
    return Remote(fs, str(root).rstrip("/"), url)


def remote_stores(remote: Remote) -> list[RemoteStore]:
    """Every store of a remote cache root whose description fits its name.

    Raises:
        TransferError: If it cannot be read.
    """
    stores = []
    with transfer_errors(remote):
        if not remote.fs.isdir(remote.root):
            return []
        remote.fs.invalidate_cache(remote.root)
        for folder in sorted(str(name).rstrip("/") for name in remote.fs.ls(remote.root, detail=False)):
            if not remote.fs.isfile(f"{folder}/features.zarr/zarr.json"):
                continue
            try:
                attributes = json.loads(remote.fs.cat_file(f"{folder}/features.zarr/zarr.json"))["attributes"]
                spec, size = FeatureSpec.model_validate(attributes["spec"]), int(attributes["shard_size"])
            except (ValueError, KeyError, TypeError):
                continue
            if folder.endswith(f"/{spec.fingerprint[:16]}"):
                stores.append(RemoteStore(remote, folder, spec, size))
    return stores


def store_file(store: Store, array: str, shard: int) -> str:
    """A shard's file relative to its store, the same on both sides."""
    return store.shard_file(array, shard).relative_to(store.path).as_posix()


def copy(source: IO[bytes], target: IO[bytes]) -> FileDigest:
    """Copy a stream and say what went through."""
    digest, count = hashlib.sha256(), 0
    while piece := source.read(PIECE):
        digest.update(piece)
        count += len(piece)
        target.write(piece)
    return FileDigest(bytes=count, sha256=digest.hexdigest())


def digest_of(remote: Remote, path: str) -> FileDigest | None:
    """Length and digest of a remote file as it is read back; None where there is none."""
    digest, count = hashlib.sha256(), 0
    try:
        with remote.fs.open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                count += len(piece)
    except FileNotFoundError:
        return None
    return FileDigest(bytes=count, sha256=digest.hexdigest())


def length_of(remote: Remote, path: str) -> int | None:
    """Length of a remote file; None where there is none."""
    try:
        info: dict[str, Any] = remote.fs.info(path)
    except FileNotFoundError:
        return None
    return int(info["size"])


@contextmanager
def transfer_errors(remote: Remote) -> Iterator[None]:
    """Turn whatever the other side's library raises into a `TransferError`; errors of this package pass."""
    try:
        yield
    except FptError:
        raise
    except Exception as error:  # each file system raises its own kinds
        raise unusable(remote.url, error) from error


def unusable(url: str, error: BaseException) -> TransferError:
    """What to say where the library of the other side raised an error."""
    return TransferError(
        f"{url} cannot be used: {type(error).__name__}: {error}",
        "The connection, the rights or the address are not what they should be.",
        "Then run the same command again: what has arrived is kept.",
    )
