"""Specs of trained models: what a bundle saves to rebuild a model around its weights, and what models read."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from schemas.base import Contract
from schemas.manifest import Split
from schemas.statistics import ProbeRule, ProbeSource, output_vectors
from schemas.tasks import Task

if TYPE_CHECKING:
    from schemas.features import FeatureSpec

Input = Literal["tokens", "statistics", "pooled", "hidden", "side", "image"]
"""What a method reads per image: tokens (cached keys and values), statistics (token statistics of every block), pooled
(pooled outputs of the LPM), hidden (tokens that enter a block), side (small image), image (pixels of the LPM, which
then runs in the training loop)."""

Inputs = frozenset[Input]


class MethodSpec(Contract):
    """What is needed to rebuild a model around its weights; each method adds its own fields."""

    method: str
    """Name in the registry."""
    classes: int
    """Outputs."""
    task: Task = "multiclass"
    """What the outputs mean."""

    @property
    def added_inputs(self) -> Inputs:
        """What the model reads apart from the inputs of its method."""
        return frozenset()

    @property
    def side_size(self) -> int:
        """Side of the small image that the model reads, in pixels; 0: it reads none."""
        return 0

    @property
    def fitted_splits(self) -> tuple[Split, ...]:
        """Splits whose images the weights were fitted to."""
        return ("train",)

    @property
    def free_fields(self) -> frozenset[str]:
        """Fields that may differ from those of a model whose weights training starts from."""
        return frozenset()

    def matches(self, features: FeatureSpec) -> bool:  # noqa: ARG002
        """Whether the shape of the model is that of features of this spec."""
        return True


UNDECIDED = 0.02
"""Standard error of a gain in log-loss above which a gain within it says nothing."""


class HeldOut(Contract):
    """Log-loss of held-out images by an ensemble, with and without its networks."""

    linear_probes: float
    """Of the linear probes only: out of fold, temperature fitted to other images."""
    ensemble: float
    """Of the ensemble, temperatures and ensemble weights fitted to other images."""
    standard_error: float | None
    """Of the difference, paired by image, over patients; null with a single patient."""

    @property
    def gain(self) -> float:
        """Log-loss that the networks save."""
        return self.linear_probes - self.ensemble

    @property
    def helps(self) -> bool:
        """Whether the networks save more than the standard error."""
        return self.standard_error is not None and self.gain > self.standard_error

    @property
    def undecided(self) -> bool:
        """Whether the held-out images are too few to tell: they are no reason to leave networks out."""
        error = self.standard_error
        return error is None or (error > UNDECIDED and abs(self.gain) <= error)


class SideNetworkSpec(MethodSpec):
    """Fusion and side networks, and the probes averaged with them."""

    method: Literal["fpt", "fpt+", "fpt-x", "fpt-x-kept", "side"]
    """Which preset."""
    layers: int
    """Blocks: one per tapped layer."""
    lpm_width: int
    """D."""
    heads: int
    """H, of the LPM and of the side network."""
    width: int
    """Width of the side network, D / reduction."""
    image_size: int
    """Input of the side network, in pixels."""
    prompts: int
    """Per layer."""
    dropout: float
    """Dropout of the fused prompts."""
    members: int = 1
    """Side networks, each with its prompts, whose log-probabilities are averaged."""
    attentive: int = 0
    """Attentive probes that are trained with them, with as many queries as there are prompts."""
    attentive_weight: float = 0.0
    """Ensemble weight of the attentive probes."""
    probe_weight: float = 0.0
    """Ensemble weight of the linear probes; 0: no probes."""
    sources: tuple[ProbeSource, ...] = ()
    """What each linear probe reads."""
    fits_shares: bool = False
    """Whether validation images fit the ensemble weights, with those above as their prior."""
    shares: tuple[float, ...] = ()
    """Fitted ensemble weights of side networks, attentive and linear probes, those of weight 0 left out; empty before
    training, or if they are not fitted."""
    most_members: int = 0
    """Side networks at most, where held-out loss decides between one and all; 0: the number is stated."""
    held_out: HeldOut | None = None
    """What the networks add to the linear probes; null before training, or without linear probes."""

    @property
    def added_inputs(self) -> Inputs:
        """Pooled outputs and token statistics, if linear probes are averaged with side networks."""
        return frozenset({"pooled", "statistics"} if self.probe_weight else ())

    @property
    def reads_tokens(self) -> bool:
        """Whether prompts attend to cached tokens."""
        return self.method != "side"

    @property
    def wide_prompts(self) -> bool:
        """Whether prompts have the width of the LPM, as in FPT+ and all later presets."""
        return self.method != "fpt"

    @property
    def side_size(self) -> int:
        """Input of the side network, in pixels."""
        return self.image_size

    @property
    def free_fields(self) -> frozenset[str]:
        """Fields that may differ from those of a model whose weights training starts from."""
        sizes = {"image_size", "members", "most_members", "attentive"}
        ensemble = {"attentive_weight", "probe_weight", "sources", "fits_shares", "shares", "held_out"}
        return frozenset({"dropout"} | sizes | ensemble)

    @property
    def is_ensemble(self) -> bool:
        """Whether several networks or probes are averaged."""
        return self.members > 1 or self.attentive > 0 or self.probe_weight > 0

    @property
    def experts(self) -> dict[str, float]:
        """Kinds of the averaged models, with their ensemble weights; without those of weight 0."""
        prior = {
            "side networks": self.side_weight,
            "attentive probes": self.attentive_weight,
            "linear probes": self.probe_weight,
        }
        present = {name: weight for name, weight in prior.items() if weight}
        return dict(zip(present, self.shares, strict=True)) if self.shares else present

    @property
    def side_weight(self) -> float:
        """Ensemble weight of the side networks."""
        return 1.0 - self.attentive_weight - self.probe_weight

    @property
    def fitted_splits(self) -> tuple[Split, ...]:
        """Splits whose images the weights were fitted to; linear probes are fitted to those of validation, too."""
        return ("train", "val") if self.probe_weight > 0 else ("train",)

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        depth = len(features.layers) if self.reads_tokens else self.layers
        shape = (self.layers, self.lpm_width, self.heads)
        return shape == (depth, features.lpm.width, features.lpm.heads) and has_sources(self.sources, features)


def has_sources(sources: tuple[ProbeSource, ...], features: FeatureSpec) -> bool:
    """Whether rows of these features have the sources, in the same places."""
    choices = product(get_args(ProbeRule), (True, False))
    read = {(source.name, source.spans) for source in sources}
    return any(read <= {(one.name, one.spans) for one in features.probe_sources(*choice)} for choice in choices)


class AttentiveSpec(MethodSpec):
    """Attentive probe of the cached tokens."""

    method: Literal["attentive"] = "attentive"
    """The kind of model."""
    layers: int
    """Tapped layers of the features; each has its own queries."""
    lpm_width: int
    """D."""
    heads: int
    """H, of the LPM."""
    queries: int
    """Per layer."""

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        return (self.layers, self.lpm_width, self.heads) == (
            len(features.layers),
            features.lpm.width,
            features.lpm.heads,
        )


class AlfSpec(MethodSpec):
    """Attentive layer fusion of the token statistics."""

    method: Literal["alf"] = "alf"
    """The kind of model."""
    lpm_width: int
    """D."""
    vectors: tuple[int, ...]
    """Position in the token statistics of the first number of each vector: class token and mean of each block."""
    heads: int
    """Attention heads."""
    dropout: float
    """Dropout of the attention weights."""

    @property
    def free_fields(self) -> frozenset[str]:
        """Fields that may differ from those of a model whose weights training starts from."""
        return frozenset({"dropout"})

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        width = features.lpm.width
        return self.lpm_width == width and self.vectors == output_vectors(features.segments, width)


class LoffTaSpec(MethodSpec):
    """Transformer classifier of cached hidden tokens."""

    method: Literal["loff-ta"] = "loff-ta"
    """The kind of model."""
    hidden: int
    """Block whose cached input tokens the model reads."""
    lpm_width: int
    """D."""
    grid: int
    """Side of the grid of patch tokens."""
    prefix_tokens: int
    """Class and register tokens before the patches."""
    pooled_grid: int
    """Side of the grid that the classifier reads, after average pooling."""
    width: int
    """Width of the classifier."""
    blocks: int
    """Blocks of the classifier."""
    heads: int
    """Heads of the classifier."""

    @property
    def free_fields(self) -> frozenset[str]:
        """Fields that may differ from those of a model whose weights training starts from."""
        return frozenset({"grid", "pooled_grid"})

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        lpm = features.lpm
        shape = (features.hidden, lpm.width, lpm.image_size // lpm.patch, lpm.prefix_tokens)
        return (self.hidden, self.lpm_width, self.grid, self.prefix_tokens) == shape


class AdaptedLpmSpec(MethodSpec):
    """The LPM itself, changed from a block upward, with a linear head."""

    lpm: str
    """Name of the LPM."""
    image_size: int
    """Input of the LPM, in pixels."""
    depth: int
    """Blocks of the LPM."""
    first_block: int
    """First block that is changed; the ones below are those of the LPM."""
    hidden: int | None
    """Block whose cached input tokens the model reads; null: it reads images."""

    @property
    def added_inputs(self) -> Inputs:
        """Hidden tokens, or images."""
        return frozenset({"image"} if self.hidden is None else {"hidden"})

    @property
    def free_fields(self) -> frozenset[str]:
        """Fields that may differ from those of a model whose weights training starts from."""
        return frozenset({"image_size", "hidden"})

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        return self.lpm == features.lpm.name and (self.hidden is None or self.hidden == features.hidden)


class FinetuneSpec(AdaptedLpmSpec):
    """Trained blocks of the LPM with a linear head."""

    method: Literal["finetune"] = "finetune"
    """The kind of model."""
    everything: bool
    """Whether the embeddings are trained, too."""


class AdaptationSpec(AdaptedLpmSpec):
    """An adaptation of the LPM with a linear head."""

    width: int
    """D."""
    heads: int
    """H."""
    mlp_width: int
    """Width of the activations in the MLP of a block; 0: unknown."""
    patch: int
    """Side of a patch, in pixels."""
    prefix_tokens: int
    """Class and register tokens."""
    options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Settings of the method, as in its section of `methods`."""

    @property
    def blocks(self) -> int:
        """Number of adapted blocks."""
        return self.depth - self.first_block

    @property
    def head_dim(self) -> int:
        """d = D / H."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches per side of the image."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """N: patches and prefix tokens."""
        return self.grid**2 + self.prefix_tokens

    def matches(self, features: FeatureSpec) -> bool:
        """Whether the shape of the model is that of features of this spec."""
        lpm = features.lpm
        shape = (lpm.depth, lpm.width, lpm.heads, lpm.patch, lpm.prefix_tokens, lpm.image_size)
        mine = (self.depth, self.width, self.heads, self.patch, self.prefix_tokens, self.image_size)
        return shape == mine and super().matches(features)
