"""The settings of a study: one `params.yaml`, one tree of frozen models, no unknown key.

Beside what makes FPT-X, defaults are the published recipe of FPT+ (arXiv 2408.02426). "auto" values are resolved before
anything runs and the resolved settings are written beside each result. Nothing here depends on the machine.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.base import Name, Section, Word
from schemas.machine import ClusterSettings, ComputeSettings, StoreSettings
from schemas.methods import METHODS_HELP, Method, MethodSettings
from schemas.tasks import SEPARATOR, Task

Importance = Literal["global", "class_token"]
FeatureDtype = Literal["float32", "float16", "int8", "int4"]
FeatureCodec = Literal["none", "zstd", "blosc"]
FeatureResize = Literal["squash", "letterbox"]
ResizeFilter = Literal["bilinear", "bicubic", "lanczos", "nearest"]
Normalisation = Literal["lpm", "dataset"]
Precision = Literal["float32", "bfloat16", "float16"]
FixedView = Literal["identity", "hflip", "vflip", "rot90", "rot180", "rot270"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Area = Annotated[float, Field(ge=0.01, le=1.0)]
Aspect = Annotated[float, Field(ge=0.1, le=10.0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0, le=999)], ...], Field(max_length=1000)]
ClassWeights = Annotated[tuple[Annotated[float, Field(ge=0.0, le=1e6)], ...], Field(min_length=1, max_length=10_000)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)]
ClassNames = Annotated[dict[Name, Name], Field(max_length=10_000)]


def _label_text(value: object) -> object:
    """Text of a label that YAML took for a number: 0 is the label "0"."""
    if isinstance(value, bool):
        # YAML reads yes, no, on and off as truth values too: the label as the user wrote it is lost.
        raise ValueError(f"a label reads as {str(value).lower()}: put it in quotes, such as 'yes'")
    return str(value) if isinstance(value, int | float) else value


class DataSettings(Section):
    """Which images, which labels, and how they are split."""

    task: Task = "multiclass"
    """What a label says: multiclass (one class an image, also of two), multilabel (any number of labels, also none) or
    ordinal (one grade, in the order of `classes`)."""
    images: Name = "data/images"
    """Folder of the images; relative paths start at the folder of `params.yaml`."""
    labels: Name | None = None
    """CSV with a row per image; null: the first-level folder of an image is its label."""
    path_column: Name = "path"
    """Column of `labels` with the path of the image, relative to `images`."""
    label_column: Name = "label"
    """Column of `labels` with the label."""
    label_separator: Word = SEPARATOR
    """Between the labels of one image in `label_column`; only for multilabel."""
    label_columns: Names | None = None
    """Columns of `labels` with 0 or 1, each named after its label, in place of `label_column`; only for multilabel."""
    group_column: Name | None = "auto"
    """Column of `labels` with the patient (or any unit that must stay in one split); auto: a column named patient,
    subject, case or group, also with _id, and without `labels` the sub-folders of class folders where they hold several
    images each; folder: those sub-folders in any case; null: each image by itself."""
    split_column: Name | None = "auto"
    """Column of `labels` with a ready split (train, val, test); images without an entry get one drawn, and so do
    validation images from train where no image has val; auto: a column named split; null: splits are drawn."""
    classes: Names | None = None
    """Labels (or their `class_names`) in the order of the model's outputs; null: sorted by name. Ordinal grades should
    be listed."""
    class_names: ClassNames | None = None
    """Names of labels, such as {0: healthy, 1: ill}, used from the manifest to the report; null: labels are names."""
    val_share: Share = 0.2
    """Share of the images for choosing the best epoch."""
    test_share: Share = 0.2
    """Share of the images for the test."""
    seed: Seed = 0
    """Seed of the split."""
    on_error: Literal["fail", "quarantine"] = "fail"
    """What to do with images that cannot be read: stop and list them, or set them aside in a CSV."""
    on_warning: Literal["error", "accept"] = "error"
    """Images whose checksums do not match or whose JPEG data is corrupt: cannot be read, or are used and counted."""
    max_pixels: Annotated[int, Field(ge=1, le=10**11)] = 250_000_000
    """Images with more pixels are refused before they are decoded."""
    min_side: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Images with a side shorter than this, in pixels, are refused."""

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.val_share + self.test_share >= 1.0:
            raise ValueError("val_share + test_share leave no images to train on")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes lists a label twice")
        if self.labels is None and (
            self.group_column not in (None, "auto", "folder") or self.split_column not in (None, "auto")
        ):
            raise ValueError("group_column and split_column need a labels CSV")
        return self

    @field_validator("group_column", "split_column", mode="before")
    @classmethod
    def _none_is_null(cls, value: object) -> object:
        return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value

    @field_validator("classes", mode="before")
    @classmethod
    def _number_labels(cls, value: object) -> object:
        return tuple(map(_label_text, value)) if isinstance(value, list | tuple) else value

    @field_validator("class_names", mode="before")
    @classmethod
    def _number_names(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {_label_text(label): _label_text(name) for label, name in value.items()}

    @model_validator(mode="after")
    def _check_class_names(self) -> DataSettings:
        names = list((self.class_names or {}).values())
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"class_names gives the name {twice!r} to two labels")
        if any(not name.strip() for name in names):
            raise ValueError("class_names holds an empty name")
        if self.task == "multilabel" and any(SEPARATOR in name for name in names):
            raise ValueError(f"class_names may not contain {SEPARATOR!r} with task multilabel")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> DataSettings:
        if self.task == "ordinal" and self.classes is None:
            raise ValueError("task ordinal needs classes: the grades from the lowest to the highest")
        if self.task == "multilabel" and self.labels is None:
            raise ValueError("task multilabel needs a labels CSV: an image in a class folder has one label")
        if self.label_columns is not None:
            if self.task != "multilabel":
                raise ValueError("label_columns is for task multilabel")
            if len(set(self.label_columns)) != len(self.label_columns):
                raise ValueError("label_columns lists a column twice")
        return self


class LpmSettings(Section):
    """The frozen large pretrained model."""

    name: Name = "vit_base_patch16_384.orig_in21k_ft_in1k"
    """timm model name with its tag, hf-hub:organisation/name, or local-dir:folder (config.json and weights)."""
    weights: Name = "hub"
    """"hub", or a local .safetensors, .pth or .npz file; relative paths start at the folder of `params.yaml`."""


class FeatureSettings(Section):
    """Features that are computed and stored per image.

    Everything here is part of the fingerprint, except `shard_size` and the views: another view is another row.
    """

    image_size: Annotated[int, Field(ge=16, le=8192)] = 512
    """Side of the square input of the LPM, in pixels; taken to the nearest multiple of the patch."""
    resize: FeatureResize = "squash"
    """Rule that makes an image square: squash (both sides scaled, aspect lost) or letterbox (aspect kept, padded with
    the mean colour of `normalisation`); the side image the same."""
    filter: Literal["auto"] | ResizeFilter = "auto"
    """Filter of the resize: bilinear, bicubic, lanczos or nearest; auto: the LPM's own. The side image the same."""
    normalisation: Normalisation = "lpm"
    """Mean and standard deviation per channel for the LPM's input and the side image: lpm (those it was trained with)
    or dataset (those of the training images, computed at the start of an extraction). With dataset, other training
    images mean other features."""
    layers: Literal["auto"] | Layers = "auto"
    """Tapped blocks of the LPM, from 0; auto: all for fpt, the upper half for every other method."""
    importance: Importance = "global"
    """Token importance: attention received from all queries, or from the class token."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the tokens that is cached per head."""
    dtype: FeatureDtype = "int8"
    """Type of the cached keys, values and hidden tokens: float32, float16, int8 (a quarter of float32) or int4 (an
    eighth, coarse)."""
    pooled: bool = True
    """Also cache the LPM's pooled outputs (class token, mean of the patches), which probes need; false: the forward
    pass ends with the last tapped keys and values."""
    precision: Literal["auto"] | Precision = "auto"
    """Type in which the LPM computes; auto: the fastest on the machine that starts the store, measured briefly."""
    hidden: Annotated[int, Field(ge=0, le=999)] | None = None
    """Also cache all tokens that enter this block of the LPM, from 0: methods that train only the blocks from it on
    start there; null: none."""
    codec: FeatureCodec = "none"
    """Lossless compression of the store: none (read fastest), zstd, or blosc (bit shuffle and zstd)."""
    bitround: Annotated[int, Field(ge=1, le=23)] | None = None
    """Mantissa bits of floats, so that a codec compresses better; null: all. Only for float dtypes."""
    side_image_size: Literal["auto"] | Annotated[int, Field(ge=16, le=1024)] = "auto"
    """Side of the small image in the store, in pixels; auto: the side network's input and a margin for crops."""
    shard_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Images per shard: one task computes one shard, and a crash loses one."""
    views: Annotated[tuple[FixedView, ...], Field(max_length=6)] = ("identity",)
    """Views of each training image, of which training draws one per epoch: identity (always), hflip, vflip, rot90,
    rot180, rot270. Each is one more row to compute and to store."""
    crops: Annotated[int, Field(ge=0, le=256)] = 0
    """Random crops of each training image, as further views."""
    crop_scale: tuple[Area, Area] = (0.8, 1.0)
    """Share of the area that each of `crops` keeps, (lowest, highest)."""

    @model_validator(mode="after")
    def _check_bitround(self) -> FeatureSettings:
        if self.bitround is not None:
            if self.dtype not in ("float32", "float16"):
                raise ValueError(f"bitround is for float dtypes, not for {self.dtype}")
            if self.dtype == "float16" and self.bitround > 10:
                raise ValueError(f"bitround must be at most 10 for float16 (is {self.bitround})")
        return self

    @field_validator("views")
    @classmethod
    def _check_views(cls, value: tuple[FixedView, ...]) -> tuple[FixedView, ...]:
        if "identity" not in value:
            raise ValueError("must list identity, which validation, test and prediction read")
        if len(set(value)) != len(value):
            raise ValueError("lists a view twice")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _check_crop_scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must be (lowest, highest)")
        return value

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        if isinstance(value, tuple):
            if not value:
                raise ValueError("needs at least one layer")
            if list(value) != sorted(set(value)):
                raise ValueError("must be in ascending order, each layer once")
        return value


class AugmentSettings(Section):
    """Augmentation of the side image; the cached features stay those of the un-augmented image."""

    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    brightness: Unit = 0.2
    """Brightness jitter: factor drawn from 1 -/+ this."""
    contrast: Unit = 0.2
    """Contrast jitter: factor drawn from 1 -/+ this."""
    crop_scale: tuple[Area, Area] = (0.8, 1.0)
    """Share of the area that a random crop keeps, (lowest, highest)."""
    crop_ratio: tuple[Aspect, Aspect] = (0.7, 1.3)
    """Aspect ratio of a random crop, (lowest, highest)."""

    @model_validator(mode="after")
    def _check(self) -> AugmentSettings:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} must be (lowest, highest)")
        return self


class TrainSettings(Section):
    """Stage two. Defaults are the published recipe, but for what a preset changes; lr: 5e-5 to 5e-3, by data set."""

    lr: Annotated[float, Field(ge=1e-12, le=100.0)] = 5e-4
    """Learning rate at the start; cosine to zero, no warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.1
    """AdamW weight decay."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Passes over the training images."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Images per step."""
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0
    """Largest norm of the gradient."""
    prompts: Annotated[int, Field(ge=1, le=1024)] = 16
    """Learnable prompts per tapped layer; for attentive: its queries."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Dropout of the fused prompts."""
    side_reduction: Annotated[int, Field(ge=1, le=1024)] = 8
    """Width of the LPM divided by the width of the side network."""
    side_image_size: Literal["auto"] | Annotated[int, Field(ge=16, le=1024)] = "auto"
    """Input of the side network, in pixels, a multiple of 16; auto: 224 for fpt, 128 else."""
    members: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Side networks that are trained side by side on one stream of batches, and averaged; auto: 1, for fpt-x 5."""
    attentive: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Attentive probes that learn beside them on the same cached tokens; auto: 0, for fpt-x 1."""
    attentive_weight: Literal["auto"] | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """Share of the attentive probes in the averaged log-probabilities; auto: 0.1 where there are any."""
    probe_weight: Literal["auto"] | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """Share of linear probes of the LPM's pooled outputs and of the cached tokens' statistics in the averaged
    log-probabilities; auto: 0, for fpt-x 0.5."""
    keep: Literal["auto", "best", "late", "last"] = "auto"
    """Epoch whose weights are kept: the best by validation AUC, the best of the second half (late), or the last; auto:
    best, for fpt-x late."""
    class_weights: Literal["none", "balanced"] | ClassWeights = "none"
    """Weight of each class in the loss; balanced: n / (classes * n_class). With multilabel the weight of an image that
    has the label; balanced: images without it / images with it."""
    sampling: Literal["natural", "balanced", "decay"] = "natural"
    """Which images an epoch reads: natural (each once), balanced (as many of each class), or decay (balanced at first,
    natural in the last epoch)."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """What training minimises; focal: images that are right already count less."""
    focal_gamma: Annotated[float, Field(ge=0.0, le=100.0)] = 2.0
    """How much less, with focal; 0: as cross_entropy."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target that is spread over all classes."""
    kappa_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.5
    """Weight of the quadratic-kappa term that ordinal adds to the loss; other tasks have none."""
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Parts in which a batch passes through the network, to save memory; must divide batch_size. The result is the same
    up to rounding."""
    checkpointing: bool = False
    """Keep only what goes into each side block and compute the block again in the backward pass: less memory, more
    time, the same result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which matrix products of a training step are computed; weights, optimiser and validation stay float32."""
    compile: bool = False
    """Compile the side network's blocks (torch.compile, needs a C++ compiler): half a minute at the start."""
    augment: AugmentSettings = AugmentSettings()
    """Augmentation of the side image."""
    seed: Seed = 0
    """Seed of initialisation and dropout."""
    order_seed: Literal["auto"] | Seed = "auto"
    """Seed of the order of the images, their augmentation and views; auto: seed. Runs of one sweep share it."""

    @model_validator(mode="after")
    def _check_accumulate(self) -> TrainSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        return self

    @field_validator("class_weights")
    @classmethod
    def _check_class_weights(cls, value: object) -> object:
        if isinstance(value, tuple) and max(value) < 1e-6:
            raise ValueError("needs a weight of at least 1e-6")
        return value

    @field_validator("side_image_size")
    @classmethod
    def _check_side(cls, value: object) -> object:
        if isinstance(value, int) and value % 16:
            raise ValueError("must be a multiple of 16, the side network's patch")
        return value


class Settings(Section):
    """All settings of a study."""

    method: Annotated[Method, Field(description=f"What is trained: {METHODS_HELP}.")] = "fpt-x"
    data: DataSettings = DataSettings()
    """Images, labels, splits."""
    lpm: LpmSettings = LpmSettings()
    """The frozen model."""
    features: FeatureSettings = FeatureSettings()
    """What stage one keeps."""
    train: TrainSettings = TrainSettings()
    """Stage two."""
    methods: MethodSettings = MethodSettings()
    """What only one method has."""
    store: StoreSettings = StoreSettings()
    """The feature store."""
    compute: ComputeSettings = ComputeSettings()
    """This machine."""
    cluster: ClusterSettings = ClusterSettings()
    """The workers of stage one."""


OUTPUTS = PurePosixPath("outputs")
"""Folder of a study, beside `params.yaml`, that holds every result."""
