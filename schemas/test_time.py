"""Adaptation at test time: its kinds and options, and what it did."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from schemas.base import Contract
from schemas.results import Metrics

Adapt = Literal["foa", "foa-shift", "vptta"]
"""foa: input prompts by CMA-ES, and a shift of what the head reads (arXiv 2404.01650); foa-shift: only the shift;
vptta: a low-frequency prompt per image (arXiv 2311.18363)."""

ADAPTS: tuple[Adapt, ...] = get_args(Adapt)

SOURCE_KINDS: dict[Adapt, tuple[str, ...]] = {
    "foa": ("vectors", "activations"),
    "foa-shift": ("vectors",),
    "vptta": ("norms",),
}
"""Statistics of source images that each needs (`stages.train.source_statistics`)."""

LEAST_BATCH = 8
"""Images of a batch, at least: deviations of fewer mean little."""


class AdaptOptions(Contract):
    """How predictions are adapted."""

    name: Adapt
    """Kind of the adaptation."""
    batch: Annotated[int, Field(ge=LEAST_BATCH, le=4096)] = 64
    """Images of a batch of foa and foa-shift; published is 64. vptta takes images one by one."""
    seed: Annotated[int, Field(ge=0)] = 2020
    """Seed of the order of the images, and of the search of foa."""


class Adapted(Contract):
    """Metrics of the same rows without and with adaptation."""

    adapt: AdaptOptions
    """What was adapted, and how."""
    without: Metrics
    """Of the model as it was trained."""
    adapted: Metrics
    """With adaptation; its warnings say what it depends on."""


def remarks(options: AdaptOptions, images: int) -> tuple[str, ...]:
    """Return what adapted predictions depend on, for people."""
    streamed = "each prediction depends on the images before it, whose order is drawn with the seed"
    prevalence = (
        "adaptation takes every difference to the training images for one of how they look, also other shares of the "
        "classes: where these differ it can harm. Compare with the figures without it."
    )
    if options.name == "vptta":
        return f"adapted by vptta, image by image: {streamed}.", prevalence
    first = min(options.batch, images)
    batches = f"adapted by {options.name} in batches of {options.batch}: {streamed}, and on its batch"
    return f"{batches}. The first {first} of {images} images are not shifted.", prevalence
