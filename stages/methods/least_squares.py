"""Ridge regressions on the labels, with every penalty at once, in the principal axes of the rows.

With targets t of zeros and ones, and row weights u,

    minimise  sum_i u_i |t_i - b - z_i W|^2 + lambda |W|^2,      logits = s (b + z W - 1/2)

The penalty and the inverse temperature s, the same for all classes, have the lowest held-out log-loss. The squared loss
weighs all images alike where the logistic one follows those near the boundary: their errors differ, and an average of
both is better than either (docs/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stages.methods.principal_axes import PrincipalAxes
from stages.methods.regression import Floats, Labels, LinearFit, logit_losses
from stages.tasks import positives

PENALTIES: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-6, 5))
"""Candidates of lambda, on rows of unit mean square length."""
SHARPNESS: tuple[float, ...] = tuple(np.exp(np.arange(-0.7, 2.35, 0.1)).tolist())
"""Candidates of the inverse temperature s, 0.5 to 10: a few images that a regression happens to separate would raise it
without limit."""


def fit_least_squares(
    rows: PrincipalAxes, y: Labels, class_weights: Floats, folds: Sequence[npt.NDArray[np.bool_]]
) -> LinearFit:
    """Fit a ridge regression to rows, with the penalty and the temperature of the lowest held-out log-loss.

    Args:
        rows: n rows.
        y: (n,) class indices; for multi-label (n, C) zeros and ones.
        class_weights: (C,) weights of the rows of each class; for multi-label, of the images that have the label.
        folds: (n,) each, true for the held-out rows; at least one.
    """
    z, targets = rows.z.astype(np.float64), positives(y, len(class_weights)).astype(np.float64)
    weights = targets @ class_weights[:, None] if y.ndim == 1 else np.where(targets > 0, class_weights, 1.0)
    solution = _solve(z, targets, weights, folds)
    some = np.any(folds, axis=0)
    sharpened = np.reshape(SHARPNESS, (-1, 1, 1))
    losses = np.stack([logit_losses(sharpened * one[some], y[some], class_weights) for one in solution.held_out])
    best, sharpest = np.unravel_index(losses.argmin(), losses.shape)
    s, penalty = SHARPNESS[sharpest], PENALTIES[best]
    weight, bias, held_out = (part[best] for part in solution)
    loss = float(losses[best, sharpest])
    return rows.linear_fit(s * weight, s * (bias - 0.5), s * held_out, 1.0 / penalty, loss)


class _Solution(NamedTuple):
    """Ridge regressions with P penalties."""

    weight: Floats
    """(P, r, C)."""
    bias: Floats
    """(P, C)."""
    held_out: Floats
    """(P, n, C): what regressions without the fold of a row predict for it, less 1/2; NaN for rows in no fold."""


def _solve(z: Floats, targets: Floats, weights: Floats, folds: Sequence[npt.NDArray[np.bool_]]) -> _Solution:
    """Fit to all rows, and without each fold; `weights` are (n, 1), or (n, C) by column.

    A regression is not repeated without a fold: with H the matrix that maps targets to predictions, and f the rows of a
    fold, the residuals of a regression without them are (I - H_ff)^-1 (t - y)_f.
    """
    # Columns of equal row weights share a decomposition.
    distinct, number_of = np.unique(weights, axis=1, return_inverse=True)
    number_of = np.broadcast_to(number_of.reshape(-1), targets.shape[1])
    penalties = np.reshape(PENALTIES, (-1, 1, 1))
    solution = _Solution(
        np.empty((len(PENALTIES), z.shape[1], targets.shape[1])),
        np.empty((len(PENALTIES), targets.shape[1])),
        np.full((len(PENALTIES), *targets.shape), np.nan),
    )
    for number, row_weights in enumerate(distinct.T):
        u, chosen = row_weights[:, None], number_of == number
        total, t = u.sum(), targets[:, chosen]
        z_mean, t_mean = (u * z).sum(axis=0) / total, (u * t).sum(axis=0) / total
        centred = z - z_mean
        squares, vectors = np.linalg.eigh(centred.T @ (u * centred))
        turned = centred @ vectors
        coefficients = (turned.T @ (u * (t - t_mean))) / (squares[:, None] + penalties)
        solution.weight[:, :, chosen] = vectors @ coefficients
        solution.bias[:, chosen] = t_mean - z_mean @ solution.weight[:, :, chosen]
        residuals = t - t_mean - turned @ coefficients
        for fold in folds:
            some, u_some = turned[fold], row_weights[fold]
            hat = u_some / total + (some / (squares + penalties)) @ (some.T * u_some)
            left_out = np.linalg.solve(np.eye(len(some)) - hat, residuals[:, fold])
            solution.held_out[np.ix_(np.arange(len(PENALTIES)), fold, chosen)] = t[fold] - left_out - 0.5
    return solution
