"""One step's input: what `Input` of a method names, for a few images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from schemas.features import FeatureSpec
from schemas.specs import Inputs
from stages.methods.cached_tokens import CachedTokens
from stages.pixels import normalise
from stages.store.layout import CACHED
from stages.store.quantise import HIDDEN_ARRAYS, decode_hidden

IMAGE = "image"
"""Name of the pixels of the LPM among the arrays of a row source."""


def array_names(inputs: Inputs) -> frozenset[str]:
    """Return the names of the arrays of a row source that hold these inputs."""
    names: set[str] = {name for name in ("pooled", "statistics", "side", IMAGE) if name in inputs}
    if "tokens" in inputs:
        names.update(CACHED)
    if "hidden" in inputs:
        names.update(HIDDEN_ARRAYS)
    return frozenset(names)


@dataclass(frozen=True)
class Batch:
    """Rows of a row source as tensors; None for what the method does not read."""

    labels: torch.Tensor
    """(B,) int64; with several labels per image (B, C)."""
    side: torch.Tensor | Callable[[], torch.Tensor] | None = None
    """(B, 3, s, s) small images at the side network's size: uint8 as read, float32 once prepared, or a function that
    returns those."""
    tokens: CachedTokens | None = None
    """Keys and values of all tapped layers."""
    pooled: torch.Tensor | None = None
    """(B, 2, D) float32, class token and mean of the patches."""
    statistics: torch.Tensor | None = None
    """(B, F) float16, token statistics of every block."""
    hidden: Mapping[str, torch.Tensor] | None = None
    """Arrays of `HIDDEN_ARRAYS` as stored; once prepared `{"hidden": (B, N, D) float32}`."""
    image: torch.Tensor | None = None
    """(B, 3, S, S) input of the LPM: uint8 as read, float32 once prepared."""

    @staticmethod
    def of(
        arrays: Mapping[str, NDArray[Any]],
        labels: torch.Tensor,
        side: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
    ) -> Batch:
        """Make a batch of views of arrays, with the images at the sizes that the model reads."""
        hidden = {name: torch.from_numpy(arrays[name]) for name in HIDDEN_ARRAYS if name in arrays}
        return Batch(
            labels,
            side,
            CachedTokens.of(arrays),
            torch.from_numpy(arrays["pooled"]) if "pooled" in arrays else None,
            torch.from_numpy(arrays["statistics"]) if "statistics" in arrays else None,
            hidden or None,
            image,
        )

    def rows(self, some: slice) -> Batch:
        """Return some images, without a copy."""
        return self._mapped(lambda tensor: tensor[some], lambda tokens: tokens.rows(some))

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True), lambda tokens: tokens.to(device))

    def prepared(self, features: FeatureSpec, lazy: bool = False) -> Batch:
        """Normalise the images and decode the hidden tokens.

        Args:
            features: With the preprocessing of the images and the type of the tokens.
            lazy: Leave the small images as read, and make `side` a function that normalises them: with checkpointing
                it is called again in the backward pass.
        """
        mean, std = features.lpm.mean, features.lpm.std
        image = None if self.image is None else normalise(self.image, mean, std)
        hidden = None if self.hidden is None else {"hidden": decode_hidden(self.hidden, features)}
        side = self.side
        if isinstance(side, torch.Tensor):
            side = partial(normalise, side, mean, std) if lazy else normalise(side, mean, std)
        return replace(self, side=side, image=image, hidden=hidden)

    def tensors(self) -> Sequence[torch.Tensor]:
        """Return every tensor of the batch."""
        single = (self.labels, self.side, self.pooled, self.statistics, self.image)
        cached = [] if self.tokens is None else self.tokens.tensors()
        hidden = () if self.hidden is None else self.hidden.values()
        return [*(tensor for tensor in single if isinstance(tensor, torch.Tensor)), *cached, *hidden]

    def _mapped(
        self, change: Callable[[torch.Tensor], torch.Tensor], change_tokens: Callable[[CachedTokens], CachedTokens]
    ) -> Batch:
        side, pooled, statistics, image = (
            change(tensor) if isinstance(tensor, torch.Tensor) else None
            for tensor in (self.side, self.pooled, self.statistics, self.image)
        )
        hidden = None if self.hidden is None else {name: change(tensor) for name, tensor in self.hidden.items()}
        tokens = None if self.tokens is None else change_tokens(self.tokens)
        return Batch(change(self.labels), side, tokens, pooled, statistics, hidden, image)


def required(value: Any, name: str) -> Any:
    """Return an input of a batch.

    Raises:
        ValueError: If it was not read.
    """
    if value is None:
        raise ValueError(f"this model needs the input {name}")
    return value
