"""VPTTA (Chen et al. 2024, arXiv 2311.18363) for a vision transformer: a translation.

The original adapts a network with batch norms. A vision transformer has none, so that (1) source statistics are
per-channel mean and variance of the output of every norm of the LPM over the patch tokens of source images, and (2) for
the n-th image, with mean mu_x and variance v_x over its patch tokens, and m = 1 / (sqrt(n) / 5 + 1),

    loss = mean over norms ( mean |m mu_x' + (1 - m) mu - mu_x| + mean |sqrt(m v_x' + (1 - m) v) - sqrt(v_x)| )

where ' stops the gradient. One Adam step on the low-frequency prompt of the image (`stages.test_time.low_frequency`)
lowers it. (3) The renormalisation by mixed statistics is left out, since LayerNorm has nothing to replace. (4) The
image is predicted with its prompt, which then enters the memory bank. The optimizer is fresh for each image, where the
released code keeps its moments. Nobody has published figures for classification: UNVERIFIED.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from stages.test_time.low_frequency import MemoryBank, spectrum_of, window_of, window_side, with_prompt
from stages.train.source_statistics import Moments

RATE = 0.05
"""Learning rate of Adam, as for fundus photographs (polyps: 0.01)."""
BETAS = (0.9, 0.99)
"""Coefficients of Adam."""
WARM_UP = 5.0
"""Square roots of images over which the statistics of the image give way to those of the source."""


class NormTarget(Protocol):
    """A model whose norms are observed."""

    def norms(self, images: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance (K, D) of the outputs of all norms over the patch tokens of (1, 3, S, S)."""

    def predict(self, images: torch.Tensor, /) -> torch.Tensor:
        """Return logits (B, C) of normalised images."""


def prompt_loss(mean: torch.Tensor, variance: torch.Tensor, source: Moments, seen: int) -> torch.Tensor:
    """Compute the loss of an image.

    Args:
        mean: (K, D) of the image.
        variance: (K, D) of the image.
        source: Mean and variance (K, D) over source images.
        seen: Images so far, this one included.
    """
    m = 1.0 / (math.sqrt(seen) / WARM_UP + 1.0)
    mu, v = source.mean.to(mean), source.spread.to(mean)
    # lerp, so that equal statistics stay equal to the last bit: the sign of a rounding error would be a full step.
    mixed_mean = torch.lerp(mu, mean.detach(), m)
    mixed_deviation = torch.lerp(v, variance.detach(), m).clamp_min(1e-12).sqrt()
    deviation = variance.clamp_min(1e-12).sqrt()
    return ((mixed_mean - mean).abs().mean(dim=1) + (mixed_deviation - deviation).abs().mean(dim=1)).mean()


class Vptta:
    """Adaptation of one image after the other."""

    def __init__(self, target: NormTarget, source: Moments) -> None:
        """Begin with an empty bank.

        Args:
            target: Model.
            source: Mean and variance (K, D) of the outputs of its norms.
        """
        self._target, self._source = target, source
        self._bank = MemoryBank()
        self._seen = 0

    def step(self, images: torch.Tensor) -> torch.Tensor:
        """Return adapted logits (B, C) of normalised images (B, 3, S, S), taken one after the other."""
        return torch.cat([self._one(image[None]) for image in images])

    def _one(self, image: torch.Tensor) -> torch.Tensor:
        self._seen += 1
        spectrum = spectrum_of(image)
        key = window_of(spectrum, window_side(image.shape[-1]))[0]
        prompt = self.adapted(spectrum, self._bank.initial(key))
        with torch.inference_mode():
            logits = self._target.predict(with_prompt(spectrum, prompt))
        self._bank.add(key, prompt)
        return logits

    def adapted(self, spectrum: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Return the prompt (3, p, p) after one step."""
        changed = prompt.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([changed], lr=RATE, betas=BETAS)
        with torch.enable_grad():
            mean, variance = self._target.norms(with_prompt(spectrum, changed))
            (changed.grad,) = torch.autograd.grad(prompt_loss(mean, variance, self._source, self._seen), [changed])
        optimizer.step()
        return changed.detach()
