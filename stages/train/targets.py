"""Training targets: a class index per image, or a 0/1 vector for multi-label."""

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
"""Target of one row."""


def targets(manifest: Manifest, split: Split) -> list[Target]:
    """Return the targets of the rows of a split, in order."""
    split_targets: list[Target] = label_array(
        [row.label for row in manifest.of(split)], manifest.classes, manifest.task
    ).tolist()
    return split_targets


def class_counts(labels: Sequence[Target], classes: int) -> npt.NDArray[np.int64]:
    """Return the number of rows per class or label, (C,)."""
    array = np.asarray(labels, dtype=np.int64)
    return np.asarray(positives(array, classes).sum(axis=0), dtype=np.int64)


def balanced_weights(counts: npt.NDArray[np.int64], rows: int, task: Task) -> npt.NDArray[np.float64]:
    """Return loss weights (C,) that balance the classes, n / (C n_c).

    Multi-label: weights (n - n_c) / n_c of the positives, which balance positives and negatives of each label.
    """
    weights = (rows - counts) / counts if task == "multilabel" else rows / (len(counts) * counts)
    return np.asarray(weights, dtype=np.float64)


def check_task(settings: ResolvedSettings, manifest: Manifest) -> None:
    """Check that manifest and settings are for the same task.

    Raises:
        SettingsError: If they are not.
    """
    if settings.data.task != manifest.task:
        raise SettingsError(
            f"The manifest was prepared for {manifest.task}.",
            [("data.task", f"is {settings.data.task}")],
            "Run `fpt prepare` again, or revert the change.",
        )
