"""timm's attention modules: queries, keys and values of a block, and its output from the mixed values.

Every supported module computes

    finish( softmax( query key^T * scale + bias ) value )

with query and key after q/k normalisation and rotary rotation. Only this file depends on how each of timm's classes
computes them (timm 1.0.12 to 1.0.31); taps and importance build on the four functions below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from schemas.errors import UnsupportedModelError


@dataclass(frozen=True)
class Projected:
    """Tokens projected to the queries, keys and values of one attention."""

    query: torch.Tensor
    """(B, H, N, d), after q/k normalisation and rotation, not multiplied by the scale."""
    key: torch.Tensor
    """(B, H, N, d), after q/k normalisation and rotation; grouped keys are repeated for their heads."""
    value: torch.Tensor
    """(B, H, N, d)."""
    bias: torch.Tensor | None = None
    """Added to the scaled scores before the softmax, broadcastable to (B, H, N, N): relative positions, mask."""
    gate: torch.Tensor | None = None
    """(B, N, H d), for `finish`: factor of the mixed values, from the same tokens; None: the attention has no gate."""


Options = dict[str, Any]
"""Arguments of a module's `forward` after the tokens, by name."""
Kind = Callable[[Any, torch.Tensor, Options], Projected]
"""Projection of one class of attention."""


def obstacle(attention: nn.Module) -> str | None:
    """Return why tokens cannot be taken from this attention, or None if they can."""
    kind = type(attention)
    if kind in _kinds():
        return None
    if kind.__name__ == "DiffAttention":
        return "Its attention is the difference of two softmax maps: no single map gives the importance of a token."
    return f"Its attention ({kind.__name__}) is not one that keys and values can be taken from."


def project(attention: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Projected:
    """Compute queries, keys, values and bias of one attention.

    Args:
        attention: Without `obstacle`.
        tokens: (B, N, D), input of the module.
        args: Further arguments of the module's `forward`, by position.
        kwargs: Further arguments of the module's `forward`, by name.

    Raises:
        UnsupportedModelError: If the attention is causal.
    """
    # The signature of the class, because callers replace `forward` of the module itself.
    bound = inspect.signature(type(attention).forward).bind(attention, tokens, *args, **kwargs)
    options = {name: value for name, value in list(bound.arguments.items())[2:] if value is not None}
    if options.get("is_causal"):
        raise UnsupportedModelError("In causal attention no token is seen by all queries.")
    return _kinds()[type(attention)](attention, tokens, options)


def value_weight(attention: Any) -> torch.Tensor:
    """Return the matrix that projects tokens to values, (H d, D); of grouped values one row per group's channel."""
    if getattr(attention, "qkv", None) is None:
        separate: torch.Tensor = attention.v_proj.weight
        return separate
    fused: torch.Tensor = attention.qkv.weight
    return fused[2 * fused.shape[0] // 3 :]


def projections(attention: Any) -> tuple[str, ...]:
    """Return the names of the linear layers to queries, keys and values, which every forward pass calls from now on.

    EVA and BEiT have layers whose weight is used without a call, with biases of their own, unless those are added
    separately.
    """
    if getattr(attention, "qkv", None) is None:
        return ("q_proj", "k_proj", "v_proj")
    if getattr(attention, "q_bias", None) is not None:
        attention.qkv_bias_separate = True
    return ("qkv",)


def scale_of(attention: Any) -> float:
    """Return the factor of the scores before the softmax."""
    return float(attention.scale)


def query_projection(attention: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight (H d, D) and bias (H d,) of the projection to queries; None: no bias."""
    if getattr(attention, "qkv", None) is None:
        return attention.q_proj.weight, attention.q_proj.bias
    rows = attention.qkv.weight.shape[0] // 3
    separate: torch.Tensor | None = getattr(attention, "q_bias", None)
    bias = attention.qkv.bias[:rows] if separate is None and attention.qkv.bias is not None else separate
    return attention.qkv.weight[:rows], bias


def queries(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Compute only the queries (B, H, N, d) of tokens (B, N, D), without positions."""
    projected = F.linear(tokens, *query_projection(attention))
    query = projected.view(*projected.shape[:-1], attention.num_heads, -1).transpose(1, 2)
    if not hasattr(attention, "q_norm"):  # older versions of EvaAttention
        return query
    normed: torch.Tensor = attention.q_norm(query)
    return normed


def gate_of(attention: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Compute the gate (B, N, H d) of `finish` from tokens (B, N, D); None: the attention has no gate."""
    gate = getattr(attention, "gate", None)
    if gate is None:
        return None
    opened: torch.Tensor = gate(tokens).sigmoid()
    return opened


def finish(attention: Any, mixed: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the module's output from softmax(...) value.

    Args:
        attention: Without `obstacle`.
        mixed: (B, H, N, d).
        gate: From `project`.

    Returns:
        (B, N, D).

    Raises:
        ValueError: If the attention has a gate, but `gate` is None.
    """
    tokens = mixed.transpose(1, 2).flatten(2)
    if isinstance(norm := getattr(attention, "norm", None), nn.Module):
        tokens = norm(tokens)
    if gate is not None:
        tokens = tokens * gate
    elif getattr(attention, "gate", None) is not None:
        raise ValueError("this attention is gated: pass the gate of project()")
    output: torch.Tensor = attention.proj_drop(attention.proj(tokens))
    return output


def _kinds() -> dict[type[nn.Module], Kind]:
    from timm import layers
    from timm.models import beit, eva, vision_transformer, vision_transformer_relpos

    # Classes moved between modules from version to version; older versions lack AttentionRope.
    supported: list[tuple[Any, str, Kind]] = [
        (vision_transformer, "Attention", _plain),
        (beit, "Attention", _biased),
        (vision_transformer_relpos, "RelPosAttention", _relative),
        (eva, "EvaAttention", _rotated),
        (layers, "AttentionRope", _rotated),
    ]
    # Exactly these classes: subclasses and look-alikes compute something else.
    return {getattr(module, name): kind for module, name, kind in supported if hasattr(module, name)}


def _plain(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    query, key, value = _heads(attention, attention.qkv(tokens))
    return Projected(*_normed(attention, query, key), value, _mask(options, query), gate_of(attention, tokens))


def _biased(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    """Project as BEiT: relative positions from a table of the block, or from one that all blocks share."""
    bias: torch.Tensor | None = options.get("shared_rel_pos_bias")
    if attention.relative_position_bias_table is not None:
        of_block: torch.Tensor = attention._get_rel_pos_bias()
        bias = of_block if bias is None else of_block + bias
    return Projected(*_heads(attention, _fused(attention, tokens)), _batched(bias))


def _relative(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    query, key, value = _heads(attention, attention.qkv(tokens))
    bias = options.get("shared_rel_pos") if attention.rel_pos is None else attention.rel_pos.get_bias()
    return Projected(*_normed(attention, query, key), value, _batched(bias))


def _rotated(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    """Project as EVA-02 and DINOv3: patches are rotated by their position, prefix tokens are not."""
    if attention.qkv is not None:
        query, key, value = _heads(attention, _fused(attention, tokens))
    else:
        dim = attention.q_proj.out_features // attention.num_heads
        query, key, value = (
            projection(tokens).unflatten(-1, (-1, dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
    query, key = _normed(attention, query, key)
    if (rope := options.get("rope")) is not None:
        query, key = (_rotate(attention, tensor, rope).type_as(value) for tensor in (query, key))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return Projected(query, key, value, _mask(options, query), gate_of(attention, tokens))


def _rotate(attention: Any, tensor: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the patches of (B, H, N, d) queries or keys."""
    from timm import layers

    timm: Any = layers
    prefix = attention.num_prefix_tokens
    layout = {"half": True} if getattr(attention, "rotate_half", False) else {}  # older versions have one layout
    rotated = timm.apply_rot_embed_cat(tensor[:, :, prefix:], rope, **layout)
    return torch.cat([tensor[:, :, :prefix], rotated], dim=2)


def _fused(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Project to queries, keys and values at once; keys may have no learned bias."""
    if getattr(attention, "q_bias", None) is None:
        projected: torch.Tensor = attention.qkv(tokens)
        return projected
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if getattr(attention, "qkv_bias_separate", False):
        return attention.qkv(tokens) + bias  # type: ignore[no-any-return]
    return F.linear(tokens, attention.qkv.weight, bias)


def _heads(attention: Any, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, 3 H d) -> three of (B, H, N, d)."""
    batch, count, _ = projected.shape
    stacked = projected.reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return stacked[0], stacked[1], stacked[2]


def _normed(attention: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not hasattr(attention, "q_norm"):  # older versions of EvaAttention
        return query, key
    return attention.q_norm(query), attention.k_norm(key)


def _mask(options: Options, query: torch.Tensor) -> torch.Tensor | None:
    mask: torch.Tensor | None = options.get("attn_mask")
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _batched(bias: torch.Tensor | None) -> torch.Tensor | None:
    """(H, N, N) -> (1, H, N, N)."""
    return bias.unsqueeze(0) if bias is not None and bias.dim() == 3 else bias
