"""CachedTokens tokens of a batch in the type of the store, and attention to them without widening all of them.

For quantised tokens k = s c + o (`stages.store.quantise`) only the codes c are widened, a few images at a time:

    q . k = q . (s c) + q . o                   the last term is the same for every token, so the softmax drops it
    sum_j A_j v_j = sum_j A_j s_j c_j + o       the weights A sum to 1

A scale per token (int8) multiplies the scores and the weights, one per channel (int4) the query and the mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

from stages.store.quantise import CENTRE, scale_of, unpack

CHUNK = 2
"""Images whose keys and values are widened to the type of the query at a time: bounds memory, and fits the caches."""


@dataclass(frozen=True)
class CachedTokens:
    """Keys and values as they are stored: floats, or codes with what dequantises them (`stages.store.quantise`).

    The arrays of a batch have a layer axis L; `layer` selects one layer and drops the axis.
    """

    keys: torch.Tensor
    """(B, L, H, T, d) floats or int8 codes; (B, L, H, T, ceil(d / 2)) uint8, each with two int4 codes."""
    values: torch.Tensor
    """Like `keys`."""
    scale: torch.Tensor | None = None
    """uint8, None for floats: (B, L, 2, H, T) with int8, (B, L, 2, H, d) with int4 codes; keys, then values."""
    offset: torch.Tensor | None = None
    """(B, L, 2, H, d) float16, None for floats; keys, then values."""

    @staticmethod
    def of(arrays: Mapping[str, NDArray[Any]]) -> CachedTokens | None:
        """Views of arrays of the store, by name; None without keys."""
        if "keys" not in arrays:
            return None
        names = ("keys", "values", "scale", "offset")
        return CachedTokens(**{name: torch.from_numpy(arrays[name]) for name in names if name in arrays})

    def tensors(self) -> list[torch.Tensor]:
        """Those that there are."""
        return [part for part in (self.keys, self.values, self.scale, self.offset) if part is not None]

    def layer(self, position: int) -> CachedTokens:
        """One layer, without its axis."""
        return CachedTokens(*(None if part is None else part[:, position] for part in self._fields()))  # type: ignore[arg-type]

    def rows(self, some: slice) -> CachedTokens:
        """Some images, without a copy."""
        return CachedTokens(*(None if part is None else part[some] for part in self._fields()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> CachedTokens:
        """Copy to a device."""
        parts = (None if part is None else part.to(device, non_blocking=True) for part in self._fields())
        return CachedTokens(*parts)  # type: ignore[arg-type]

    def chunks(self, query: torch.Tensor) -> Iterator[tuple[slice, Tokens]]:
        """One layer, a few images at a time and which, for queries like this one (..., d)."""
        kind, head_dim = query.dtype, query.shape[-1]
        for start in range(0, len(self.keys), CHUNK):
            part = slice(start, start + CHUNK)
            tokens = Tokens(self.keys[part], self.values[part], kind, head_dim)
            if self.scale is None or self.offset is None:
                yield part, tokens
                continue
            scales = scale_of(self.scale[part], kind).unsqueeze(-2)
            pair, offset = (scales[:, 0], scales[:, 1]), self.offset[part, 1].to(kind).unsqueeze(-2)
            if self.keys.dtype == torch.int8:
                yield part, replace(tokens, per_token=pair, offset=offset)
            else:
                yield part, replace(tokens, per_channel=pair, offset=offset - CENTRE * pair[1])

    def _fields(self) -> tuple[torch.Tensor | None, ...]:
        return self.keys, self.values, self.scale, self.offset


@dataclass(frozen=True)
class Tokens:
    """A few images of one layer, and scales that multiply tokens or channels, or None."""

    keys: torch.Tensor
    """(b, H, T, ...) as stored."""
    values: torch.Tensor
    """(b, H, T, ...) as stored."""
    kind: torch.dtype
    """Type of the query."""
    head_dim: int
    """d."""
    per_token: tuple[torch.Tensor, torch.Tensor] | None = None
    """(b, H, 1, T) of keys and of values."""
    per_channel: tuple[torch.Tensor, torch.Tensor] | None = None
    """(b, H, 1, d) of keys and of values."""
    offset: torch.Tensor | None = None
    """(b, H, 1, d) of values, the middle of the codes included; that of keys drops out."""

    def wide_keys(self) -> torch.Tensor:
        """(b, H, T, d): floats or codes in the type of the query; apart, so that keys and values never live at once."""
        return self._widen(self.keys)

    def scores(self, query: torch.Tensor, wide_keys: torch.Tensor) -> torch.Tensor:
        """(H, P, d) -> (b, H, P, T), up to a number that all tokens share."""
        if self.per_channel is not None:
            query = query * self.per_channel[0]
        scores = query @ wide_keys.mT
        return scores if self.per_token is None else scores.mul_(self.per_token[0])

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """(b, H, P, T), rows of which sum to 1 -> (b, H, P, d)."""
        mixed = (weights if self.per_token is None else weights * self.per_token[1]) @ self._widen(self.values)
        if self.per_channel is not None:
            mixed.mul_(self.per_channel[1])
        return mixed if self.offset is None else mixed.add_(self.offset)

    def unmix(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of `mix`, up to a number that all tokens share: (b, H, P, d) -> (b, H, P, T)."""
        if self.per_channel is not None:
            grad = grad * self.per_channel[1]
        inner = grad @ self._widen(self.values).mT
        return inner if self.per_token is None else inner.mul_(self.per_token[1])

    def unscore(self, grad: torch.Tensor, wide_keys: torch.Tensor) -> torch.Tensor:
        """Gradient of `scores`, where rows sum to 0: (b, H, P, T) -> (b, H, P, d)."""
        if self.per_token is not None:
            grad = grad * self.per_token[0]
        found = grad @ wide_keys
        return found if self.per_channel is None else found.mul_(self.per_channel[0])

    def _widen(self, stored: torch.Tensor) -> torch.Tensor:
        if stored.dtype == torch.uint8:
            return unpack(stored, self.head_dim, self.kind)
        return stored.to(self.kind)
