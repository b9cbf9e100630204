"""Contexts around a forward pass of the LPM: prompts at its input, class tokens and norm outputs of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from stages.lpm.adaptation import insert_behind


def running_blocks(lpm: Any) -> list[Any]:
    """Return the blocks that run: those below cached hidden tokens are placeholders without a norm."""
    return [block for block in lpm.blocks if hasattr(block, "norm1")]


@contextmanager
def input_prompts(lpm: Any, prompts: torch.Tensor, prefix: int) -> Iterator[None]:
    """Insert prompts (m, D) behind the prefix tokens of the first block that runs, and cut them after the last."""
    blocks, count = running_blocks(lpm), len(prompts)

    def enter(_block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (insert_behind(inputs[0], prompts, prefix), *inputs[1:])

    def leave(_block: nn.Module, _inputs: tuple[Any, ...], tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(enter).remove)
        stack.callback(blocks[-1].register_forward_hook(leave).remove)
        for block in blocks:
            # Rotary positions are those of the patches: all tokens before them have none.
            if hasattr(block.attn, "num_prefix_tokens"):
                before = block.attn.num_prefix_tokens
                stack.callback(setattr, block.attn, "num_prefix_tokens", before)
                block.attn.num_prefix_tokens = before + count
        yield


class ClassTokens:
    """Context that records the class token after each block that runs."""

    def __init__(self, lpm: Any) -> None:
        self._lpm, self._blocks = lpm, running_blocks(lpm)
        self._tokens: list[torch.Tensor] = []
        self._stack = ExitStack()

    def __enter__(self) -> ClassTokens:
        for block in self._blocks:
            self._stack.callback(block.register_forward_hook(self._record).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _record(self, _block: nn.Module, _inputs: tuple[Any, ...], tokens: torch.Tensor) -> None:
        self._tokens.append(tokens[:, 0])

    def take(self) -> torch.Tensor:
        """Return and forget the class tokens of the last pass, each after the next norm: (B, L D) float32."""
        norms = [block.norm1 for block in self._blocks[1:]] + [self._lpm.norm]
        found = [norm(tokens).float() for norm, tokens in zip(norms, self._tokens, strict=True)]
        self._tokens = []
        return torch.cat(found, dim=1)


class PatchNorms:
    """Context that records mean and variance over the patch tokens of every norm's output."""

    def __init__(self, lpm: Any, patches: int) -> None:
        """Prepare it.

        Args:
            lpm: timm's model.
            patches: Patch tokens of an image, the last ones of the sequence.
        """
        final = [] if isinstance(lpm.norm, nn.Identity) else [lpm.norm]
        self._norms = [norm for block in running_blocks(lpm) for norm in (block.norm1, block.norm2)] + final
        self._patches = patches
        self._found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stack = ExitStack()

    def __enter__(self) -> PatchNorms:
        for norm in self._norms:
            self._stack.callback(norm.register_forward_hook(self._record).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _record(self, _norm: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        # Prompts that are only keys and values pass through a norm by themselves.
        if output.shape[1] >= self._patches:
            variance, mean = torch.var_mean(output[:, -self._patches :].float(), dim=(0, 1), correction=0)
            self._found.append((mean, variance))

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return and forget mean and variance (K, D) of the last pass, over all its images."""
        means, variances = zip(*self._found, strict=True)
        self._found = []
        return torch.stack(means), torch.stack(variances)
