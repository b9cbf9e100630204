"""Training of closed-form methods: read all rows once and fit once."""

from __future__ import annotations

import time

import torch

from schemas.manifest import Split
from schemas.methods import METHODS
from schemas.results import EpochLog, TrainResult
from schemas.views import train_views
from stages.methods.base import FitInputs, RowModel, closed_form_method
from stages.methods.fit_rows import FitRows
from stages.threads import open_threads
from stages.train.job import DESCRIBED, Job, rows_to_fit, save_model
from stages.train.loop import score_logits
from stages.train.source_statistics import Moments, moments_of

MOST_THREADS = 64
"""Maximum number of threads that fits share; limited by the number of cores."""


def fit_job(job: Job) -> list[TrainResult]:
    """Fit every variant on the CPU, and write its bundle."""
    # Every view of a training image is a row of its own.
    ids: dict[Split, list[list[str]]] = {
        "train": [[row.row_id for row in views] for views in train_views(job.manifest, job.first.features)],
        "val": [[row.id] for row in job.manifest.of("val")],
    }
    results = []
    with open_threads(MOST_THREADS, torch.device("cpu")) as threads:
        inputs, preset = METHODS[job.first.method].inputs, METHODS[job.first.method].preset
        train, val = rows_to_fit(job, job.opened.source, ids, inputs)
        for position, settings in enumerate(job.variants):
            weights = job.class_weights(settings, torch.device("cpu"))
            fit_inputs = FitInputs(
                train=train,
                val=val,
                task=job.manifest.task,
                method=settings.method,
                sources=preset.probe_sources(job.opened.features, "pooled" in inputs),
                preference=preset.preference,
                class_weights=None if weights is None else weights.tolist(),
                threads=threads,
            )
            model, log = fit_rows(settings.method, fit_inputs)
            job.watch.on_epoch(position, log)
            results.append(
                TrainResult(
                    best=log,
                    epochs=(log,),
                    resumed_from=0,
                    learnable=save_model(job, position, model, log, _source(model, train)),
                    chosen=dict(closed_form_method(settings.method).chosen(model.spec)),
                )
            )
    return results


def _source(model: RowModel, train: FitRows) -> dict[str, Moments]:
    """Return the statistics of the vector that the head reads, which are those of the training rows."""
    if not model.has_head:
        return {}
    return {"vectors": moments_of(torch.from_numpy(train.x).split(DESCRIBED))}  # type: ignore[no-untyped-call]


def fit_rows(method: str, inputs: FitInputs) -> tuple[RowModel, EpochLog]:
    """Fit a closed-form method, and score it.

    Args:
        method: Name of a closed-form method.
        inputs: Rows, task and class weights.

    Returns:
        The model, and its scores as a log of one epoch. Validation scores are out of fold if it is fitted to those
        rows, too.

    Raises:
        TrainingError: If a class has no training rows, the validation split is empty, or a feature is not finite.
    """
    start = time.perf_counter()
    model, val_logits = closed_form_method(method).fit(inputs)
    weights = None if inputs.class_weights is None else torch.tensor(inputs.class_weights, dtype=torch.float32)
    with torch.inference_mode():
        if val_logits is None:
            val_logits = model.row_logits(torch.from_numpy(inputs.val.x))
        train_logits = model.row_logits(torch.from_numpy(inputs.train.x))
        train_loss, _, _ = score_logits(train_logits, inputs.train.y.tolist(), weights, inputs.task)
        val_loss, val_auc, val_accuracy = score_logits(val_logits, inputs.val.y.tolist(), weights, inputs.task)
    log = EpochLog(
        epoch=1,
        train_loss=train_loss,
        val_loss=val_loss,
        val_auc=val_auc,
        val_accuracy=val_accuracy,
        lr=None,
        seconds=round(time.perf_counter() - start, 3),
    )
    return model, log
