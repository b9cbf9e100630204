"""Probes of the LPM's pooled outputs: logistic regression and k-NN, each tuned in folds of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from schemas.results import KnnSpec, LinearSpec
from schemas.tasks import Task
from stages.methods.cached_tokens import Cached
from stages.methods.fit_rows import FittedRows, check_rows_to_fit, held_out
from stages.methods.regression import OneVsRest, Softmax, label_log_loss, log_loss

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-12, 7))
"""Candidates of C, the inverse of the L2 penalty: 1e-6 to 1e3, two a decade."""
ITERATIONS = 2000
"""Of the solver per candidate; each starts where the stronger penalty before it ended."""
TOLERANCE = 1e-7
"""Largest gradient at which the solver stops; at its own default weak penalties end far from the optimum."""
ROUGH = 1e-4
"""The same on a fold, which only judges."""
PATIENCE = 4
"""Candidates without a lower held-out loss after which the weaker penalties are not tried."""
LEARNT = 0.99
"""Patience starts once the held-out loss is below this share of that of the strongest penalty, which predicts little
but class frequencies: on few rows the loss can rise by chance before it falls."""
NEIGHBOURS: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
"""Candidates of k."""
TEMPERATURE = 0.07
"""Of the cosine similarity in the votes of neighbours."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


class LinearFit(NamedTuple):
    """Logits of x (n, F): ((x - mean) / scale) @ weight.T + bias."""

    weight: torch.Tensor
    """(classes, F) float32."""
    bias: torch.Tensor
    """(classes,) float32."""
    mean: torch.Tensor
    """(F,) float32, of the training rows."""
    scale: torch.Tensor
    """(F,) float32, standard deviation of the training rows; 1 where they do not vary."""
    c: float
    """Inverse of the penalty that was chosen."""
    loss: float
    """Log-loss of the rows that it did not see."""
    held: torch.Tensor
    """(n + m, classes) float32: logits of its n rows, then of m others, by regressions that did not see them; NaN where
    there is none."""


def fit_linear_probe(train: FittedRows, val: FittedRows, class_weights: Sequence[float] | None = None) -> LinearFit:
    """Logistic regression of the training rows, with the C of the lowest out-of-fold log-loss among them.

    Every training row is held out once, in up to five folds by patient; the final fit is to all training rows. Where
    a class has one patient there are no folds, and the validation rows choose. With several labels an image it is one
    regression of each label, with one C for all.

    The loss, not the AUC, chooses: of some dozen images the AUC takes few values and jumps between them. Some dozen
    validation images would make the choice a matter of luck as well.

    Args:
        train: Every class occurs.
        val: At least one row.
        class_weights: (C,) weight of each class in both losses, of several labels that of yes; None: all 1.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    check_rows_to_fit(train, val)
    weights = np.ones(train.classes) if class_weights is None else np.asarray(class_weights, np.float64)
    folds = train.folds()
    held = val.at(np.full(len(val.y), not folds))
    # Products of a few hundred rows are too small to be shared out among cores: beside other work, 92 s for 1 s.
    with threadpool_limits(1):
        return fit_regression(train.x[:, 0], train.y, held.x[:, 0], held.y, weights, folds)


def fit_regression(
    x: npt.NDArray[Any],
    y: Labels,
    x_held: npt.NDArray[Any],
    y_held: Labels,
    weights: Floats,
    folds: Sequence[npt.NDArray[np.bool_]] = (),
) -> LinearFit:
    """Logistic regression on standardised rows, with the C of the lowest log-loss on rows that it did not see.

    Args:
        x: (n, F), checked.
        y: (n,), or of several labels (n, C).
        x_held: (m, F), m = 0 where there are folds alone: judges the regression of all rows.
        y_held: (m,) or (m, C).
        weights: (C,) weight of each class in the losses.
        folds: (n,) each: rows that judge a regression of the others, too.
    """
    mean, scale = spread(x.astype(np.float64))
    x, x_held = (x - mean) / scale, (x_held - mean) / scale
    axes = _axes(x)
    x, x_held = x @ axes, x_held @ axes
    rows, labels, everything = np.concatenate([x, x_held]), np.concatenate([y, y_held]), np.arange(len(y))
    # Of each that judges a penalty: rows to fit to, rows to judge by, the solver's tolerance.
    judges = [(everything, len(y) + np.arange(len(y_held)), TOLERANCE)] if len(y_held) else []
    judges += [(everything[~fold], everything[fold], ROUGH) for fold in folds]
    models = [_regression(y, weights, tolerance) for _, _, tolerance in judges]
    best, since, strongest = (np.inf, 0.0), 0, np.inf
    fits: list[tuple[Floats, Floats]] = []
    for c in STRENGTHS:
        total = 0.0
        for model, (seen, judged, _) in zip(models, judges, strict=True):
            model.fit(rows[seen], labels[seen], c)
            total += len(judged) * model.loss(rows[judged], labels[judged])
        loss = total / sum(len(judged) for _, judged, _ in judges)
        strongest = loss if c == STRENGTHS[0] else strongest
        since += 1
        if loss < best[0]:
            best, since = (loss, c), 0
            fits = [model.coefficients() for model in models]
        elif since >= PATIENCE and best[0] < LEARNT * strongest:
            break
    loss, c = best
    held = np.full((len(rows), len(weights)), np.nan)
    for (weight, bias), (_, judged, _) in zip(fits, judges, strict=True):
        held[judged] = rows[judged] @ weight.T + bias
    if not len(y_held):
        # No judge has seen all rows.
        whole = _regression(y, weights, TOLERANCE)
        whole.fit(x, y, c)
        fits = [whole.coefficients()]
    weight, bias = fits[0]
    found = [torch.from_numpy(part.astype(np.float32)) for part in (weight @ axes.T, bias, mean, scale, held)]
    return LinearFit(found[0], found[1], found[2], found[3], c, loss, found[4])


def _axes(x: Floats) -> Floats:
    """(F, r) orthonormal, r <= n: of fewer rows than features, what the penalised optimum is made of; else all."""
    rows, features = x.shape
    if rows >= features:
        return np.eye(features)
    _, sizes, right = np.linalg.svd(x, full_matrices=False)
    axes: Floats = right[sizes > 1e-7 * sizes[0]].T
    return axes


def _regression(y: Labels, weights: Floats, tolerance: float) -> Softmax | OneVsRest:
    from sklearn.linear_model import LogisticRegression

    models = [
        # Each fit starts where the last one ended.
        LogisticRegression(warm_start=True, max_iter=ITERATIONS, tol=tolerance)
        for _ in range(1 if y.ndim == 1 else len(weights))
    ]
    return Softmax(models[0], weights) if y.ndim == 1 else OneVsRest(models, weights)


def spread(x: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation (F,) of rows (n, F); the deviation 1 where they do not vary."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # What varies by rounding alone is constant: divided by its deviation it would be noise of size 1.
    scale[scale <= 1e-7 * (1.0 + np.abs(mean))] = 1.0
    return mean, scale


class LinearProbe(nn.Module):
    """Logistic regression on the LPM's pooled outputs. Fitted, not trained: no gradient reaches it."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        for name, shape in {"weight": (classes, width), "bias": (classes,), "mean": (width,)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, 2, D) -> logits (B, classes)."""
        return (pooled.flatten(1) - self.mean) / self.scale @ self.weight.T + self.bias


class LinearModel(nn.Module):
    """A linear probe of the pooled outputs, and nothing else."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self.probe = LinearProbe(spec.features, spec.classes)

    def forward(self, _image: torch.Tensor | None, _cached: Cached | None, pooled: torch.Tensor | None) -> torch.Tensor:
        """(B, 2, D) pooled outputs -> (B, classes) logits."""
        return self.judge(required(pooled))

    def judge(self, sources: torch.Tensor) -> torch.Tensor:
        """(B, 1, 2 D) or (B, 2, D) -> (B, classes) logits."""
        logits: torch.Tensor = self.probe(sources)
        return logits


class KnnProbe(nn.Module):
    """Votes of the training rows of highest cosine similarity.

    Of the k nearest, each row votes for its label with exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978), the
    votes scaled to k in all. One more vote is shared among the classes as they occur in training: a class without a
    neighbour is improbable, not impossible. With several labels an image, a row votes yes or no for each.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    class_weights: torch.Tensor

    def __init__(self, spec: KnnSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("rows", torch.zeros(spec.rows, spec.features))
        shape = (spec.rows, spec.classes) if spec.task == "multilabel" else (spec.rows,)
        self.register_buffer("labels", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("class_weights", torch.ones(spec.classes))

    def forward(self, _image: torch.Tensor | None, _cached: Cached | None, pooled: torch.Tensor | None) -> torch.Tensor:
        """(B, 2, D) pooled outputs -> (B, classes) logarithms of the shares of the votes; of labels log-odds."""
        return self.judge(required(pooled))

    def judge(self, sources: torch.Tensor) -> torch.Tensor:
        """(B, 1, 2 D) or (B, 2, D) -> (B, classes), as the whole model."""
        return self.vote(*self.nearest(sources))

    def nearest(self, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1, 2 D) or (B, 2, D) -> cosine similarity and index (B, k) of the nearest rows, the nearest first."""
        values, rows = (F.normalize(sources.flatten(1), dim=1) @ self.rows.T).topk(self.spec.neighbours, dim=1)
        return values, rows

    def vote(self, similarity: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, k) of `nearest` -> (B, classes)."""
        k = similarity.shape[1]
        votes = k * torch.softmax(similarity / TEMPERATURE, dim=1)
        several = self.spec.task == "multilabel"
        labels = (self.labels if several else F.one_hot(self.labels, self.spec.classes)).to(votes.dtype)
        counts = (votes[:, :, None] * labels[rows]).sum(dim=1) + labels.mean(dim=0)
        weighted = counts * self.class_weights
        if several:
            against = k + 1 - counts
            return torch.log(weighted.clamp_min(1e-12)) - torch.log(against.clamp_min(1e-12))
        # A class of weight 0 has a share of 0, whose logarithm the losses could not average.
        return torch.log((weighted / weighted.sum(dim=1, keepdim=True)).clamp_min(1e-12))


def required(pooled: torch.Tensor | None) -> torch.Tensor:
    """Them, or an error.

    Raises:
        ValueError: If they were not read.
    """
    if pooled is None:
        raise ValueError("this model needs the pooled outputs")
    return pooled


def linear_model(fit: LinearFit, task: Task = "multiclass") -> LinearModel:
    """The model of a fit."""
    classes, features = fit.weight.shape
    model = LinearModel(LinearSpec(classes=classes, features=features, c=fit.c, task=task))
    copy_fit(fit, model.probe)
    return model.eval()


def copy_fit(fit: LinearFit, probe: LinearProbe) -> None:
    """Give a probe the coefficients of a fit."""
    probe.load_state_dict({name: getattr(fit, name) for name in ("weight", "bias", "mean", "scale")})


def fit_knn(
    train: FittedRows, val: FittedRows, class_weights: Sequence[float] | None = None, task: Task = "multiclass"
) -> KnnProbe:
    """A k-NN of the training rows, with the k of the lowest out-of-fold log-loss among them.

    Folds, arguments and errors are those of `fit_linear_probe`.
    """
    check_rows_to_fit(train, val)
    weights = torch.ones(train.classes) if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
    pairs = held_out(train, val)
    fewest = min(len(seen.y) for seen, _ in pairs)
    candidates = [k for k in NEIGHBOURS if k <= fewest]
    losses = np.zeros(len(candidates))
    for seen, judged in pairs:
        model = _knn(seen, candidates[-1], weights, task)
        values, rows = model.nearest(torch.from_numpy(judged.x))
        for position, k in enumerate(candidates):
            logits = model.vote(values[:, :k], rows[:, :k]).double()
            losses[position] += len(judged.y) * _knn_loss(logits, judged.y, weights.double().numpy(), task)
    return _knn(train, candidates[int(losses.argmin())], weights, task)


def _knn(rows: FittedRows, k: int, weights: torch.Tensor, task: Task) -> KnnProbe:
    x = F.normalize(torch.from_numpy(rows.x).flatten(1), dim=1)
    spec = KnnSpec(classes=rows.classes, features=x.shape[1], rows=len(x), neighbours=k, task=task)
    model = KnnProbe(spec)
    model.load_state_dict({"rows": x, "labels": torch.from_numpy(rows.y), "class_weights": weights})
    return model.eval()


def _knn_loss(logits: torch.Tensor, labels: Labels, weights: Floats, task: Task) -> float:
    if task == "multilabel":
        return label_log_loss(F.logsigmoid(logits).numpy(), F.logsigmoid(-logits).numpy(), labels, weights)
    return log_loss(logits.numpy(), labels, weights)
