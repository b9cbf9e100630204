"""Models without epochs: fitted to all training rows at once, judged like any other."""

from __future__ import annotations

import time
from typing import get_args

import torch

from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog, KnnSpec, LinearSpec, StatisticsSpec
from schemas.settings import FittedMethod, Method
from stages.methods.fit_rows import FittedRows
from stages.methods.probes import KnnProbe, LinearModel, fit_knn, fit_linear_probe, linear_model
from stages.methods.statistics import StatisticsModel, fit_evidence, statistics_model
from stages.threads import ONE, Lanes
from stages.train.loop import judge_logits

FITTED: frozenset[Method] = frozenset(get_args(FittedMethod))
"""Methods without epochs, as a set. All read the pooled outputs."""

Fitted = StatisticsModel | LinearModel | KnnProbe
"""Their models."""

READ = frozenset({"class_weights"})
"""Fields of `train` that decide them: another seed or learning rate fits the same model again."""


def fit_rows(
    settings: ResolvedSettings,
    layers: tuple[int, ...],
    train: FittedRows,
    val: FittedRows,
    class_weights: torch.Tensor | None,
    lanes: Lanes = ONE,
) -> tuple[Fitted, EpochLog]:
    """Fit on the CPU: C or k of the lowest out-of-fold log-loss, by patient, of the training rows.

    Only statistics fits to the validation rows, too; the others are only evaluated on them.

    Args:
        settings: Of a method of `FITTED`.
        layers: Tapped blocks of the features.
        train: To fit to.
        val: To evaluate on.
        class_weights: (C,) weights of the losses, or None.
        lanes: Threads that regressions are shared out to.

    Returns:
        The model, and its judgement in the form of one epoch. (Each training row of a k-NN finds itself; validation
        rows are judged by models that did not see them.)

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    start, task = time.perf_counter(), settings.data.task
    weights = None if class_weights is None else class_weights.tolist()
    probe: Fitted
    said: torch.Tensor | None = None
    if settings.method == "statistics":
        found, said = fit_evidence(train, val, weights, lanes)
        probe = statistics_model(found, layers, task)
    elif settings.method == "linear":
        probe = linear_model(fit_linear_probe(train, val, weights), task)
    else:
        probe = fit_knn(train, val, weights, task)
    with torch.inference_mode():
        said = probe.judge(torch.from_numpy(val.x)) if said is None else said
        own, held = (
            judge_logits(logits, rows.y.tolist(), class_weights, task)
            for logits, rows in ((probe.judge(torch.from_numpy(train.x)), train), (said, val))
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


def chosen(spec: StatisticsSpec | LinearSpec | KnnSpec) -> dict[str, float]:
    """The hyperparameter that was chosen; of statistics the largest share, and whose it is."""
    if isinstance(spec, StatisticsSpec):
        name, share = spec.ranked[0]
        return {f"share of {name}": round(share, 2)}
    return {"C": spec.c} if isinstance(spec, LinearSpec) else {"k": spec.neighbours}
