"""Augmentation of cached tokens: one operation per image, drawn with its strength as by TrivialAugment.

LOFF-TA (arXiv 2410.02527) augments cached features like images, because those of augmented images are too many to
store. Which operations there are, and how strong, is our reading:

    identity            unchanged
    flip                horizontal or vertical
    turn                90, 180 or 270 degrees
    shift               up to a quarter of the side in each direction; tokens at the edge are repeated
    noise               normal, up to half of the deviation of each channel over the tokens of the image
    channel dropout     up to a fifth of the channels are zero
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.methods.batch_draws import BatchDraws

SHIFT = 0.25
"""Largest shift, as a share of the side of the grid."""
NOISE = 0.5
"""Largest deviation of noise, as a multiple of that of a channel."""
DROPPED = 0.2
"""Largest share of dropped channels."""

Places = npt.NDArray[np.int64]
"""(side, side) positions of tokens in a sequence, row by row."""


def _identity(tokens: torch.Tensor, _places: Places, _rng: np.random.Generator) -> torch.Tensor:
    return tokens


def _flip_horizontally(tokens: torch.Tensor, places: Places, _rng: np.random.Generator) -> torch.Tensor:
    return _taken(tokens, places[:, ::-1])


def _flip_vertically(tokens: torch.Tensor, places: Places, _rng: np.random.Generator) -> torch.Tensor:
    return _taken(tokens, places[::-1])


def _turn(tokens: torch.Tensor, places: Places, rng: np.random.Generator) -> torch.Tensor:
    return _taken(tokens, np.rot90(places, int(rng.integers(1, 4))))


def _shift(tokens: torch.Tensor, places: Places, rng: np.random.Generator) -> torch.Tensor:
    side = len(places)
    most = max(1, int(SHIFT * side))
    rows, columns = (np.clip(np.arange(side) + rng.integers(-most, most + 1), 0, side - 1) for _ in range(2))
    return _taken(tokens, places[np.ix_(rows, columns)])


def _noise(tokens: torch.Tensor, _places: Places, rng: np.random.Generator) -> torch.Tensor:
    strength = float(rng.uniform(0, NOISE))
    drawn = torch.from_numpy(rng.standard_normal(tuple(tokens.shape), dtype=np.float32)).to(tokens.device)
    return tokens + strength * tokens.std(dim=0, correction=0) * drawn


def _channel_dropout(tokens: torch.Tensor, _places: Places, rng: np.random.Generator) -> torch.Tensor:
    kept = rng.random(tokens.shape[1]) >= rng.uniform(0, DROPPED)
    return tokens * torch.from_numpy(kept.astype(np.float32)).to(tokens.device)


OPERATIONS: tuple[Callable[[torch.Tensor, Places, np.random.Generator], torch.Tensor], ...] = (
    _identity, _flip_horizontally, _flip_vertically, _turn, _shift, _noise, _channel_dropout
)  # fmt: skip
"""Operations, each as probable as the others."""


def _taken(tokens: torch.Tensor, places: Places) -> torch.Tensor:
    return tokens[torch.from_numpy(places.reshape(-1).copy()).to(tokens.device)]


class TensorAugmentation(BatchDraws):
    """Draws the operation of every image of a batch, in micro-batches the same as in the complete batch."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def reseed(self, *entropy: int) -> None:
        """Draw from here on as these numbers determine, on every device alike."""
        self._rng = np.random.default_rng(entropy)

    def _state(self) -> Any:
        return self._rng.bit_generator.state

    def _restore(self, state: Any) -> None:
        self._rng.bit_generator.state = state

    def __call__(self, grids: torch.Tensor, side: int) -> torch.Tensor:
        """Augment patch tokens.

        Args:
            grids: (B, side * side, D), row by row; unchanged.
            side: Side of the grid.

        Returns:
            (B, side * side, D).
        """
        rows, batch_rows = self.part_of(len(grids))
        # One number per image determines the rest: how much an operation draws does not affect the next image.
        seeds = self._rng.integers(2**63, size=batch_rows)[rows]
        return torch.stack([augmented(grid, side, int(seed)) for grid, seed in zip(grids, seeds, strict=True)])


def augmented(grid: torch.Tensor, side: int, seed: int) -> torch.Tensor:
    """Return the patch tokens (side * side, D) of an image after the operation that a seed determines."""
    rng = np.random.default_rng(seed)
    operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
    return operation(grid, np.arange(side * side).reshape(side, side), rng)
