"""Effective rank of features: how many directions they spread over."""

from __future__ import annotations

import torch


def effective_rank(features: torch.Tensor) -> float:
    """Compute the effective rank of centred features (Roy and Vetterli, EUSIPCO 2007).

        erank = exp(-sum_i p_i log p_i),   p_i = sigma_i / sum_j sigma_j

    with the singular values sigma of the centred features: between 1 and min(n - 1, D), which it reaches where all
    directions have the same spread. PT-PEFT (arXiv 2411.00029) holds that prefix tuning preserves it and LoRA does not.

    Args:
        features: (n, D), such as `AdaptedLpm.features` of test images.

    Returns:
        The effective rank; 0 if all rows are equal.
    """
    wide = features.double()
    values = torch.linalg.svdvals(wide - wide.mean(dim=0))
    # Smaller ones are rounding: the mean of equal rows may differ from them in the last bit.
    values = values[values > 1e-12 * wide.norm()]
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return float((-(shares * shares.log()).sum()).exp())
