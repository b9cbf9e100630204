"""Read and write `predictions.parquet`: one row per evaluated image, with the probability of every class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import EvaluationError
from schemas.manifest import GroupUnit, ManifestRow
from schemas.results import PROBABILITY, EvaluatedModel
from schemas.tasks import Task
from stages.parquet import read_table, write_table
from stages.tasks import decide, label_array, texts

TABLE = "predictions.parquet"
"""File of the table in the folder of an evaluation."""
REPAIR = "Write it again: fpt evaluate"


@dataclass(frozen=True)
class Predictions:
    """Predicted probabilities for the rows of a split."""

    classes: tuple[str, ...]
    """Label names in the order of the columns of `probabilities`."""
    rows: tuple[ManifestRow, ...]
    """The n rows of the manifest."""
    probabilities: npt.NDArray[np.float32]
    """(n, C) in [0, 1]."""
    model: EvaluatedModel | None = None
    """Model that made the predictions, or None if not recorded."""
    task: Task = "multiclass"
    """Task of the model, which defines the meaning of the probabilities."""
    unit: GroupUnit | None = None
    """Kind of the groups, or None if unknown."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(n,) index of each row's label; multi-label: (n, C) zeros and ones."""
        return label_array([row.label for row in self.rows], self.classes, self.task)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """Predicted labels (`decide`), in the same form as `labels`."""
        return decide(self.probabilities, self.task)


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write the table: id, path, label, group, split, predicted and p_<class> for every class.

    The same predictions give the same bytes. The metadata of the schema has the class names in order, the model, and
    the task if it is not multiclass.
    """
    rows, classes = predictions.rows, predictions.classes
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(row, name) for row in rows], pa.string())
        for name in ("id", "path", "label", "group", "split")
    }
    columns["predicted"] = pa.array(texts(predictions.predicted, classes), pa.string())
    for index, name in enumerate(classes):
        columns[f"{PROBABILITY}{name}"] = pa.array(predictions.probabilities[:, index], pa.float32())
    metadata = {"classes": json.dumps(classes)}
    if predictions.task != "multiclass":
        metadata["task"] = predictions.task
    if predictions.unit is not None:
        metadata["unit"] = predictions.unit
    if predictions.model is not None:
        metadata["model"] = predictions.model.model_dump_json()
    table = pa.table(columns).replace_schema_metadata(metadata)
    write_table(table, path)


def evaluation_folder(folder: Path) -> Path:
    """Return the folder of a table of predictions: this one, or its folder `evaluation`.

    Raises:
        EvaluationError: There is no table.
    """
    inner = folder / "evaluation"
    found = inner if not (folder / TABLE).exists() and inner.is_dir() else folder
    if not (found / TABLE).exists():
        raise EvaluationError(f"There are no predictions at {found / TABLE}.", repair=REPAIR)
    return found


def read_predictions(path: Path) -> Predictions:
    """Read the table written by `write_predictions`.

    Raises:
        EvaluationError: The file is missing, damaged, or not a table of predictions.
    """
    try:
        table = read_table(path)
        metadata = table.schema.metadata or {}
        classes = tuple(json.loads(metadata[b"classes"]))
        model = EvaluatedModel.model_validate_json(metadata[b"model"]) if b"model" in metadata else None
        names: Sequence[str] = ("id", "path", "label", "group", "split")
        rows = tuple(ManifestRow(**row) for row in table.select(names).to_pylist())
        task = _task(metadata.get(b"task", b"multiclass").decode())
        unit = _unit(metadata[b"unit"].decode()) if b"unit" in metadata else None
        columns = [table.column(f"{PROBABILITY}{name}").to_numpy() for name in classes]
    except FileNotFoundError as error:
        raise EvaluationError(f"There are no predictions at {path}.", repair=REPAIR) from error
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is not a table of predictions.", str(error), REPAIR) from error
    return Predictions(classes, rows, np.stack(columns, axis=1).astype(np.float32, copy=False), model, task, unit)


def _unit(text: str) -> GroupUnit:
    units: tuple[GroupUnit, ...] = get_args(GroupUnit)
    return units[units.index(text)]


def _task(text: str) -> Task:
    tasks: tuple[Task, ...] = get_args(Task)
    return tasks[tasks.index(text)]
