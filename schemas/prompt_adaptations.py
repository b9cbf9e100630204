"""Adaptations of the LPM by prompts: one registry row each, and their settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.adaptation_row import Count, adaptation
from schemas.base import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Pruned = Annotated[float, Field(ge=0.0, le=0.9)]


class EptSettings(Section):
    """Settings of ept and ept-lse."""

    prompts: Count = 100
    """Prompt logits per token and block (d_p); the paper chooses among 5, 10, 20, 50, 100, 200, 400 and 600."""


class VptSettings(Section):
    """Settings of vpt-shallow and vpt-deep."""

    prompts: Count = 10
    """Prompts, of vpt-deep per block; the paper chooses among 1, 5, 10, 50, 100 and 200."""


class DecomposedPromptSettings(Section):
    """Settings of decomposed-prompts."""

    prompts: Count = 10
    """Prompts per block (m)."""
    rank: Count = 4
    """Rank of the matrix of prompts (r)."""
    freeze_u: bool = False
    """Keep the random factor U and train only V; the mean of the prompts U V of several sites is then exactly the
    product of U and the mean of V (`fpt federate`)."""


class VfptSettings(Section):
    """Settings of vfpt."""

    prompts: Count = 10
    """Prompts per block (M)."""
    fourier_share: Share = 0.5
    """Share of the prompts that pass through the Fourier transform (alpha); the paper chooses among 0.2, 0.3, 0.5, 0.7
    and 1."""


class E2vptSettings(Section):
    """Settings of e2vpt."""

    prompts: Count = 10
    """Visual prompts per block; the published commands have 1, 5, 10 and 32."""
    kv_prompts: Count = 5
    """Prompts per block and head that are keys and values; the published commands have 1, 5 and 10."""
    shared: bool = True
    """Whether a key and its value are the same vector, as published."""
    prune: bool = False
    """Prune the visual prompts: the first half of the epochs measures which are important, the second half starts again
    without the others. Needs at least 3 epochs."""
    pruned_prompts: Pruned = 0.5
    """Share of the visual prompts that is pruned; the paper chooses among 0.1 to 0.9."""
    pruned_segments: Pruned = 0.5
    """Share of the 16 segments of each visual prompt that is pruned, at most 12; the paper chooses among 0.1 to 0.9."""


class PrefixSettings(Section):
    """Settings of prefix."""

    prompts: Count = 16
    """Keys and values per block and head (m)."""


class PtPeftSettings(Section):
    """Settings of pt-peft."""

    prompts: Count = 16
    """Keys and values per block and head (m)."""
    rank: Count = 8
    """Rank of LoRA (r)."""


_EPT, _VPT = "arXiv 2407.01003 (Medical Image Analysis 2024)", "arXiv 2203.12119 (ECCV 2022)"
ROWS = (
    adaptation(
        "ept",
        "EPT",
        "prompt logits in every softmax of the LPM, as published",
        _EPT,
        "ept",
        section="ept",
        options=EptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "ept-lse",
        "EPT-lse",
        "EPT with one logit per token and block, in fused attention",
        _EPT,
        "ept",
        section="ept",
        options=EptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "vpt-shallow",
        "VPT-shallow",
        "prompts among the tokens, from the first adapted block to the last",
        _VPT,
        "vpt",
        section="vpt",
        options=VptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "vpt-deep",
        "VPT-deep",
        "other prompts in every block of the LPM, as further keys and values",
        _VPT,
        "vpt",
        section="vpt",
        options=VptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "decomposed-prompts",
        "decomposed prompts",
        "VPT-deep with a low-rank matrix of prompts per block",
        "arXiv 2407.11573",
        "decomposed_prompts",
        options=DecomposedPromptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "vfpt",
        "VFPT",
        "VPT-deep with some of the prompts behind a Fourier transform",
        "arXiv 2411.01327 (NeurIPS 2024)",
        "vfpt",
        options=VfptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "e2vpt",
        "E2VPT",
        "VPT-deep with prompts in the keys and values of every head, and with pruning",
        "arXiv 2307.13770 (ICCV 2023)",
        "e2vpt",
        options=E2vptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "prefix",
        "prefix tuning",
        "further keys and values in every head of the LPM",
        "arXiv 2101.00190 (ACL 2021)",
        "prefix",
        options=PrefixSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "pt-peft",
        "PT-PEFT",
        "prefix tuning in the first half of the epochs, with LoRA in the second half",
        "arXiv 2411.00029 (EMNLP Findings 2024)",
        "prefix",
        options=PtPeftSettings,
        rates=(5e-4, 1e-3, 5e-3),
    ),
)
"""In the order of help texts."""
