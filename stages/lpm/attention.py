"""timm's attention modules: what a block's attention sees, and what it does with the mixed values.

Every supported module computes

    finish( softmax( query key^T * scale + bias ) value )

with query and key after q/k normalisation and rotary rotation. This file alone knows how each of timm's classes gets
there (timm 1.0.12 to 1.0.31); taps, importance and speed build on the four functions below.
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
    """Tokens as one attention sees them."""

    query: torch.Tensor
    """(B, H, N, d), after q/k normalisation and rotation, not multiplied by the scale."""
    key: torch.Tensor
    """(B, H, N, d), after q/k normalisation and rotation; grouped keys are repeated for their heads."""
    value: torch.Tensor
    """(B, H, N, d)."""
    bias: torch.Tensor | None = None
    """Added to the scaled scores before the softmax, broadcastable to (B, H, N, N): relative positions, mask."""
    gate: torch.Tensor | None = None
    """(B, N, H d), for `finish`: factor of the mixed values, from the same tokens; None: there is no gate."""


Options = dict[str, Any]
"""Arguments of a module's `forward` after the tokens, by name."""
Kind = Callable[[Any, torch.Tensor, Options], Projected]
"""How one class of attention projects."""


def obstacle(attention: nn.Module) -> str | None:
    """Why tokens cannot be taken from this attention; None if they can."""
    kind = type(attention)
    if kind in _kinds():
        return None
    if kind.__name__ == "DiffAttention":
        return "Its attention is the difference of two softmax maps: no one map says how much a token is attended to."
    return f"Its attention ({kind.__name__}) is not one that keys and values can be taken from."


def project(attention: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Projected:
    """Queries, keys, values and bias of one attention.

    Args:
        attention: Without `obstacle`.
        tokens: (B, N, D), input of the module.
        args: What the module's own `forward` was called with after the tokens.
        kwargs: The same, by name.

    Raises:
        UnsupportedModelError: Attention was asked to be causal.
    """
    # Of the class: a caller may have put its own `forward` on the module.
    bound = inspect.signature(type(attention).forward).bind(attention, tokens, *args, **kwargs)
    options = {name: value for name, value in list(bound.arguments.items())[2:] if value is not None}
    if options.get("is_causal"):
        raise UnsupportedModelError("Causal attention has no token that all queries see.")
    return _kinds()[type(attention)](attention, tokens, options)


def scale_of(attention: Any) -> float:
    """Factor of the scores before the softmax."""
    return float(attention.scale)


def finish(attention: Any, mixed: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """What the module does after softmax(...) value.

    Args:
        attention: Without `obstacle`.
        mixed: (B, H, N, d).
        gate: Of `project`.

    Returns:
        (B, N, D).

    Raises:
        ValueError: The attention has a gate, and none is given.
    """
    tokens = mixed.transpose(1, 2).flatten(2)
    if isinstance(norm := getattr(attention, "norm", None), nn.Module):
        tokens = norm(tokens)
    if gate is not None:
        tokens = tokens * gate
    elif getattr(attention, "gate", None) is not None:
        raise ValueError("this attention is gated: pass the gate of project()")
    done: torch.Tensor = attention.proj_drop(attention.proj(tokens))
    return done


def _kinds() -> dict[type[nn.Module], Kind]:
    from timm import layers
    from timm.models import beit, eva, vision_transformer, vision_transformer_relpos

    # Where a class is defined has moved between versions; older ones lack AttentionRope.
    known: list[tuple[Any, str, Kind]] = [
        (vision_transformer, "Attention", _plain),
        (beit, "Attention", _biased),
        (vision_transformer_relpos, "RelPosAttention", _relative),
        (eva, "EvaAttention", _rotated),
        (layers, "AttentionRope", _rotated),
    ]
    # Exactly these classes: subclasses and look-alikes change what attention is.
    return {getattr(module, name): kind for module, name, kind in known if hasattr(module, name)}


def _plain(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    query, key, value = _heads(attention, attention.qkv(tokens))
    return Projected(*_normed(attention, query, key), value, _mask(options, query), _gate(attention, tokens))


def _biased(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    """BEiT: a table of relative positions in the block, or one that all blocks share."""
    bias: torch.Tensor | None = options.get("shared_rel_pos_bias")
    if attention.relative_position_bias_table is not None:
        own: torch.Tensor = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    return Projected(*_heads(attention, _fused(attention, tokens)), _batched(bias))


def _relative(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    query, key, value = _heads(attention, attention.qkv(tokens))
    bias = options.get("shared_rel_pos") if attention.rel_pos is None else attention.rel_pos.get_bias()
    return Projected(*_normed(attention, query, key), value, _batched(bias))


def _rotated(attention: Any, tokens: torch.Tensor, options: Options) -> Projected:
    """EVA-02, DINOv3 and their kin: patches are rotated by their position, prefix tokens are not."""
    if attention.qkv is not None:
        query, key, value = _heads(attention, _fused(attention, tokens))
    else:
        dim = attention.q_proj.out_features // attention.num_heads
        query, key, value = (
            part(tokens).unflatten(-1, (-1, dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
    query, key = _normed(attention, query, key)
    if (rope := options.get("rope")) is not None:
        query, key = (_rotate(attention, part, rope).type_as(value) for part in (query, key))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return Projected(query, key, value, _mask(options, query), _gate(attention, tokens))


def _rotate(attention: Any, part: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    from timm import layers

    timm: Any = layers
    prefix = attention.num_prefix_tokens
    layout = {"half": True} if getattr(attention, "rotate_half", False) else {}  # older versions know one layout
    rotated = timm.apply_rot_embed_cat(part[:, :, prefix:], rope, **layout)
    return torch.cat([part[:, :, :prefix], rotated], dim=2)


def _fused(attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """One projection to queries, keys and values, where keys have no learnt bias."""
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
    apart = projected.reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return apart[0], apart[1], apart[2]


def _normed(attention: Any, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not hasattr(attention, "q_norm"):  # older versions of EvaAttention
        return query, key
    return attention.q_norm(query), attention.k_norm(key)


def _gate(attention: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    gate = getattr(attention, "gate", None)
    return None if gate is None else gate(tokens).sigmoid()


def _mask(options: Options, query: torch.Tensor) -> torch.Tensor | None:
    mask: torch.Tensor | None = options.get("attn_mask")
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _batched(bias: torch.Tensor | None) -> torch.Tensor | None:
    """(H, N, N) -> (1, H, N, N)."""
    return bias.unsqueeze(0) if bias is not None and bias.dim() == 3 else bias
