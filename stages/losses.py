"""What training minimises: cross-entropy or focal loss, smoothed labels, and a kappa term for grades."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from schemas.settings import TrainSettings
from schemas.tasks import Task

Reduction = Literal["mean", "sum"]

EPSILON = 1e-6
"""In the logarithm of the kappa term: bounds it from below where a batch is all right."""


def training_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    settings: TrainSettings,
    task: Task = "multiclass",
    class_weights: torch.Tensor | None = None,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """The loss of a batch, a scalar.

    Args:
        logits: (B, C).
        labels: (B,) class indices, multi-label (B, C) zeros and ones.
        settings: `loss`, `focal_gamma`, `label_smoothing`, `kappa_weight`.
        task: What the logits mean.
        class_weights: (C,), of each class, multi-label of the images that have the label; None: all 1.
        reduction: "sum": the mean times `loss_weight`, which parts of a batch can add up. The kappa of a part is that
            of only its rows.
    """
    gamma = settings.focal_gamma if settings.loss == "focal" else 0.0
    if task == "multilabel":
        return label_loss(logits, labels, class_weights, gamma, settings.label_smoothing, reduction)
    loss = class_loss(logits, labels, class_weights, gamma, settings.label_smoothing, reduction)
    if task == "ordinal" and settings.kappa_weight:
        rows = 1.0 if reduction == "mean" else loss_weight(labels, task, class_weights)
        loss = loss + rows * settings.kappa_weight * kappa_loss(logits, labels)
    return loss


def loss_weight(labels: torch.Tensor, task: Task, class_weights: torch.Tensor | None) -> torch.Tensor:
    """What the sum of a batch's losses is divided by for their mean, a scalar."""
    if class_weights is None or task == "multilabel":
        return torch.tensor(float(len(labels)))
    return class_weights[labels.to(class_weights.device)].sum()


def plain_loss(
    logits: torch.Tensor, labels: torch.Tensor, task: Task = "multiclass", class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the weighted log-loss, which compares runs with different training losses."""
    return (label_loss if task == "multilabel" else class_loss)(logits, labels, class_weights)


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, task: Task = "multiclass", class_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-losses (n,) and their weights (n,): the weighted mean is `plain_loss`."""
    if task == "multilabel":
        target = labels.to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, target, pos_weight=class_weights, reduction="none")
        return losses.mean(dim=1), losses.new_ones(len(losses))
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses, losses.new_ones(len(losses)) if class_weights is None else class_weights[labels].to(losses)


def class_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Cross-entropy of one class an image, or its focal loss.

    Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 4) takes -(1 - p)^gamma log p in the place of -log p. Of a
    smoothed target t every class has its share of it: the mean of sum_c w_c t_c (1 - p_c)^gamma (-log p_c), weighted
    by w of the label, which is `cross_entropy` at gamma = 0.
    """
    if gamma == 0:
        return F.cross_entropy(logits, labels, weight=class_weights, label_smoothing=smoothing, reduction=reduction)
    logs = logits.log_softmax(dim=1)
    target = F.one_hot(labels, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
    terms = -target * _right(logs, gamma) * logs
    total = (terms if class_weights is None else terms * class_weights).sum()
    return total if reduction == "sum" else total / loss_weight(labels, "multiclass", class_weights)


def label_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Binary cross-entropy of each label, or its focal loss, the mean over images and labels.

    A smoothed target is 1 - smoothing / 2 and smoothing / 2: the share is spread over yes and no.
    """
    target = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    if gamma == 0:
        losses = F.binary_cross_entropy_with_logits(logits, target, pos_weight=class_weights, reduction=reduction)
        return losses if reduction == "mean" else losses / logits.shape[1]
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    found, spared = target * _right(yes, gamma) * yes, (1 - target) * _right(no, gamma) * no
    losses = -((found if class_weights is None else found * class_weights) + spared).mean(dim=1)
    return losses.mean() if reduction == "mean" else losses.sum()


def _right(logs: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p)^gamma of log p; away from 0, where a power below 1 has no slope."""
    return (-torch.expm1(logs)).clamp_min(1e-7) ** gamma


def kappa_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logarithm of 1 - kappa of a batch, with quadratic weights and probabilities in the place of predictions.

    De la Torre, Puig and Valls, "Weighted kappa loss function for multi-class classification of ordinal data in deep
    learning", Pattern Recognition Letters 105 (2018): with B images of grades y and probabilities p,

        1 - kappa = sum_k sum_j (y_k - j)^2 p_kj / (sum_i sum_j (i - j)^2 n_i m_j / B)

    where n_i is the number of images of grade i, and m_j = sum_k p_kj what is expected of grade j.

    A batch of one grade where nothing else is expected has 0 / 0, and counts as no better than chance.

    Args:
        logits: (B, C), the grades in order.
        labels: (B,) grades.
    """
    p = logits.float().softmax(dim=1)
    grades = torch.arange(p.shape[1], device=p.device, dtype=p.dtype)
    cost = (grades[:, None] - grades) ** 2
    observed = (cost[labels] * p).sum()
    counts = F.one_hot(labels, p.shape[1]).sum(dim=0).to(p.dtype)
    expected = counts @ cost @ p.sum(dim=0) / len(labels)
    return torch.log((observed + EPSILON) / (expected + EPSILON) + EPSILON)
