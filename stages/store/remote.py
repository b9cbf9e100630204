"""A cache root behind an fsspec URL, with the same layout as a local one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from schemas.errors import CacheCorruptError, CacheMismatchError, FptError, TransferError
from schemas.features import CRC_BYTES, FeatureSpec, ShardReceipt
from schemas.urls import masked, names_secret, secrets_in
from stages.store.layout import Store, described_shard_size

LARGEST_DESCRIPTION = 2**24
"""Size limit for JSON files, in bytes; a receipt of 4,096 rows of views has about 2 MiB."""


@dataclass(frozen=True)
class Remote:
    """A cache root behind a URL."""

    fs: fsspec.AbstractFileSystem
    """File system of the URL."""
    root: str
    """Path in the file system, without a trailing slash."""
    address: str = field(repr=False)
    """URL or folder as the user gave it; may contain a password."""

    @property
    def url(self) -> str:
        """The address without passwords and tokens, for messages."""
        return masked(self.address)

    @property
    def local(self) -> Path | None:
        """The folder if the URL names one on this machine, else None."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def store(self, spec: FeatureSpec, shard_size: int) -> RemoteStore:
        """Return the store of a spec, whether or not it exists."""
        return RemoteStore(self, f"{self.root}/{spec.fingerprint[:16]}", spec, shard_size)


@dataclass(frozen=True)
class RemoteStore:
    """A store behind a URL."""

    remote: Remote
    """Cache root of the store."""
    path: str
    """Folder of the store in the remote file system."""
    spec: FeatureSpec
    """Spec of its features."""
    shard_size: int
    """Rows per shard."""
    problem: FptError | None = None
    """Reason why it cannot be used, or None."""

    def place(self, file: str) -> str:
        """Return the remote path of a file of the store."""
        return f"{self.path}/{file}"

    def receipts(self) -> dict[int, ShardReceipt]:
        """Return the valid receipts of this store, by shard."""
        return self.read_receipts()[0]

    def read_receipts(self) -> tuple[dict[int, ShardReceipt], list[str]]:
        """Read all receipts.

        Returns:
            The valid receipts of this store by shard, and the names of all other files among them.

        Raises:
            TransferError: If the remote side cannot be read.
        """
        fs, folder = self.remote.fs, self.place("receipts")
        with transfer_errors(self.remote):
            if not fs.isdir(folder):
                return {}, []
            fs.invalidate_cache(folder)
            listed = {str(entry["name"]): entry for entry in fs.ls(folder, detail=True)}
            names = [name for name in listed if name.endswith(".json")]
            regular = [name for name in names if _is_small(self.remote, listed[name])]
            contents: dict[str, Any] = fs.cat(regular, on_error="return") if regular else {}
        receipts, refused = {}, sorted(set(names) - set(regular))
        for name, content in contents.items():
            if isinstance(content, FileNotFoundError):
                continue
            if isinstance(content, Exception):
                raise as_transfer_error(self.remote.address, content) from content
            try:
                receipt = ShardReceipt.model_validate_json(content)
            except ValidationError:
                receipt = None
            if receipt is not None and self._belongs(receipt) and name.endswith(f"/{receipt.shard:06d}.json"):
                receipts[receipt.shard] = receipt
            else:
                refused.append(name)
        return receipts, [name.rsplit("/", 1)[-1] for name in refused]

    def _belongs(self, receipt: ShardReceipt) -> bool:
        """Whether a receipt fits this store: fingerprint, arrays, number of rows, and file lengths."""
        layouts = Store(Path(), self.spec, self.shard_size).layouts
        rows = len(receipt.rows)
        if (
            receipt.fingerprint != self.spec.fingerprint
            or receipt.files.keys() != layouts.keys()
            or not 0 < rows <= self.shard_size
            or not 0 <= receipt.shard < 2**32 // self.shard_size
        ):
            return False
        index = 16 * self.shard_size + CRC_BYTES
        for name, layout in layouts.items():
            raw = math.prod(layout.shape) * np.dtype(layout.dtype).itemsize
            exact = rows * (raw + CRC_BYTES) + index
            # A codec may add a little to incompressible data.
            longest = exact if self.spec.codec == "none" else exact + rows * (raw // 64 + 4096)
            if not (exact if self.spec.codec == "none" else index) <= receipt.files[name].bytes <= longest:
                return False
        return True


def open_remote(url: str) -> Remote:
    """Find the file system of a URL or plain directory.

    Raises:
        TransferError: If the URL's protocol is unknown, or needs a package that is not installed.
    """
    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise TransferError(
            f"{masked(url)} cannot be opened: {_without_secrets(str(error), url)}",
            repair="Give a directory or a URL that fsspec supports, and install the package that it names.",
        ) from None
    except Exception as error:  # some file systems connect immediately, and each raises its own types
        raise as_transfer_error(url, error) from error
    return Remote(fs, str(root).rstrip("/"), url)


def remote_stores(remote: Remote) -> list[RemoteStore]:
    """Return every store of a remote cache root whose description matches its name.

    Raises:
        TransferError: If it cannot be read.
    """
    stores = []
    with transfer_errors(remote):
        if not remote.fs.isdir(remote.root):
            return []
        remote.fs.invalidate_cache(remote.root)
        for folder in sorted(str(name).rstrip("/") for name in remote.fs.ls(remote.root, detail=False)):
            description = f"{folder}/features.zarr/zarr.json"
            if not remote.fs.isfile(description) or not is_small(remote, description):
                continue
            attributes = group_attributes(remote.fs.cat_file(description))
            try:
                spec = FeatureSpec.model_validate(attributes.get("spec"))
            except ValidationError:
                continue
            if folder.endswith(f"/{spec.fingerprint[:16]}"):
                stores.append(_described_store(remote, folder, spec, attributes))
    return stores


def _described_store(remote: Remote, folder: str, spec: FeatureSpec, attributes: Mapping[str, Any]) -> RemoteStore:
    try:
        size = described_shard_size(attributes, spec, f"{remote.url}/{spec.fingerprint[:16]}")
    except (CacheCorruptError, CacheMismatchError) as problem:
        return RemoteStore(remote, folder, spec, 0, problem)
    return RemoteStore(remote, folder, spec, size)


def group_attributes(content: bytes) -> dict[str, Any]:
    """Return the attributes in the zarr.json of a Zarr group, or an empty dictionary if it is not a valid one."""
    try:
        attributes = json.loads(content)["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def is_small(remote: Remote, path: str) -> bool:
    """Whether a path is a regular file within the size limit for JSON files; unknown lengths count as small."""
    length = remote_length(remote, path)
    return length is None or 0 <= length <= LARGEST_DESCRIPTION


def _is_small(remote: Remote, entry: Mapping[str, Any]) -> bool:
    """Like `is_small` for an entry of a listing; saves a round trip if the entry has type and size."""
    if entry.get("type") != "file" or entry.get("islink"):
        return is_small(remote, str(entry["name"]))
    return entry.get("size") is None or int(entry["size"]) <= LARGEST_DESCRIPTION


def store_file(store: Store, array: str, shard: int) -> str:
    """Return the path of a shard's file relative to its store, the same locally and remotely."""
    return store.shard_file(array, shard).relative_to(store.path).as_posix()


def remote_length(remote: Remote, path: str) -> int | None:
    """Return the length of a remote file in bytes: None if it is missing or unknown, -1 for anything but a file."""
    try:
        info: dict[str, Any] = remote.fs.info(path)
    except FileNotFoundError:
        return None
    if info.get("type") not in (None, "file", "link"):
        return -1
    return None if info.get("size") is None else int(info["size"])


@contextmanager
def transfer_errors(remote: Remote) -> Iterator[None]:
    """Convert errors of the remote file system into `TransferError`; errors of this package pass through."""
    try:
        yield
    except FptError:
        raise
    except Exception as error:  # each file system raises its own types
        raise as_transfer_error(remote.address, error) from error


def as_transfer_error(url: str, error: BaseException) -> TransferError:
    """Return the error to raise when the library of a remote file system failed."""
    return TransferError(
        f"{masked(url)} cannot be used: {type(error).__name__}: {_without_secrets(str(error), url)}",
        "The connection failed, permissions are missing, or the address is wrong.",
        "Fix that, then run the same command again: what has arrived is kept.",
    )


def _without_secrets(text: str, url: str) -> str:
    """Hide the secrets in a URL, in the environment and in fsspec's configuration, which libraries may quote."""
    secrets = {value for name, value in os.environ.items() if names_secret(name) and len(value) > 7}
    return masked(text, secrets_in(url) | secrets | _secret_options(fsspec.config.conf))


def _secret_options(options: Mapping[str, Any], inside: bool = False) -> set[str]:
    secrets = set()
    for name, value in options.items():
        is_secret = inside or names_secret(str(name))
        if isinstance(value, Mapping):
            secrets |= _secret_options(value, is_secret)
        elif is_secret and isinstance(value, str):
            secrets.add(value)
    return secrets
