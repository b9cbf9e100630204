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


class FitCost(Contract):
    """What a fit in closed form reads, and what it leaves."""

    coefficients: int
    """Weights and biases; 0 for a method that keeps rows or means instead."""
    width: int
    """Numbers that are read per image or view."""
    rows: int | None
    """Images of training and validation, and the other views of the former; null without a manifest."""
    read_mib: float | None
    """Size of what is read, float32, MiB: in memory at once. A fit takes about twice as much for copies."""
    kept_mib: float | None
    """Size of what the bundle holds of the fit, MiB: coefficients, means and deviations, or the rows of k-NN."""


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
    """Parameters that are trained or fitted: what `train` reports, and the bundle holds."""
    lpm_parameters: int
    """Parameters of the LPM with a linear head: what full fine-tuning would learn."""
    learnable_share: float
    """r = learnable / lpm_parameters."""
    train_tensor_mib: float | None
    """Peak tensor memory of a training step of stage two, MiB: parameters, gradients, optimiser, activations, batch.
    Null, as the next three, for a closed form: it has no gradient."""
    train_batch_mib: float | None
    """The batch as it is stored, a share of the former: nothing makes a step smaller than this and the next."""
    train_states_mib: float | None
    """Parameters, gradients and the states of the optimiser, a share of the former."""
    train_frozen_mib: float | None
    """Frozen weights of the LPM that a step holds, a share of the former; 0 for methods that do not run the LPM."""
    fit: FitCost | None
    """The fit of a closed form, or of the linear probes of an ensemble; null without either."""
    checkpointing: bool
    """Whether side blocks are computed again in the backward pass."""
    accumulate: int
    """Parts in which the batch passes through the network; the batch itself counts as a whole."""
    full_finetune_tensor_mib: float
    """The same for full fine-tuning of the LPM with fused attention."""
    ppe_factor: float
    """exp(-log10(r + 1)): performance-parameter efficiency is the score times this."""
    pme_factor: float | None
    """exp(-log10(m / m_full + 1)): performance-memory efficiency is the score times this; null without a gradient."""
    cache_bytes_per_image: int
    """One row of the store."""
    cache_bytes_by_dtype: dict[str, int]
    """One row, were it stored in another dtype."""
