"""Adaptations of the LPM by prompts: one registry row each, and their settings."""

from __future__ import annotations

from schemas.adaptation_row import Count, adaptation
from schemas.base import Section


class EptSettings(Section):
    """Settings of ept and ept-lse."""

    prompts: Count = 100
    """Prompt logits per token and block (d_p); the paper chooses among 5, 10, 20, 50, 100, 200, 400 and 600."""


_EPT = "arXiv 2407.01003 (Medical Image Analysis 2024)"
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
)
"""In the order of help texts."""
