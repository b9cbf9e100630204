"""Adaptations of the LPM between prompts and tokens by cross-attention, or parallel to attention: rows and settings."""

from __future__ import annotations

from schemas.adaptation_row import Count, adaptation
from schemas.base import Section


class CvptSettings(Section):
    """Settings of cvpt."""

    prompts: Count = 10
    """Prompts per block (m); the paper chooses from 1 to 200 per data set."""
    normed: bool = False
    """Whether queries are made of normalised tokens, as the LPM's own queries are; the published code does not."""


class DvptSettings(Section):
    """Settings of dvpt."""

    prompts: Count = 10
    """Prompts per block."""
    latent: Count = 20
    """Width of the adapters, each of which three consecutive blocks share."""


class DvptReleaseSettings(Section):
    """Settings of dvpt-release."""

    prompts: Count = 50
    """Prompts that enter the first block."""
    latent: Count = 20
    """Width of the adapters, each of which three consecutive blocks share."""


class AptSettings(Section):
    """Settings of apt."""

    prompts: Count = 50
    """Prompts per block (M): 50 in the published code; 200 gives the published numbers of parameters."""
    latent: Count = 4
    """Rank of what the keys add to the prompts."""
    zero_gate: bool = False
    """Whether a learnable gate, 0 at first, multiplies what the prompts add; it is not published."""


_CVPT = "arXiv 2408.14961 (ICCV 2025)"
_DVPT = "arXiv 2307.09787 (Neural Networks 2025)"
_APT = "arXiv 2306.15706"
ROWS = (
    adaptation(
        "cvpt",
        "CVPT",
        "the tokens of every block of the LPM attend to prompts after its attention",
        _CVPT,
        "cvpt",
        options=CvptSettings,
        rates=(5e-4, 1e-3, 5e-3),
    ),
    adaptation(
        "dvpt",
        "DVPT",
        "prompts that attend to the tokens of every block of the LPM, and shared adapters, both gated",
        _DVPT,
        "dvpt",
        options=DvptSettings,
        rates=(5e-4, 1e-3, 5e-3),
    ),
    adaptation(
        "dvpt-release",
        "DVPT as released",
        "prompts as further tokens of the LPM, and shared gated adapters",
        _DVPT,
        "dvpt",
        options=DvptReleaseSettings,
        rates=(5e-4, 1e-3, 5e-3),
    ),
    adaptation(
        "apt",
        "APT",
        "prompts whose weighted sum is added to the output of every attention of the LPM, without a softmax",
        _APT,
        "apt",
        options=AptSettings,
        rates=(2e-4, 5e-4, 2e-3),
    ),
)
"""In the order of help texts."""
