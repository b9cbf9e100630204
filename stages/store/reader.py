"""Reading rows by image id. Readers trust receipts, never the mere presence of a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.base import digest
from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ExtractionReceipt, ShardReceipt
from stages.store.layout import Store, array_layouts, open_store_layout, store_path
from stages.store.shards import ShardFile

OPEN_FILES = 256
"""Shard files held open at once, well below the usual limit of 1,024 per process."""


class StoreReader:
    """Random access to the rows of a store.

    File handles are opened on first use and never carried into another process by pickling; `pread` keeps no
    position, so a forked worker may share them.
    """

    def __init__(self, store: Store, rows: dict[str, tuple[int, int]]) -> None:
        """Use `open_store` instead, which checks the receipts.

        Args:
            store: The store.
            rows: Image id -> (shard, slot in the shard).
        """
        self.store, self._rows = store, rows
        self._layouts = array_layouts(store.spec)
        self._files: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(
        self, ids: Sequence[str], names: Iterable[str], out: dict[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Read rows in the order of `ids`.

        Args:
            ids: Image ids, repeats allowed.
            names: Arrays to read: keys, values, indices, pooled, side.
            out: Buffers to fill and return slices of, by name, each with at least len(ids) rows; a fresh
                buffer of tens of megabytes a batch costs more than the read.

        Returns:
            name -> (len(ids), ...), in the type of the store.

        Raises:
            CacheIncompleteError: If an image has no row.
            CacheCorruptError: If bytes changed since they were written.
        """
        places = [self._place(image_id) for image_id in ids]
        result = {}
        for name in names:
            layout = self._layouts[name]
            if out is not None and name in out:
                rows = out[name][: len(ids)]
            else:
                rows = np.empty((len(ids), *layout.shape), layout.dtype)
            flat = rows.reshape(-1).view(np.uint8).data
            count, size = layout.chunks_per_row, rows[:1].nbytes // layout.chunks_per_row
            for row, (shard, slot) in enumerate(places):
                file = self._file(name, shard, count, size)
                for part in range(count):
                    start = (row * count + part) * size
                    file.read_into(slot * count + part, flat[start : start + size])
            result[name] = rows
        return result

    def close(self) -> None:
        """Release every file handle."""
        while self._files:
            self._files.popitem()[1].close()

    def _place(self, image_id: str) -> tuple[int, int]:
        try:
            return self._rows[image_id]
        except KeyError:
            raise CacheIncompleteError(
                f"The store {self.store.path} has no features of image {image_id[:16]}.",
                (image_id,),
                "The image was added after the features were extracted.",
                "Run `fpt extract`: it computes what is missing.",
            ) from None

    def _file(self, name: str, shard: int, chunks_per_row: int, chunk_bytes: int) -> ShardFile:
        key = (name, shard)
        file = self._files.get(key)
        if file is None:
            path = self.store.shard_file(name, shard)
            file = ShardFile(path, self.store.shard_size * chunks_per_row, chunk_bytes)
            self._files[key] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(key)
        return file


def read_receipt(store: Store, shard: int) -> ShardReceipt:
    """The receipt of a finished shard, checked against the sizes of its files.

    Raises:
        CacheIncompleteError: If the receipt or a file is gone.
        CacheCorruptError: If the receipt is damaged or a file has another length.
    """
    receipt, repair = parse_receipt(store, shard), "Run `fpt extract`: it computes what is missing."
    for name, expected in receipt.files.items():
        file = store.shard_file(name, shard)
        try:
            length = file.stat().st_size
        except FileNotFoundError:
            raise CacheIncompleteError(f"The shard file {file} is gone.", (file.name,), repair=repair) from None
        if length != expected.bytes:
            raise CacheCorruptError(
                f"The shard file {file} has {length} bytes instead of {expected.bytes}.", file.name, repair=repair
            )
    return receipt


def parse_receipt(store: Store, shard: int) -> ShardReceipt:
    """The receipt of a finished shard, without a look at its files.

    Raises:
        CacheIncompleteError: If the receipt is gone.
        CacheCorruptError: If it is damaged or belongs elsewhere.
    """
    path = store.receipt(shard)
    repair = "Run `fpt extract`: it computes what is missing."
    try:
        receipt = ShardReceipt.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CacheIncompleteError(f"The receipt {path} is gone.", (path.name,), repair=repair) from None
    except ValidationError:
        raise CacheCorruptError(f"The receipt {path} is damaged.", path.name, repair=repair) from None
    if (
        receipt.fingerprint != store.spec.fingerprint
        or receipt.shard != shard
        or receipt.files.keys() != array_layouts(store.spec).keys()
        or not 0 < len(receipt.rows) <= store.shard_size
    ):
        raise CacheCorruptError(f"The receipt {path} belongs to another shard or store.", path.name, repair=repair)
    return receipt


def receipt_digest(receipt: ShardReceipt) -> str:
    """What an extraction receipt remembers of a shard: rows and file digests, not times."""
    return digest(receipt.model_dump(mode="json", include={"shard", "fingerprint", "rows", "files"}))


def open_store(cache_root: Path, receipt: ExtractionReceipt) -> StoreReader:
    """Open the store behind an extraction receipt and check that it is whole: every shard, receipt and length.

    Raises:
        CacheIncompleteError: If the store or a shard is gone.
        CacheCorruptError: If a receipt or a file was changed.
        CacheMismatchError: If the folder holds other features.
    """
    repair = "Run `fpt extract`: it computes what is missing."
    try:
        store = open_store_layout(cache_root, receipt.spec)
    except FileNotFoundError:
        path = store_path(cache_root, receipt.fingerprint)
        raise CacheIncompleteError(
            f"The feature store {path} behind the extraction receipt is gone.",
            cause="It was deleted, or FPT_CACHE_DIR points to another place than during the extraction.",
            repair=repair,
        ) from None
    rows: dict[str, tuple[int, int]] = {}
    for number, expected in receipt.shards.items():
        found = read_receipt(store, int(number))
        if receipt_digest(found) != expected:
            raise CacheCorruptError(
                f"Shard {number} of {store.path} is not the one that this study extracted.",
                number,
                "The store was rebuilt or changed since.",
                "Run `fpt extract`: it writes a new extraction receipt.",
            )
        for slot, image_id in enumerate(found.rows):
            rows.setdefault(image_id, (found.shard, slot))
    return StoreReader(store, rows)
