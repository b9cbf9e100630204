"""Temperature scaling of experts on the validation images, before they are averaged.

Trained to the end on a few hundred images, an expert that has memorised all of them is overconfident, and would
dominate an average of log-probabilities. Dividing its logits by a temperature (Guo et al. 2017, arXiv 1706.04599)
keeps its ranking of the classes and calibrates its confidence.
"""

from __future__ import annotations

import torch

from schemas.tasks import Task
from stages.losses import plain_loss

PRIOR = 1.0
"""Standard deviation of the logarithm of the factor before any image is seen: of a few images it stays near 1."""
LIMIT = 5.0
"""Largest logarithm of a factor that is tried, in steps of `STEP`."""
STEP = 0.05


def inverse_temperatures(
    terms: torch.Tensor, labels: torch.Tensor, task: Task = "multiclass", class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the factor, 1 / temperature, that makes the log-probabilities of each expert fit the labels best.

    Minimises n * log-loss + (log factor)^2 / (2 PRIOR^2), which has one minimum but for the prior; a grid finds it.

    Args:
        terms: (n, K, C) logits of K experts.
        labels: (n,) class indices, multi-label (n, C) zeros and ones; all on the CPU.
        task: What the logits mean.
        class_weights: (C,) weight of each class in the loss.

    Returns:
        (K,), positive; 1 without images.
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
