"""What a network learns to say of each row: a class index, or a zero or one for each label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schemas.errors import SettingsError
from schemas.manifest import Manifest, Split
from schemas.resolved import ResolvedSettings
from schemas.tasks import Task
from stages.tasks import label_array, positives

Target = int | Sequence[int]
"""Of one row."""


def targets(manifest: Manifest, split: Split) -> list[Target]:
    """Of the rows of a split, in order."""
    found: list[Target] = label_array(
        [row.label for row in manifest.of(split)], manifest.classes, manifest.task
    ).tolist()
    return found


def class_counts(labels: Sequence[Target], classes: int) -> npt.NDArray[np.int64]:
    """(C,): rows of each class, or with each label."""
    array = np.asarray(labels, dtype=np.int64)
    return np.asarray(positives(array, classes).sum(axis=0), dtype=np.int64)


def balanced_weights(counts: npt.NDArray[np.int64], rows: int, task: Task) -> npt.NDArray[np.float64]:
    """(C,): n / (C n_c), so that each class weighs the same; multi-label (n - n_c) / n_c, so that yes weighs as no."""
    weights = (rows - counts) / counts if task == "multilabel" else rows / (len(counts) * counts)
    return np.asarray(weights, dtype=np.float64)


def check_task(settings: ResolvedSettings, manifest: Manifest) -> None:
    """Refuse a manifest whose labels mean something else than the settings say.

    Raises:
        SettingsError: They are of different tasks.
    """
    if settings.data.task != manifest.task:
        raise SettingsError(
            f"The manifest was prepared for {manifest.task}.",
            [("data.task", f"is {settings.data.task}")],
            "Run `fpt prepare` again, or revert the change.",
        )
