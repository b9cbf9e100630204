"""The statistics probe: linear probes of the LPM's pooled outputs and of the statistics of its cached tokens.

Per tapped layer, the mean and the standard deviation of every channel over the kept tokens, of keys and of values,
describe an image as a texture does (Gram matrices, Gatys et al. 2015, arXiv 1505.07376; here their diagonal). Which
layer is most informative depends on the images: a logistic regression is fitted to each source separately, and their
log-probabilities are averaged,

    log p = sum_s share_s log softmax(W_s z_s + b_s)   up to a constant,   share_s ~ exp(-PREFERENCE * loss_s)

with z the standardised source and loss its log-loss on held-out images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from schemas.specs import MethodSpec, StatisticsSpec
from schemas.tasks import Task
from stages.methods.base import ClosedFormMethod, Details, FitInputs, RowModel
from stages.methods.fit_rows import check_rows_to_fit
from stages.methods.regression import LinearFit, fit_regression
from stages.scores import log_pool_terms

LISTED = 0.05
"""Ensemble weight below which a source is not listed in the report."""

PREFERENCE = 20.0
"""A source whose log-loss is 0.05 nats per image higher has an ensemble weight smaller by a factor of e."""


class StatisticsProbe(nn.Module):
    """Averaged logistic regressions, one per source. Fitted in closed form: no gradient reaches them."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    share: torch.Tensor

    def __init__(self, sources: int, width: int, classes: int, task: Task = "multiclass") -> None:
        super().__init__()
        self.task = task
        self.register_buffer("weight", torch.zeros(sources, classes, width))
        self.register_buffer("bias", torch.zeros(sources, classes))
        self.register_buffer("mean", torch.zeros(sources, width))
        self.register_buffer("scale", torch.ones(sources, width))
        self.register_buffer("share", torch.full((sources,), 1.0 / sources))

    def forward(self, sources: torch.Tensor) -> torch.Tensor:
        """(B, S, F) of `describe_rows` -> (B, classes) of the opinion pool."""
        scaled = (sources - self.mean) / self.scale
        logits = torch.einsum("bsf,scf->bsc", scaled, self.weight) + self.bias
        return (log_pool_terms(logits, self.task) * self.share[:, None]).sum(dim=1)


class StatisticsModel(RowModel):
    """Only the linear probes."""

    spec: StatisticsSpec

    def __init__(self, spec: StatisticsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.probe = StatisticsProbe(len(spec.shares), spec.features, spec.classes, spec.task)

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, S, 2 D) of `describe_rows` -> (B, classes) log-probabilities up to a constant."""
        logits: torch.Tensor = self.probe(rows)
        return logits


class StatisticsFit(NamedTuple):
    """State of an `StatisticsProbe`."""

    weight: torch.Tensor
    """(S, classes, F) float32."""
    bias: torch.Tensor
    """(S, classes) float32."""
    mean: torch.Tensor
    """(S, F) float32, of the training rows."""
    scale: torch.Tensor
    """(S, F) float32, standard deviation of the training rows; 1 where they do not vary."""
    share: torch.Tensor
    """(S,) float32; they sum to 1."""

    def copy_to(self, probe: StatisticsProbe) -> None:
        """Give it to a probe."""
        probe.load_state_dict(self._asdict())


def fit_statistics(inputs: FitInputs) -> tuple[StatisticsFit, torch.Tensor]:
    """Fit a logistic regression to each standardised source, of training and validation images together.

    Penalty and ensemble weight follow from the log-loss on held-out images: every image is held out once, in up to
    five folds of complete groups. A few dozen validation images would make both a matter of luck, and would be lost to
    the fit. Where a class of a single group leaves no folds, training images are fitted to and validation images
    choose.

    Args:
        inputs: Rows, class weights, and the threads that the sources share.

    Returns:
        The fit, and (m, C) float32: logits of the validation images, each from regressions without it.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    train, val = inputs.train, inputs.val
    classes, count = train.classes, len(val.y)
    check_rows_to_fit(train, val)
    weights = np.ones(classes) if inputs.class_weights is None else np.asarray(inputs.class_weights, np.float64)
    rows, x_held, y_held = train.joined(val), val.x[:0], val.y[:0]
    folds = rows.folds()
    if not folds or not np.any(folds, axis=0)[len(train.y) :].all():
        rows, x_held, y_held = train, val.x, val.y
        folds = train.folds()

    def fit(sources: Sequence[int]) -> list[LinearFit]:
        return [fit_regression(rows.x[:, one], rows.y, x_held[:, one], y_held, weights, folds) for one in sources]

    # Products of a few hundred rows are too small to be split among cores; complete fits are not.
    with threadpool_limits(1):
        fits = inputs.threads.map(fit, range(rows.x.shape[1]))
    losses = np.array([one.loss for one in fits])
    # With several labels per image the loss is a mean over them: an image's is their sum.
    losses *= 1 if rows.y.ndim == 1 else classes
    preferred = np.exp(-PREFERENCE * (losses - losses.min()))
    share = torch.from_numpy((preferred / preferred.sum()).astype(np.float32))
    stacked = {name: torch.stack([getattr(one, name) for one in fits]) for name in ("weight", "bias", "mean", "scale")}
    held_out = torch.stack([one.held[-count:] for one in fits], dim=1)
    terms = log_pool_terms(held_out, "multiclass" if rows.y.ndim == 1 else "multilabel")
    return StatisticsFit(**stacked, share=share), (terms * share[:, None]).sum(dim=1)


class StatisticsMethod(ClosedFormMethod):
    """The statistics probe as a method."""

    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Fit the probes; validation images are fitted to as well."""
        fit, held_out = fit_statistics(inputs)
        _, classes, features = fit.weight.shape
        spec = StatisticsSpec(
            classes=classes,
            layers=inputs.layers,
            features=features,
            shares=tuple(fit.share.tolist()),
            task=inputs.task,
        )
        model = StatisticsModel(spec)
        fit.copy_to(model.probe)
        return model.eval(), held_out

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
