"""Record the splits of earlier draws, so that images keep their split when others are added or removed.

The records are kept in a folder that outlives `outputs/manifest`, which DVC deletes before it runs the stage again.
For each draw (seed, shares, task) it has two files named by a digest of these settings: a copy of the last manifest,
and the split of every image content and group that occurred in any manifest of the draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from schemas.base import digest
from schemas.data_settings import DataSettings
from schemas.errors import ManifestError
from schemas.manifest import SPLITS, Manifest, Split
from stages.files import storage_errors
from stages.manifest import write_manifest
from stages.parquet import read_table, write_table

_KNOWN_SUFFIX = ".known.parquet"
_COLUMNS = ("kind", "name", "split")
_CONTENT, _GROUP = "content", "group"
_BY_NAME: dict[str, Split] = {split: split for split in SPLITS}


@dataclass
class KnownSplits:
    """Splits that earlier draws assigned."""

    contents: dict[str, Split] = field(default_factory=dict)
    """Content id -> split."""
    groups: dict[str, Split] = field(default_factory=dict)
    """Group -> split."""

    def of_contents(self, ids: Iterable[str]) -> list[Split]:
        """Return the splits of the known ones among some contents."""
        return [self.contents[content_id] for content_id in ids if content_id in self.contents]

    def of_groups(self, groups: Iterable[str | None]) -> list[Split]:
        """Return the splits of the known ones among some groups."""
        return [self.groups[group] for group in groups if group is not None and group in self.groups]

    def with_manifest(self, manifest: Manifest) -> KnownSplits:
        """Return these splits updated with those of a manifest."""
        groups = {row.group: row.split for row in manifest.rows if row.group != row.path}
        contents = {row.id: row.split for row in manifest.rows}
        return KnownSplits({**self.contents, **contents}, {**self.groups, **groups})


def manifest_copy(folder: Path, data: DataSettings) -> Path:
    """Return the path of the copy of the last manifest of a draw.

    Args:
        folder: Folder with the history of a study.
        data: Settings, which identify the draw.
    """
    return folder / f"{_draw(data)}.parquet"


def is_known(folder: Path, data: DataSettings) -> bool:
    """Whether splits were drawn with these settings before."""
    return _known_file(folder, data).exists()


def same_draw(one: DataSettings, other: DataSettings) -> bool:
    """Whether two settings draw the same splits."""
    return _draw(one) == _draw(other)


@contextmanager
def locked(folder: Path | None, data: DataSettings) -> Iterator[None]:
    """Lock the history of a draw, which parallel experiments of one study share."""
    if folder is None:
        yield
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{_draw(data)}.lock"):
        yield


def read_known(folder: Path, data: DataSettings) -> KnownSplits:
    """Read the splits of earlier draws with these settings; empty before the first draw.

    Raises:
        ManifestError: The file is damaged.
    """
    path = _known_file(folder, data)
    try:
        table = read_table(path)
    except FileNotFoundError:
        return KnownSplits()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read.", f"{error.strerror}.", "Make it readable.") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    try:
        kinds, names, splits = (table.column(name).to_pylist() for name in _COLUMNS)
        split_of: dict[str, dict[str, Split]] = {_CONTENT: {}, _GROUP: {}}
        for kind, name, split in zip(kinds, names, splits, strict=True):
            split_of[kind][name] = _BY_NAME[split]
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return KnownSplits(split_of[_CONTENT], split_of[_GROUP])


def _damaged(path: Path, cause: str) -> ManifestError:
    return ManifestError(
        f"{path} is damaged: the splits of earlier draws cannot be read.",
        cause,
        "Restore the file, or draw all splits again with `fpt prepare --redraw`.",
    )


def write_known(folder: Path, data: DataSettings, known: KnownSplits, manifest: Manifest) -> None:
    """Write the known splits of a draw, and a copy of its manifest.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    import pyarrow as pa

    rows = [(_CONTENT, *item) for item in sorted(known.contents.items())]
    rows += [(_GROUP, *item) for item in sorted(known.groups.items())]
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in _COLUMNS])
    columns = {name: [row[position] for row in rows] for position, name in enumerate(_COLUMNS)}
    write_table(pa.table(columns, schema=schema), _known_file(folder, data))
    write_manifest(manifest, manifest_copy(folder, data))


def latest_copy(folder: Path) -> Path | None:
    """Return the most recent manifest copy of any draw, or None."""
    copies = [path for path in folder.glob("*.parquet") if not path.name.endswith(_KNOWN_SUFFIX)]
    return max(copies, key=lambda path: path.stat().st_mtime_ns, default=None)


def _known_file(folder: Path, data: DataSettings) -> Path:
    return folder / f"{_draw(data)}{_KNOWN_SUFFIX}"


def _draw(data: DataSettings) -> str:
    return digest({"seed": data.seed, "val": data.val_share, "test": data.test_share, "task": data.task})[:16]
