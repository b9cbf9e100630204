"""Low-frequency prompts of VPTTA (Chen et al. 2024, arXiv 2311.18363): factors of an image's amplitude spectrum.

    x~ = IFFT( amplitude * P * e^(i phase) )        P: the prompt in a window around frequency zero, 1 elsewhere

Since P is real, that is the spectrum times P. The released code places a window of even side off centre, and rolls
batch and channels; here the side is odd, the window symmetric about frequency zero, and only rows and columns roll.
"""

from __future__ import annotations

from collections import deque

import torch
from torch.nn import functional as F

SHARE = 0.01
"""Side of the window as a share of the image's."""
MOST = 40
"""Entries of the memory bank; the oldest leaves first."""
NEIGHBOURS = 16
"""Entries that start a prompt; a bank with fewer starts it at ones."""
TEMPERATURE = 0.2
"""Temperature of the softmax over cosine similarities."""


def window_side(size: int) -> int:
    """Return the side of the window of an image, odd: 3 for 224 pixels, 5 for 512."""
    side = max(1, int(SHARE * size))
    return side + 1 - side % 2


def spectrum_of(images: torch.Tensor) -> torch.Tensor:
    """Return the spectrum of images (B, 3, S, S), frequency zero in the centre, complex."""
    shifted: torch.Tensor = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    return shifted


def window_of(spectrum: torch.Tensor, side: int) -> torch.Tensor:
    """Return the amplitudes (B, 3, p, p) in the window."""
    start = spectrum.shape[-1] // 2 - side // 2
    return spectrum[..., start : start + side, start : start + side].abs()


def factors(prompt: torch.Tensor, size: int) -> torch.Tensor:
    """Return the factors (3, S, S) of a spectrum from a prompt (3, p, p)."""
    side = prompt.shape[-1]
    before = size // 2 - side // 2
    after = size - side - before
    return F.pad(prompt - 1.0, (before, after, before, after)) + 1.0


def with_prompt(spectrum: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, S, S) from their spectrum and a prompt (3, p, p)."""
    changed = torch.fft.ifftshift(spectrum * factors(prompt, spectrum.shape[-1]), dim=(-2, -1))
    images: torch.Tensor = torch.fft.ifft2(changed).real
    return images


class MemoryBank:
    """Prompts of earlier images by the low-frequency amplitudes of the images without them."""

    def __init__(self) -> None:
        self._entries: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=MOST)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: torch.Tensor, prompt: torch.Tensor) -> None:
        """Keep a prompt (3, p, p) for a key of the same shape."""
        self._entries.append((key.detach().clone(), prompt.detach().clone()))

    def initial(self, key: torch.Tensor) -> torch.Tensor:
        """Return the prompt to start from: a mean of those with the nearest keys; ones while there are under 16."""
        if len(self) < NEIGHBOURS:
            return torch.ones_like(key)
        keys = torch.stack([one for one, _ in self._entries]).flatten(1)
        similarity = F.cosine_similarity(key.flatten()[None], keys, dim=1)
        nearest = similarity.topk(NEIGHBOURS)
        weights = (nearest.values / TEMPERATURE).softmax(dim=0)
        prompts = torch.stack([self._entries[at][1] for at in nearest.indices.tolist()])
        return (weights[:, None, None, None] * prompts).sum(dim=0)
