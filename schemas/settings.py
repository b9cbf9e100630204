"""The settings of a study: one `params.yaml`, one tree of frozen models, no unknown key.

Defaults are the published recipe of FPT+ (arXiv 2408.02426), plus the additions of FPT-X. "auto" values are resolved
before anything runs, and the resolved settings are saved with each result. Nothing here depends on the machine.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.base import Name, Section, Text
from schemas.data_settings import DataSettings, Seed
from schemas.machine import ClusterSettings, ComputeSettings, StoreSettings
from schemas.methods import METHODS_HELP, Method, MethodSettings
from schemas.rendering import Frame, Rendering, Window

Importance = Literal["global", "class_token"]
FeatureDtype = Literal["float32", "float16", "int8", "int4"]
FeatureCodec = Literal["none", "zstd", "blosc"]
FeatureResize = Literal["squash", "letterbox"]
ResizeFilter = Literal["bilinear", "bicubic", "lanczos", "nearest"]
Normalisation = Literal["lpm", "dataset"]
Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "sgd", "extrap-sgd", "extrap-adamw"]
FixedView = Literal["identity", "hflip", "vflip", "rot90", "rot180", "rot270"]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Area = Annotated[float, Field(ge=0.01, le=1.0)]
Aspect = Annotated[float, Field(ge=0.1, le=10.0)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0, le=999)], ...], Field(max_length=1000)]
ClassWeights = Annotated[tuple[Annotated[float, Field(ge=0.0, le=1e6)], ...], Field(min_length=1, max_length=10_000)]


class LpmSettings(Section):
    """The frozen large pretrained model."""

    name: Name = "vit_base_patch16_384.orig_in21k_ft_in1k"
    """timm model name with its tag, hf-hub:organisation/name, or local-dir:folder (config.json and weights)."""
    weights: Name = "hub"
    """"hub", or a local .safetensors, .pth or .npz file; relative paths start at the folder of `params.yaml`."""


class FeatureSettings(Section):
    """Features that are computed and stored per image.

    Everything here enters the fingerprint, except `shard_size` and the views, which only add rows.
    """

    image_size: Annotated[int, Field(ge=16, le=8192)] = 512
    """Side of the square input of the LPM, in pixels; rounded to the nearest multiple of the patch size."""
    resize: FeatureResize = "squash"
    """How images are made square: squash (aspect ratio lost) or letterbox (aspect ratio kept, padded with the mean
    colour of `normalisation`); also for the side image."""
    filter: Literal["auto"] | ResizeFilter = "auto"
    """Resampling filter: bilinear, bicubic, lanczos or nearest; auto: the LPM's default. Also for the side image."""
    normalisation: Normalisation = "lpm"
    """Mean and standard deviation per channel for the LPM's input and the side image: lpm (those of its pretraining) or
    dataset (those of the training images, computed at the start of an extraction). With dataset, features change
    whenever the training images do."""
    window: Window = "stored"
    """Grey values of DICOM, NIfTI and 16-bit PNG and TIFF files that become black and white: stored (the window in a
    DICOM or NIfTI file, else percentile; the full range for PNG and TIFF), percentile (the 0.5th and 99.5th of each
    image), full (the range of the type), or [center, width] in the units of the file, such as Hounsfield units."""
    frame: Frame = "middle"
    """Frame of a DICOM file or axial slice of a NIfTI volume that is the image: middle, first, or a number from 0."""
    tokens: bool = True
    """Cache the keys and values of the important tokens, which side networks read; false: a small store for methods
    that are fitted in closed form; the LPM may then be any model of timm that gives feature maps (ConvNeXt, Swin)."""
    statistics: bool = True
    """Cache statistics of all tokens of every block (mean, deviation, covariance), which probes read."""
    layers: Literal["auto"] | Layers = "auto"
    """Blocks of the LPM whose tokens are cached, from 0; auto: all for fpt, the upper half for every other method."""
    importance: Importance = "global"
    """Token importance: attention received from all queries (global), or from the class token (class_token)."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Fraction of the tokens that is cached per head."""
    dtype: FeatureDtype = "int8"
    """Data type of the cached keys, values and hidden tokens: float32, float16, int8 (a quarter of the size of float32)
    or int4 (an eighth, coarse)."""
    pooled: bool = True
    """Also cache the LPM's pooled outputs (class token, mean of the patches), which probes need; false: the forward
    pass stops after the last tapped block's keys and values."""
    precision: Literal["auto"] | Precision = "auto"
    """Precision of the LPM's forward pass; auto: the fastest in a short benchmark when the store is created."""
    hidden: Annotated[int, Field(ge=0, le=999)] | None = None
    """Also cache all tokens that enter this block of the LPM, from 0, for methods that train only this block and those
    above; null: cache no hidden tokens."""
    codec: FeatureCodec = "none"
    """Lossless compression of the store: none (fastest to read), zstd, or blosc (bit shuffle and zstd)."""
    bitround: Annotated[int, Field(ge=1, le=23)] | None = None
    """Round floats to this many mantissa bits, so that they compress better; null: keep all. Only for float dtypes."""
    side_image_size: Literal["auto"] | Annotated[int, Field(ge=16, le=1024)] = "auto"
    """Side of the stored small image, in pixels; auto: the side network's input plus a margin for crops."""
    shard_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Images per shard. One task computes one shard, and a crash loses at most one."""
    views: Annotated[tuple[FixedView, ...], Field(max_length=6)] = ("identity",)
    """Cached views of each training image, of which training draws one per epoch: identity (required), hflip, vflip,
    rot90, rot180, rot270. Each adds a row per training image to compute and store."""
    crops: Annotated[int, Field(ge=0, le=256)] = 0
    """Random crops of each training image, as additional views."""
    crop_scale: tuple[Area, Area] = (0.8, 1.0)
    """Fraction of the area that each of `crops` keeps, (lowest, highest)."""

    @property
    def rendering(self) -> Rendering:
        """Window and frame."""
        return Rendering(window=self.window, frame=self.frame)

    @property
    def with_tokens(self) -> bool:
        """Whether single tokens of the LPM are stored, not only statistics and pooled outputs."""
        return self.tokens or self.hidden is not None

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
    """Augmentation of the side image; the cached features are those of the un-augmented image."""

    flip: Unit = 0.5
    """Probability of a horizontal flip."""
    brightness: Unit = 0.2
    """Brightness jitter: factor drawn from 1 ± this."""
    contrast: Unit = 0.2
    """Contrast jitter: factor drawn from 1 ± this."""
    crop_scale: tuple[Area, Area] = (0.8, 1.0)
    """Fraction of the area that a random crop keeps, (lowest, highest)."""
    crop_ratio: tuple[Aspect, Aspect] = (0.7, 1.3)
    """Aspect ratio of a random crop, (lowest, highest)."""

    @model_validator(mode="after")
    def _check(self) -> AugmentSettings:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} must be (lowest, highest)")
        return self


class ExtrapolationSettings(Section):
    """Extrapolation for large batches, with `optimizer` extrap-sgd or extrap-adamw (docs/large-batches.md)."""

    workers: Annotated[int, Field(ge=1, le=4096)] = 4
    """K, parts of each batch; every part has its gradient at an extrapolated point of its own. Must divide
    batch_size."""
    rate: Literal["auto"] | Annotated[float, Field(ge=0.0, le=1e9)] = "auto"
    """Length of the extrapolation against the last gradient of the part, relative to the learning rate, whose schedule
    it follows; auto: 1 / workers, the rate of a small batch."""
    direction: Literal["gradient", "preconditioned"] = "gradient"
    """Direction of the extrapolation: gradient (the published form), or preconditioned (divided by AdamW's root mean
    square of each number, so that its length is comparable to a step; only extrap-adamw)."""

    @property
    def relative_rate(self) -> float:
        """Length of the extrapolation divided by the learning rate."""
        return 1.0 / self.workers if self.rate == "auto" else self.rate


class TrainSettings(Section):
    """Stage two. Defaults are the published recipe, except where a preset differs. Tune lr: 5e-5 to 5e-3."""

    lr: Annotated[float, Field(ge=1e-12, le=100.0)] = 5e-4
    """Initial learning rate; cosine decay to zero, no warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.1
    """Weight decay: decoupled with AdamW, added to the gradient with SGD."""
    optimizer: Optimizer = "adamw"
    """Optimiser: adamw, sgd, or one of them with a gradient per part of the batch, each at an extrapolated point
    (extrap-adamw, extrap-sgd)."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of sgd and extrap-sgd."""
    extrapolation: ExtrapolationSettings = ExtrapolationSettings()
    """Extrapolation of extrap-sgd and extrap-adamw."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Passes over the training set."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Images per optimiser step."""
    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0
    """Maximum gradient norm; larger gradients are clipped."""
    prompts: Annotated[int, Field(ge=1, le=1024)] = 16
    """Learnable prompts per tapped layer; for attentive: queries per layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Dropout rate of the fused prompts."""
    side_reduction: Annotated[int, Field(ge=1, le=1024)] = 8
    """Width of the LPM divided by the width of the side network."""
    side_image_size: Literal["auto"] | Annotated[int, Field(ge=16, le=1024)] = "auto"
    """Input size of the side network, in pixels, a multiple of 16; auto: 224 for fpt, otherwise 128."""
    members: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Side networks in the ensemble, trained simultaneously on the same batches; auto: for fpt-x 1, or 3 if the first
    one lowers the held-out log-loss of linear probes, or the images are too few to tell; 5 for fpt-x-kept, otherwise
    1."""
    attentive: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Attentive probes in the ensemble, trained together with the side networks on the same cached tokens; auto: 1 for
    fpt-x-kept, otherwise 0."""
    attentive_weight: Literal["auto"] | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """Ensemble weight of the attentive probes; auto: 0.1 with attentive probes, otherwise 0."""
    probe_weight: Literal["auto"] | Annotated[float, Field(ge=0.0, lt=1.0)] = "auto"
    """Ensemble weight of linear probes on the LPM's pooled outputs and token statistics; with fpt-x the weights are
    fitted to the validation images, and these numbers are their prior. auto: 0.7 for fpt-x, 0.5 for fpt-x-kept,
    otherwise 0."""
    keep: Literal["auto", "best", "late", "last"] = "auto"
    """Epoch whose weights are saved: best (highest validation AUC), late (the best of the second half), or last; auto:
    late for fpt-x and fpt-x-kept, otherwise best."""
    class_weights: Literal["none", "balanced"] | ClassWeights = "none"
    """Weight of each class in the loss; balanced: n / (classes * n_class). For multilabel, the weight of the positives
    of each label; balanced: negatives / positives."""
    sampling: Literal["natural", "balanced", "decay"] = "natural"
    """Sampling of the training images in an epoch: natural (each once), balanced (classes equally often), or decay
    (from balanced in the first epoch to natural in the last)."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """Training loss; focal down-weights images that are already classified well."""
    focal_gamma: Annotated[float, Field(ge=0.0, le=100.0)] = 2.0
    """Focusing exponent of the focal loss; 0: cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of the target probability that is spread evenly over all classes."""
    kappa_weight: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.5
    """Weight of the quadratic-kappa term in the loss; only for ordinal."""
    start_block: Literal["auto"] | Annotated[int, Field(ge=0, le=999)] = "auto"
    """First block of the LPM that an adaptation (ept, vpt-deep, lora, ...) changes. It reads hidden tokens if
    `features.hidden` is this block or a lower one: then no image is opened and the blocks below never run; else images,
    augmented. auto: the block of `features.hidden`, otherwise 0, the published form."""
    accumulate: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Gradient accumulation: micro-batches per batch, to save memory; must divide batch_size. Results are the same up
    to rounding."""
    checkpointing: bool = False
    """Gradient checkpointing: store only the input of each side block and recompute the block in the backward pass.
    Less memory, more time, same result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products of a training step; weights, optimiser and validation stay in float32."""
    compile: bool = False
    """Compile the blocks of the side network (torch.compile, needs a C++ compiler); takes about 30 s at the start."""
    augment: AugmentSettings = AugmentSettings()
    """Augmentation of the side image."""
    start_from: Text | None = None
    """Folder of a model whose weights training starts from, such as one of a smaller `features.image_size`: of the same
    method, LPM and classes; relative paths start at the folder of `params.yaml`. null: new weights."""
    seed: Seed = 0
    """Random seed of initialisation and dropout."""
    order_seed: Literal["auto"] | Seed = "auto"
    """Random seed of the image order, augmentation and views; auto: the value of seed. Runs of one sweep share it."""

    @model_validator(mode="after")
    def _check_accumulate(self) -> TrainSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        return self

    @property
    def extrapolates(self) -> bool:
        """Whether parts of a batch have their gradients at extrapolated points."""
        return self.optimizer.startswith("extrap-")

    @model_validator(mode="after")
    def _check_extrapolation(self) -> TrainSettings:
        if not self.extrapolates:
            return self
        workers = self.extrapolation.workers
        if self.batch_size % workers:
            raise ValueError(f"extrapolation.workers ({workers}) must divide batch_size ({self.batch_size})")
        if self.accumulate > 1:
            raise ValueError(
                f"accumulate must be 1 with {self.optimizer} (is {self.accumulate}): the parts of a batch are already "
                "those of extrapolation.workers"
            )
        if self.extrapolation.direction == "preconditioned" and self.optimizer != "extrap-adamw":
            raise ValueError(f"extrapolation.direction: preconditioned is for extrap-adamw, not for {self.optimizer}")
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
            raise ValueError("must be a multiple of 16, the patch size of the side network")
        return value


class Settings(Section):
    """All settings of a study."""

    method: Annotated[Method, Field(description=f"What is trained: {METHODS_HELP}.")] = "fpt-x"
    data: DataSettings = DataSettings()
    """Images, labels, splits."""
    lpm: LpmSettings = LpmSettings()
    """The frozen model."""
    features: FeatureSettings = FeatureSettings()
    """Features cached by stage one."""
    train: TrainSettings = TrainSettings()
    """Stage two."""
    methods: MethodSettings = MethodSettings()
    """Settings of single methods."""
    store: StoreSettings = StoreSettings()
    """The feature store."""
    compute: ComputeSettings = ComputeSettings()
    """This machine."""
    cluster: ClusterSettings = ClusterSettings()
    """The workers of stage one."""


OUTPUTS = PurePosixPath("outputs")
"""Folder next to `params.yaml` that holds all results of a study."""
