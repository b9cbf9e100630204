"""Logistic regressions of every penalty and every fold at once, in the principal axes of the rows.

In the axes of `stages.methods.principal_axes`, the curvature of the
penalised loss of penalty C is at most 1 + C b lambda_r along axis r, with lambda the squared singular values and
b = 1/2 (softmax) or 1/4 (sigmoid), so that scaling each axis by the root of its inverse makes a step of length 1 safe:
all regressions take Nesterov's accelerated gradient steps together (restarted when they overshoot, O'Donoghue and
Candes 2015, arXiv 1204.3982), as a few dozen products of matrices. On 1,000 rows that is nine times as fast as one
solver call per penalty and fold, with the same optimum (tests/stages/methods/test_logistic_path.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stages.methods.principal_axes import PrincipalAxes, Rows
from stages.methods.regression import LinearFit, logit_loss

STRENGTHS: tuple[float, ...] = tuple(10.0 ** (half / 2) for half in range(-8, 5))
"""Candidates of C, the inverse of the L2 penalty, on rows of unit mean square length."""
WEAKEST = 2
"""Weakest penalties that are only tried if the next one is the best of the others: they take most steps of all."""
STEPS = 400
"""Gradient steps at most."""
TOLERANCE = 3e-5
"""Length of the gradient relative to that of the weights at which a regression has converged."""
ROUGH = 3e-4
"""The same while penalties are compared; the regressions of the best one then continue to `TOLERANCE`."""
CHECKED = 10
"""Steps between two checks of the gradients."""

Labels = npt.NDArray[np.int64]


def fit_path(
    rows: PrincipalAxes, y: Labels, class_weights: npt.NDArray[np.float64], folds: Sequence[npt.NDArray[np.bool_]]
) -> LinearFit:
    """Fit a logistic regression to rows, with the penalty of the lowest held-out loss.

    Args:
        rows: n rows.
        y: (n,) class indices; for multi-label (n, C) zeros and ones.
        class_weights: (C,) loss weights.
        folds: (n,) each, true for the held-out rows; at least one.
    """
    seen, some = np.stack([~fold for fold in folds]), np.any(folds, axis=0)
    losses: list[float] = []
    solutions: list[_Solution] = []
    for strengths in filter(None, (STRENGTHS[:-WEAKEST], STRENGTHS[-WEAKEST:])):
        if losses and losses[-1] > min(losses):
            break
        found = _solve(rows.z, y, class_weights, seen, strengths, ROUGH)
        for number in range(len(strengths)):
            solutions.append(found.at(number))
            losses.append(logit_loss(_held_out(rows.z, solutions[-1], folds)[some], y[some], class_weights))
    best = min(range(len(losses)), key=losses.__getitem__)
    start = solutions[best].with_mean()
    every = np.concatenate([seen, np.ones((1, len(y)), bool)])
    solution = _solve(rows.z, y, class_weights, every, STRENGTHS[best : best + 1], TOLERANCE, start)
    held_out = _held_out(rows.z, solution, folds)
    loss = logit_loss(held_out[some], y[some], class_weights)
    return rows.linear_fit(solution.weight[-1, 0], solution.bias[-1, 0], held_out, STRENGTHS[best], loss)


class _Solution(NamedTuple):
    """Regressions on K choices of rows with P penalties each."""

    weight: npt.NDArray[np.float32]
    """(K, P, r, C)."""
    bias: npt.NDArray[np.float32]
    """(K, P, C)."""

    def at(self, penalty: int) -> _Solution:
        """Return those of one penalty, (K, 1, ...)."""
        return _Solution(self.weight[:, penalty : penalty + 1], self.bias[:, penalty : penalty + 1])

    def with_mean(self) -> _Solution:
        """Return them and their mean, (K + 1, P, ...): near the regression on all rows."""
        return _Solution(*(np.concatenate([part, part.mean(axis=0, keepdims=True)]) for part in self))


def _held_out(z: Rows, solution: _Solution, folds: Sequence[npt.NDArray[np.bool_]]) -> npt.NDArray[np.float64]:
    """Return logits (n, C) of each row by the regression without its fold, NaN for rows in no fold; of one penalty."""
    logits = np.full((len(z), solution.bias.shape[-1]), np.nan)
    # The regression on all rows, if there is one, comes after those of the folds.
    for fold, weight, bias in zip(folds, solution.weight[:, 0], solution.bias[:, 0], strict=False):
        logits[fold] = z[fold] @ weight + bias
    return logits


def _targets(y: Labels, class_weights: npt.NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return targets (n, C) of zeros and ones, and row weights (n, 1), or (n, C) for multi-label."""
    weights, targets = torch.from_numpy(class_weights.astype(np.float32)), torch.from_numpy(y)
    if y.ndim == 2:
        return targets.float(), torch.where(targets > 0, weights, torch.ones(()))
    truth = torch.nn.functional.one_hot(targets, len(weights)).float()
    return truth, (truth @ weights)[:, None]


def _solve(
    z: Rows,
    y: Labels,
    class_weights: npt.NDArray[np.float64],
    seen: npt.NDArray[np.bool_],
    strengths: Sequence[float],
    tolerance: float,
    start: _Solution | None = None,
) -> _Solution:
    """Fit to the rows `seen` (K, n) with P penalties each, from `start` or from zeros."""
    rows, (count, rank), classes, softmax = torch.from_numpy(z), z.shape, len(class_weights), y.ndim == 1
    truth, row_weights = _targets(y, class_weights)
    c = torch.tensor(strengths).repeat(len(seen))
    problems = len(c)
    # Problems come last: a softmax over the few classes is several times as fast if these are not.
    # (n, 1 or C, K P): factor of each row in the gradient of each problem.
    used = torch.from_numpy(seen).float().repeat_interleave(len(strengths), dim=0)
    factors = (used * c[:, None]).T[:, None] * row_weights[:, :, None]
    bound = (0.5 if softmax else 0.25) * max(float(row_weights.max()), 1e-6)
    energy = rows.square().sum(dim=0)
    step = (1.0 + bound * energy[:, None] * c).rsqrt()[:, None]
    bias_step = (bound * count * c).rsqrt()

    solved = torch.zeros(rank, classes, problems), torch.zeros(classes, problems)
    active = torch.arange(problems)
    if start is None:
        v, bias = solved[0].clone(), solved[1].clone()
    else:
        v = torch.from_numpy(start.weight).permute(2, 3, 0, 1).reshape(rank, classes, problems) / step
        bias = torch.from_numpy(start.bias).permute(2, 0, 1).reshape(classes, problems) / bias_step
    ahead, bias_ahead, t = v, bias, torch.ones(problems)
    for number in range(1, STEPS + 1):
        w = ahead * step
        logits = (rows @ w.reshape(rank, -1)).reshape(count, classes, len(active)) + bias_ahead * bias_step
        p = logits.softmax(dim=1) if softmax else logits.sigmoid()
        errors = (p - truth[:, :, None]) * factors
        slope = (rows.T @ errors.reshape(count, -1)).reshape_as(v) * step + w * step
        bias_slope = errors.sum(dim=0) * bias_step
        v_next, bias_next = ahead - slope, bias_ahead - bias_slope
        overshot = (slope * (v_next - v)).sum(dim=(0, 1)) + (bias_slope * (bias_next - bias)).sum(dim=0) > 0
        t = torch.where(overshot, 1.0, t)
        t_next = (1.0 + (1.0 + 4.0 * t.square()).sqrt()) / 2.0
        momentum = torch.where(overshot, 0.0, (t - 1.0) / t_next)
        ahead, bias_ahead = v_next + momentum * (v_next - v), bias_next + momentum * (bias_next - bias)
        v, bias, t = v_next, bias_next, t_next
        if number % CHECKED == 0 or number == STEPS:
            length = slope.square().sum(dim=(0, 1)) + bias_slope.square().sum(dim=0)
            done = length <= tolerance**2 * v.square().sum(dim=(0, 1)).clamp_min(1e-12)
            if number == STEPS:
                done[:] = True
            # Strong penalties converge in a few dozen steps; those of the weakest are not spent on all.
            solved[0][..., active[done]] = (v * step)[..., done]
            solved[1][:, active[done]] = (bias * bias_step)[:, done]
            if not (left := ~done).any():
                break
            if done.any():
                active, t, bias_step = active[left], t[left], bias_step[left]
                v, ahead, bias, bias_ahead, step, factors = (
                    one[..., left] for one in (v, ahead, bias, bias_ahead, step, factors)
                )
    shape = (len(seen), len(strengths))
    return _Solution(
        solved[0].reshape(rank, classes, *shape).permute(2, 3, 0, 1).numpy(),
        solved[1].reshape(classes, *shape).permute(1, 2, 0).numpy(),
    )
