"""Probes of the LPM's pooled outputs: logistic regression and k-NN, each chosen on the validation images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from schemas.errors import TrainingError
from schemas.results import KnnSpec, LinearSpec
from schemas.tasks import Task
from stages.tasks import positives
from stages.train.cached import Cached
from stages.train.regression import OneVsRest, Softmax, label_log_loss, log_loss

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-12, 7))
"""Candidates of C, the inverse of the L2 penalty: 1e-6 to 1e3, two a decade."""
ITERATIONS = 2000
"""Of the solver per candidate; each starts where the stronger penalty before it ended."""
TOLERANCE = 1e-7
"""Largest gradient at which the solver stops; at its own default weak penalties end far from the optimum."""
ROUGH = 1e-4
"""The same on a fold, which only judges."""
PATIENCE = 4
"""Candidates without a lower validation loss after which the weaker penalties are not tried."""
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


def fit_linear_probe(
    x_train: npt.ArrayLike,
    y_train: npt.ArrayLike,
    x_val: npt.ArrayLike,
    y_val: npt.ArrayLike,
    classes: int,
    class_weights: Sequence[float] | None = None,
) -> LinearFit:
    """Logistic regression on standardised features, with the C of the lowest validation log-loss.

    With several labels an image it is one of each label, with one C for all.

    The loss, not the AUC, chooses: of some dozen validation images the AUC takes few values and jumps between them,
    and what is joined with other evidence has to be calibrated.

    Args:
        x_train: (n, F).
        y_train: (n,) class indices; every class occurs. Several labels an image: (n, C) zeros and ones.
        x_val: (m, F), m > 0.
        y_val: (m,) class indices; classes may be absent. Several labels: (m, C).
        classes: C, at least 2.
        class_weights: (C,) weight of each class in both losses, of several labels that of yes; None: all 1.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    x, y = np.asarray(x_train, np.float64), np.asarray(y_train, np.int64)
    x_held, y_held = np.asarray(x_val, np.float64), np.asarray(y_val, np.int64)
    check_probed(x, y, x_held, classes)
    weights = np.ones(classes) if class_weights is None else np.asarray(class_weights, np.float64)
    # Products of a few hundred rows are too small to be shared out among cores: beside other work, 92 s for 1 s.
    with threadpool_limits(1):
        return fit_regression(x, y, x_held, y_held, weights)


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
    best, since = (np.inf, 0.0), 0
    fits: list[tuple[Floats, Floats]] = []
    for c in STRENGTHS:
        total = 0.0
        for model, (seen, judged, _) in zip(models, judges, strict=True):
            model.fit(rows[seen], labels[seen], c)
            total += len(judged) * model.loss(rows[judged], labels[judged])
        loss = total / sum(len(judged) for _, judged, _ in judges)
        since += 1
        if loss < best[0]:
            best, since = (loss, c), 0
            fits = [model.coefficients() for model in models]
        elif since == PATIENCE:
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


def check_probed(x: npt.NDArray[Any], y: npt.NDArray[np.int64], x_held: npt.NDArray[Any], classes: int) -> None:
    """Refuse rows that nothing can be fitted to.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    counts = positives(y, classes).sum(axis=0)
    if (counts == 0).any():
        raise TrainingError(
            f"{int((counts == 0).sum())} of {classes} classes have no training images.",
            "The split left them out.",
            "Change data.split_column, the shares or data.seed, then run `fpt prepare`.",
        )
    if not len(x_held):
        raise TrainingError(
            "There are no validation images to choose a probe by.",
            "The split left none.",
            "Raise data.val_share, then run `fpt prepare`.",
        )
    if not (np.isfinite(x).all() and np.isfinite(x_held).all()):
        raise TrainingError(
            "The features of the LPM are not finite.",
            "The features are damaged.",
            "Check them with `fpt cache verify`.",
        )


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
        nearest = (F.normalize(sources.flatten(1), dim=1) @ self.rows.T).topk(self.spec.neighbours, dim=1)
        votes = self.spec.neighbours * torch.softmax(nearest.values / TEMPERATURE, dim=1)
        several = self.spec.task == "multilabel"
        labels = (self.labels if several else F.one_hot(self.labels, self.spec.classes)).to(votes.dtype)
        counts = (votes[:, :, None] * labels[nearest.indices]).sum(dim=1) + labels.mean(dim=0)
        weighted = counts * self.class_weights
        if several:
            against = self.spec.neighbours + 1 - counts
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
    x_train: npt.NDArray[np.float32],
    y_train: npt.NDArray[np.int64],
    x_val: npt.NDArray[np.float32],
    y_val: npt.NDArray[np.int64],
    classes: int,
    class_weights: Sequence[float] | None = None,
    task: Task = "multiclass",
) -> KnnProbe:
    """A k-NN with the k of the lowest validation log-loss; arguments and errors as of `fit_linear_probe`."""
    check_probed(x_train, y_train, x_val, classes)
    weights = torch.ones(classes) if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
    state = {
        "rows": F.normalize(torch.from_numpy(x_train), dim=1),
        "labels": torch.from_numpy(y_train),
        "class_weights": weights,
    }

    def probe(k: int) -> KnnProbe:
        spec = KnnSpec(classes=classes, features=x_train.shape[1], rows=len(x_train), neighbours=k, task=task)
        found = KnnProbe(spec)
        found.load_state_dict(state)
        return found.eval()

    def loss(k: int) -> float:
        held = probe(k).judge(torch.from_numpy(x_val))
        if task == "multilabel":
            yes, no = F.logsigmoid(held.double()).numpy(), F.logsigmoid(-held.double()).numpy()
            return label_log_loss(yes, no, y_val, weights.double().numpy())
        return log_loss(held.double().numpy(), y_val, weights.double().numpy())

    return probe(min((k for k in NEIGHBOURS if k <= len(x_train)), key=loss))
