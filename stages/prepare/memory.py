"""What earlier draws decided, so that images keep their split when others come and go.

Below a folder that outlives `outputs/manifest` (DVC deletes that before it runs the stage again) lie, for each draw
(seed, shares, task), two files named by its digest: a copy of the last manifest, and the split of every image content
and group that any manifest of this draw had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from schemas.base import digest
from schemas.errors import ManifestError
from schemas.manifest import SPLITS, Manifest, Split
from schemas.settings import DataSettings
from stages.files import storage_errors
from stages.manifest import write_manifest
from stages.parquet import read_table, write_table

_KNOWN_SUFFIX = ".known.parquet"
_COLUMNS = ("kind", "name", "split")
_CONTENT, _GROUP = "content", "group"
_KNOWN: dict[str, Split] = {split: split for split in SPLITS}


@dataclass
class KnownSplits:
    """Splits of earlier draws."""

    contents: dict[str, Split] = field(default_factory=dict)
    """Content id -> split."""
    groups: dict[str, Split] = field(default_factory=dict)
    """Group -> split."""

    def of_contents(self, ids: Iterable[str]) -> list[Split]:
        """The splits of those contents that are known."""
        return [self.contents[one] for one in ids if one in self.contents]

    def of_groups(self, groups: Iterable[str | None]) -> list[Split]:
        """The splits of those groups that are known."""
        return [self.groups[one] for one in groups if one is not None and one in self.groups]

    def with_manifest(self, manifest: Manifest) -> KnownSplits:
        """These and those of a manifest, which win."""
        groups = {row.group: row.split for row in manifest.rows if row.group != row.path}
        contents = {row.id: row.split for row in manifest.rows}
        return KnownSplits({**self.contents, **contents}, {**self.groups, **groups})


def manifest_copy(folder: Path, data: DataSettings) -> Path:
    """Where the copy of the last manifest of a draw lies.

    Args:
        folder: Of all draws of a study.
        data: Their settings decide which draw it is.
    """
    return folder / f"{_draw(data)}.parquet"


def is_known(folder: Path, data: DataSettings) -> bool:
    """Whether there was a draw with these settings."""
    return _known_file(folder, data).exists()


def same_draw(one: DataSettings, other: DataSettings) -> bool:
    """Whether two settings draw the same splits."""
    return _draw(one) == _draw(other)


@contextmanager
def locked(folder: Path | None, data: DataSettings) -> Iterator[None]:
    """Keep other processes from changing what is known of a draw: experiments of one study share it."""
    if folder is None:
        yield
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{_draw(data)}.lock"):
        yield


def read_known(folder: Path, data: DataSettings) -> KnownSplits:
    """What earlier draws with these settings decided; empty before the first.

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
        found: dict[str, dict[str, Split]] = {_CONTENT: {}, _GROUP: {}}
        for kind, name, split in zip(kinds, names, splits, strict=True):
            found[kind][name] = _KNOWN[split]
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return KnownSplits(found[_CONTENT], found[_GROUP])


def _damaged(path: Path, cause: str) -> ManifestError:
    return ManifestError(
        f"{path} is damaged: the splits of earlier draws are lost.",
        cause,
        "Restore it, or draw all splits again with `fpt prepare --redraw`.",
    )


def write_known(folder: Path, data: DataSettings, known: KnownSplits, manifest: Manifest) -> None:
    """Keep what is known from now on, and a copy of the manifest.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    import pyarrow as pa

    rows = [(_CONTENT, *item) for item in sorted(known.contents.items())]
    rows += [(_GROUP, *item) for item in sorted(known.groups.items())]
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in _COLUMNS])
    columns = {name: [row[place] for row in rows] for place, name in enumerate(_COLUMNS)}
    write_table(pa.table(columns, schema=schema), _known_file(folder, data))
    write_manifest(manifest, manifest_copy(folder, data))


def latest_copy(folder: Path) -> Path | None:
    """The copy of the manifest that was written last, of whatever draw, or None."""
    copies = [path for path in folder.glob("*.parquet") if not path.name.endswith(_KNOWN_SUFFIX)]
    return max(copies, key=lambda path: path.stat().st_mtime_ns, default=None)


def _known_file(folder: Path, data: DataSettings) -> Path:
    return folder / f"{_draw(data)}{_KNOWN_SUFFIX}"


def _draw(data: DataSettings) -> str:
    return digest({"seed": data.seed, "val": data.val_share, "test": data.test_share, "task": data.task})[:16]
