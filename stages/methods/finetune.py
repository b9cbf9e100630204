"""Fine-tuning: the last blocks of the LPM, or all of it, with a linear head. The comparator of every adaptation.

Training reads hidden tokens (`features.hidden`), and the blocks below them never run; or augmented images, and frozen
blocks run without keeping anything for the backward pass.
"""

from __future__ import annotations

from typing import cast

from schemas.features import LpmInfo
from schemas.resolved import ResolvedSettings
from schemas.specs import FinetuneSpec, MethodSpec
from stages.lpm.adaptation import Adaptation
from stages.methods.adapted_lpm import AdaptedLpm, build_lpm, trained_on
from stages.methods.base import Details, GradientMethod, Network


class TrainedBlocks(Adaptation):
    """No change but new weights: of the blocks from `first` upward and the final norm, or of everything."""

    def __init__(self, first: int, everything: bool) -> None:
        """Choose the weights.

        Args:
            first: First trained block.
            everything: Whether the embeddings are trained, too.
        """
        super().__init__(first)
        self.everything = everything

    def learns(self, name: str) -> bool:
        """Whether this parameter of the LPM is trained."""
        if name.startswith("blocks."):
            return self.everything or int(name.split(".")[1]) >= self.first
        return self.everything or name.startswith(("norm.", "fc_norm.", "attn_pool."))


class FinetuneMethod(GradientMethod):
    """Fine-tuning as a method."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> FinetuneSpec:
        """Return the spec of resolved settings."""
        finetune = settings.methods.finetune
        return FinetuneSpec(
            classes=classes,
            task=settings.data.task,
            lpm=lpm.name,
            image_size=lpm.image_size,
            depth=lpm.depth,
            first_block=finetune.first_block(lpm.depth),
            everything=finetune.blocks == "all",
            hidden=settings.features.hidden if finetune.source == "hidden" else None,
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build timm's model with random weights."""
        spec = cast("FinetuneSpec", spec)
        return AdaptedLpm(spec, build_lpm(spec), TrainedBlocks(spec.first_block, spec.everything))

    def describe(self, spec: MethodSpec) -> Details:
        """Return which blocks are trained, and on what."""
        spec = cast("FinetuneSpec", spec)
        upper = f"{spec.first_block} to {spec.depth - 1}, final norm"
        blocks = "all, embeddings included" if spec.everything else upper
        return (("Trained blocks, from 0", blocks), trained_on(spec))


METHOD = FinetuneMethod()
