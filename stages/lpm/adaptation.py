"""Adaptations: what a method changes in the forward pass of the frozen LPM, and the driver that applies the changes.

timm's model runs as it is, except that the blocks with an adaptation compute

    z  = norm1(x)
    y  = attention(z)                     extra keys and values, a sink, or another softmax: `extra`, `sink`, `mix`
    u  = between(x + scale1(attention_out(y, z)))
    z' = norm2(u)
    x' = u + scale2(mlp_out(mlp(z'), u, z'))

in place of their own `forward`. Embeddings, rotary positions, final norm, pooling and gradient checkpointing stay those
of the model, so that there is neither a fork nor a subclass of timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from schemas.errors import UnsupportedModelError
from stages.lpm.attention import Projected, finish, project, scale_of
from stages.phases import Phase

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, (1 or B, H, m, d) each."""


class Adaptation(nn.Module):
    """Changes to the LPM from block `first` upward; every hook defaults to what the LPM does.

    Blocks are numbered as in the LPM; `row(number)` is the position of a block among the adapted ones.
    """

    added_tokens = 0
    """Tokens that `enter` adds behind the prefix tokens."""

    bound_to_tokens = False
    """Whether it has parameters per token, and so takes no further tokens at test time."""

    def __init__(self, first: int = 0) -> None:
        """Set the first adapted block.

        Args:
            first: Its number.
        """
        super().__init__()
        self.first = first

    def row(self, number: int) -> int:
        """Return the position of a block among the adapted ones."""
        return number - self.first

    def adapted(self, lpm: Any) -> list[tuple[int, Any]]:
        """Return number and module of each adapted block."""
        return list(enumerate(lpm.blocks))[self.first :]

    def attach(self, lpm: Any) -> None:
        """Change modules of the LPM once, before its weights are loaded; does nothing by default.

        Args:
            lpm: timm's model, with `Identity` in place of blocks that never run.
        """

    def start(self, lpm: Any) -> None:
        """Set initial values that depend on the weights of the LPM, once it has them; does nothing by default."""

    def resampled(self, state: Mapping[str, torch.Tensor], side: int, new_side: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return saved parameters of the adaptation for another grid of patches; unchanged by default.

        Args:
            state: Parameters of this module, by name.
            side: Patches per side of the grid that they were trained on.
            new_side: Patches per side of the new grid.
        """
        return dict(state)

    def learns(self, name: str) -> bool:  # noqa: ARG002
        """Whether this parameter of the LPM is trained. Its head always is."""
        return False

    def saves(self, name: str) -> bool:
        """Whether this parameter of the LPM is saved with the model: those that are trained, by default."""
        return self.learns(name)

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Change the tokens (B, N, D) that enter the first adapted block, or add `added_tokens` behind the prefix."""
        return tokens

    def leave(self, tokens: torch.Tensor, prefix: int) -> torch.Tensor:
        """Change the tokens that leave the last block; cuts added tokens by default.

        Args:
            tokens: (B, N + added, D).
            prefix: Class and register tokens in front of the added ones.
        """
        if not self.added_tokens:
            return tokens
        return torch.cat([tokens[:, :prefix], tokens[:, prefix + self.added_tokens :]], dim=1)

    def extra(self, number: int, block: Any) -> KeysValues | None:  # noqa: ARG002
        """Return keys and values that all queries of a block attend to besides its own; None: no others."""
        return None

    def sink(self, number: int) -> torch.Tensor | None:  # noqa: ARG002
        """Return a logit per query (N,) that takes part in each softmax of a block and has the value 0; None: none."""
        return None

    def mix(self, number: int, tokens: Projected, scale: float) -> torch.Tensor | None:  # noqa: ARG002
        """Return the mixed values (B, H, N, d) in place of fused attention; None: fused attention."""
        return None

    def attention_out(self, number: int, output: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Change the output (B, N, D) of an attention, before LayerScale.

        Args:
            number: Block.
            output: Output of its attention.
            normed: Input of its attention.
        """
        return output

    def between(self, number: int, block: Any, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Change the tokens (B, N, D) between the attention of a block and its MLP."""
        return tokens

    def mlp_out(
        self,
        number: int,  # noqa: ARG002
        output: torch.Tensor,
        tokens: torch.Tensor,  # noqa: ARG002
        normed: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """Change the output (B, N, D) of an MLP, before LayerScale.

        Args:
            number: Block.
            output: Output of its MLP.
            tokens: Tokens between attention and MLP.
            normed: Input of the MLP.
        """
        return output

    def phase(self, epoch: int, epochs: int) -> Phase:  # noqa: ARG002
        """Return the phase of an epoch, from 1, in a training of so many epochs; one for all of them by default."""
        return Phase(1, epochs)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set what learns in an epoch, from 1, of a training of so many epochs; does nothing by default."""

    def begin_phase(self, epoch: int, epochs: int) -> None:
        """Change weights before an epoch that begins a phase; does nothing by default."""

    def read_gradients(self) -> None:
        """Read the gradients of a batch before the weights are updated; does nothing by default."""

    def fold(self, lpm: Any) -> None:
        """Move what can be folded into new weights of the LPM, which may be shared; for prediction only."""

    def maps(self, forward: Callable[[], object]) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """Return maps that explain what is computed for images, by name; none by default.

        Args:
            forward: Runs the adapted LPM on the images.

        Returns:
            (B, blocks, gh, gw) each, a number per patch.
        """
        return {}


_ATTENTION_HOOKS = ("extra", "sink", "mix")
_BLOCK_HOOKS = (*_ATTENTION_HOOKS, "attention_out", "between", "mlp_out")


def overrides(adaptation: Adaptation, *names: str) -> bool:
    """Return whether the adaptation has one of these hooks of its own."""
    return any(getattr(type(adaptation), name) is not getattr(Adaptation, name) for name in names)


def install(lpm: Any, adaptation: Adaptation) -> None:
    """Make the forward pass of a timm model that of the adaptation; the model is changed in place.

    Args:
        lpm: timm's model, without `obstacle`.
        adaptation: Its hooks are called from block `adaptation.first` upward.

    Raises:
        UnsupportedModelError: If blocks of the model compute something else than attention and MLP in turn.
    """
    adaptation.attach(lpm)
    adapted = adaptation.adapted(lpm)
    if overrides(adaptation, *_BLOCK_HOOKS):
        kinds = _block_kinds()
        for number, block in adapted:
            if type(block) not in kinds:
                raise UnsupportedModelError(
                    f"{type(lpm).__name__} cannot be adapted.",
                    f"Its blocks ({type(block).__name__}) are not attention and MLP one after the other.",
                    "Choose a method that reads cached features, or an LPM such as vit_base_patch16_384.",
                )
            block.forward = _block_forward(number, block, adaptation)
    if overrides(adaptation, "enter"):
        adapted[0][1].register_forward_pre_hook(lambda _, inputs: (adaptation.enter(inputs[0]), *inputs[1:]))
    if adaptation.added_tokens and any("rel_pos" in name or "relative_pos" in name for name in _names(lpm)):
        raise UnsupportedModelError(
            f"{type(lpm).__name__} has no place for more tokens.",
            "Its positions are biases between pairs of its own tokens, which others do not have.",
            "Choose prompts that are keys and values, such as vpt-deep, or an LPM such as vit_base_patch16_384.",
        )
    if adaptation.added_tokens or overrides(adaptation, "leave"):
        prefix = lpm.num_prefix_tokens
        adapted[-1][1].register_forward_hook(lambda _, __, tokens: adaptation.leave(tokens, prefix))
        for _, block in adapted:
            # Rotary positions are those of the patches: all tokens before them have none.
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens += adaptation.added_tokens


def insert_behind(tokens: torch.Tensor, prompts: torch.Tensor, prefix: int) -> torch.Tensor:
    """Insert prompts (m, D) behind the prefix of tokens (B, N, D); return (B, N + m, D)."""
    inserted = prompts.to(tokens.dtype).expand(len(tokens), -1, -1)
    return torch.cat([tokens[:, :prefix], inserted, tokens[:, prefix:]], dim=1)


def _names(lpm: Any) -> list[str]:
    """Return the names of all modules and parameters of the LPM."""
    return [name for name, _ in (*lpm.named_modules(), *lpm.named_parameters())]


def _block_kinds() -> set[type[nn.Module]]:
    from timm.models import beit, eva, vision_transformer, vision_transformer_relpos

    # Exactly these classes: subclasses compute something else.
    return {vision_transformer.Block, eva.EvaBlock, beit.Block, vision_transformer_relpos.RelPosBlock}


def _block_forward(number: int, block: Any, adaptation: Adaptation) -> Callable[..., torch.Tensor]:
    """Return the `forward` of a block with an adaptation."""
    own_attention = not overrides(adaptation, *_ATTENTION_HOOKS)

    def forward(tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        normed = block.norm1(tokens)
        if own_attention:
            output = block.attn(normed, *args, **options)
        else:
            output = _attention(number, block, adaptation, normed, args, options)
        output = adaptation.attention_out(number, output, normed)
        tokens = tokens + block.drop_path1(_scaled(block, 1, output))
        tokens = adaptation.between(number, block, tokens)
        normed = block.norm2(tokens)
        output = adaptation.mlp_out(number, block.mlp(normed), tokens, normed)
        result: torch.Tensor = tokens + block.drop_path2(_scaled(block, 2, output))
        return result

    return forward


def _scaled(block: Any, position: int, output: torch.Tensor) -> torch.Tensor:
    """Return the output of a sublayer after the LayerScale of its block, if it has one."""
    if (scale := getattr(block, f"ls{position}", None)) is not None:
        scaled: torch.Tensor = scale(output)
        return scaled
    gamma: torch.Tensor | None = getattr(block, f"gamma_{position}", None)
    return output if gamma is None else gamma * output


def _attention(
    number: int,
    block: Any,
    adaptation: Adaptation,
    normed: torch.Tensor,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> torch.Tensor:
    """Compute the output of an attention with the attention hooks of an adaptation."""
    tokens, scale = project(block.attn, normed, *args, **options), scale_of(block.attn)
    mixed = adaptation.mix(number, tokens, scale)
    if mixed is None:
        mixed = mix_with(tokens, scale, adaptation.extra(number, block), adaptation.sink(number))
    return finish(block.attn, mixed, tokens.gate)


def mix_with(
    tokens: Projected, scale: float, extra: KeysValues | None = None, sink: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute fused attention with further keys and values, and with a sink.

    A sink is one more key with the value 0, whose logit is s_i for query i. It fits into any fused kernel as one more
    channel of each head (identity 2): q~ = [q, s / scale], k~ = [k, 0], k~_sink = [0, 1], v~_sink = 0.

    Args:
        tokens: Queries, keys and values of a block.
        scale: Factor of the scores.
        extra: Keys and values in front of those of the block.
        sink: (N,) logits.

    Returns:
        (B, H, N, d).
    """
    query, key, value, bias = tokens.query, tokens.key, tokens.value, tokens.bias
    batch, added = len(query), 0
    if extra is not None:
        more = [part.to(key.dtype).expand(batch, -1, -1, -1) for part in extra]
        key, value, added = torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2), more[0].shape[2]
    width = value.shape[-1]
    if sink is not None:
        query, key, value = _with_sink(query, key, value, sink / scale)
    if bias is not None and (added or sink is not None):
        bias = F.pad(bias, (added, 0 if sink is None else 1))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)[..., :width]


def _with_sink(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor) -> Any:
    """Return queries, keys and values with the sink as last key, channels padded to a multiple of 8."""
    batch, heads, count, width = query.shape
    padding = (width // 8 + 1) * 8 - width
    channels = torch.cat([logits.to(query.dtype)[:, None], query.new_zeros(count, padding - 1)], dim=1)
    sink_key = F.one_hot(torch.tensor(width, device=key.device), width + padding).to(key.dtype)
    return (
        torch.cat([query, channels.expand(batch, heads, -1, -1)], dim=-1),
        torch.cat([F.pad(key, (0, padding)), sink_key.expand(batch, heads, 1, -1)], dim=2),
        F.pad(value, (0, padding, 0, 1)),
    )


def keys_values(block: Any, prompts: torch.Tensor, normed: bool = True) -> KeysValues:
    """Return the keys and values (1, H, m, d) of prompts (m, D) in a block (identity 5).

    Args:
        block: Block of the LPM; its norm and projections are used, without positions.
        prompts: Tokens as they would enter the block.
        normed: Whether they pass through the norm before the attention.
    """
    tokens = prompts[None]
    projected = project(block.attn, block.norm1(tokens) if normed else tokens)
    return projected.key, projected.value
