"""Costs known before a training: memory of the cached features, and parameters and memory of a step."""

from __future__ import annotations

from schemas.base import Contract
from schemas.methods import Method


class StoreMemory(Contract):
    """Whether training holds the features of its images in memory."""

    held: bool
    """True: the store is read once; False: in every epoch."""
    rows: int
    """Images of training and validation, and the other views of the former."""
    needed: int
    """Bytes of their features."""
    budget: int
    """Bytes that they may take."""
    remote: str | None = None
    """URL of the store where it is read in place; null: a folder."""


class CostReport(Contract):
    """What a setting costs, computed without images, weights or an accelerator."""

    lpm: str
    """timm name."""
    method: Method
    """Preset."""
    image_size: int
    """Input of the LPM, in pixels."""
    classes: int
    """Outputs."""
    batch_size: int
    """Images per training step."""
    dtype: str
    """Type of the cached keys and values."""
    learnable: int
    """Parameters that are trained."""
    lpm_parameters: int
    """Parameters of the LPM with a linear head: what full fine-tuning would learn."""
    learnable_share: float
    """r = learnable / lpm_parameters."""
    train_tensor_mib: float
    """Peak tensor memory of a training step of stage two, MiB: parameters, gradients, optimiser, activations, batch."""
    train_batch_mib: float
    """The batch as it is stored, a share of the former: nothing makes a step smaller than this and the next."""
    train_states_mib: float
    """Parameters, gradients and the two states of AdamW, a share of the former."""
    train_frozen_mib: float
    """Frozen weights of the LPM that a step holds, a share of the former; 0 for methods that do not run the LPM."""
    checkpointing: bool
    """Whether side blocks are computed again in the backward pass."""
    accumulate: int
    """Parts in which the batch passes through the network; the batch itself counts as a whole."""
    full_finetune_tensor_mib: float
    """The same for full fine-tuning of the LPM with fused attention."""
    ppe_factor: float
    """exp(-log10(r + 1)): performance-parameter efficiency is the score times this."""
    pme_factor: float
    """exp(-log10(m / m_full + 1)): performance-memory efficiency is the score times this."""
    cache_bytes_per_image: int
    """One row of the store."""
    cache_bytes_by_dtype: dict[str, int]
    """One row, were it stored in another dtype."""
