"""What stage two and its judges hand over: the model bundle, metrics, and the cost report."""

from __future__ import annotations

from schemas.base import Contract
from schemas.features import FeatureSpec
from schemas.settings import Method, TrainSettings

BUNDLE_VERSION = 1
"""Raised by hand when the layout of a bundle changes."""


class SideNetworkSpec(Contract):
    """All that is needed to rebuild the fusion and the side network around its weights."""

    method: Method
    """Which preset."""
    classes: int
    """Outputs."""
    layers: int
    """Blocks: one per tapped layer."""
    lpm_width: int
    """D."""
    heads: int
    """H, of the LPM and of the side network."""
    width: int
    """Width of the side network, D / reduction."""
    image_size: int
    """Input of the side network, in pixels."""
    prompts: int
    """Per layer."""
    dropout: float
    """Of the fused prompts."""


class BundleSpec(Contract):
    """`model.json`: with `model.safetensors` beside it, everything needed to predict."""

    bundle_version: int = BUNDLE_VERSION
    """Layout."""
    classes: tuple[str, ...]
    """Label names in the order of the logits."""
    network: SideNetworkSpec
    """Fusion and side network."""
    features: FeatureSpec
    """The features that it was trained on: prediction computes the same."""
    train: TrainSettings
    """The recipe, resolved."""
    best_epoch: int
    """From 1."""
    val_auc: float | None
    """Of the best epoch; null where the validation split lacks a class."""
    learnable: int
    """Parameters of fusion and side network."""
    weights_sha256: str
    """Of `model.safetensors`."""


class Metrics(Contract):
    """Test metrics. Averages over classes are unweighted (macro). Null: not defined for this split."""

    images: int
    """Rows judged."""
    auc: float | None
    """Area under the ROC curve: binary with two classes, macro one-vs-rest with more."""
    accuracy: float
    """Share of rows whose most probable class is the label."""
    balanced_accuracy: float
    """Mean recall."""
    f1: float
    """Macro F1."""
    quadratic_kappa: float | None
    """Cohen's kappa with quadratic weights, in the order of the classes."""
    auc_per_class: dict[str, float | None]
    """One-vs-rest."""
    confusion: tuple[tuple[int, ...], ...]
    """Rows: label; columns: prediction; in the order of the classes."""


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
    """Of the training step."""
    dtype: str
    """Of the cached keys and values."""
    learnable: int
    """Parameters of fusion and side network."""
    lpm_parameters: int
    """Parameters of the LPM with a linear head: what full fine-tuning would learn."""
    learnable_share: float
    """r = learnable / lpm_parameters."""
    train_tensor_mib: float
    """Peak tensor memory of a training step of stage two, MiB: parameters, gradients, optimiser, activations, batch."""
    full_finetune_tensor_mib: float
    """The same for full fine-tuning of the LPM with fused attention."""
    ppe_factor: float
    """exp(-log10(r + 1)): performance-parameter efficiency is the score times this."""
    pme_factor: float
    """exp(-log10(m / m_full + 1)): performance-memory efficiency is the score times this."""
    cache_bytes_per_image: int
    """One row of the store."""
