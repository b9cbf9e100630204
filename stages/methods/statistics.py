"""What the LPM knows without training: linear probes of its pooled outputs and of the statistics of its cached tokens.

Of each tapped layer, the mean and the standard deviation of every channel over the kept tokens, of keys and of values,
describe an image as a texture does (Gram matrices, Gatys et al. 2015, arXiv 1505.07376; here their diagonal). Which
layer tells most depends on the images: a logistic regression is fitted to each source by itself, and what they say is
averaged,

    log p = sum_s share_s log softmax(W_s z_s + b_s)   up to a constant,   share_s ~ exp(-PREFERENCE * loss_s)

with z the standardised source and loss its log-loss on images that it did not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from schemas.results import StatisticsSpec
from schemas.tasks import Task
from stages.methods.cached_tokens import CHUNK, Cached
from stages.methods.fit_rows import FittedRows, check_rows_to_fit
from stages.methods.probes import LinearFit, fit_regression, required
from stages.scores import log_pool_terms
from stages.threads import ONE, Lanes

PREFERENCE = 20.0
"""A source whose log-loss is 0.05 nats an image higher has a share smaller by e."""


def describe(pooled: torch.Tensor, cached: Cached | None) -> torch.Tensor:
    """Sources of a batch.

    Args:
        pooled: (B, 2, D).
        cached: Keys and values of L layers, or None.

    Returns:
        (B, S, 2 D) float32 with S = 1 + 2 L: the pooled outputs, then of each layer the keys' mean and standard
        deviation over the tokens, and the values'. S = 1 without cached tokens.
    """
    found = [pooled.float().flatten(1)]
    if cached is not None:
        for layer in range(cached.keys.shape[1]):
            found += _moments(cached.layer(layer))
    return torch.stack(found, dim=1)


def _moments(cached: Cached) -> list[torch.Tensor]:
    """Of keys and of values of one layer: mean and standard deviation over the tokens, (B, 2 D)."""
    parts: list[list[torch.Tensor]] = [[], []]
    for start in range(0, len(cached.keys), CHUNK):
        for found, (mean, deviation) in zip(
            parts, cached.rows(slice(start, start + CHUNK)).token_moments(), strict=True
        ):
            found.append(torch.cat([mean.flatten(1), deviation.flatten(1)], dim=1))
    return [torch.cat(found) for found in parts]


class EvidenceProbe(nn.Module):
    """Logistic regressions, one a source, averaged. Fitted, not trained: no gradient reaches it."""

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
        """(B, S, F) of `describe` -> (B, classes) of the opinion pool."""
        scaled = (sources - self.mean) / self.scale
        logits = torch.einsum("bsf,scf->bsc", scaled, self.weight) + self.bias
        return (log_pool_terms(logits, self.task) * self.share[:, None]).sum(dim=1)


class StatisticsModel(nn.Module):
    """The probes, and nothing else."""

    def __init__(self, spec: StatisticsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.probe = EvidenceProbe(len(spec.shares), spec.features, spec.classes, spec.task)

    def forward(self, _image: torch.Tensor | None, cached: Cached | None, pooled: torch.Tensor | None) -> torch.Tensor:
        """Cached tokens and (B, 2, D) pooled outputs -> (B, classes) log-probabilities up to a constant."""
        return self.judge(describe(required(pooled), cached))

    def judge(self, sources: torch.Tensor) -> torch.Tensor:
        """(B, S, 2 D) of `describe` -> (B, classes), as the whole model."""
        logits: torch.Tensor = self.probe(sources)
        return logits


class EvidenceFit(NamedTuple):
    """State of an `EvidenceProbe`."""

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

    def copy_to(self, probe: EvidenceProbe) -> None:
        """Give it to a probe."""
        probe.load_state_dict(self._asdict())


def statistics_model(fit: EvidenceFit, layers: tuple[int, ...], task: Task = "multiclass") -> StatisticsModel:
    """The model of a fit to features of these blocks."""
    _, classes, features = fit.weight.shape
    shares = tuple(fit.share.tolist())
    spec = StatisticsSpec(classes=classes, layers=layers, features=features, shares=shares, task=task)
    model = StatisticsModel(spec)
    fit.copy_to(model.probe)
    return model.eval()


def fit_evidence(
    train: FittedRows, val: FittedRows, class_weights: Sequence[float] | None = None, lanes: Lanes = ONE
) -> tuple[EvidenceFit, torch.Tensor]:
    """Logistic regression on each standardised source, of training and validation images together.

    Its penalty and its share follow from the log-loss on images that it did not see: all are held out once, in up to
    five folds, whole groups each. Some dozen validation images alone would make both a matter of luck, and be lost to
    the fit. Where classes of a single group leave no folds, training images are fitted to and validation images judge.

    Args:
        train: Every class occurs.
        val: At least one row.
        class_weights: (C,) weight of each class in the losses; None: all 1.
        lanes: Threads that the sources are shared out to.

    Returns:
        The fit, and (m, C) float32: what an `EvidenceProbe` says of the validation images, each from regressions that
        did not see it.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    classes, count = train.classes, len(val.y)
    check_rows_to_fit(train, val)
    weights = np.ones(classes) if class_weights is None else np.asarray(class_weights, np.float64)
    rows, x_held, y_held = train.joined(val), val.x[:0], val.y[:0]
    folds = rows.folds()
    if not folds or not np.any(folds, axis=0)[len(train.y) :].all():
        rows, x_held, y_held = train, val.x, val.y
        folds = train.folds()

    def fit(sources: Sequence[int]) -> list[LinearFit]:
        return [fit_regression(rows.x[:, one], rows.y, x_held[:, one], y_held, weights, folds) for one in sources]

    # Products of a few hundred rows are too small to be shared out among cores; whole fits are not.
    with threadpool_limits(1):
        found = lanes.map(fit, range(rows.x.shape[1]))
    losses = np.array([one.loss for one in found])
    # Of several labels an image the loss is a mean over them: an image's is their sum.
    losses *= 1 if rows.y.ndim == 1 else classes
    preferred = np.exp(-PREFERENCE * (losses - losses.min()))
    share = torch.from_numpy((preferred / preferred.sum()).astype(np.float32))
    parts = {name: torch.stack([getattr(one, name) for one in found]) for name in ("weight", "bias", "mean", "scale")}
    held = torch.stack([one.held[-count:] for one in found], dim=1)
    terms = log_pool_terms(held, "multiclass" if rows.y.ndim == 1 else "multilabel")
    return EvidenceFit(**parts, share=share), (terms * share[:, None]).sum(dim=1)
