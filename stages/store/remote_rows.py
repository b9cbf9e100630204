"""Read rows of a store behind a URL in place, through zarr and with the same checks as a local store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import CacheCorruptError, CacheIncompleteError, TransferError
from schemas.features import ExtractionReceipt, ShardReceipt
from schemas.urls import masked
from stages.store.array_sources import ZarrArray
from stages.store.index import (
    LISTING_SHARE,
    RowIndex,
    build_index,
    parse_shard_receipt,
    receipt_digest,
    shard_record,
)
from stages.store.layout import Store, described_shard_size, store_path
from stages.store.reader import StoreReader, open_store
from stages.store.remote import (
    Remote,
    RemoteStore,
    as_transfer_error,
    group_attributes,
    open_remote,
    store_file,
    transfer_errors,
)

THREADS = 16
"""File lengths fetched at the same time."""
REPAIR = (
    "Delete the receipt of the shard there and `fpt cache push` the store again from a machine with a complete copy,"
    " or run `fpt extract` here."
)


class RemoteRows(StoreReader):
    """Random access to the rows of a remote store.

    Opening fetches the receipts of the study's shards in one request batch. The lengths of a shard's files are compared
    before its first row is read. Each process has its own connections.
    """

    def __init__(self, store: RemoteStore, expected: Mapping[str, str], receipts: Sequence[ShardReceipt]) -> None:
        """Use `open_remote_rows` instead, which compares the receipts.

        Args:
            store: The remote store.
            expected: Shard number -> digest of its receipt, as in the extraction receipt.
            receipts: Receipts of these shards.
        """
        address = f"{store.remote.address.rstrip('/')}/{store.spec.fingerprint[:16]}"
        self._url = masked(address)
        local = Store(Path(store.path), store.spec, store.shard_size)
        sources = {
            name: ZarrArray(f"{address}/features.zarr", name, layout, store.shard_size, REPAIR, remote=True)
            for name, layout in local.layouts.items()
        }
        self._remote = store
        super().__init__(local, expected, _index(local, receipts), sources)
        for receipt in receipts:
            self._bind(receipt)
        self._ids = {receipt.shard: bytes.fromhex("".join(receipt.rows)) for receipt in receipts}

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a loader need not fetch and compare the receipts again.
        return dict(self.__dict__)

    @property
    def url(self) -> str:
        """URL of the store, without passwords and tokens."""
        return self._url

    @property
    def place(self) -> str:
        """URL of the store, without passwords and tokens."""
        return self._url

    def read_rows(
        self,
        rows: NDArray[np.int64],
        row_ids: Sequence[str],
        names: Iterable[str],
        out: dict[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Read rows whose positions are known already, as `StoreReader.read_rows` does.

        Raises:
            CacheIncompleteError: If a file of a shard is gone.
            CacheCorruptError: If bytes changed since they were written.
            TransferError: If the remote side cannot be reached.
        """
        shards = np.unique(np.asarray(rows, np.int64) // self.store.shard_size).tolist()
        self._require([shard for shard in shards if shard not in self._checked])
        return super().read_rows(rows, row_ids, names, out)

    def require_complete(self) -> None:
        """Check that every file of the study's shards exists with the recorded length.

        Raises:
            CacheIncompleteError: If a file is gone.
            CacheCorruptError: If one has another length.
            TransferError: If the remote side cannot be reached.
        """
        self._require(sorted(self._ids.keys() - self._checked.keys()))

    def _check(self, shard: int) -> bytes:
        self._require([shard])
        return self._checked[shard]

    def _require(self, shards: Sequence[int]) -> None:
        """Compare the lengths of the files of these shards with their receipts."""
        if not shards:
            return
        table = self.index.shards
        places = np.searchsorted(table["number"], np.array(shards, np.uint32))
        expected = {
            self._remote.place(store_file(self.store, name, shard)): (shard, length)
            for shard, lengths in zip(shards, table["files"][places].tolist(), strict=True)
            for name, length in zip(self._layouts, lengths, strict=True)
        }
        lengths: dict[str, int | None] = {}
        if len(shards) * LISTING_SHARE >= len(table) and len(shards) > 1:
            for name in self._layouts:
                lengths |= _listed(self._remote.remote, self._remote.place(f"features.zarr/{name}"))
        unlisted = [path for path in expected if path not in lengths]
        with ThreadPoolExecutor(THREADS) as pool, transfer_errors(self._remote.remote):
            lengths |= zip(unlisted, pool.map(lambda path: _length(self._remote.remote, path), unlisted), strict=True)
        for path, (shard, length) in expected.items():
            if lengths[path] not in (length, None):
                raise CacheCorruptError(
                    f"The shard file {masked(path)} has {lengths[path]} bytes instead of {length}.",
                    str(shard),
                    "The upload was interrupted, or the file was changed since.",
                    REPAIR,
                )
        self._checked.update((shard, self._ids[shard]) for shard in shards)

    def _fill(self, rows: Sequence[int], targets: Mapping[str, NDArray[Any]]) -> None:
        def fill(name: str) -> None:
            self._sources[name].read(rows, targets[name])

        # Each array costs a few round trips, which would dominate the time of a batch if they ran one after another.
        with ThreadPoolExecutor(max(1, len(targets))) as pool:
            list(pool.map(fill, targets))

    def _other_row(self, row: int, row_id: str) -> CacheCorruptError:
        return CacheCorruptError(
            f"Row {row} of {self.url} is not the one of image {row_id[:16]}.",
            str(row // self.store.shard_size),
            "The metadata of the store or its shards were changed.",
            REPAIR,
        )


def open_rows(cache_root: Path, receipt: ExtractionReceipt, remote: str | None = None) -> StoreReader:
    """Open the store of an extraction receipt: from the local cache if possible, else in place at the remote.

    Args:
        cache_root: Folder of the local stores.
        receipt: Extraction receipt of the study.
        remote: URL or folder of another cache root; a folder is read like the local cache.

    Raises:
        CacheIncompleteError: If neither has the store, or one of its receipts is gone.
        CacheCorruptError: If a receipt was changed.
        CacheMismatchError: If a store holds other features.
        TransferError: If the remote side cannot be reached.
    """
    try:
        return open_store(cache_root, receipt)
    except CacheIncompleteError as error:
        if remote is None:
            raise CacheIncompleteError(
                error.state,
                error.missing,
                error.cause,
                f"{error.repair} Or copy it from where it was pushed with `fpt cache pull URL`, or read it there with"
                " `store.remote: URL`.",
            ) from None
    return open_remote_rows(remote, receipt)


def open_remote_rows(url: str, receipt: ExtractionReceipt) -> StoreReader:
    """Open the store of an extraction receipt in a remote cache root.

    Args:
        url: URL of the cache root, as for `fpt cache push`.
        receipt: Extraction receipt of the study.

    Raises:
        CacheIncompleteError: If the store or one of its receipts is missing.
        CacheCorruptError: If a receipt was changed.
        CacheMismatchError: If it holds other features.
        TransferError: If the remote side cannot be reached, or does not support range requests.
    """
    remote = open_remote(url)
    if remote.local is not None:
        return open_store(remote.local, receipt)
    path = f"{remote.root}/{store_path(Path(), receipt.fingerprint)}"
    description = f"{path}/features.zarr/zarr.json"
    with transfer_errors(remote):
        try:
            content = remote.fs.cat_file(description)
            excerpt = remote.fs.cat_file(description, start=1, end=3)
        except FileNotFoundError:
            raise CacheIncompleteError(
                f"There is no feature store {receipt.fingerprint[:16]} at {remote.url}.",
                cause="It was never pushed there, or store.remote names another place.",
                repair="`fpt cache push` it there from a machine that has it, or run `fpt extract` here.",
            ) from None
    if excerpt != content[1:3]:
        raise TransferError(
            f"{remote.url} cannot be read in place: it answers a request for part of a file with the complete file.",
            "The server does not support range requests.",
            "Copy the store with `fpt cache pull`, or use another server.",
        )
    size = described_shard_size(group_attributes(content), receipt.spec, f"{remote.url}/{path[-16:]}")
    store = remote.store(receipt.spec, size)
    return RemoteRows(store, receipt.shards, _receipts(store, receipt.shards))


def _receipts(store: RemoteStore, expected: Mapping[str, str]) -> list[ShardReceipt]:
    """Fetch the receipts of the study's shards and compare them with the digests in its extraction receipt."""
    if not all(number.isdecimal() for number in expected):
        raise CacheCorruptError(
            "The extraction receipt names a shard that is not a number.", repair="Run `fpt extract`."
        )
    layout = Store(Path(store.path), store.spec, store.shard_size)
    places = {store.place(f"receipts/{int(number):06d}.json"): int(number) for number in expected}
    with transfer_errors(store.remote):
        contents: dict[str, Any] = store.remote.fs.cat(list(places), on_error="return") if places else {}
    receipts = []
    for place, number in places.items():
        content = contents.get(place, FileNotFoundError(place))
        if isinstance(content, FileNotFoundError):
            gone = f"The receipt {masked(place)} is gone."
            raise CacheIncompleteError(gone, (f"{number:06d}.json",), repair=REPAIR)
        if isinstance(content, Exception):
            raise as_transfer_error(store.remote.address, content) from content
        receipt = parse_shard_receipt(content, layout, number, masked(place), REPAIR)
        if receipt_digest(receipt) != expected[str(number)]:
            raise CacheCorruptError(
                f"Shard {number} of {store.remote.url}/{store.spec.fingerprint[:16]} is not the one that this study"
                " extracted.",
                str(number),
                "Another machine pushed its own shard under this number, or the store was changed since.",
                "Copy the store with `fpt cache pull` and run `fpt extract`: it writes a new extraction receipt.",
            )
        receipts.append(receipt)
    return receipts


def _index(store: Store, receipts: Sequence[ShardReceipt]) -> RowIndex:
    shards = np.zeros(len(receipts), shard_record(len(store.layouts)))
    for record, receipt in zip(shards, receipts, strict=True):
        record["number"], record["rows"], record["seconds"] = receipt.shard, len(receipt.rows), receipt.seconds
        record["digest"] = np.frombuffer(bytes.fromhex(receipt_digest(receipt)), "V32")[0]
        record["files"] = [receipt.files[name].bytes for name in store.layouts]
    ids = np.frombuffer(bytes.fromhex("".join(row for receipt in receipts for row in receipt.rows)), "S32")
    places = [receipt.shard * store.shard_size + np.arange(len(receipt.rows), dtype=np.uint32) for receipt in receipts]
    return build_index(store, shards, ids, np.concatenate([np.zeros(0, np.uint32), *places]))


def _listed(remote: Remote, folder: str) -> dict[str, int]:
    """Return path -> length of the files of a folder, as far as its listing contains lengths."""
    remote.fs.invalidate_cache(folder)
    try:
        entries = remote.fs.ls(folder, detail=True)
    except Exception:  # many servers cannot list; the request for each file then raises the actual error
        return {}
    return {str(entry["name"]): int(entry["size"]) for entry in entries if entry.get("size") is not None}


def _length(remote: Remote, path: str) -> int | None:
    """Return the length of a file, or None if the remote side does not report it.

    Raises:
        CacheIncompleteError: If the file does not exist.
    """
    try:
        size = remote.fs.info(path).get("size")
    except FileNotFoundError:
        # Over HTTP every failure looks like this; reading one byte shows whether the file really is missing.
        try:
            remote.fs.cat_file(path, start=0, end=1)
        except FileNotFoundError:
            name = path.rsplit("/", 1)[-1]
            raise CacheIncompleteError(f"The shard file {masked(path)} is gone.", (name,), repair=REPAIR) from None
        return None
    return None if size is None else int(size)
