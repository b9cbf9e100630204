"""The settings of a study: one `params.yaml`, one tree of frozen models, no unknown key.

Defaults are the published recipe of FPT+ (arXiv 2408.02426). "auto" values are resolved before anything runs and
the resolved settings are written beside each result. Nothing here depends on the machine.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.base import Contract

Method = Literal["fpt", "fpt+", "side"]
Importance = Literal["global", "class_token"]
FeatureDtype = Literal["float32", "float16", "int8", "int4"]
FeatureCodec = Literal["none", "zstd", "blosc"]
Precision = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class DataSettings(Contract):
    """Which images, which labels, and how they are split."""

    images: str = "data/images"
    """Folder of the images; relative paths start at the folder of `params.yaml`."""
    labels: str | None = None
    """CSV with a row per image; null: the first-level folder of an image is its label."""
    path_column: str = "path"
    """Column of `labels` with the path of the image, relative to `images`."""
    label_column: str = "label"
    """Column of `labels` with the label."""
    group_column: str | None = None
    """Column of `labels` with the patient (or any unit that must stay in one split); null: each image by itself."""
    split_column: str | None = None
    """Column of `labels` with a ready split (train, val, test); null: splits are drawn."""
    classes: tuple[str, ...] | None = None
    """Labels in the order of the model's outputs; null: sorted by name. Ordinal grades should be listed."""
    val_share: Share = 0.2
    """Share of the images for choosing the best epoch."""
    test_share: Share = 0.2
    """Share of the images for the test."""
    seed: int = 0
    """Seed of the split."""
    on_error: Literal["fail", "quarantine"] = "fail"
    """What to do with images that cannot be read: stop and list them, or set them aside in a CSV."""
    max_pixels: Annotated[int, Field(ge=1)] = 250_000_000
    """Images with more pixels are refused before they are decoded."""
    min_side: Annotated[int, Field(ge=1)] = 16
    """Images with a side shorter than this, in pixels, are refused."""

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.val_share + self.test_share >= 1.0:
            raise ValueError("val_share + test_share leave no images to train on")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes lists a label twice")
        if self.labels is None and (self.group_column or self.split_column):
            raise ValueError("group_column and split_column need a labels CSV")
        return self


class LpmSettings(Contract):
    """The frozen large pretrained model."""

    name: str = "vit_base_patch16_384.orig_in21k_ft_in1k"
    """timm model name, with the tag of the pretrained weights."""
    weights: str = "hub"
    """"hub", or a local .safetensors, .pth or .npz file; relative paths start at the folder of `params.yaml`."""


class FeatureSettings(Contract):
    """What is computed and kept per image. Everything here is part of the fingerprint, except `shard_size`."""

    image_size: Annotated[int, Field(ge=16, le=8192)] = 512
    """Side of the square input of the LPM, in pixels; taken to the nearest multiple of the patch."""
    layers: Literal["auto"] | tuple[Annotated[int, Field(ge=0)], ...] = "auto"
    """Tapped blocks of the LPM, from 0; auto: all for fpt, the upper half for fpt+ and side."""
    importance: Importance = "global"
    """Token importance: attention received from all queries, or from the class token."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the tokens that is kept per head."""
    dtype: FeatureDtype = "int8"
    """Type of the cached keys and values: float32, float16, int8 (a quarter of float32) or int4 (an eighth, coarse)."""
    pooled: bool = True
    """Also keep the LPM's pooled outputs (class token, mean of the patches), which probes need; false: the forward pass
    ends with the last tapped keys and values."""
    precision: Literal["auto"] | Precision = "float32"
    """Type in which the LPM computes; auto: the fastest where the store is begun, by a short measurement."""
    codec: FeatureCodec = "none"
    """Lossless compression of the store: none (read fastest), zstd, or blosc (bit shuffle and zstd)."""
    bitround: Annotated[int, Field(ge=1, le=23)] | None = None
    """Mantissa bits that floats keep, so that a codec finds more to compress; null: all. Only for float dtypes."""
    side_image_size: Literal["auto"] | Annotated[int, Field(ge=16, le=1024)] = "auto"
    """Side of the small image in the store, in pixels; auto: the side network's input and a margin for crops."""
    shard_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Images per shard: what one task computes, and what a crash costs."""

    @model_validator(mode="after")
    def _check_bitround(self) -> FeatureSettings:
        if self.bitround is not None:
            if self.dtype not in ("float32", "float16"):
                raise ValueError(f"bitround is for float dtypes, not for {self.dtype}")
            if self.dtype == "float16" and self.bitround > 10:
                raise ValueError(f"bitround must be at most 10 for float16 (is {self.bitround})")
        return self

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        if isinstance(value, tuple):
            if not value:
                raise ValueError("needs at least one layer")
            if list(value) != sorted(set(value)):
                raise ValueError("must be in ascending order, each layer once")
        return value


class AugmentSettings(Contract):
    """Augmentation of the side image; the cached features stay those of the un-augmented image."""

    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    brightness: Unit = 0.2
    """Brightness jitter: factor drawn from 1 -/+ this."""
    contrast: Unit = 0.2
    """Contrast jitter: factor drawn from 1 -/+ this."""
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.8, 1.0)
    """Share of the area that a random crop keeps, (lowest, highest)."""
    crop_ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.7, 1.3)
    """Aspect ratio of a random crop, (lowest, highest)."""

    @model_validator(mode="after")
    def _check(self) -> AugmentSettings:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} must be (lowest, highest)")
        return self


class TrainSettings(Contract):
    """Stage two. Defaults are the published recipe; the best learning rate lies between 5e-5 and 5e-3."""

    lr: Annotated[float, Field(gt=0.0)] = 5e-4
    """Learning rate at the start; cosine to zero, no warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """AdamW weight decay."""
    epochs: Annotated[int, Field(ge=1)] = 20
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per step."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the gradient."""
    prompts: Annotated[int, Field(ge=1)] = 16
    """Learnable prompts per tapped layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Dropout of the fused prompts."""
    side_reduction: Annotated[int, Field(ge=1)] = 8
    """Width of the LPM divided by the width of the side network."""
    side_image_size: Literal["auto"] | Annotated[int, Field(ge=16, le=1024)] = "auto"
    """Input of the side network, in pixels, a multiple of 16; auto: 224 for fpt, 128 for fpt+ and side."""
    class_weights: Literal["none", "balanced"] | tuple[Annotated[float, Field(ge=0.0)], ...] = "none"
    """Weight of each class in the loss; balanced: n / (classes * n_class)."""
    augment: AugmentSettings = AugmentSettings()
    """Augmentation of the side image."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""

    @field_validator("side_image_size")
    @classmethod
    def _check_side(cls, value: object) -> object:
        if isinstance(value, int) and value % 16:
            raise ValueError("must be a multiple of 16, the side network's patch")
        return value


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes of a unit."""


class StoreSettings(Contract):
    """How stage two reads the feature store. Never part of a fingerprint; DVC does not watch it."""

    memory_budget: Annotated[int, Field(ge=0)] | str = "auto"
    """Features of the study's images are held in memory if they take no more than this: bytes, or text such as 2GB or
    1.5GiB; 0: never; auto: half of the memory that is free when training starts."""
    remote: str | None = None
    """URL or folder of a cache root, such as `fpt cache push` fills, whose store training and evaluation read in place
    where the local cache lacks it; null: none. Relative paths start at the folder of `params.yaml`."""

    @field_validator("memory_budget")
    @classmethod
    def _check_budget(cls, value: int | str) -> int | str:
        if isinstance(value, str) and value != "auto" and _bytes(value) is None:
            raise ValueError("must be auto, a number of bytes, or text such as 2GB or 1.5GiB")
        return value

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes; None: auto."""
        return _bytes(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2].upper()])


class ComputeSettings(Contract):
    """How to use this machine. Never part of a fingerprint; DVC does not watch it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    threads: Annotated[int, Field(ge=0)] = 0
    """torch threads; 0: as many as the process may use."""
    extract_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Images per forward pass of the LPM, halved where they do not fit the memory; auto: 4, on an accelerator 32."""
    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read the store in training; 0: the training process itself."""


class Settings(Contract):
    """All settings of a study."""

    method: Method = "fpt+"
    """Preset: fpt (MICCAI 2024), fpt+ (TNNLS 2025), or side: the side network of fpt+ without cached features."""
    data: DataSettings = DataSettings()
    """Images, labels, splits."""
    lpm: LpmSettings = LpmSettings()
    """The frozen model."""
    features: FeatureSettings = FeatureSettings()
    """What stage one keeps."""
    train: TrainSettings = TrainSettings()
    """Stage two."""
    store: StoreSettings = StoreSettings()
    """The feature store."""
    compute: ComputeSettings = ComputeSettings()
    """This machine."""


OUTPUTS = PurePosixPath("outputs")
"""Folder of a study, beside `params.yaml`, that holds every result."""
