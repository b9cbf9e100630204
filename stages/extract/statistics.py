"""Token statistics: moments of all patch tokens in every block, taken while the LPM runs.

The mean, the standard deviation and the covariance of the tokens describe an image as a texture does (Gram matrices,
Gatys et al. 2015, arXiv 1505.07376; covariance descriptors of DINOv2's tokens, arXiv 2511.04190). A covariance is taken
in 64 fixed directions of random signs, which need no data and keep inner products to within a few percent (Achlioptas
2003), and stored as sign(c) sqrt(|c|): of one scale with the deviations, and within the range of float16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from schemas.errors import DataError
from schemas.features import FeatureSpec
from schemas.statistics import DIRECTIONS, KINDS, middle
from stages.lpm.attention import value_weight

SEED = 64
"""Seed of the signs of the directions."""
FIRST = 64
"""Tokens whose mean is subtracted from all tokens of an image before they are squared."""
CACHED = 2**17
"""Numbers that are summed at a time: several passes over half a MiB stay in the processor's cache, and are enough work
for each call. It does not depend on the batch size or the number of threads, so that sums do not either."""


@cache
def directions(width: int) -> torch.Tensor:
    """Return the fixed directions of tokens of a width, (width, 64) float32 of unit length."""
    signs = np.random.Generator(np.random.PCG64([SEED, width])).integers(0, 2, (width, DIRECTIONS))
    return torch.from_numpy(((2 * signs - 1) / np.sqrt(width)).astype(np.float32))


class TokenStatistics:
    """Context that records the statistics of every block in each forward pass of the LPM."""

    def __init__(self, model: nn.Module, spec: FeatureSpec) -> None:
        """Prepare the hooks; the model is only changed inside the context.

        Args:
            model: The LPM.
            spec: Gives the statistics and the prefix tokens.
        """
        blocks: Any = model.blocks
        prefix, class_token = spec.lpm.prefix_tokens, spec.lpm.has_class_token
        self._recorders = [
            _BlockRecorder(block, prefix, class_token, number in middle(len(blocks)))
            for number, block in enumerate(blocks)
        ]
        self._stack = ExitStack()

    def __enter__(self) -> TokenStatistics:
        for recorder in self._recorders:
            for handle in recorder.register():
                self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def take(self) -> torch.Tensor:
        """Return the statistics of all blocks of the last forward pass, (B, F) float32.

        Raises:
            DataError: If they are not finite.
        """
        return checked(torch.cat([part for recorder in self._recorders for part in recorder.take()], dim=1))


class _BlockRecorder:
    """Hooks of one block."""

    def __init__(self, block: Any, prefix: int, class_token: bool, complete: bool) -> None:
        """Prepare them.

        Args:
            block: Block of the LPM.
            prefix: Tokens before the patches.
            class_token: Whether token 0 is a class token.
            complete: Whether covariances and the activations of the MLP are recorded.
        """
        self._block, self._prefix, self._class_token, self._complete = block, prefix, class_token, complete
        self._weight = value_weight(block.attn).float()
        device, (values, width) = self._weight.device, self._weight.shape
        if complete:
            # Values times directions is the input of the attention times these.
            self._value_axes = (self._weight.T @ directions(values).to(device)).contiguous()
            self._output_axes = directions(width).to(device)
        self._parts: dict[str, torch.Tensor] = {}
        self._activations: list[TokenMoments] = []

    def register(self) -> Iterator[Any]:
        """Register the hooks, and yield their handles."""
        yield self._block.attn.register_forward_pre_hook(self._enter_attention)
        yield self._block.register_forward_hook(self._leave_block)
        if self._complete:
            yield self._block.mlp.fc2.register_forward_pre_hook(self._leave_activation)

    def take(self) -> list[torch.Tensor]:
        """Return and forget the statistics of the last forward pass, in the order of the store."""
        if self._complete:
            self._parts["MLP activations"] = torch.cat(merged(self._activations), dim=1)
            self._activations = []
        parts = [self._parts[kind] for kind in KINDS if kind in self._parts]
        self._parts = {}
        return parts

    def _enter_attention(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Record the mean of the values (without the bias of their projection) and their covariance."""
        with torch.autocast(self._weight.device.type, enabled=False):
            patches = self._patches(inputs[0])
            self._parts["value means"] = torch.stack([image.mean(dim=0) for image in patches]) @ self._weight.T
            if self._complete:
                self._parts["value covariance"] = _covariances(image @ self._value_axes for image in patches)

    def _leave_activation(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Record the moments of the MLP's activations, which may come in chunks of tokens."""
        first = self._prefix if not self._activations else 0
        self._activations.append(moments([image[first:] for image in inputs[0]]))

    def _leave_block(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Record class token, mean, deviation and covariance of the output."""
        with torch.autocast(self._weight.device.type, enabled=False):
            patches = self._patches(output)
            _, mean, deviation = moments(patches)
            first = [output[:, 0].float()] if self._class_token else []
            self._parts["outputs"] = torch.cat([*first, mean, deviation], dim=1)
            if self._complete:
                self._parts["output covariance"] = _covariances(image @ self._output_axes for image in patches)

    def _patches(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        # Image by image: what one image takes stays in the processor's cache.
        return [image[self._prefix :].float() for image in tokens]


class TokenMoments(NamedTuple):
    """Moments of some tokens of each image."""

    tokens: int
    mean: torch.Tensor
    """(B, F)."""
    deviation: torch.Tensor
    """(B, F)."""


def moments(images: Sequence[torch.Tensor]) -> TokenMoments:
    """Return the moments of tokens (N, F) of each image, computed in float32."""
    found = [_mean_and_deviation(image) for image in images]
    return TokenMoments(len(images[0]), *(torch.stack(rows) for rows in zip(*found, strict=True)))


def _mean_and_deviation(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation (F,) of tokens (N, F): sums about the mean of the first ones, which loses no digits."""
    about = tokens[:FIRST].float().mean(dim=0)
    total, squares = torch.zeros_like(about), torch.zeros_like(about)
    step = max(1, CACHED // len(about))
    buffer = about.new_empty(step, len(about))
    for part in torch.split(tokens, step):
        centred = buffer[: len(part)]
        if part.dtype == torch.float32:
            torch.sub(part, about, out=centred)
        else:  # subtracting mixed types takes longer than converting first
            centred.copy_(part).sub_(about)
        total += centred.sum(dim=0)
        squares += centred.square_().sum(dim=0)
    shift = total / len(tokens)
    return about + shift, (squares / len(tokens) - shift.square()).clamp_min_(0.0).sqrt_()


def _covariances(projected: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the signed roots of covariance matrices of projected tokens (N, 64) per image, overwritten: (B, 2080)."""
    matrices = []
    for image in projected:
        image -= image.mean(dim=0)
        matrices.append(image.T @ image / len(image))
    return _signed_roots(torch.stack(matrices))


def _signed_roots(matrices: torch.Tensor) -> torch.Tensor:
    """Return sign(c) sqrt(|c|) of the upper triangles of matrices, row by row: (B, 64, 64) -> (B, 2080)."""
    upper = torch.triu_indices(DIRECTIONS, DIRECTIONS, device=matrices.device)
    triangle = matrices[:, upper[0], upper[1]]
    return triangle.sign() * triangle.abs().sqrt()


def merged(parts: Sequence[TokenMoments]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation of all tokens, from the moments of chunks of them (Chan et al. 1979)."""
    total = sum(part.tokens for part in parts)
    mean = torch.stack([part.mean * (part.tokens / total) for part in parts]).sum(dim=0)
    squares = [(part.deviation.square() + (part.mean - mean).square()) * (part.tokens / total) for part in parts]
    return mean, torch.stack(squares).sum(dim=0).sqrt()


def map_statistics(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return mean, deviation and output covariance of feature maps (B, C, y, x): (B, F) float32, in the store's order.

    Raises:
        DataError: If they are not finite, or too large for float16.
    """
    parts = []
    for one in maps:
        tokens = one.float().flatten(2)
        variance, mean = torch.var_mean(tokens, dim=2, correction=0)
        projected = directions(tokens.shape[1]).T.to(tokens.device) @ tokens
        centred = projected - projected.mean(dim=2, keepdim=True)
        parts += [mean, variance.sqrt(), _signed_roots(centred @ centred.mT / tokens.shape[2])]
    return checked(torch.cat(parts, dim=1))


def kept_moments(tokens: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of the kept tokens of one layer: (B, H, T, d) -> (B, 2 H d) float32."""
    rows = []
    for image in tokens:  # what one image takes stays in the processor's cache
        kept = image.float()
        mean = kept.mean(dim=1, keepdim=True)
        deviation = (kept - mean).square_().mean(dim=1).sqrt_()
        rows.append(torch.cat([mean.flatten(), deviation.flatten()]))
    return torch.stack(rows)


def checked(rows: torch.Tensor) -> torch.Tensor:
    """Return statistics that fit float16.

    Raises:
        DataError: If they do not.
    """
    if not bool((rows.abs() <= torch.finfo(torch.float16).max).all()):
        raise DataError(
            "The token statistics of the LPM are not finite, or too large for float16.",
            "The weights are damaged, or features.precision has too small a range for this LPM.",
            "Check lpm.weights, set features.precision to float32, or features.statistics to false.",
        )
    return rows
