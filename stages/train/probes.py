"""Probes of the LPM's pooled outputs: logistic regression, its strength chosen on the validation images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import TrainingError

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-12, 7))
"""Candidates of C, the inverse of the L2 penalty: 1e-6 to 1e3, two a decade."""
ITERATIONS = 2000
"""Of the solver per candidate; each starts where the stronger penalty before it ended."""
TOLERANCE = 1e-7
"""Largest gradient at which the solver stops; at its own default weak penalties end far from the optimum."""
PATIENCE = 4
"""Candidates without a lower validation loss after which the weaker penalties are not tried."""

Floats = npt.NDArray[np.float64]


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


def fit_linear_probe(
    x_train: npt.ArrayLike,
    y_train: npt.ArrayLike,
    x_val: npt.ArrayLike,
    y_val: npt.ArrayLike,
    classes: int,
    class_weights: Sequence[float] | None = None,
) -> LinearFit:
    """Logistic regression on standardised features, with the C of the lowest validation log-loss.

    The loss, not the AUC, chooses: of some dozen validation images the AUC takes few values and jumps between them,
    and what is joined with other evidence has to be calibrated.

    Args:
        x_train: (n, F).
        y_train: (n,) class indices; every class occurs.
        x_val: (m, F), m > 0.
        y_val: (m,) class indices; classes may be absent.
        classes: C, at least 2.
        class_weights: (C,) weight of each class in both losses; None: all 1.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = np.asarray(x_train, np.float64), np.asarray(y_train, np.int64)
    x_held, y_held = np.asarray(x_val, np.float64), np.asarray(y_val, np.int64)
    _check(x, y, x_held, classes)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # What varies by rounding alone is constant: divided by its deviation it would be noise of size 1.
    scale[scale <= 1e-7 * (1.0 + np.abs(mean))] = 1.0
    x, x_held = (x - mean) / scale, (x_held - mean) / scale
    weights = np.ones(classes) if class_weights is None else np.asarray(class_weights, np.float64)
    model = LogisticRegression(warm_start=True, max_iter=ITERATIONS, tol=TOLERANCE)
    best, since = (np.inf, 0.0, np.zeros(0), np.zeros(0)), 0
    for c in STRENGTHS:
        with warnings.catch_warnings():
            # The weakest penalties on separable rows have their optimum far away; validation judges where it stopped.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=c).fit(x, y, sample_weight=weights[y])
        loss = log_loss(np.asarray(model.predict_log_proba(x_held)), y_held, weights)
        since += 1
        if loss < best[0]:
            best, since = (loss, c, model.coef_.copy(), model.intercept_.copy()), 0
        elif since == PATIENCE:
            break
    _, c, weight, bias = best
    if classes == 2:
        # scikit-learn gives the logit of the second class alone; halves of it differ by it.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    tensors = [torch.from_numpy(part.astype(np.float32)) for part in (weight, bias, mean, scale)]
    return LinearFit(tensors[0], tensors[1], tensors[2], tensors[3], c)


def log_loss(log_probabilities: Floats, labels: npt.NDArray[np.int64], class_weights: Floats) -> float:
    """Weighted mean of -log p(label); plain where no label has weight."""
    losses, weight = -log_probabilities[np.arange(len(labels)), labels], class_weights[labels]
    return float(np.average(losses, weights=weight if weight.any() else None))


def _check(x: Floats, y: npt.NDArray[np.int64], x_held: Floats, classes: int) -> None:
    counts = np.bincount(y, minlength=classes)
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
            "The pooled outputs of the LPM are not finite.",
            "The features are damaged.",
            "Check them with `fpt cache verify`.",
        )
