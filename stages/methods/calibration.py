"""Temperature scaling of experts on the validation images, before they are averaged.

An expert that has memorised a few hundred training images is over-confident, and would dominate an average of
log-probabilities. Dividing its logits by a temperature (Guo et al. 2017, arXiv 1706.04599) calibrates its confidence
without changing its ranking of the classes.
"""

from __future__ import annotations

import torch

from schemas.tasks import Task
from stages.losses import plain_loss

PRIOR = 1.0
"""Prior standard deviation of the log inverse temperature, which keeps it near 0 with few images."""
LIMIT = 5.0
"""Largest absolute log inverse temperature of the grid."""
STEP = 0.05
"""Step of the grid."""


def inverse_temperatures(
    terms: torch.Tensor, labels: torch.Tensor, task: Task = "multiclass", class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Fit the inverse temperature 1 / t of each expert to labels.

    Minimises n * log-loss + log(1 / t)^2 / (2 PRIOR^2) by grid search.

    Args:
        terms: Logits of K experts, (n, K, C).
        labels: Class indices (n,), or for multi-label zeros and ones (n, C); on the CPU.
        task: Kind of the labels.
        class_weights: Loss weight of each class, (C,), or None.

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
    total = len(labels) * torch.stack(costs) + logs**2 / (2 * PRIOR**2)
    return logs[total.argmin(dim=1)].exp().float()
