"""Summarise a bench: choose learning rates by validation, average over samplings, compare with the reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.bench import BenchRow, BenchRun
from schemas.errors import EvaluationError
from schemas.sweeps import PairedDifference, RunRecord, Separation
from stages.evaluate.bootstrap import group_draws, percentile_interval, weighted_auc
from stages.evaluate.predictions import TABLE, Predictions, read_predictions
from stages.evaluate.sweep_statistics import spread, spread_known
from stages.tasks import LEAST, positives, scored_columns
from stages.train.cost import efficiency_factor

Floats = npt.NDArray[np.float64]
Tables = Mapping[int, Sequence[Predictions]]
"""Sampling -> predictions of each seed."""


def mean_loss(records: Sequence[RunRecord]) -> float:
    """Return the mean validation loss of the seeds of a learning rate."""
    return statistics.fmean(record.val_loss for record in records)


def choose_rate(trials: Mapping[str, Sequence[RunRecord]]) -> str:
    """Return the learning rate with the lowest mean validation loss, of equal ones that of the highest AUC.

    Args:
        trials: Rate, or an empty text for closed forms -> records of its seeds, at least one. No record holds a test
            metric.
    """

    def merit(rate: str) -> tuple[float, float]:
        return (mean_loss(trials[rate]), -statistics.fmean(record.val_auc or 0.0 for record in trials[rate]))

    return min(trials, key=merit)


def log_loss(table: Predictions) -> float:
    """Return the mean negative log-probability of the labels; multi-label: of each yes and no, mean over labels."""
    p = np.clip(table.probabilities.astype(np.float64), LEAST, 1.0 - LEAST)
    own = positives(table.labels, p.shape[1])
    if table.task == "multilabel":
        return float(-np.log(np.where(own, p, 1.0 - p)).mean())
    return float(-np.log((p / p.sum(axis=1, keepdims=True))[own]).mean())


def summarise_method(
    method: str,
    runs: Sequence[BenchRun],
    validation: Mapping[str, Mapping[str, float | None]],
    *,
    difference: PairedDifference | None,
    lpm_parameters: int,
    tensor_mib: float | None,
    full_mib: float,
) -> BenchRow:
    """Return the row of a method with a number of shots.

    Args:
        method: Its name.
        runs: Its runs with the chosen learning rates, at least one.
        validation: Sampling -> learning rate -> validation loss.
        difference: To the reference.
        lpm_parameters: Parameters of the LPM with a linear head.
        tensor_mib: Memory of a training step, MiB; None for closed forms.
        full_mib: Memory of a step of full fine-tuning, MiB.
    """
    metrics = {name: spread_known([run.test.get(name) for run in runs]) for name in runs[0].test}
    auc, learnable = metrics.get("auc"), max(run.learnable for run in runs)
    share = learnable / lpm_parameters
    return BenchRow(
        method=method,
        auc=auc,
        difference=difference,
        test={name: values for name, values in metrics.items() if values is not None},
        seconds=spread_known([run.seconds for run in runs]),
        learnable=learnable,
        learnable_share=share,
        tensor_mib=tensor_mib,
        ppe=None if auc is None else auc.mean * efficiency_factor(share),
        pme=None if auc is None or tensor_mib is None else auc.mean * efficiency_factor(tensor_mib / full_mib),
        separation=mean_separation([run.separation for run in runs]),
        rates={str(run.sampling): run.rate for run in runs if run.rate is not None},
        validation={sampling: dict(losses) for sampling, losses in validation.items()},
        runs=tuple(runs),
    )


def mean_separation(values: Sequence[Separation | None]) -> Separation | None:
    """Average measurements of several runs; None if one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None

    def mean(read: Callable[[Separation], float | None]) -> float | None:
        over_runs = spread_known([read(value) for value in known])
        return None if over_runs is None else over_runs.mean

    return Separation(
        silhouette=mean(lambda value: value.silhouette),
        margin=mean(lambda value: value.margin),
        effective_rank=mean(lambda value: value.effective_rank),
    )


def auc_difference(reference: Tables, method: Tables) -> PairedDifference | None:
    """Compare the AUC of a method with that of the reference, sampling by sampling.

    All samplings have the same test images. Each bootstrap sample of their patients scores every model of both methods,
    and the interval is that of the mean over samplings of the difference of means over seeds.

    Args:
        reference: Predictions of the reference for the test images.
        method: Predictions of the method.

    Returns:
        None if they share no sampling, or an AUC is not defined. The interval is None where fewer than half of the
        bootstrap samples have an AUC.

    Raises:
        EvaluationError: The predictions are of different images.
    """
    samplings = [number for number in reference if number in method]
    if not samplings:
        return None
    rows = reference[samplings[0]][0].rows
    if any(table.rows != rows for tables in (reference, method) for number in samplings for table in tables[number]):
        raise EvaluationError(
            "The methods were evaluated on different test images.",
            "The study was prepared again.",
            "Run `fpt bench` again.",
        )
    whole = np.ones((len(rows), 1))
    paired = [_mean_auc(method[number], whole) - _mean_auc(reference[number], whole) for number in samplings]
    values = [float(value[0]) for value in paired]
    if not np.isfinite(values).all():
        return None
    drawn = []
    for weights in group_draws([row.group for row in rows]):
        each = [_mean_auc(method[number], weights) - _mean_auc(reference[number], weights) for number in samplings]
        drawn.append(np.mean(each, axis=0))
    sample = np.concatenate(drawn) if drawn else np.zeros(0)
    return PairedDifference(difference=spread(values), interval=percentile_interval(sample))


def _mean_auc(tables: Sequence[Predictions], weights: Floats) -> Floats:
    """Return the AUC (r,) of each weighting (n, r) of the rows, averaged over tables."""
    return np.asarray(np.mean([_auc(table, weights) for table in tables], axis=0))


def _auc(table: Predictions, weights: Floats) -> Floats:
    p, labels = table.probabilities.astype(np.float64), table.labels
    positive = positives(labels, p.shape[1])
    columns = scored_columns(labels, p.shape[1])
    return np.asarray(np.mean([weighted_auc(positive[:, at], p[:, at], weights) for at in columns], axis=0))


def read_tables(folders: Mapping[int, Sequence[Path]]) -> dict[int, list[Predictions]]:
    """Read the predictions of evaluations, sampling by sampling.

    Raises:
        EvaluationError: A table is missing or damaged.
    """
    return {
        sampling: [read_predictions(folder / TABLE) for folder in evaluations]
        for sampling, evaluations in folders.items()
    }
