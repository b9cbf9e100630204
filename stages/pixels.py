"""Pixels as tensors: normalisation, resizing and augmentation of images that were read already.

torchvision is imported where it is used: it imports Pillow, which training on cached tokens does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from schemas.settings import AugmentSettings
from stages.vision import compiler_left_out

Transform = Callable[[torch.Tensor], torch.Tensor]


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32, (x / 255 - mean) / std per channel."""
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    return pixels.to(torch.float32, copy=True).div_(255).sub_(shift).div_(scale)


def augmentation(settings: AugmentSettings, size: int) -> Transform:
    """The published augmentation of the side image: crop, flip, brightness and contrast."""
    with compiler_left_out():
        from torchvision.transforms import v2

    steps: list[Any] = [
        v2.RandomResizedCrop(size, scale=settings.crop_scale, ratio=settings.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(settings.flip),
    ]
    if settings.brightness or settings.contrast:
        steps.append(v2.ColorJitter(brightness=settings.brightness, contrast=settings.contrast))
    composed: Transform = v2.Compose(steps)
    return composed


def to_size(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (..., 3, s, s) -> (..., 3, size, size), as evaluation and prediction see it."""
    if image.shape[-1] == size:
        return image
    with compiler_left_out():
        from torchvision.transforms.v2 import functional as tv

    resized: torch.Tensor = tv.resize(image, [size, size], antialias=True)
    return resized
