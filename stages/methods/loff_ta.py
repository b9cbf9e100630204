"""LOFF-TA: a small transformer is trained on cached hidden tokens of the LPM, which are augmented instead of images.

Learning from Offline Foundation Features with Tensor Augmentations (arXiv 2410.02527):

    grid   = augment(pool(patch tokens that enter block s))       augment: training only
    tokens = [class token | W norm([prefix tokens | grid])] + position embedding
    logits = head(norm(blocks(tokens)[class token]))

From the paper, as far as its abstract and summaries of its figures and tables describe it: cached features of
un-augmented images, tensor augmentations, a projection with a layer norm, a small transformer as the classifier, and
pooling of the features of large images ("LOFF-TA & Pool"). Ours: features are the tokens that enter block
`features.hidden` instead of the LPM's outputs; the classifier has two blocks of DeiT-Ti's width, for a few hundred
images; average pooling to at most 16 x 16 tokens comes before the augmentation; the prefix tokens of the LPM (class
token, registers) are read without augmentation. The operations are those of `stages.methods.tensor_augmentation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from schemas.features import LpmInfo
from schemas.resolved import ResolvedSettings
from schemas.specs import LoffTaSpec, MethodSpec
from stages.methods.base import Details, GradientMethod, Network
from stages.methods.batch import Batch, required
from stages.methods.positions import resample_embeddings
from stages.methods.side_network import INIT_STD, NORM_EPS, Block
from stages.methods.tensor_augmentation import TensorAugmentation

WIDTH = 192
"""Width of the classifier."""
HEADS = 3
"""Heads of the classifier."""
BLOCKS = 2
"""Blocks of the classifier."""
LARGEST_GRID = 16
"""Side of the largest grid that is not pooled."""


class TokenClassifier(Network):
    """A small transformer that classifies hidden tokens."""

    spec: LoffTaSpec
    has_head = True

    def __init__(self, spec: LoffTaSpec) -> None:
        super().__init__()
        self.spec = spec
        tokens = 1 + spec.prefix_tokens + spec.pooled_grid**2
        self.input_norm = nn.LayerNorm(spec.lpm_width)
        self.project = nn.Linear(spec.lpm_width, spec.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, spec.width))
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.blocks))
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.head = nn.Linear(spec.width, spec.classes)
        self.augmentation = TensorAugmentation()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)

    def resampled(self, saved: MethodSpec, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Resample the position embedding to the pooled grid."""
        return resample_embeddings(state, cast("LoffTaSpec", saved).pooled_grid, self.spec.pooled_grid)

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (M, B, classes) of networks with augmentations of their own; the tokens are pooled once."""
        prefix, grid = members[0].pooled(required(batch.hidden, "hidden")["hidden"])
        return torch.stack([member.logits(prefix, grid, checkpointing) for member in members])

    def pooled(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prefix tokens and the pooled grid, each (B, tokens, D), of hidden tokens (B, N, D)."""
        spec = self.spec
        prefix, grid = hidden[:, : spec.prefix_tokens], hidden[:, spec.prefix_tokens :]
        if spec.pooled_grid < spec.grid:
            planes = grid.transpose(1, 2).reshape(len(grid), -1, spec.grid, spec.grid)
            grid = F.adaptive_avg_pool2d(planes, spec.pooled_grid).flatten(2).transpose(1, 2)
        return prefix, grid

    def logits(self, prefix: torch.Tensor, grid: torch.Tensor, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (B, classes) of prefix tokens and pooled patch tokens, augmented in training."""
        return self.head_logits(self._class_token(prefix, grid, checkpointing))

    def _class_token(self, prefix: torch.Tensor, grid: torch.Tensor, checkpointing: bool) -> torch.Tensor:
        if self.training:
            grid = self.augmentation(grid, self.spec.pooled_grid)
        projected = self.project(self.input_norm(torch.cat([prefix, grid], dim=1)))
        tokens = torch.cat([self.cls_token.expand(len(projected), -1, -1), projected], dim=1) + self.pos_embed
        for number, block in enumerate(self.blocks):
            # Only the class token is read after the last block.
            kept = 1 if number == len(self.blocks) - 1 else tokens.shape[1]
            if checkpointing:
                tokens = checkpoint(block, tokens, kept, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, kept)
        return cast("torch.Tensor", self.norm(tokens[:, 0]))

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Compute the normalised class token (B, width) of a prepared batch."""
        return self._class_token(*self.pooled(required(batch.hidden, "hidden")["hidden"]), False)

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) of class tokens."""
        return cast("torch.Tensor", self.head(vectors))

    def reseed(self, *entropy: int) -> None:
        """Draw augmentations from here on as these numbers determine."""
        self.augmentation.reseed(*entropy)

    def set_micro_batch(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Draw the augmentations of the complete batch, and use those of some rows."""
        self.augmentation.draw_part(rows, batch_rows, again)

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """Yield the blocks."""
        yield from self.blocks


class LoffTaMethod(GradientMethod):
    """LOFF-TA as a method."""

    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> LoffTaSpec:
        """Return the spec of resolved settings."""
        grid = lpm.image_size // lpm.patch
        return LoffTaSpec(
            classes=classes,
            task=settings.data.task,
            # Settings without it were refused when they were resolved.
            hidden=cast("int", settings.features.hidden),
            lpm_width=lpm.width,
            grid=grid,
            prefix_tokens=lpm.prefix_tokens,
            pooled_grid=min(grid, LARGEST_GRID),
            width=WIDTH,
            blocks=BLOCKS,
            heads=HEADS,
        )

    def build(self, spec: MethodSpec) -> Network:
        """Build the network of a spec."""
        return TokenClassifier(cast("LoffTaSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return what is read, and the size of the classifier."""
        spec = cast("LoffTaSpec", spec)
        pooled = f", pooled to {spec.pooled_grid} x {spec.pooled_grid}" if spec.pooled_grid < spec.grid else ""
        return (
            ("Training reads", f"hidden tokens that enter block {spec.hidden}{pooled}, augmented"),
            ("Classifier", f"{spec.blocks} blocks of width {spec.width}"),
        )


METHOD = LoffTaMethod()
