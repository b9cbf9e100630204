"""Read and write the manifest, a Parquet file with one row per image and the classes in its schema metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import ValidationError

from schemas.errors import ManifestError
from schemas.manifest import SPLITS, UNLABELLED, Manifest, ManifestRow
from stages.parquet import read_table, write_table

_COLUMNS = ("id", "path", "label", "group", "split")
_OPTIONAL = ("site", "near")
"""Columns that are absent if they are empty for all images."""
_KEPT = "kept."
"""Prefix of the columns of `data.keep_columns`."""
_CLASSES = b"fpt.classes"
_UNIT = b"fpt.unit"
_TASK = b"fpt.task"
"""Absent for multiclass, the only task of earlier versions."""
_LEAKS = b"fpt.allow_leaks"
_REPAIR = "Run `fpt prepare` (or `dvc repro`) to create it again."


def fitted_sha256(manifest: Manifest) -> str:
    """Return a digest of the image contents in the training and validation splits; it changes if these splits do."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        digest.update(f"{split}:".encode())
        for image_id in sorted({row.id for row in manifest.rows if row.split == split}):
            digest.update(image_id.encode())
    return digest.hexdigest()


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest; equal manifests give equal bytes, so that DVC does not rerun later stages needlessly.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    import pyarrow as pa

    every = manifest.every()
    columns = {name: [getattr(row, name) for row in every] for name in _COLUMNS}
    optional = {} if manifest.task == "multiclass" else {_TASK: manifest.task.encode()}
    if manifest.unit is not None:
        optional[_UNIT] = manifest.unit.encode()
    if manifest.allow_leaks:
        optional[_LEAKS] = json.dumps(manifest.allow_leaks).encode()
    fields = [pa.field(name, pa.string(), nullable=False) for name in _COLUMNS]
    for name in _OPTIONAL:
        if any(getattr(row, name) is not None for row in every):
            columns[name] = [getattr(row, name) for row in every]
            fields.append(pa.field(name, pa.string()))
    for name in every[0].kept if every else ():
        columns[_KEPT + name] = [row.kept[name] for row in every]
        fields.append(pa.field(_KEPT + name, pa.string(), nullable=False))
    schema = pa.schema(fields, metadata={_CLASSES: json.dumps(manifest.classes).encode(), **optional})
    write_table(pa.table(columns, schema=schema), path)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: It is missing, damaged or inconsistent.
    """
    import pyarrow as pa

    try:
        table = read_table(path)
    except FileNotFoundError:
        raise ManifestError(f"There is no manifest at {path}.", "The images were not prepared yet.", _REPAIR) from None
    except OSError as error:
        raise ManifestError(f"The manifest {path} cannot be read.", f"{error.strerror}.", _REPAIR) from error
    except ValueError as error:
        raise ManifestError(f"The manifest {path} is damaged.", str(error), _REPAIR) from error
    try:
        metadata = table.schema.metadata or {}
        classes, task = json.loads(metadata[_CLASSES]), metadata.get(_TASK, b"multiclass").decode()
        rows = tuple(_row(row) for row in table.to_pylist())
        unit = metadata[_UNIT].decode() if _UNIT in metadata else None
        leaks = tuple(json.loads(metadata.get(_LEAKS, b"[]")))
        fields = {"classes": tuple(classes), "task": task, "unit": unit, "allow_leaks": leaks}
        fields["rows"] = tuple(row for row in rows if row.split != UNLABELLED)
        fields["unlabelled"] = tuple(row for row in rows if row.split == UNLABELLED)
        manifest = Manifest.model_validate(fields)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, ValidationError) as error:
        raise ManifestError(f"The manifest {path} is damaged.", f"{type(error).__name__}: {error}", _REPAIR) from error
    problem = _contradiction(manifest, [row.path for row in rows])
    if problem:
        raise ManifestError(f"The manifest {path} is damaged.", problem, _REPAIR)
    return manifest


def _row(cells: dict[str, str | None]) -> ManifestRow:
    kept = {name.removeprefix(_KEPT): value for name, value in cells.items() if name.startswith(_KEPT)}
    others = {name: value for name, value in cells.items() if not name.startswith(_KEPT)}
    return ManifestRow.model_validate({**others, "kept": kept} if kept else others)


def _contradiction(manifest: Manifest, paths: list[str]) -> str | None:
    if paths != sorted(set(paths)):
        return "Its rows are not sorted by path, each path once."
    unknown = {name for row in manifest.rows for name in manifest.names(row)} - set(manifest.classes)
    if unknown:
        return f"The label {min(unknown)!r} is not one of its classes."
    splits: dict[str, str] = {}
    for row in manifest.rows:
        if row.split not in SPLITS:
            return f"{row.path} is in the split {row.split!r}; splits are {', '.join(SPLITS)}."
        if splits.setdefault(row.id, row.split) != row.split and "content" not in manifest.allow_leaks:
            return f"The content of {row.path} is in two splits."
    return None
