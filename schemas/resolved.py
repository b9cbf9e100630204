"""Resolved settings: plain values only, which stages accept; `schemas.resolve` makes them from `Settings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.data_settings import Seed
from schemas.settings import (
    ExtrapolationSettings,
    FeatureSettings,
    Layers,
    Precision,
    ResizeFilter,
    Settings,
    TrainSettings,
)


class ResolvedFeatures(FeatureSettings):
    """Features that are computed and stored per image."""

    filter: ResizeFilter
    """Filter of the resize."""
    layers: Layers
    """Tapped blocks of the LPM, from 0, ascending."""
    precision: Precision
    """Type in which the LPM computes."""
    side_image_size: Annotated[int, Field(ge=16, le=1024)]
    """Side of the small image in the store, in pixels."""


class ResolvedExtrapolation(ExtrapolationSettings):
    """Extrapolation for large batches."""

    rate: Annotated[float, Field(ge=0.0, le=1e9)] = 0.25
    """Length of the extrapolation, relative to the learning rate."""


class ResolvedTrain(TrainSettings):
    """Stage two."""

    extrapolation: ResolvedExtrapolation = ResolvedExtrapolation()
    """Extrapolation of extrap-sgd and extrap-adamw."""
    side_image_size: Annotated[int, Field(ge=16, le=1024)]
    """Input of the side network, in pixels."""
    members: Annotated[int, Field(ge=1, le=64)]
    """Side networks that are trained together and averaged; with `adaptive_members` at most."""
    adaptive_members: bool = False
    """Whether held-out loss decides between one side network and all: only if `members` is auto."""
    attentive: Annotated[int, Field(ge=0, le=64)]
    """Attentive probes that are trained with them."""
    attentive_weight: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Ensemble weight of the attentive probes."""
    probe_weight: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Ensemble weight of the linear probes."""
    keep: Literal["best", "late", "last"]
    """Epoch whose weights are kept."""
    start_block: Annotated[int, Field(ge=0, le=999)]
    """First block that an adaptation changes."""
    order_seed: Seed
    """Seed of the order of the images, their augmentation and views."""


class ResolvedSettings(Settings):
    """All settings of a study, without a value that is still to be chosen."""

    features: ResolvedFeatures
    """What stage one keeps."""
    train: ResolvedTrain
    """Stage two."""
