"""Layout of a store: its files, and the arrays in them.

    <cache root>/<first 16 of the fingerprint>/
        features.zarr/          Zarr v3 group; attributes hold the spec, the fingerprint and the shard size
            keys values         (row, layer, head, token, channel), float, int8, or two int4 codes a byte
                                without `features.tokens` these, scale, offset and indices are missing
            scale offset        only with int8 and int4: see `stages.store.quantise`
            hidden              (row, token, channel): all tokens that enter one block, encoded like keys and values
            hidden_scale        as scale and offset, for hidden; all three only with `features.hidden`
            hidden_offset
            indices             (row, layer, head, token), uint16: position of each kept token
            pooled              (row, output, width), float32: class token, mean of the patches; with `features.pooled`
            statistics          (row, statistic), float16: token statistics of every block, in the segments that the
                                attribute `statistics` of the group lists; with `features.statistics`
            side                (row, channel, y, x), uint8: the small image
            sha256              (row, byte), uint8: content digest of the image; all zero: an empty row
        receipts/000012.json    proof that shard 12 of every array is complete
        index/rows.bin          place of each row; made from the receipts, and made again when it does not fit them
        locks/                  held while a shard is written

One shard of an array is one file, one row is one inner chunk with its CRC32C. Without a codec bytes are raw, so that a
reader with the shard index reads a row by one `pread`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from pydantic import ValidationError

from schemas.errors import CacheCorruptError, CacheMismatchError
from schemas.features import FeatureSpec
from stages.files import open_regular, read_regular, storage_errors
from stages.store.array_layouts import CACHED as CACHED
from stages.store.array_layouts import ArrayLayout as ArrayLayout
from stages.store.array_layouts import array_layouts as array_layouts
from stages.store.array_layouts import decoding_attributes

LARGEST_SHARD = 4096
"""Largest number of rows per shard, as in `features.shard_size`."""


@dataclass(frozen=True)
class Store:
    """An existing store on a local disk."""

    path: Path
    """`<cache root>/<first 16 of the fingerprint>`."""
    spec: FeatureSpec
    """Definition of its features."""
    shard_size: int
    """Rows per shard."""

    @property
    def group(self) -> Path:
        """The Zarr group."""
        return self.path / "features.zarr"

    @property
    def receipts(self) -> Path:
        """Folder of the receipts."""
        return self.path / "receipts"

    def receipt(self, shard: int) -> Path:
        """Return the path of the receipt of one shard; it need not exist."""
        return self.receipts / f"{shard:06d}.json"

    def shard_file(self, array: str, shard: int) -> Path:
        """Return the path of one shard of one array: chunk key with '.' separators, no nested folders."""
        return Path(self.shard_name(array, shard))

    def shard_name(self, array: str, shard: int) -> str:
        """Return `shard_file` as text, which readers need a dozen times per shard."""
        return self._names[array].format(shard)

    @cached_property
    def layouts(self) -> dict[str, ArrayLayout]:
        """Every array, by name."""
        return array_layouts(self.spec)

    @cached_property
    def _names(self) -> dict[str, str]:
        group = str(self.group).replace("{", "{{").replace("}", "}}")
        return {
            name: f"{group}{os.sep}{name}{os.sep}c.{{}}" + ".0" * len(layout.shape)
            for name, layout in self.layouts.items()
        }

    def finished_shards(self) -> list[int]:
        """Return the numbers of the shards that have a receipt, ascending."""
        with os.scandir(self.receipts) as entries:
            stems = [entry.name[:-5] for entry in entries if entry.name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal() and stem == f"{int(stem):06d}")


def store_path(cache_root: Path, fingerprint: str) -> Path:
    """Return the folder of the store of a fingerprint; it need not exist."""
    return cache_root / fingerprint[:16]


def store_lock(path: Path) -> FileLock:
    """Return the lock that guards creation and growth of the store in `path`, between processes."""
    return FileLock(path / "locks" / "store.lock")


def create_store(cache_root: Path, spec: FeatureSpec, shard_size: int) -> Store:
    """Open the store of a spec, or create it; an existing store keeps its shard size.

    Raises:
        StorageError: If the cache root cannot be written.
    """
    path = store_path(cache_root, spec.fingerprint)
    with storage_errors(path):
        (path / "receipts").mkdir(parents=True, exist_ok=True)
        (path / "locks").mkdir(exist_ok=True)
        with store_lock(path):
            if not (path / "features.zarr").exists():
                fresh = path / "features.zarr.new"
                shutil.rmtree(fresh, ignore_errors=True)
                create_group(fresh, spec, shard_size)
                fresh.rename(path / "features.zarr")
            elif not (path / "features.zarr" / "zarr.json").exists():
                _restore_description(path, spec)
    store = open_store_layout(cache_root, spec)
    agreed = agreed_shard_size(path, spec)
    if agreed not in (None, store.shard_size):
        raise CacheCorruptError(
            f"The description of the store {path} has {store.shard_size} rows per shard, its arrays have {agreed}.",
            cause="Its zarr.json was changed or damaged.",
            repair="Run `fpt cache verify --repair`: it writes the description again, and no feature is lost.",
        )
    return store


def _restore_description(path: Path, spec: FeatureSpec) -> None:
    """Write the lost zarr.json of a group again; the shard size comes from its arrays."""
    size = agreed_shard_size(path, spec)
    if size is None:
        raise CacheCorruptError(
            f"The metadata of the store {path} is gone.", repair="Move the folder away, then run `fpt extract`."
        )
    fresh = path / "features.zarr.new"
    shutil.rmtree(fresh, ignore_errors=True)
    create_group(fresh, spec, size)
    (fresh / "zarr.json").rename(path / "features.zarr" / "zarr.json")
    shutil.rmtree(fresh)


def create_group(path: Path, spec: FeatureSpec, shard_size: int) -> None:
    """Create an empty group with every array of a spec."""
    import zarr
    from zarr.codecs import Crc32cCodec

    attributes = {
        "title": "Keys and values of the important tokens of a frozen vision transformer",
        "fingerprint": spec.fingerprint,
        "shard_size": shard_size,
        "spec": spec.model_dump(mode="json"),
    }
    attributes |= decoding_attributes(spec)
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    for name, array in array_layouts(spec).items():
        group.create_array(
            name,
            shape=(0, *array.shape),
            shards=(shard_size, *array.shape),
            chunks=(1, *array.shape),
            dtype=array.dtype,
            filters=None,
            compressors=[*_codecs(spec, array), Crc32cCodec()],
            dimension_names=("row", *array.dims),
            chunk_key_encoding={"name": "default", "separator": "."},
            # A row of zeros must be stored as bytes: readers treat a missing chunk as an error, not as zeros.
            config={"write_empty_chunks": True},
            fill_value=0,
        )


def _codecs(spec: FeatureSpec, array: ArrayLayout) -> list[Any]:
    """Return the codecs that compress a chunk before its checksum."""
    from zarr.codecs import BloscCodec, BloscShuffle, ZstdCodec

    if spec.codec == "zstd":
        return [ZstdCodec(level=3)]
    if spec.codec == "blosc":
        size = np.dtype(array.dtype).itemsize
        return [BloscCodec(cname="zstd", clevel=5, shuffle=BloscShuffle.bitshuffle, typesize=size)]
    return []


def open_store_layout(cache_root: Path, spec: FeatureSpec) -> Store:
    """Open an existing store and check that it is the one of this spec.

    Raises:
        FileNotFoundError: If the store does not exist.
        CacheMismatchError: If the folder holds the features of another spec.
        CacheCorruptError: If its metadata cannot be read.
    """
    path = store_path(cache_root, spec.fingerprint)
    if not (path / "features.zarr").exists():
        raise FileNotFoundError(path)
    if not (path / "features.zarr" / "zarr.json").exists():
        raise CacheCorruptError(
            f"The metadata of the store {path} is gone.",
            cause="Its zarr.json was deleted.",
            repair="Move the folder away, then run `fpt extract`.",
        )
    return Store(path, spec, described_shard_size(store_attributes(path), spec, path))


def described_shard_size(attributes: Mapping[str, Any], spec: FeatureSpec, place: object) -> int:
    """Return the shard size of a store, after comparing its description with a spec.

    Raises:
        CacheMismatchError: If it holds the features of another spec.
        CacheCorruptError: If its description cannot be read.
    """
    try:
        described = FeatureSpec.model_validate(attributes.get("spec"))
    except (ValidationError, AttributeError):
        raise CacheCorruptError(
            f"The store {place} does not describe itself.",
            cause="It was written by another version, or its zarr.json was changed.",
            repair="Move the folder away, then run `fpt extract`.",
        ) from None
    size = attributes.get("shard_size")
    shard_size = size if type(size) is int else 0
    problem = impossible(described)
    if not 1 <= shard_size <= LARGEST_SHARD:
        problem = f"shard_size is {str(size)[:40]}, not a number from 1 to {LARGEST_SHARD:,}"
    if problem is not None:
        raise CacheCorruptError(
            f"The store {place} describes itself wrongly: {problem}.",
            cause="Its zarr.json was changed or damaged.",
            repair="In the cache of this machine `fpt cache verify --repair` writes it again; elsewhere push it again.",
        )
    if differing := spec.differing(described):
        raise CacheMismatchError(f"The store {place} holds other features than those of its name.", differing)
    return shard_size


def impossible(spec: FeatureSpec) -> str | None:
    """Return why a spec is impossible, before memory or files of its size are allocated, or None."""
    lpm = spec.lpm
    bounds = {
        "lpm.depth": (lpm.depth, 1, 1000),
        "lpm.width": (lpm.width, 1, 2**17),
        "lpm.heads": (lpm.heads, 1, lpm.width),
        "lpm.image_size": (lpm.image_size, 1, 2**14),
        "lpm.patch": (lpm.patch, 1, lpm.image_size),
        "lpm.prefix_tokens": (lpm.prefix_tokens, 0, 2**14),
        "kept": (spec.kept, *((1, 2**16) if spec.layers else (0, 0))),
        "side_image_size": (spec.side_image_size, 1, 2**14),
    }
    for name, (value, lowest, highest) in bounds.items():
        if not lowest <= value <= highest:
            return f"{name} is {value}, not from {lowest:,} to {highest:,}"
    if lpm.map_widths and (len(lpm.map_widths) != lpm.depth or not all(1 <= one <= 2**17 for one in lpm.map_widths)):
        return f"lpm.map_widths are not {lpm.depth} numbers from 1 to {2**17:,}"
    if lpm.map_widths and (spec.layers or spec.hidden is not None):
        return "it has tokens of an LPM that gives feature maps"
    if spec.kept > lpm.tokens:
        return f"kept is {spec.kept} of {lpm.tokens} tokens"
    if not spec.layers and not (spec.pooled or spec.statistics):
        return "it has neither tokens, nor pooled outputs, nor statistics"
    if list(spec.layers) != sorted(set(spec.layers) & set(range(lpm.depth))):
        return f"layers are not ascending numbers below {lpm.depth}"
    if spec.hidden is not None and not 0 <= spec.hidden < lpm.depth:
        return f"hidden is {spec.hidden}, not a block from 0 to {lpm.depth - 1}"
    return None


def agreed_shard_size(path: Path, spec: FeatureSpec) -> int | None:
    """Return the shard size that all arrays of the store in `path` agree on, or None."""
    sizes = set()
    for name in array_layouts(spec):
        try:
            metadata = json.loads(read_regular(path / "features.zarr" / name / "zarr.json"))
            sizes.add(int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0]))
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            continue
    size = sizes.pop() if len(sizes) == 1 else None
    return size if size is not None and 1 <= size <= LARGEST_SHARD else None


def store_attributes(path: Path) -> dict[str, Any]:
    """Read the attributes of the group of the store in `path`.

    Raises:
        CacheCorruptError: If its metadata cannot be read.
    """
    import zarr

    try:
        # Zarr would wait for a FIFO.
        os.close(open_regular(path / "features.zarr" / "zarr.json"))
        return dict(zarr.open_group(path / "features.zarr", mode="r").attrs)
    except Exception as error:  # zarr raises many kinds here; all of them mean unreadable metadata
        raise CacheCorruptError(
            f"The metadata of the store {path} cannot be read: {error}",
            repair="Move the folder away, then run `fpt extract`.",
        ) from error


def grow_store(store: Store, shards: int) -> None:
    """Grow the arrays to at least `shards` shards. Safe between processes."""
    # Tested without the lock, which all writers share: arrays never shrink.
    if all(_rows(store, name) >= shards * store.shard_size for name in store.layouts):
        return
    rows = capacity(shards) * store.shard_size
    import zarr

    with store_lock(store.path):
        group = zarr.open_group(store.group, mode="r+")
        for name, layout in store.layouts.items():
            array: Any = group[name]
            if array.shape[0] < rows:
                array.resize((rows, *layout.shape))


def capacity(shards: int) -> int:
    """Return the length of the arrays in shards: exact up to 31 shards, then with up to 1/16 of reserve.

    Each growth blocks all writers: with the reserve a store grows sixteen times while its size doubles, not once per
    shard. The length depends only on the highest shard, not on the order of writers. The reserve takes no bytes.
    """
    step = 1 << max(0, shards.bit_length() - 5)
    return -(-shards // step) * step


def _rows(store: Store, name: str) -> int:
    """Read the length of an array from its metadata; 0 if they cannot be read."""
    try:
        return int(json.loads(read_regular(store.group / name / "zarr.json"))["shape"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
