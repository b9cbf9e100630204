"""Visual Fourier Prompt Tuning (arXiv 2411.01327): VPT-deep with some of the prompts behind a Fourier transform.

Of the M prompts P_l (M, D) of a block, the first m = floor(alpha M) are replaced by the real part of their transform
over both axes, without normalisation:

    P^_l = [Re(FFT_tokens(FFT_channels(P_l[:m]))); P_l[m:]]

and then are keys and values as in VPT-deep (`stages.methods.vpt`). No parameters are added. The real part only depends
on the even part (P[i, j] + P[-i, -j]) / 2 (identity 7): of m D numbers, (m D + c) / 2 have an effect, with c = (2 if m
is even else 1) (2 if D is even else 1); in the other directions there is no gradient. The transform multiplies the
deviation of the initial values by sqrt(m D / 2).

At prediction, keys and values of P^ are computed once, so that it costs what VPT-deep does. Where the transformed
prompts stand has no effect on attention. Not offered: drawing which prompts are transformed in every forward pass, as
an option of the published code does. Ours: no dropout before the transform; AdamW, whose weight decay acts on P, not on
P^. The number of prompts per data set is UNVERIFIED.
"""

from __future__ import annotations

import math

import torch

from schemas.prompt_adaptations import VfptSettings
from schemas.specs import AdaptationSpec
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.base import Details
from stages.methods.vpt import DeepPrompts


def even_numbers(count: int, width: int) -> int:
    """Return how many of the numbers of `count` transformed prompts of this width have an effect."""
    fixed = (1 + (count % 2 == 0)) * (1 + (width % 2 == 0))
    return (count * width + fixed) // 2 if count else 0


def transform(prompts: torch.Tensor, count: int) -> torch.Tensor:
    """Replace the first `count` of the prompts (M, D) by the real part of their Fourier transform."""
    return torch.cat([torch.fft.fft2(prompts[:count]).real, prompts[count:]]) if count else prompts


class FourierPrompts(DeepPrompts):
    """VFPT."""

    def __init__(self, spec: AdaptationSpec, options: VfptSettings) -> None:
        super().__init__(spec, options.prompts)
        self.transformed = _transformed(options)

    def tokens(self, row: int) -> torch.Tensor:
        """Return P^ (M, D) of an adapted block."""
        return transform(super().tokens(row), self.transformed)


def _transformed(options: VfptSettings) -> int:
    return math.floor(options.fourier_share * options.prompts)


def _describe(spec: AdaptationSpec, options: VfptSettings) -> Details:
    count = _transformed(options)
    effective = even_numbers(count, spec.width) + (options.prompts - count) * spec.width
    return (
        ("Fourier prompts", f"{count} of {options.prompts} per block"),
        ("Parameters of prompts with an effect", f"{spec.blocks * effective:,}"),
    )


METHOD = AdaptationMethod(FourierPrompts, _describe)
