"""Rows that models without epochs are fitted to, and the folds by patient that choose their hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import TrainingError
from stages.methods.batch import Batch
from stages.tasks import positives

FOLDS = 5
"""Folds at most; fewer where the rarest class has fewer patients."""

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FitRows:
    """What fits read of one split."""

    x: npt.NDArray[np.float32]
    """(n, F) of `describe_rows`."""
    y: Labels
    """(n,) class indices; with several labels an image (n, C) zeros and ones."""
    groups: Sequence[str]
    """(n,) patients: images of one stay together."""
    classes: int
    """C, at least 2."""

    def joined(self, others: FitRows) -> FitRows:
        """These, then the others."""
        x, y = np.concatenate([self.x, others.x]), np.concatenate([self.y, others.y])
        return FitRows(x, y, [*self.groups, *others.groups], self.classes)

    def at(self, chosen: npt.NDArray[np.bool_]) -> FitRows:
        """The rows where `chosen` (n,) is true."""
        groups = [group for group, take in zip(self.groups, chosen.tolist(), strict=True) if take]
        return FitRows(self.x[chosen], self.y[chosen], groups, self.classes)

    def folds(self) -> list[npt.NDArray[np.bool_]]:
        """(n,) held-out rows of each of up to five folds, complete patients, stratified by class.

        Left out are folds without which a class has no rows, or a label no others. Empty where a class has one patient.
        """
        return list(_folds(self.y, self.groups, self.classes))


def describe_rows(batch: Batch) -> torch.Tensor:
    """Return the vectors that closed forms are fitted to, (B, F) float32.

    They are the pooled outputs (2 D: class token, mean of the patches), then the token statistics, each as far as the
    batch has them.
    """
    parts = [] if batch.pooled is None else [batch.pooled.float().flatten(1)]
    if batch.statistics is not None:
        parts.append(batch.statistics.float())
    if not parts:
        raise ValueError("this model needs the input pooled or statistics")
    return torch.cat(parts, dim=1)


def held_out(train: FitRows, val: FitRows) -> list[tuple[FitRows, FitRows]]:
    """Pairs of rows to fit to and rows to evaluate on: the folds of `train`; without folds, `train` and `val`."""
    return [(train.at(~fold), train.at(fold)) for fold in train.folds()] or [(train, val)]


def _folds(y: Labels, groups: Sequence[str], classes: int) -> Iterator[npt.NDArray[np.bool_]]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    there = positives(y, classes)
    names = np.asarray(groups)
    count = min(FOLDS, *(len(set(names[column > 0])) for column in there.T))
    if count < 2:
        return
    # Rows of several labels have no one class to be balanced by.
    splitter: Any = GroupKFold(count)
    if y.ndim == 1:
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    for seen, held in splitter.split(there, y if y.ndim == 1 else None, names):
        known = there[seen].sum(axis=0)
        if known.min() > 0 and (y.ndim == 1 or known.max() < len(seen)):
            fold = np.zeros(len(y), bool)
            fold[held] = True
            yield fold


def check_rows_to_fit(train: FitRows, val: FitRows) -> None:
    """Refuse rows that nothing can be fitted to.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    counts = positives(train.y, train.classes).sum(axis=0)
    if (counts == 0).any():
        raise TrainingError(
            f"{int((counts == 0).sum())} of {train.classes} classes have no training images.",
            "The split left them out.",
            "Change data.split_column, the shares or data.seed, then run `fpt prepare`.",
        )
    if not len(val.x):
        raise TrainingError(
            "There are no validation images.",
            "The split left none.",
            "Raise data.val_share, then run `fpt prepare`.",
        )
    check_finite(train)
    check_finite(val)


def check_finite(rows: FitRows) -> None:
    """Refuse rows with numbers that are not finite.

    Raises:
        TrainingError: If there is one.
    """
    if not np.isfinite(rows.x).all():
        raise TrainingError(
            "The features of the LPM are not finite.",
            "The features are damaged.",
            "Check them with `fpt cache verify`.",
        )
