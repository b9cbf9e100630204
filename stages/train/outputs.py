"""What the logits of a model mean, by task."""

from __future__ import annotations

import torch

from schemas.tasks import Task


def probabilities(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """(..., C) logits -> (..., C) probabilities: a softmax over classes, multi-label a sigmoid of each label.

    In double precision.
    """
    wide = logits.double()
    return wide.sigmoid() if task == "multilabel" else wide.softmax(dim=-1)


def log_pool_terms(logits: torch.Tensor, task: Task) -> torch.Tensor:
    """(..., C) logits -> what a logarithmic opinion pool averages; the average is logits again.

    Log-probabilities of the classes; of labels, which are each a yes or no, log p - log(1 - p), the logits themselves.
    """
    return logits if task == "multilabel" else logits.log_softmax(dim=-1)
