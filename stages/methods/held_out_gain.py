"""What networks add to linear probes: a paired comparison of log-losses on held-out images.

Linear probes predict validation images out of fold. Temperatures and ensemble weights are fitted to these images, too,
and would make any network look useful: for the comparison they are fitted again in folds of complete patients. With
d_i the log-loss of image i without the networks minus that with them, and w_i its class weight,

    gain = sum_i w_i d_i / sum_i w_i
    standard error^2 = G / (G - 1) sum_g (sum_{i in g} w_i (d_i - gain))^2 / (sum_i w_i)^2      patients g = 1 .. G

so that several images of a patient do not count as independent. Only the epoch is chosen on the images that are
compared: by AUC, not by this loss.
"""

from __future__ import annotations

import torch

from schemas.tasks import Task
from stages.losses import row_losses

FOLDS = 5
"""Most folds of the comparison."""


def group_folds(groups: torch.Tensor) -> list[torch.Tensor]:
    """Divide rows into up to `FOLDS` folds of complete groups.

    Args:
        groups: Numbers of the groups, (n,).

    Returns:
        Masks (n,) of the rows of each fold; a single one with all rows if there is a single group.
    """
    numbers = _numbers(groups)
    count = min(FOLDS, int(numbers.max()) + 1)
    return [numbers % count == fold for fold in range(count)]


def paired_losses(
    without: torch.Tensor,
    with_networks: torch.Tensor,
    labels: torch.Tensor,
    groups: torch.Tensor,
    task: Task = "multiclass",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compare two predictions of the same images.

    Args:
        without: Logits (n, C).
        with_networks: Logits (n, C).
        labels: Class indices (n,), or for multi-label zeros and ones (n, C).
        groups: Numbers of the patients, (n,).
        task: Kind of the labels.
        class_weights: Loss weight of each class, (C,), or None.

    Returns:
        (3,): mean log-loss of each, and the standard error of their difference; NaN with a single group.
    """
    first, weights = row_losses(without.double(), labels, task, class_weights)
    second, _ = row_losses(with_networks.double(), labels, task, class_weights)
    total = weights.sum()
    means = [(weights * losses).sum() / total for losses in (first, second)]
    numbers = _numbers(groups)
    count = int(numbers.max()) + 1
    residuals = weights * (first - second - (means[0] - means[1]))
    by_group = torch.zeros(count, dtype=residuals.dtype).index_add_(0, numbers, residuals)
    correction = count / (count - 1) if count > 1 else torch.nan
    return torch.stack([*means, (correction * (by_group**2).sum()).sqrt() / total])


def _numbers(groups: torch.Tensor) -> torch.Tensor:
    """Number the groups from 0, (n,)."""
    return torch.unique(groups, return_inverse=True)[1]  # type: ignore[no-any-return]
