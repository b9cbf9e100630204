"""Parameters that belong to token positions, for another image size: resampled on the grid of patches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stages.vision import compiler_left_out


def resample_positions(values: torch.Tensor, side: int, new_side: int, new_prefix: int | None = None) -> torch.Tensor:
    """Resample numbers of token positions on the grid of patches by timm (bicubic, antialiased, in float32).

    Args:
        values: (..., N, F), prefix tokens (class token, registers) in front of side x side patches.
        side: Patches per side of the grid.
        new_side: Patches per side of the new grid.
        new_prefix: Prefix tokens of the new positions; None: as before. Entries of the prefix are kept, entries of
            tokens that had none before are 0.

    Returns:
        (..., N', F) of the same type; `values` themselves where nothing changes.
    """
    prefix = values.shape[-2] - side**2
    count = prefix if new_prefix is None else new_prefix
    if (side, prefix) == (new_side, count):
        return values
    # Imported late: only models of another image size need it.
    with compiler_left_out():
        from timm.layers.pos_embed import resample_abs_pos_embed

    *leading, _, width = values.shape
    # timm takes one grid at a time.
    grids = values[..., prefix:, :].reshape(-1, 1, side**2, width)
    sizes = [new_side, new_side], [side, side]
    resampled = torch.cat([resample_abs_pos_embed(grid, *sizes, num_prefix_tokens=0) for grid in grids])
    patches = resampled.reshape(*leading, new_side**2, width)
    kept = values[..., : min(prefix, count), :]
    added = values.new_zeros(*leading, count - kept.shape[-2], width)
    return torch.cat([kept, added, patches], dim=-2)


def resample_embeddings(state: Mapping[str, torch.Tensor], side: int, new_side: int) -> dict[str, torch.Tensor]:
    """Resample the position embeddings, all (1, N, D) whose name ends in `pos_embed`, among named tensors.

    Args:
        state: Named tensors.
        side: Patches per side of their grid.
        new_side: Patches per side of the new grid.
    """
    return {
        name: resample_positions(value, side, new_side) if name.rpartition(".")[2] == "pos_embed" else value
        for name, value in state.items()
    }
