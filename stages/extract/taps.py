"""Taps: keys and values of the important tokens, and hidden tokens, taken while the LPM runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from schemas.features import FeatureSpec
from stages.extract.importance import attend, gather_tokens, select_tokens, token_importance
from stages.lpm.attention import Projected, finish, project, scale_of

MLP_CHUNK = 1024
"""Tokens per image that an MLP processes at a time, if the image has more than twice as many."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class Tapped:
    """Selected tokens of one layer, for a batch."""

    keys: torch.Tensor
    """(B, H, T, d), in the model's type."""
    values: torch.Tensor
    """(B, H, T, d)."""
    indices: torch.Tensor
    """(B, H, T) int64: positions among the N tokens, most important first."""


class _PassComplete(Exception):  # noqa: N818  (not an error: it ends a forward pass early)
    """All keys, values and hidden tokens are recorded."""


class Taps(Generic[Record]):
    """Context that records the selected tokens of the tapped layers in every forward pass of the LPM.

    The attention of a tapped block is computed here, by the model's own projections around one fused kernel, because
    its log-sum-exp makes the importance nearly free. Other blocks run unchanged, except that their MLPs process very
    many tokens in chunks. Tokens are selected at once: queries and unselected tokens are released layer by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: FeatureSpec,
        record: Callable[[Tapped], Record],
        record_hidden: Callable[[torch.Tensor], Record] | None = None,
    ) -> None:
        """Prepare the taps; the model is only changed inside the context.

        Args:
            model: The LPM.
            spec: Gives the layers, the importance rule and the number of tokens.
            record: Makes the record of a layer, which is held until the end of the pass.
            record_hidden: The same for the tokens (B, N, D) that enter block `spec.hidden`; None: no record of them.
        """
        self._model, self._spec, self._record, self._record_hidden = model, spec, record, record_hidden
        self._hidden_block = None if record_hidden is None else spec.hidden
        self._runs_on = spec.pooled or spec.statistics
        self._records: dict[int, Record] = {}
        self._hidden_records: list[Record] = []
        self._stack = ExitStack()

    def __enter__(self) -> Taps[Record]:
        blocks: Any = self._model.blocks
        for layer in self._spec.layers:
            attention = blocks[layer].attn
            self._replace(attention, self._tapped(layer, attention))
        if self._hidden_block is not None:
            handle = blocks[self._hidden_block].register_forward_pre_hook(self._entering)
            self._stack.callback(handle.remove)
        if self._spec.lpm.tokens > 2 * MLP_CHUNK:
            for block in blocks:
                if isinstance(mlp := getattr(block, "mlp", None), nn.Module):
                    self._replace(mlp, _in_chunks(mlp.forward))
        return self

    def _replace(self, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        self._stack.callback(delattr, module, "forward")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._records.clear()
        self._hidden_records.clear()

    def run(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Run one forward pass.

        Args:
            pixels: (B, 3, S, S), normalised.

        Returns:
            The tokens after the final norm, (B, N, D); None if neither pooled outputs nor statistics are cached: then
            the pass ends with the last keys and values, or with the hidden tokens of a higher block.
        """
        model: Any = self._model
        try:
            tokens: torch.Tensor = model.forward_features(pixels)
        except _PassComplete:
            return None
        return tokens

    def take(self) -> list[Record]:
        """Return and forget the records of the last forward pass, one per tapped layer in ascending order."""
        records = [self._records.pop(layer) for layer in self._spec.layers]
        self._records.clear()
        return records

    def take_hidden(self) -> Record | None:
        """Return and forget the record of the hidden tokens of the last forward pass, if they are recorded."""
        return self._hidden_records.pop() if self._hidden_records else None

    def _entering(self, _block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Record the input of a block; its forward pre-hook."""
        if self._record_hidden is not None:
            self._hidden_records[:] = [self._record_hidden(inputs[0])]
        last = self._spec.layers[-1] if self._spec.layers else -1
        if not self._runs_on and self._hidden_block is not None and self._hidden_block > last:
            raise _PassComplete

    def _tapped(self, layer: int, attention: nn.Module) -> Callable[..., torch.Tensor]:
        """Return the `forward` of a tapped attention."""
        rule, count = self._spec.importance, self._spec.kept
        scale = scale_of(attention)
        higher = self._hidden_block is not None and self._hidden_block > layer
        last = layer == self._spec.layers[-1] and not self._runs_on and not higher

        def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            projected = _in_one_type(project(attention, tokens, *args, **kwargs))
            mixed, lse = (None, None) if last else attend(projected, scale)
            indices = select_tokens(token_importance(projected, scale, rule, lse), count)
            keys, values = gather_tokens(projected.key, indices), gather_tokens(projected.value, indices)
            self._records[layer] = self._record(Tapped(keys, values, indices))
            if mixed is None:
                raise _PassComplete
            return finish(attention, mixed, projected.gate)

        return forward


def _in_chunks(mlp: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an MLP's `forward` in chunks of tokens: its hidden layer is the widest tensor of a forward pass."""

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([mlp(chunk) for chunk in torch.split(tokens, MLP_CHUNK, dim=1)], dim=1)

    return forward


def _in_one_type(tokens: Projected) -> Projected:
    """Cast queries and keys to the type of the values.

    Under autocast normalised queries are float32 while values are not; a fused kernel takes one type.
    """
    kind = tokens.value.dtype
    if tokens.query.dtype == kind == tokens.key.dtype:
        return tokens
    return replace(tokens, query=tokens.query.to(kind), key=tokens.key.to(kind))
