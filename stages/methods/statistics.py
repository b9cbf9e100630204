"""The statistics probe: linear probes of the pooled outputs and of the token statistics of the LPM.

Which statistic of which block is most informative depends on the images: a logistic regression and a ridge regression
are fitted to each source separately, and the log-probabilities of all of them are averaged,

    log p = sum_s share_s log softmax(W_s z_s + b_s)   up to a constant,   share_s ~ exp(-n loss_s / 2)

with z the standardised source and loss the mean log-loss on the n held-out images: the more images there are, the more
the best ones count. `covariance` and `all-block-linear` have logistic regressions only.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from schemas.probe_specs import StatisticsSpec
from schemas.specs import MethodSpec
from schemas.statistics import ProbeSource
from schemas.tasks import Task
from stages.methods.base import ClosedFormMethod, Details, FitInputs, FitShape, RowModel
from stages.methods.fit_rows import FitRows, check_rows_to_fit
from stages.methods.least_squares import fit_least_squares
from stages.methods.logistic_path import fit_path
from stages.methods.principal_axes import principal_axes
from stages.methods.regression import LinearFit
from stages.scores import log_pool_terms

LISTED = 0.05
"""Ensemble weight below which a source is not listed in the report."""

FITS = {"logistic": fit_path, "squared": fit_least_squares}
"""Loss of a probe -> its fit."""


class StatisticsProbe(nn.Module):
    """Averaged linear regressions, one per source. Fitted in closed form: no gradient reaches them."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    share: torch.Tensor

    def __init__(self, sources: Sequence[ProbeSource], classes: int, task: Task = "multiclass") -> None:
        super().__init__()
        self.task, self.sources = task, tuple(sources)
        self._widths = [source.width for source in sources]
        total = sum(self._widths)
        self.register_buffer("weight", torch.zeros(classes, total))
        self.register_buffer("bias", torch.zeros(len(sources), classes))
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("scale", torch.ones(total))
        self.register_buffer("share", torch.full((len(sources),), 1.0 / len(sources)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, F) of `describe_rows` -> (B, classes), the weighted average of log-probabilities."""
        # One source after the other: all of them together are many times the rows.
        parts = (torch.split(part, self._widths, dim=-1) for part in (self.mean, self.scale, self.weight))
        logits = [
            ((select(rows, source) - mean) / scale) @ weight.T
            for source, mean, scale, weight in zip(self.sources, *parts, strict=True)
        ]
        terms = log_pool_terms(torch.stack(logits, dim=1) + self.bias, self.task)
        return (terms * self.share[:, None]).sum(dim=1)


def select(rows: torch.Tensor, source: ProbeSource) -> torch.Tensor:
    """Return the numbers of a source, (B, F) -> (B, width)."""
    return torch.cat([rows[:, start:stop] for start, stop in source.spans], dim=1)


class StatisticsModel(RowModel):
    """Only the linear probes."""

    spec: StatisticsSpec

    def __init__(self, spec: StatisticsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.probe = StatisticsProbe(spec.sources, spec.classes, spec.task)

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, F) of `describe_rows` -> (B, classes) log-probabilities up to a constant."""
        logits: torch.Tensor = self.probe(rows)
        return logits


class StatisticsFit(NamedTuple):
    """State of an `StatisticsProbe`."""

    weight: torch.Tensor
    """(classes, F) float32, the sources one after the other."""
    bias: torch.Tensor
    """(S, classes) float32."""
    mean: torch.Tensor
    """(F,) float32, of the rows fitted to."""
    scale: torch.Tensor
    """(F,) float32, standard deviation of the rows fitted to; 1 where they do not vary."""
    share: torch.Tensor
    """(S,) float32; they sum to 1."""

    def copy_to(self, probe: StatisticsProbe) -> None:
        """Give it to a probe."""
        probe.load_state_dict(self._asdict())


def fit_statistics(inputs: FitInputs) -> tuple[StatisticsFit, torch.Tensor]:
    """Fit the regression of each standardised source to training and validation images together.

    Penalty and ensemble weight follow from the log-loss on held-out images: every image is held out once, in up to
    five folds of complete groups. A few dozen validation images would make both a matter of luck, and would be lost to
    the fit. Where a class of a single group leaves no folds, training images are fitted to and validation images
    choose.

    Args:
        inputs: Rows, sources of the probes, class weights, and the threads that the fits share.

    Returns:
        The fit, and (m, C) float32: logits of the validation images, each from regressions without it.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    train, val = inputs.train, inputs.val
    classes, count = train.classes, len(val.y)
    check_rows_to_fit(train, val)
    weights = np.ones(classes) if inputs.class_weights is None else np.asarray(inputs.class_weights, np.float64)
    rows = train.joined(val)
    folds = rows.folds()
    if not folds or not np.any(folds, axis=0)[len(train.y) :].all():
        # The only fold is the validation split.
        folds = [np.arange(len(rows.y)) >= len(train.y)]
    fits = _fit_sources(inputs, rows, weights, folds)
    losses = np.array([one.loss for one in fits])
    # With several labels per image the loss is a mean over them: an image's is their sum.
    losses *= 1 if rows.y.ndim == 1 else classes
    held_rows = np.any(folds, axis=0).sum()
    preferred = np.exp(-inputs.preference * held_rows * (losses - losses.min()))
    share = torch.from_numpy((preferred / preferred.sum()).astype(np.float32))
    joined = {name: torch.cat([getattr(one, name) for one in fits], dim=-1) for name in ("weight", "mean", "scale")}
    held_out = torch.stack([one.held_out[-count:] for one in fits], dim=1)
    terms = log_pool_terms(held_out, "multiclass" if rows.y.ndim == 1 else "multilabel")
    bias = torch.stack([one.bias for one in fits])
    return StatisticsFit(**joined, bias=bias, share=share), (terms * share[:, None]).sum(dim=1)


def _fit_sources(
    inputs: FitInputs, rows: FitRows, weights: npt.NDArray[np.float64], folds: Sequence[npt.NDArray[np.bool_]]
) -> list[LinearFit]:
    """Fit every source; those of the same numbers share their principal axes."""
    x = torch.from_numpy(rows.x)
    alike: dict[tuple[tuple[int, int], ...], list[ProbeSource]] = {}
    for source in inputs.sources:
        alike.setdefault(source.spans, []).append(source)

    def fit(groups: Sequence[list[ProbeSource]]) -> list[dict[ProbeSource, LinearFit]]:
        turned = ((group, principal_axes(select(x, group[0]).numpy())) for group in groups)
        return [{one: FITS[one.loss](axes, rows.y, weights, folds) for one in group} for group, axes in turned]

    # Products of a few hundred rows are too small to be split among cores; complete fits are not.
    with threadpool_limits(1):
        fits = dict(ChainMap(*inputs.threads.map(fit, list(alike.values()))))
    return [fits[source] for source in inputs.sources]


class StatisticsMethod(ClosedFormMethod):
    """The statistics probe as a method."""

    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Fit the probes; validation images are fitted to as well."""
        fit, held_out = fit_statistics(inputs)
        model = StatisticsModel(self.spec(inputs.shape).model_copy(update={"shares": tuple(fit.share.tolist())}))
        fit.copy_to(model.probe)
        return model.eval(), held_out

    def spec(self, shape: FitShape) -> StatisticsSpec:
        """Return the spec without ensemble weights."""
        return StatisticsSpec(
            method=shape.method,
            classes=shape.classes,
            sources=shape.sources,
            shares=(0.0,) * len(shape.sources),
            task=shape.task,
        )

    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec."""
        return StatisticsModel(cast("StatisticsSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return the ensemble weights that count."""
        ranked = cast("StatisticsSpec", spec).ranked
        return (("Ensemble weights", ", ".join(f"{name} {share:.2f}" for name, share in ranked if share >= LISTED)),)

    def chosen(self, spec: MethodSpec) -> Mapping[str, float]:
        """Return the largest ensemble weight."""
        name, share = cast("StatisticsSpec", spec).ranked[0]
        return {f"share of {name}": round(share, 2)}


METHOD = StatisticsMethod()
