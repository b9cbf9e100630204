"""Models without epochs: fitted to the pooled outputs of all training rows at once, judged like any other."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from schemas.results import EpochLog, KnnSpec, LinearSpec
from schemas.settings import Method
from schemas.tasks import Task
from stages.train.loop import judge_logits
from stages.train.probes import KnnProbe, LinearModel, fit_knn, fit_linear_probe, linear_model

POOLED: frozenset[Method] = frozenset({"linear", "knn"})
"""Methods that are fitted to pooled outputs."""

READ = frozenset({"class_weights"})
"""Fields of `train` that decide them: another seed or learning rate fits the same model again."""


@dataclass(frozen=True)
class PooledRows:
    """What such a model reads of one split."""

    x: npt.NDArray[np.float32]
    """(n, 2 D): class token and mean of the patches, one after the other."""
    y: npt.NDArray[np.int64]
    """(n,) class indices; with several labels an image (n, C) zeros and ones."""


def fit_pooled(
    method: Method,
    train: PooledRows,
    val: PooledRows,
    classes: int,
    class_weights: torch.Tensor | None,
    task: Task = "multiclass",
) -> tuple[LinearModel | KnnProbe, EpochLog]:
    """Fit on the CPU, C or k chosen on the validation rows.

    Returns:
        The model, and its judgement in the form of one epoch. (Each training row of a k-NN finds itself.)

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    start = time.perf_counter()
    weights = None if class_weights is None else class_weights.tolist()
    probe: LinearModel | KnnProbe
    if method == "linear":
        probe = linear_model(fit_linear_probe(train.x, train.y, val.x, val.y, classes, weights), task)
    else:
        probe = fit_knn(train.x, train.y, val.x, val.y, classes, weights, task)
    with torch.inference_mode():
        own, held = (
            judge_logits(probe(None, None, torch.from_numpy(rows.x)), rows.y.tolist(), class_weights, task)
            for rows in (train, val)
        )
    log = EpochLog(
        epoch=1,
        train_loss=own[0],
        val_loss=held[0],
        val_auc=held[1],
        val_accuracy=held[2],
        lr=None,
        seconds=round(time.perf_counter() - start, 3),
    )
    return probe, log


def chosen(spec: LinearSpec | KnnSpec) -> dict[str, float]:
    """What the validation rows chose."""
    return {"C": spec.c} if isinstance(spec, LinearSpec) else {"k": spec.neighbours}
