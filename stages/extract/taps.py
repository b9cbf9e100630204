"""Taps: keys and values of the important tokens, taken while the LPM runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from schemas.features import FeatureSpec
from stages.extract.importance import gather_tokens, select_tokens, token_importance


@dataclass(frozen=True)
class Tapped:
    """What one layer gives for a batch."""

    keys: torch.Tensor
    """(B, H, T, d), in the model's type."""
    values: torch.Tensor
    """(B, H, T, d)."""
    indices: torch.Tensor
    """(B, H, T) int64: positions among the N tokens, most important first."""


class Taps:
    """Context in which every forward pass of the LPM leaves the selected tokens of the tapped layers.

    Keys and values are the outputs of the block's qkv projection after the model's q/k normalisation. The
    selection happens inside the hook: queries and unselected tokens are released layer by layer.
    """

    def __init__(self, model: nn.Module, spec: FeatureSpec) -> None:
        self._model, self._spec = model, spec
        self._found: dict[int, Tapped] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Taps:
        blocks: Any = self._model.blocks
        for layer in self._spec.layers:
            handle = blocks[layer].attn.qkv.register_forward_hook(self._hook(layer, blocks[layer].attn))
            self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._found.clear()

    def take(self) -> list[Tapped]:
        """The tapped layers of the last forward pass, in ascending order; can be taken once."""
        found = [self._found.pop(layer) for layer in self._spec.layers]
        self._found.clear()
        return found

    def _hook(self, layer: int, attention: nn.Module) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        heads, head_dim = self._spec.lpm.heads, self._spec.lpm.head_dim
        q_norm: Any = getattr(attention, "q_norm", nn.Identity())
        k_norm: Any = getattr(attention, "k_norm", nn.Identity())

        def select(_module: nn.Module, _inputs: Any, projected: torch.Tensor) -> None:
            batch, count, _ = projected.shape
            query, key, value = projected.view(batch, count, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
            query, key = q_norm(query), k_norm(key)
            importance = token_importance(query, key, self._spec.importance)
            indices = select_tokens(importance, self._spec.kept)
            self._found[layer] = Tapped(gather_tokens(key, indices), gather_tokens(value, indices), indices)

        return select
