"""Adaptations of weights, norms and activations of the LPM: one registry row each, and their settings."""

from __future__ import annotations

from schemas.adaptation_row import Count, adaptation
from schemas.base import Section
from schemas.method_row import MethodRow
from schemas.probe_specs import PooledSpec


class SsfSettings(Section):
    """Settings of ssf."""

    published_start: bool = False
    """Draw initial scales and shifts around 1 and 0 with deviation 0.02, as published; false: exactly these, so that
    training starts at the LPM."""


class AdapterSettings(Section):
    """Settings of adapter."""

    width: Count = 8
    """Channels of the bottleneck."""


class AdaptFormerSettings(Section):
    """Settings of adaptformer."""

    width: Count = 64
    """Channels of the bottleneck."""


class LoraSettings(Section):
    """Settings of lora and dora."""

    rank: Count = 8
    """Rank of the update of a weight matrix."""
    freeze_a: bool = False
    """Keep the random matrix A and train only B; the mean of the updates B A of several sites is then exactly that of
    the mean of B (`fpt federate`)."""


class VeraSettings(Section):
    """Settings of vera."""

    rank: Count = 256
    """Rank of the random projections."""


_MODERATE, _HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
_FEW_SHOT = "arXiv 2304.01917 (Strong Baselines)"
ROWS = (
    adaptation(
        "bitfit",
        "BitFit",
        "all biases of the LPM",
        "arXiv 2106.10199 (ACL 2022)",
        "tuned_weights",
        rates=_HIGH,
    ),
    adaptation(
        "ln-tune",
        "LN-Tune",
        "the norms of the LPM",
        _FEW_SHOT,
        "tuned_weights",
        rates=_HIGH,
    ),
    adaptation(
        "attn-scale",
        "AttnScale",
        "a factor per head and block of the attention logits",
        _FEW_SHOT,
        "attn_scale",
        rates=(3e-3, 1e-2, 3e-2),
    ),
    adaptation(
        "attn-scale-matrix",
        "AttnScale of every pair of tokens",
        "a factor per block of each attention weight, shared by heads",
        _FEW_SHOT,
        "attn_scale",
        rates=_HIGH,
    ),
    adaptation(
        "ln-scale",
        "LN-Tune and AttnScale",
        "the norms of the LPM and a factor per head of the attention logits",
        _FEW_SHOT,
        "attn_scale",
        rates=_HIGH,
    ),
    adaptation(
        "dra",
        "DRA",
        "an offset of the output of every attention and every MLP",
        "arXiv 2301.02419 (TMLR 2022)",
        "dra",
        rates=_HIGH,
    ),
    adaptation(
        "ssf",
        "SSF",
        "scale and shift of the output of every linear layer and norm",
        "arXiv 2210.08823 (NeurIPS 2022)",
        "ssf",
        options=SsfSettings,
        rates=_MODERATE,
    ),
    adaptation(
        "adapter",
        "adapter",
        "a bottleneck after every MLP",
        "arXiv 1902.00751 (ICML 2019)",
        "adapters",
        options=AdapterSettings,
        rates=_MODERATE,
    ),
    adaptation(
        "adaptformer",
        "AdaptFormer",
        "a bottleneck parallel to every MLP",
        "arXiv 2205.13535 (NeurIPS 2022)",
        "adapters",
        options=AdaptFormerSettings,
        rates=_MODERATE,
    ),
    MethodRow(
        name="mlp-3",
        title="MLP-3",
        help="an MLP with two hidden layers on the pooled output",
        paper="arXiv 2203.12119 (ECCV 2022)",
        module="mlp_3",
        spec=PooledSpec,
        inputs=frozenset({"pooled"}),
        trained_by="gradient",
        rates=(1e-4, 3e-4, 1e-3),
    ),
    adaptation(
        "lora",
        "LoRA",
        "low-rank updates of queries, keys and values",
        "arXiv 2106.09685 (ICLR 2022)",
        "peft_layers",
        section="lora",
        options=LoraSettings,
        rates=_MODERATE,
    ),
    adaptation(
        "dora",
        "DoRA",
        "low-rank updates of the direction of queries, keys and values, and their magnitudes",
        "arXiv 2402.09353 (ICML 2024)",
        "peft_layers",
        section="lora",
        options=LoraSettings,
        rates=_MODERATE,
    ),
    adaptation(
        "ia3",
        "IA3",
        "factors of queries, keys and values, and of the activations in the MLPs",
        "arXiv 2205.05638 (NeurIPS 2022)",
        "peft_layers",
        rates=_HIGH,
    ),
    adaptation(
        "vera",
        "VeRA",
        "factors of random low-rank updates of queries, keys and values",
        "arXiv 2310.11454 (ICLR 2024)",
        "peft_layers",
        options=VeraSettings,
        rates=(3e-3, 1e-2, 3e-2),
    ),
)
"""In the order of help texts."""
