"""Reimplementation of the published training loop, the baseline for stage two.

It repeats the steps of https://github.com/YijinHuang/FPT within an epoch, without our optimisations:

    data        per image: decode the original; flip, change brightness and contrast, crop and resize the decoded
                image, in this order; `load_file` of its safetensors file, keys and values (L, H, T, d) float32
    batch       `default_collate`, (B, L, H, T, d), transposed to (L, B, H, T, d)
    fusion      queries expanded to the batch, the attention of all layers at once in plain operations
    side ViT    separate projections to queries, keys and values, attention in plain operations; every block computes
                all tokens and prompts, which are dropped after it
    step        cross-entropy, AdamW, gradient norm clipped at 1, loss read back

Its validation, metrics of the training images, progress bar and learning rate schedule are omitted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from schemas.settings import AugmentSettings
from schemas.specs import SideNetworkSpec
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fpt import PromptedSideNetwork


class PublishedAttention(nn.Module):
    """Self-attention without fused kernels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, width)."""
        query, key, value = (self._split(layer(tokens)) for layer in (self.query, self.key, self.value))
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        mixed: torch.Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return mixed

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PublishedBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = PublishedAttention(width, heads)
        self.wide, self.gelu, self.narrow = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, width) -> (B, N, width)."""
        tokens = self.attn(self.norm1(tokens)) + tokens
        mixed: torch.Tensor = self.narrow(self.gelu(self.wide(self.norm2(tokens)))) + tokens
        return mixed


class PublishedFusion(nn.Module):
    """FPT+: prompts of all layers attend to the cached tokens of all layers."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.prompts = nn.Parameter(torch.empty(spec.layers, 1, spec.prompts, spec.lpm_width).normal_(std=1e-6))
        self.norm, self.out = nn.LayerNorm(spec.lpm_width), nn.Linear(spec.lpm_width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Keys and values (L, B, H, T, d) -> prompts (L, B, P, width of the side network)."""
        prompts = self.prompts.expand(-1, keys.shape[1], -1, -1)
        query = self.norm(prompts).unflatten(-1, (self.heads, -1)).transpose(2, 3)
        weights = (query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        mixed = (weights @ values).transpose(2, 3).flatten(3)
        found: torch.Tensor = self.dropout(self.out(mixed + prompts))
        return found


class PublishedNetwork(nn.Module):
    """The FPT+ network."""

    def __init__(self, spec: SideNetworkSpec) -> None:
        super().__init__()
        tokens, patch = 1 + (spec.image_size // 16) ** 2, 16
        self.patches = nn.Conv2d(3, spec.width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.positions = nn.Parameter(torch.zeros(1, tokens, spec.width))
        self.blocks = nn.ModuleList(PublishedBlock(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm, self.head = nn.LayerNorm(spec.width, eps=1e-6), nn.Linear(spec.width, spec.classes)
        self.fusion = PublishedFusion(spec)

    def forward(self, image: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) normalised, keys and values (L, B, H, T, d) -> logits (B, classes)."""
        prompts = self.fusion(keys, values)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), self.patches(image).flatten(2).mT], dim=1)
        tokens = tokens + self.positions
        for layer, block in enumerate(self.blocks):
            tokens = block(torch.cat([tokens, prompts[layer]], dim=1))[:, : -prompts.shape[2]]
        logits: torch.Tensor = self.head(self.norm(tokens)[:, 0])
        return logits

    @staticmethod
    def like(ours: PromptedSideNetwork) -> PublishedNetwork:
        """Build the network with the weights of ours."""
        network, own, fusion = PublishedNetwork(ours.spec), ours.side, ours.fusion
        assert fusion is not None
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = [
            (network.cls_token, own.cls_token),
            (network.positions, own.pos_embed),
            (network.fusion.prompts, fusion.prompts.unsqueeze(1)),
        ]
        layers = [
            (network.patches, own.patch_embed),
            (network.norm, own.norm),
            (network.head, own.head),
            (network.fusion.norm, fusion.query),
            (network.fusion.out, fusion.out),
        ]
        for mine, other in zip(network.blocks, own.blocks, strict=True):
            for name in ("weight", "bias"):
                thirds = getattr(other.attn.qkv, name).chunk(3)
                separate = (mine.attn.query, mine.attn.key, mine.attn.value)
                pairs += [(getattr(layer, name), third) for layer, third in zip(separate, thirds, strict=True)]
            layers += [(mine.norm1, other.norm1), (mine.attn.out, other.attn.proj), (mine.norm2, other.norm2)]
            layers += [(mine.wide, other.mlp[0]), (mine.narrow, other.mlp[2])]
        pairs += [(getattr(mine, name), getattr(other, name)) for mine, other in layers for name in ("weight", "bias")]
        assert sum(copy.numel() for copy, _ in pairs) == sum(one.numel() for one in network.parameters())
        with torch.no_grad():
            for copy, original in pairs:
                copy.copy_(original)
        return network


class PublishedDataset(Dataset[Any]):
    """Samples (image, keys, values, label)."""

    def __init__(
        self,
        images: Sequence[str],
        files: Sequence[Path],
        labels: Sequence[int],
        size: int,
        augment: AugmentSettings,
        statistics: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        """Store the paths.

        Args:
            images: Original image of each position.
            files: Its keys and values.
            labels: Its class.
            size: Input of the side network, in pixels.
            augment: Augmentation of the recipe.
            statistics: Mean and standard deviation that the image is normalised with.
        """
        self.images, self.files, self.labels = images, files, labels
        self.decoding = 0.0
        """Seconds spent on decoding images."""
        self.augmenting = 0.0
        """Seconds spent on augmentation and normalisation."""
        self._transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(augment.flip),
                transforms.ColorJitter(brightness=augment.brightness, contrast=augment.contrast),
                transforms.RandomResizedCrop(size, scale=augment.crop_scale, ratio=augment.crop_ratio),
                transforms.ToTensor(),
                transforms.Normalize(*statistics),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        start = time.perf_counter()
        with Path(self.images[position]).open("rb") as file:
            decoded = Image.open(file).convert("RGB")
        between = time.perf_counter()
        image = self._transform(decoded)
        self.decoding += between - start
        self.augmenting += time.perf_counter() - between
        states = load_file(self.files[position])
        return image, states["keys"], states["values"], self.labels[position]


class PublishedTraining:
    """A network with its optimiser and data."""

    def __init__(self, network: PublishedNetwork, data: PublishedDataset, batch: int, lr: float, decay: float) -> None:
        self.network, self.data = network.train(), data
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=decay)
        self.parts: dict[str, list[float]] = {}
        """Seconds of each epoch by step."""
        self._loader = DataLoader(data, batch, shuffle=True, drop_last=True)

    def epoch(self) -> None:
        """Train one epoch."""
        self.data.decoding = self.data.augmenting = 0.0
        began, steps, loss_sum = time.perf_counter(), 0.0, 0.0
        for image, keys, values, labels in self._loader:
            start = time.perf_counter()
            logits = self.network(image, keys.transpose(0, 1), values.transpose(0, 1))
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            loss_sum += loss.item()
            steps += time.perf_counter() - start
        images = self.data.decoding, self.data.augmenting
        rest = time.perf_counter() - began - steps - sum(images)
        for name, seconds in zip(("read and stack", "decode", "augment", "step"), (rest, *images, steps), strict=True):
            self.parts.setdefault(name, []).append(seconds)


@torch.inference_mode()
def require_same_function(spec: SideNetworkSpec, kept: int) -> None:
    """Check that the logits for random images, tokens and weights equal those of our network, without dropout.

    Raises:
        RuntimeError: The logits differ by more than rounding errors.
    """
    generator = torch.Generator().manual_seed(0)
    ours = PromptedSideNetwork(spec).eval()
    for parameter in ours.parameters():
        # Freshly initialised weights hide differences in factors that are zero or one.
        parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    shape = (2, spec.layers, spec.heads, kept, spec.lpm_width // spec.heads)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    image = torch.randn(2, 3, spec.image_size, spec.image_size, generator=generator)
    left = PublishedNetwork.like(ours).eval()(image, keys.transpose(0, 1), values.transpose(0, 1))
    right = ours(Batch(torch.zeros(len(image)), side=image, tokens=CachedTokens(keys, values)))
    error = float((left - right).abs().max() / right.abs().max())
    if error > 1e-4:
        raise RuntimeError(f"the networks are not the same function: relative difference of the logits {error:.1e}")
