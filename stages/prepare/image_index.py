"""Remember what was read of each image file, so that a second run reads only new and changed files.

An entry counts only if size, times and inode of the file are the same. The index is a cache: without it, or if it is
damaged or was made with other limits or another version, every image is read again, with the same result.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from schemas.base import digest
from schemas.version import __version__
from stages.parquet import read_table, write_table
from stages.prepare.image_record import ImageRecord, ReadLimits
from stages.prepare.near_duplicates import SIDE

_FORMAT = 2
"""Bump it when another record would be read of the same file."""
_KEY = b"fpt.key"
_DECODERS = (
    *("pillow", "simplejpeg", "pydicom", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "imagecodecs", "nibabel"),
)
"""Packages that decode images; some are not installed."""
_SETTLED = 2.0
"""Seconds for which a file has to be unchanged before it is read: on some file systems a later change within this time
leaves the times as they are."""


class FileState(NamedTuple):
    """What tells whether a file changed."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | str) -> FileState | None:
        """Return the state of a file, links followed; None if there is none."""
        try:
            status = os.stat(path)  # noqa: PTH116, because 100,000 paths as text take 2 s less
        except OSError:
            return None
        # Parquet has signed numbers only.
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**63)


@dataclass
class ImageIndex:
    """Records of the images in one folder."""

    file: Path
    """Where the index is kept."""
    key: str
    """Digest of all that a record depends on, other than the file."""
    entries: dict[str, tuple[FileState, ImageRecord]] = field(default_factory=dict)
    """Path -> state of the file before it was read, and what was read."""
    settled: float = _SETTLED
    """Seconds for which a file has to be unchanged to be remembered."""
    changed: bool = False
    """Whether the file lacks something."""

    @classmethod
    def open(cls, folder: Path, images: Path, limits: ReadLimits, *, fresh: bool = False) -> ImageIndex:
        """Open the index of an image folder; empty if there is none that fits.

        Args:
            folder: Folder of all indices.
            images: Image folder, to which paths are relative.
            limits: Limits with which images are read.
            fresh: Whether to read every image again.
        """
        place = str(images.resolve())
        key = digest({"format": _FORMAT, "versions": _versions(), "images": place, "limits": _described(limits)})
        file = folder / f"{digest(place)[:16]}.parquet"
        return cls(file, key, {} if fresh else _read(file, key), changed=fresh)

    def find(self, path: str, state: FileState | None) -> ImageRecord | None:
        """Return what was read of a file, or None if it is new or changed."""
        known = self.entries.get(path)
        return known[1] if known is not None and known[0] == state else None

    def add(self, path: str, before: FileState | None, after: FileState | None, record: ImageRecord) -> None:
        """Remember a file that did not change while it was read, nor shortly before."""
        if before is None or before != after:
            return
        if time.time_ns() - max(before.mtime_ns, before.ctime_ns) >= self.settled * 1e9:
            self.entries[path] = (before, record)
            self.changed = True

    def write(self, records: Mapping[str, ImageRecord]) -> None:
        """Write the entries of these images, if anything changed, and forget all others.

        Raises:
            StorageError: The disk is full or the folder cannot be written.
        """
        entries = {path: entry for path, entry in self.entries.items() if records.get(path) == entry[1]}
        if not self.changed and len(entries) == len(self.entries):
            return
        _write(self.file, self.key, entries)
        self.entries, self.changed = entries, False


def _described(limits: ReadLimits) -> dict[str, Any]:
    fields = {name: getattr(limits, name) for name in ("max_pixels", "min_side", "accept_warnings")}
    return {**fields, "rendering": limits.rendering.model_dump(mode="json")}


def _versions() -> dict[str, str]:
    versions = {"fpt": __version__}
    for package in _DECODERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _read(file: Path, key: str) -> dict[str, tuple[FileState, ImageRecord]]:
    try:
        table = read_table(file)
        if (table.schema.metadata or {}).get(_KEY) != key.encode():
            return {}
        states = zip(*(table.column(name).to_pylist() for name in FileState._fields), strict=True)
        records = zip(*(table.column(name).to_pylist() for name in _RECORD), strict=True)
        return {
            path: (FileState(*state), ImageRecord(*record))
            for path, state, record in zip(table.column("path").to_pylist(), states, records, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError):
        # Missing, damaged, or of another version: a cache that does not help.
        return {}


def _write(file: Path, key: str, entries: Mapping[str, tuple[FileState, ImageRecord]]) -> None:
    import pyarrow as pa

    types = {name: pa.int64() for name in FileState._fields} | dict(_record_types())
    values = [("path", [*entries], pa.string())]
    values += [
        (name, [getattr(state, name) for state, _ in entries.values()], types[name]) for name in FileState._fields
    ]
    values += [(name, [getattr(record, name) for _, record in entries.values()], types[name]) for name in _RECORD]
    arrays = [pa.array(cells, kind) for _, cells, kind in values]
    schema = pa.schema([(name, kind) for name, _, kind in values], metadata={_KEY: key.encode()})
    write_table(pa.Table.from_arrays(arrays, schema=schema), file)


_RECORD = ("id", "thumbnail", "width", "height", "file_size", "warning", "remarks")


def _record_types() -> list[tuple[str, object]]:
    import pyarrow as pa

    kinds = (pa.string(), pa.binary(SIDE * SIDE), pa.int64(), pa.int64(), pa.int64(), pa.string(), pa.string())
    return list(zip(_RECORD, kinds, strict=True))
