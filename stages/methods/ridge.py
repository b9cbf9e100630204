"""Ridge regressions on pooled outputs and central blocks, as a function of sums over rows.

With targets t of zeros and ones, standardised rows z / sqrt(F) of a source of F numbers, and row weights u,

    minimise  sum_i u_i |t_i - b - z_i W|^2 + lambda |W|^2,      p = sum_s share_s (b_s + z_s W_s)

depends on the rows only through the sums  u, u x, u x x', u x t'  and  u t. Penalty and ensemble weight of a source
follow from the squared loss of held-out folds, a function of the same sums, kept separately for each fold of patients.
Sums over several sites add up, so that one exchange gives the fit to all rows (`fpt federate`), up to rounding. The
log-loss, by which the ridge regressions of `statistics` are chosen, is no such function.

Folds follow from a hash of each patient's key: a patient is in the same fold wherever it is. A ridge regression on the
labels estimates probabilities; p is cut off at `LEAST` and its logarithm is the logit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from schemas.errors import TrainingError
from schemas.methods import METHODS
from schemas.probe_specs import RidgeSpec
from schemas.specs import MethodSpec
from schemas.statistics import ProbeSource
from stages.methods.base import Details, FitInputs, FitShape, RowModel
from stages.methods.fit_rows import check_finite
from stages.methods.least_squares import PENALTIES
from stages.methods.linear import LinearProbe
from stages.methods.regression import Floats, scale_of
from stages.methods.statistics import select
from stages.methods.summed import SummedMethod, Sums
from stages.tasks import positives

FOLDS = 3
"""Folds of patients. Each adds as many sums as a fit needs, so that there are fewer than for fits to rows."""
LEAST = 0.01
"""Smallest probability of a class."""
CONSTANT = 1e-6
"""Deviation, relative to 1 + |mean|, up to which a number is constant: a difference of sums is rounded more than one of
rows."""


def fold_of(patient: str) -> int:
    """Return the fold of a patient, which depends only on its key."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % FOLDS


@dataclass(frozen=True)
class RowSums:
    """Weighted sums over rows (n, F) with targets (n, C)."""

    weight: float
    """Sum of the row weights."""
    labels: Floats
    """(C,) sum of the targets, and of their squares: they are zeros and ones."""
    total: Floats
    """(F,)."""
    gram: Floats
    """(F, F)."""
    cross: Floats
    """(F, C)."""

    def plus(self, other: RowSums, factor: float = 1.0) -> RowSums:
        """Return these sums plus `factor` times others; -1: without the rows of the others."""
        return RowSums(
            self.weight + factor * other.weight,
            self.labels + factor * other.labels,
            self.total + factor * other.total,
            self.gram + factor * other.gram,
            self.cross + factor * other.cross,
        )

    def standardised(self, mean: Floats, scale: Floats) -> RowSums:
        """Return the sums over (x - mean) / scale / sqrt(F)."""
        length = scale * np.sqrt(len(scale))
        total = self.total - self.weight * mean
        shifted = self.gram - np.outer(self.total, mean) - np.outer(mean, total)
        cross = self.cross - np.outer(mean, self.labels)
        return RowSums(
            self.weight, self.labels, total / length, shifted / np.outer(length, length), cross / length[:, None]
        )

    def path(self) -> tuple[Floats, Floats]:
        """Return the ridge regressions of all penalties: weights (P, F, C) and biases (P, C)."""
        mean, target = self.total / self.weight, self.labels / self.weight
        squares, vectors = np.linalg.eigh(self.gram - self.weight * np.outer(mean, mean))
        projected = vectors.T @ (self.cross - np.outer(self.total, target))
        weights = vectors @ (projected / (np.maximum(squares, 0.0)[:, None] + np.reshape(PENALTIES, (-1, 1, 1))))
        return weights, target - mean @ weights

    def losses(self, weights: Floats, biases: Floats) -> Floats:
        """Return the squared losses (P,), summed over rows and classes, of regressions of all penalties."""
        fitted = np.einsum("pfc,pfc->p", weights, self.gram @ weights) + 2 * ((self.total @ weights) * biases).sum(1)
        agreed = np.einsum("pfc,fc->p", weights, self.cross) + biases @ self.labels
        return cast("Floats", self.labels.sum() + fitted + self.weight * (biases**2).sum(1) - 2 * agreed)


class SourceFit(NamedTuple):
    """The regression of one source: p = (x - mean) / scale @ weight + bias."""

    weight: Floats
    """(F, C)."""
    bias: Floats
    """(C,)."""
    mean: Floats
    """(F,)."""
    scale: Floats
    """(F,)."""
    penalty: float
    """lambda of the lowest held-out loss."""
    loss: float
    """Squared loss per held-out row."""


def sums_of(
    x: npt.NDArray[Any], targets: Floats, weights: Floats, folds: npt.NDArray[np.int64], sources: Sequence[ProbeSource]
) -> dict[str, Floats]:
    """Return the sums over rows of every source, by name, with the folds as first axis.

    Args:
        x: (n, F) rows of all numbers.
        targets: (n, C) zeros and ones.
        weights: (n,) row weights.
        folds: (n,) fold of each row.
        sources: What each regression reads.
    """
    rows = torch.from_numpy(np.asarray(x, np.float32))
    chosen = [(folds == fold)[:, None] * weights[:, None] for fold in range(FOLDS)]
    sums = {
        "count": np.array([one.sum() for one in chosen]),
        "labels": np.stack([(one * targets).sum(axis=0) for one in chosen]),
    }
    for number, source in enumerate(sources):
        values = select(rows, source).numpy().astype(np.float64)
        upper = np.triu_indices(values.shape[1])
        parts = [(one * values, one) for one in chosen]
        sums[f"total.{number}"] = np.stack([part.sum(axis=0) for part, _ in parts])
        sums[f"gram.{number}"] = np.stack([(values.T @ part)[upper] for part, _ in parts])
        sums[f"cross.{number}"] = np.stack([part.T @ targets for part, _ in parts])
    return sums


def row_sums(sums: Sums, number: int) -> list[RowSums]:
    """Return the sums of one source, fold by fold."""
    width = sums[f"total.{number}"].shape[1]
    upper = np.triu_indices(width)
    found = []
    for fold in range(FOLDS):
        gram = np.zeros((width, width))
        gram[upper] = sums[f"gram.{number}"][fold]
        gram = gram + np.triu(gram, 1).T
        total, cross = sums[f"total.{number}"][fold], sums[f"cross.{number}"][fold]
        found.append(RowSums(float(sums["count"][fold]), sums["labels"][fold], total, gram, cross))
    return found


def fit_source(folds: Sequence[RowSums]) -> SourceFit:
    """Fit the ridge regression of one source, with the penalty of the lowest squared loss on held-out folds."""
    raw = reduce(RowSums.plus, folds)
    mean = raw.total / raw.weight
    deviation = np.sqrt(np.maximum(np.diag(raw.gram) / raw.weight - mean**2, 0.0))
    scale = scale_of(mean, deviation, CONSTANT)
    standardised = [one.standardised(mean, scale) for one in folds if one.weight > 0]
    everything = raw.standardised(mean, scale)
    # With all rows in one fold nothing can be held out: the fit is scored on its own rows, and the strongest wins ties.
    seen = [everything.plus(one, -1.0) if len(standardised) > 1 else everything for one in standardised]
    losses = np.sum([held.losses(*one.path()) for held, one in zip(standardised, seen, strict=True)], axis=0)
    best = int(losses.argmin()) if len(standardised) > 1 else len(PENALTIES) - 1
    weights, biases = everything.path()
    weight = weights[best] / np.sqrt(len(scale))
    return SourceFit(weight, biases[best], mean, scale, PENALTIES[best], float(losses[best] / raw.weight))


class RidgeModel(RowModel):
    """Averaged ridge regressions of several sources."""

    spec: RidgeSpec

    def __init__(self, spec: RidgeSpec) -> None:
        super().__init__()
        self.spec = spec
        # The average of linear maps of the sources is one linear map of all of them.
        self.probe = LinearProbe(sum(source.width for source in spec.sources), spec.classes)

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, F) of `describe_rows` -> (B, classes) logits."""
        values = torch.cat([select(rows, source) for source in self.spec.sources], dim=1)
        p: torch.Tensor = self.probe(values)
        return p.clamp(LEAST, 1 - LEAST).logit() if self.spec.task == "multilabel" else p.clamp(LEAST, 1.0).log()


class RidgeMethod(SummedMethod):
    """Ridge regressions as a method."""

    def sums(self, inputs: FitInputs) -> Sums:
        """Return the sums over the training rows.

        Raises:
            TrainingError: If a feature is not finite, or labels of a multi-label study are weighted.
        """
        train = inputs.train
        check_finite(train)
        if train.y.ndim == 2 and inputs.class_weights is not None:
            raise TrainingError(
                "ridge cannot weight the labels of a multi-label study.",
                "One sum serves all labels.",
                "Set train.class_weights: none.",
            )
        targets = positives(train.y, train.classes).astype(np.float64)
        weights = np.ones(len(targets))
        if inputs.class_weights is not None:
            weights = targets @ np.asarray(inputs.class_weights, np.float64)
        folds = np.array([fold_of(patient) for patient in train.groups], np.int64)
        with threadpool_limits(1):
            return sums_of(train.x, targets, weights, folds, inputs.sources)

    def fit_sums(self, sums: Sums, shape: FitShape) -> RowModel:
        """Fit the regressions to sums, and weight them by their held-out squared losses."""
        with threadpool_limits(1):
            fits = [fit_source(row_sums(sums, number)) for number in range(len(shape.sources))]
        losses = np.array([max(fit.loss, 1e-12) for fit in fits])
        held_rows = METHODS[shape.method].preset.preference * sums["count"].sum()
        preferred = (losses / losses.min()) ** -held_rows
        shares = preferred / preferred.sum()
        found = {
            "shares": tuple(round(share, 4) for share in shares.tolist()),
            "penalties": tuple(fit.penalty for fit in fits),
        }
        model = RidgeModel(self.spec(shape).model_copy(update=found))
        arrays = {
            "weight": np.concatenate([share * fit.weight for share, fit in zip(shares, fits, strict=True)]).T,
            "bias": np.sum([share * fit.bias for share, fit in zip(shares, fits, strict=True)], axis=0),
            "mean": np.concatenate([fit.mean for fit in fits]),
            "scale": np.concatenate([fit.scale for fit in fits]),
        }
        model.probe.load_state_dict(
            {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in arrays.items()}
        )
        return model.eval()

    def sums_size(self, shape: FitShape) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the sums, by name."""
        shapes: dict[str, tuple[int, ...]] = {"count": (FOLDS,), "labels": (FOLDS, shape.classes)}
        for number, source in enumerate(shape.sources):
            width = source.width
            shapes[f"total.{number}"] = (FOLDS, width)
            shapes[f"gram.{number}"] = (FOLDS, width * (width + 1) // 2)
            shapes[f"cross.{number}"] = (FOLDS, width, shape.classes)
        return shapes

    def spec(self, shape: FitShape) -> RidgeSpec:
        """Return the spec without ensemble weights and penalties."""
        none = (0.0,) * len(shape.sources)
        return RidgeSpec(classes=shape.classes, sources=shape.sources, shares=none, penalties=none, task=shape.task)

    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec."""
        return RidgeModel(cast("RidgeSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return ensemble weights and penalties."""
        spec = cast("RidgeSpec", spec)
        parts = zip(spec.sources, spec.shares, spec.penalties, strict=True)
        return (
            ("Ensemble weights", ", ".join(f"{one.name} {share:.2f} (penalty {c:.2g})" for one, share, c in parts)),
        )

    def chosen(self, spec: MethodSpec) -> Mapping[str, float]:
        """Return the largest ensemble weight."""
        spec = cast("RidgeSpec", spec)
        share, source = max(zip(spec.shares, (one.name for one in spec.sources), strict=True))
        return {f"share of {source}": round(share, 2)}


METHOD = RidgeMethod()
