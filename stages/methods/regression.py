"""Logistic regression on standardised rows whose penalty is chosen on held-out rows.

One regression of all classes, or one per label with a common penalty.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stages.tasks import LEAST

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-12, 7))
"""Candidates of C, the inverse of the L2 penalty: 1e-6 to 1e3, two a decade."""
ITERATIONS = 2000
"""Iterations of the solver per candidate; each starts where the stronger penalty before it ended."""
TOLERANCE = 1e-7
"""Largest gradient at which the solver stops; at its own default weak penalties end far from the optimum."""
ROUGH = 1e-4
"""The same for a fold, which only chooses the penalty."""
PATIENCE = 4
"""Candidates without a lower held-out loss after which the weaker penalties are not tried."""
LEARNT = 0.99
"""Patience starts once the held-out loss is below this share of that of the strongest penalty, which predicts little
but class frequencies: on few rows the loss can rise by chance before it falls."""
CONSTANT = 1e-7
"""Deviation relative to 1 + |mean| up to which a column is constant: it varies by rounding only."""
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
    """Inverse of the penalty with the lowest held-out loss."""
    loss: float
    """Log-loss of the held-out rows; for multi-label the mean over labels."""
    held_out: torch.Tensor
    """(n + m, classes) float32: logits of the n rows fitted to, then of m others, by regressions that did not see them;
    NaN for rows that no regression held out."""


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
        x_held: (m, F) rows to evaluate the regression of all rows on; m = 0 with folds only.
        y_held: (m,) or (m, C).
        weights: (C,) weight of each class in the losses.
        folds: (n,) each: rows on which a regression of the others is evaluated.
    """
    mean, scale = spread(x.astype(np.float64))
    x, x_held = (x - mean) / scale, (x_held - mean) / scale
    axes = _axes(x)
    x, x_held = x @ axes, x_held @ axes
    rows, labels, everything = np.concatenate([x, x_held]), np.concatenate([y, y_held]), np.arange(len(y))
    # Per evaluation of a penalty: rows to fit to, rows to evaluate on, the tolerance of the solver.
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
        # No regression was fitted to all rows.
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
    mean = x.mean(axis=0)
    return mean, scale_of(mean, x.std(axis=0))


def scale_of(mean: Floats, deviation: Floats, rounding: float = CONSTANT) -> Floats:
    """Return what standardises columns (F,): the deviation, or 1 where it is rounding.

    A constant divided by the deviation that rounding gives it would be noise of size 1.

    Args:
        mean: (F,) means of the columns.
        deviation: (F,) standard deviations.
        rounding: Deviation, relative to 1 + |mean|, up to which a column is constant.
    """
    return np.where(deviation <= rounding * (1.0 + np.abs(mean)), 1.0, deviation)


def log_loss(log_probabilities: Floats, labels: Labels, class_weights: Floats) -> float:
    """Weighted mean of -log p(label); plain where no label has weight."""
    return float(_weighted_mean(-log_probabilities[np.arange(len(labels)), labels], labels, class_weights))


def _weighted_mean(losses: Floats, labels: Labels, class_weights: Floats) -> Floats:
    """Return the means of losses (..., n), weighted by class; plain where no label has weight."""
    weight = class_weights[labels]
    return np.asarray(np.average(losses, axis=-1, weights=weight if weight.any() else None))


def label_log_loss(log_yes: Floats, log_no: Floats, labels: Labels, class_weights: Floats) -> float:
    """Mean over rows and labels of -log p of what is the case, the labels that are there weighted; all (n, C)."""
    return float(-(labels * class_weights * log_yes + (1 - labels) * log_no).mean())


def logit_losses(logits: Floats, y: Labels, class_weights: Floats) -> Floats:
    """Return the weighted log-losses (k,) of k sets of logits (k, n, C); for multi-label the means over labels."""
    values = torch.from_numpy(logits)
    if y.ndim == 1:
        # Classes come first: sums over the few of them are several times as fast.
        losses = values.permute(2, 0, 1).contiguous().logsumexp(dim=0).numpy() - logits[:, np.arange(len(y)), y]
        return _weighted_mean(losses, y, class_weights)
    least = float(np.log(LEAST))
    yes, no = (torch.nn.functional.logsigmoid(sign * values).clamp_min(least).numpy() for sign in (1, -1))
    return np.array([label_log_loss(*pair, y, class_weights) for pair in zip(yes, no, strict=True)])


def logit_loss(logits: Floats, y: Labels, class_weights: Floats) -> float:
    """Return the loss of `logit_losses` of one set of logits (n, C)."""
    return float(logit_losses(logits[None], y, class_weights)[0])


class Softmax:
    """Multinomial logistic regression; with two classes only the logit of the second."""

    def __init__(self, model: Any, weights: Floats) -> None:
        self._model, self._weights = model, weights

    def fit(self, x: Floats, y: Labels, c: float) -> None:
        """Fit to rows (n, F) of classes (n,); starts where the last fit ended."""
        _fit(self._model, x, y, self._weights[y], c)

    def loss(self, x: Floats, y: Labels) -> float:
        """Weighted log-loss of other rows."""
        return log_loss(_log_probabilities(self._model, x), y, self._weights)

    def coefficients(self) -> tuple[Floats, Floats]:
        """Weight (C, F) and bias (C,)."""
        weight, bias = self._model.coef_.copy(), self._model.intercept_.copy()
        if len(self._weights) == 2:
            # scikit-learn returns only the logit of the second class; halves of it differ by it.
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return weight, bias


class OneVsRest:
    """A logistic regression of each label by itself."""

    def __init__(self, models: list[Any], weights: Floats) -> None:
        self._models, self._weights = models, weights

    def fit(self, x: Floats, y: Labels, c: float) -> None:
        """Fit to rows (n, F) with labels (n, C); starts where the last fit ended."""
        for model, there, weight in zip(self._models, y.T, self._weights, strict=True):
            _fit(model, x, there, np.where(there == 1, weight, 1.0), c)

    def loss(self, x: Floats, y: Labels) -> float:
        """Weighted log-loss of other rows, the mean over labels."""
        found = np.stack([_log_probabilities(model, x) for model in self._models], axis=1)
        # For an impossible label that is absent, 0 times minus infinity would be NaN.
        no, yes = np.maximum(found, np.log(LEAST)).transpose(2, 0, 1)
        return label_log_loss(yes, no, y, self._weights)

    def coefficients(self) -> tuple[Floats, Floats]:
        """Weight (C, F) and bias (C,)."""
        return (
            np.concatenate([model.coef_ for model in self._models]),
            np.concatenate([model.intercept_ for model in self._models]),
        )


def _log_probabilities(model: Any, x: Floats) -> Floats:
    """(n, classes); minus infinity is a fair verdict on weak penalties, no reason to warn."""
    with np.errstate(divide="ignore"):
        return np.asarray(model.predict_log_proba(x))


def _fit(model: Any, x: Floats, y: Labels, weights: Floats, c: float) -> None:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The weakest penalties on separable rows have their optimum far away; validation evaluates where it stopped.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(C=c).fit(x, y, sample_weight=weights)
