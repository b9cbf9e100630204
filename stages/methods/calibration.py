"""Temperature scaling of experts on the validation images, and the weights of their average.

An expert that has memorised a few hundred training images is over-confident, and would dominate an average of
log-probabilities. Dividing its logits by a temperature (Guo et al. 2017, arXiv 1706.04599) calibrates its confidence
without changing its ranking of the classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from schemas.tasks import Task
from stages.losses import plain_loss

PRIOR = 0.25
"""Prior standard deviation of the log inverse temperature, which keeps it near 0 with few images: thirty validation
images that an ensemble happens to separate would sharpen it by factors (docs/lab-notes.md)."""
FIRST_PRIOR = 1.0
"""The same as FPT-X had it first, with fixed ensemble weights."""
LIMIT = 5.0
"""Largest absolute log inverse temperature of the grid."""
STEP = 0.05
"""Step of the grid."""
CONCENTRATION = 5.0
"""Images that the prior of the ensemble weights counts as."""
SHARE_STEP = 0.05
"""Step of the grid of ensemble weights."""


def inverse_temperatures(
    terms: torch.Tensor,
    labels: torch.Tensor,
    task: Task = "multiclass",
    class_weights: torch.Tensor | None = None,
    prior: float = PRIOR,
) -> torch.Tensor:
    """Fit the inverse temperature 1 / t of each expert to labels.

    Minimises n * log-loss + log(1 / t)^2 / (2 prior^2) by grid search.

    Args:
        terms: Logits of K experts, (n, K, C).
        labels: Class indices (n,), or for multi-label zeros and ones (n, C); on the CPU.
        task: Kind of the labels.
        class_weights: Loss weight of each class, (C,), or None.
        prior: Standard deviation of log(1 / t) without images.

    Returns:
        Inverse temperatures (K,), positive; 1 without images.
    """
    if not len(labels):
        return torch.ones(terms.shape[1])
    logs = torch.arange(-LIMIT, LIMIT + STEP / 2, STEP, dtype=torch.float64)
    weights = None if class_weights is None else class_weights.double().cpu()
    costs = [
        torch.stack([plain_loss(expert * factor, labels, task, weights) for factor in logs.exp()])
        for expert in terms.double().unbind(dim=1)
    ]
    total = len(labels) * torch.stack(costs) + logs**2 / (2 * prior**2)
    return logs[total.argmin(dim=1)].exp().float()


def fit_shares(
    terms: torch.Tensor,
    labels: torch.Tensor,
    prior: Sequence[float],
    task: Task = "multiclass",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fit the ensemble weights of calibrated experts to labels.

    Minimises n * log-loss - CONCENTRATION * sum_k prior_k log share_k, a Dirichlet prior, by grid search: some dozen
    images do not move the weights far.

    Args:
        terms: Calibrated logits of K experts, (n, K, C).
        labels: As for `inverse_temperatures`.
        prior: Weights (K,) without images; positive, they sum to 1.
        task: Kind of the labels.
        class_weights: Loss weight of each class, (C,), or None.

    Returns:
        Ensemble weights (K,), positive, float32; they sum to 1.
    """
    start = torch.tensor(prior, dtype=torch.float64)
    if not len(labels) or len(start) == 1:
        return start.float()
    steps = round(1 / SHARE_STEP)
    # Away from 0, which the prior excludes.
    counts = [one for one in itertools.product(range(1, steps), repeat=len(start)) if sum(one) == steps]
    grid = torch.cat([start[None], torch.tensor(counts, dtype=torch.float64) / steps])
    weights = None if class_weights is None else class_weights.double().cpu()
    costs = []
    for shares in grid:
        averaged = (terms.double() * shares[:, None]).sum(dim=1)
        loss = plain_loss(averaged, labels, task, weights)
        costs.append(len(labels) * loss - CONCENTRATION * (start * shares.log()).sum())
    return grid[torch.stack(costs).argmin()].float()
