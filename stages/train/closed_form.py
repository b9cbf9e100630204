"""Training of closed-form methods: read all rows once and fit once."""

from __future__ import annotations

import time

import torch

from schemas.manifest import Split
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog, TrainResult
from schemas.views import train_views
from stages.methods.base import FitInputs, RowModel, closed_form_method
from stages.methods.fit_rows import FitRows
from stages.methods.summed import Sums, summed_method
from stages.threads import CALLING_THREAD, Threads, open_threads
from stages.train.job import DESCRIBED, Job, rows_to_fit, save_model
from stages.train.loop import score_logits
from stages.train.source_statistics import Moments, moments_of

MOST_THREADS = 64
"""Maximum number of threads that fits share; limited by the number of cores."""


def fit_job(job: Job) -> list[TrainResult]:
    """Fit every variant on the CPU, and write its bundle."""
    results = []
    with open_threads(MOST_THREADS, torch.device("cpu")) as threads:
        train, val = rows_to_fit(job, job.opened.source, _row_ids(job), METHODS[job.first.method].inputs)
        for position, settings in enumerate(job.variants):
            model, log = fit_rows(settings.method, _fit_inputs(job, settings, train, val, threads))
            job.watch.on_epoch(position, log)
            results.append(
                TrainResult(
                    best=log,
                    epochs=(log,),
                    resumed_from=0,
                    learnable=save_model(job, position, model, log, _source_moments(model, train)),
                    chosen=dict(closed_form_method(settings.method).chosen(model.spec)),
                )
            )
    return results


def _source_moments(model: RowModel, train: FitRows) -> dict[str, Moments]:
    """Return the statistics of the vector that the head reads, which are those of the training rows."""
    if not model.has_head:
        return {}
    return {"vectors": moments_of(torch.from_numpy(train.x).split(DESCRIBED))}  # type: ignore[no-untyped-call]


def sum_job(job: Job) -> Sums:
    """Return the sums over the training rows of a job's first variant, a summed method; its classes may be absent."""
    # Read first: a site without validation images has no other rows.
    train = next(rows_to_fit(job, job.opened.source, _row_ids(job), METHODS[job.first.method].inputs))
    inputs = _fit_inputs(job, job.first, train, train, CALLING_THREAD)
    return summed_method(job.first.method).sums(inputs)


def _row_ids(job: Job) -> dict[Split, list[list[str]]]:
    """Return the row ids of each image; every view of a training image is a row of its own."""
    return {
        "train": [[row.row_id for row in views] for views in train_views(job.manifest, job.first.features)],
        "val": [[row.id] for row in job.manifest.of("val")],
    }


def _fit_inputs(job: Job, settings: ResolvedSettings, train: FitRows, val: FitRows, threads: Threads) -> FitInputs:
    row = METHODS[settings.method]
    weights = job.class_weights(settings, torch.device("cpu"))
    return FitInputs(
        train=train,
        val=val,
        task=job.manifest.task,
        method=settings.method,
        sources=row.preset.probe_sources(job.opened.features, "pooled" in row.inputs),
        preference=row.preset.preference,
        class_weights=None if weights is None else weights.tolist(),
        threads=threads,
    )


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
