"""Where everything in a store lies, and how its arrays are made.

    <cache root>/<first 16 of the fingerprint>/
        features.zarr/          Zarr v3 group; attributes hold the spec, the fingerprint and the shard size
            keys values         (row, layer, head, token, channel), float, int8, or two int4 codes a byte
            scale offset        only beside int8 and int4: see `stages.store.quantise`
            hidden              (row, token, channel): all tokens that enter one block, encoded like keys and values
            hidden_scale        as scale and offset, for hidden; all three only with `features.hidden`
            hidden_offset
            indices             (row, layer, head, token), uint16: position of each kept token
            pooled              (row, output, width), float32: class token and mean of the patches; where it is kept
            side                (row, channel, y, x), uint8: the small image
            sha256              (row, byte), uint8: content digest of the image; all zero: an empty row
        receipts/000012.json    proof that shard 12 of every array is whole
        index/rows.bin          where each row lies; made from the receipts, and made again when it does not fit them
        locks/                  held while a shard is written

One shard of an array is one file, one row is one inner chunk with its CRC32C. Without a codec bytes are raw, so that a
reader that knows the shard index gets a row by one `pread`.
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

DEQUANTISE = {
    "int8": (
        "x[layer, head, token, channel] = 2 ** (scale[layer, part, head, token] / 8 - 24) * code"
        " + offset[layer, part, head, channel]; part 0: keys, 1: values"
    ),
    "int4": (
        "x[layer, head, token, channel] = 2 ** (scale[layer, part, head, channel] / 8 - 24) * (code - 7.5)"
        " + offset[layer, part, head, channel]; part 0: keys, 1: values; the byte of channel pair j holds the codes of"
        " channel j (low four bits) and of channel j + number of pairs (high four bits)"
    ),
}
"""Attribute of quantised groups: how anyone gets the keys and values back."""

DEQUANTISE_HIDDEN = {
    "int8": "x[token, channel] = 2 ** (hidden_scale[token] / 8 - 24) * code + hidden_offset[channel]",
    "int4": (
        "x[token, channel] = 2 ** (hidden_scale[channel] / 8 - 24) * (code - 7.5) + hidden_offset[channel];"
        " codes are packed as those of keys and values"
    ),
}
"""The same for hidden tokens."""


LARGEST_SHARD = 4096
"""Most rows of a shard, as `features.shard_size` allows."""


@dataclass(frozen=True)
class ArrayLayout:
    """One array of the store, without its row axis."""

    shape: tuple[int, ...]
    """Of one row."""
    dtype: str
    """numpy name; little endian on disk."""
    dims: tuple[str, ...]
    """Names of the axes of one row."""


CACHED = ("keys", "values", "scale", "offset")
"""Arrays that hold the cached tokens; the last two only in quantised stores."""


def array_layouts(spec: FeatureSpec) -> dict[str, ArrayLayout]:
    """Every array of a store of this spec, by name."""
    side = spec.side_image_size
    lpm, layers = spec.lpm, len(spec.layers)
    tokens = ("layer", "head", "token")
    kept = (layers, lpm.heads, spec.kept)
    pooled = {"pooled": ArrayLayout((2, lpm.width), "float32", ("output", "width"))} if spec.pooled else {}
    return {
        **_cached_layouts(spec),
        **(_hidden_layouts(spec) if spec.hidden is not None else {}),
        "indices": ArrayLayout(kept, "uint16", tokens),
        **pooled,
        "side": ArrayLayout((3, side, side), "uint8", ("rgb", "y", "x")),
        "sha256": ArrayLayout((32,), "uint8", ("byte",)),
    }


def _cached_layouts(spec: FeatureSpec) -> dict[str, ArrayLayout]:
    layers, heads, kept, dim = len(spec.layers), spec.lpm.heads, spec.kept, spec.lpm.head_dim
    packed = spec.dtype == "int4"
    codes = ArrayLayout(
        (layers, heads, kept, -(-dim // 2) if packed else dim),
        "uint8" if packed else spec.dtype,
        ("layer", "head", "token", "channel_pair" if packed else "channel"),
    )
    layouts = {"keys": codes, "values": codes}
    if spec.dtype in ("int8", "int4"):
        axis, length = ("channel", dim) if packed else ("token", kept)
        # Keys and values together, and the layer first as in every other array.
        layouts["scale"] = ArrayLayout((layers, 2, heads, length), "uint8", ("layer", "part", "head", axis))
        layouts["offset"] = ArrayLayout((layers, 2, heads, dim), "float16", ("layer", "part", "head", "channel"))
    return layouts


def _hidden_layouts(spec: FeatureSpec) -> dict[str, ArrayLayout]:
    tokens, width = spec.lpm.tokens, spec.lpm.width
    if spec.dtype not in ("int8", "int4"):
        return {"hidden": ArrayLayout((tokens, width), spec.dtype, ("token", "channel"))}
    if spec.dtype == "int8":
        codes = ArrayLayout((tokens, width), "int8", ("token", "channel"))
        scale = ArrayLayout((tokens,), "uint8", ("token",))
    else:
        codes = ArrayLayout((tokens, -(-width // 2)), "uint8", ("token", "channel_pair"))
        scale = ArrayLayout((width,), "uint8", ("channel",))
    offset = ArrayLayout((width,), "float16", ("channel",))
    return {"hidden": codes, "hidden_scale": scale, "hidden_offset": offset}


@dataclass(frozen=True)
class Store:
    """An existing store on a local disk."""

    path: Path
    """`<cache root>/<first 16 of the fingerprint>`."""
    spec: FeatureSpec
    """What its features are."""
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
        """Receipt of one shard; it need not exist."""
        return self.receipts / f"{shard:06d}.json"

    def shard_file(self, array: str, shard: int) -> Path:
        """File of one shard of one array: chunk key with '.' separators, no nested folders."""
        return Path(self.shard_name(array, shard))

    def shard_name(self, array: str, shard: int) -> str:
        """The same as text: a reader that meets a shard for the first time asks for it a dozen times."""
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
        """Numbers of the shards that have a receipt, ascending."""
        with os.scandir(self.receipts) as entries:
            stems = [entry.name[:-5] for entry in entries if entry.name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal() and stem == f"{int(stem):06d}")


def store_path(cache_root: Path, fingerprint: str) -> Path:
    """Folder of the store of a fingerprint; it need not exist."""
    return cache_root / fingerprint[:16]


def store_lock(path: Path) -> FileLock:
    """Guards creation and growth of the store in `path`, between processes."""
    return FileLock(path / "locks" / "store.lock")


def create_store(cache_root: Path, spec: FeatureSpec, shard_size: int) -> Store:
    """Open the store of a spec, creating it if need be; an existing store keeps its shard size.

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
            f"The store {path} says that a shard has {store.shard_size} rows; its arrays have shards of {agreed}.",
            cause="Its zarr.json was changed or damaged.",
            repair="Run `fpt cache verify --repair`: it writes the description again, and no feature is lost.",
        )
    return store


def _restore_description(path: Path, spec: FeatureSpec) -> None:
    """Write the lost zarr.json of a group again; its arrays say how many rows a shard has."""
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
    """Make an empty group with every array of a spec."""
    import zarr
    from zarr.codecs import Crc32cCodec

    attributes = {
        "title": "Keys and values of the important tokens of a frozen vision transformer",
        "fingerprint": spec.fingerprint,
        "shard_size": shard_size,
        "spec": spec.model_dump(mode="json"),
    }
    if spec.dtype in DEQUANTISE:
        attributes["dequantise"] = DEQUANTISE[spec.dtype]
        if spec.hidden is not None:
            attributes["dequantise_hidden"] = DEQUANTISE_HIDDEN[spec.dtype]
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
            # A row of zeros must be there as bytes: for the reader a missing chunk is an error, not zeros.
            config={"write_empty_chunks": True},
            fill_value=0,
        )


def _codecs(spec: FeatureSpec, array: ArrayLayout) -> list[Any]:
    """What compresses a chunk before its checksum."""
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
        FileNotFoundError: If there is no such store.
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
    """The shard size of a store that describes itself as the one of a spec.

    Raises:
        CacheMismatchError: If it holds the features of another spec.
        CacheCorruptError: If its description cannot be read.
    """
    try:
        found = FeatureSpec.model_validate(attributes.get("spec"))
    except (ValidationError, AttributeError):
        raise CacheCorruptError(
            f"The store {place} does not describe itself.",
            cause="It was written by another version, or its zarr.json was changed.",
            repair="Move the folder away, then run `fpt extract`.",
        ) from None
    size = attributes.get("shard_size")
    shard_size = size if type(size) is int else 0
    problem = impossible(found)
    if not 1 <= shard_size <= LARGEST_SHARD:
        problem = f"shard_size is {str(size)[:40]}, not a number from 1 to {LARGEST_SHARD:,}"
    if problem is not None:
        raise CacheCorruptError(
            f"The store {place} describes itself wrongly: {problem}.",
            cause="Its zarr.json was changed or damaged.",
            repair="In the cache of this machine `fpt cache verify --repair` writes it again; elsewhere push it again.",
        )
    if differing := spec.differing(found):
        raise CacheMismatchError(f"The store {place} holds other features than its name says.", differing)
    return shard_size


def impossible(spec: FeatureSpec) -> str | None:
    """Return what no feature spec can be, before memory or files of that size are made; None: it is possible."""
    lpm = spec.lpm
    bounds = {
        "lpm.depth": (lpm.depth, 1, 1000),
        "lpm.width": (lpm.width, 1, 2**17),
        "lpm.heads": (lpm.heads, 1, lpm.width),
        "lpm.image_size": (lpm.image_size, 1, 2**14),
        "lpm.patch": (lpm.patch, 1, lpm.image_size),
        "lpm.prefix_tokens": (lpm.prefix_tokens, 0, 2**14),
        "kept": (spec.kept, 1, 2**16),
        "side_image_size": (spec.side_image_size, 1, 2**14),
    }
    for name, (value, lowest, highest) in bounds.items():
        if not lowest <= value <= highest:
            return f"{name} is {value}, not from {lowest:,} to {highest:,}"
    if spec.kept > lpm.tokens:
        return f"kept is {spec.kept} of {lpm.tokens} tokens"
    if not spec.layers or list(spec.layers) != sorted(set(spec.layers) & set(range(lpm.depth))):
        return f"layers are not ascending numbers below {lpm.depth}"
    if spec.hidden is not None and not 0 <= spec.hidden < lpm.depth:
        return f"hidden is {spec.hidden}, not a block from 0 to {lpm.depth - 1}"
    return None


def agreed_shard_size(path: Path, spec: FeatureSpec) -> int | None:
    """The shard size that all arrays of the store in `path` have; None where they have no such size in common."""
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
    """What the group of the store in `path` says about itself.

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
    """Make the arrays long enough for `shards` shards; never shrinks. Safe between processes."""
    # Without the lock, which all writers share: arrays never shrink, so what is long enough stays so.
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
    """Shards that the arrays get room for: up to 31 as many as there are, then up to 1/16 more.

    Each growth holds up all writers: with this a store grows sixteen times while its size doubles, not once a shard.
    It depends on the highest shard alone, so that the order of writers leaves no trace. Room costs no bytes.
    """
    step = 1 << max(0, shards.bit_length() - 5)
    return -(-shards // step) * step


def _rows(store: Store, name: str) -> int:
    """Length of an array, from its metadata alone; 0 where they cannot be read."""
    try:
        return int(json.loads(read_regular(store.group / name / "zarr.json"))["shape"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
