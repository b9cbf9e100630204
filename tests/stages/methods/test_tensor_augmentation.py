"""Augmentation of cached tokens: each operation, and draws that depend on nothing but seed and image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stages.methods.tensor_augmentation import OPERATIONS, TensorAugmentation, augmented

SIDE, WIDTH = 5, 12
NAMES = [operation.__name__ for operation in OPERATIONS]


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(SIDE**2, WIDTH, generator=torch.Generator().manual_seed(seed)) + 3


def after(name: str, grid: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The grid (side, side, D) after an operation with the draws of a seed."""
    operation = OPERATIONS[NAMES.index(name)]
    result = operation(grid, np.arange(SIDE**2).reshape(SIDE, SIDE), np.random.default_rng(seed))
    return result.view(SIDE, SIDE, WIDTH)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_identity", lambda grid: grid),
        ("_flip_horizontally", lambda grid: grid.flip(1)),
        ("_flip_vertically", lambda grid: grid.flip(0)),
    ],
)
def test_flips_move_tokens(name: str, expected: Callable[[torch.Tensor], torch.Tensor]) -> None:
    grid = tokens()
    assert torch.equal(after(name, grid), expected(grid.view(SIDE, SIDE, WIDTH)))


def test_turns_are_by_quarters() -> None:
    grid = tokens().view(SIDE, SIDE, WIDTH)
    quarters = [torch.rot90(grid, k) for k in (1, 2, 3)]
    seen = {
        next(k for k, turned in enumerate(quarters, 1) if torch.equal(after("_turn", grid.flatten(0, 1), seed), turned))
        for seed in range(30)
    }
    assert seen == {1, 2, 3}


def test_a_shift_repeats_the_edge() -> None:
    grid = tokens().view(SIDE, SIDE, WIDTH)
    padded = torch.nn.functional.pad(grid.permute(2, 0, 1)[None], (1, 1, 1, 1), mode="replicate")[0].permute(1, 2, 0)
    shifts = {(y, x): padded[y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)}
    seen = {
        next(by for by, shifted in shifts.items() if torch.equal(after("_shift", grid.flatten(0, 1), seed), shifted))
        for seed in range(200)
    }
    assert seen == set(shifts)


def test_noise_is_scaled_by_the_deviation_of_each_channel() -> None:
    grid = tokens() * torch.logspace(-2, 2, WIDTH)
    grid[:, 3] = 7.0
    deviations = grid.std(dim=0, correction=0)
    strengths = []
    for seed in range(300):
        noise = after("_noise", grid, seed).flatten(0, 1) - grid
        assert not noise[:, 3].any(), "a constant channel has no deviation"
        relative = (noise / deviations)[:, deviations > 0]
        strengths.append(float(relative.std()))
        assert relative.std(dim=0).max() < 3 * strengths[-1], "noise follows the deviation of its channel"
    assert min(strengths) < 0.05
    assert 0.45 < max(strengths) < 0.6


def test_channels_are_dropped_in_all_tokens_of_an_image() -> None:
    grid, counts = tokens(), []
    for seed in range(300):
        left = after("_channel_dropout", grid, seed).flatten(0, 1)
        dropped = (left == 0).all(dim=0)
        assert torch.equal(left[:, ~dropped], grid[:, ~dropped])
        counts.append(int(dropped.sum()))
    assert 0 < np.mean(counts) < 0.2 * WIDTH


def test_operations_are_equally_probable() -> None:
    grid, places = tokens(), np.arange(SIDE**2).reshape(SIDE, SIDE)
    counts = dict.fromkeys(NAMES, 0)
    for seed in range(700):
        rng = np.random.default_rng(seed)
        number = int(rng.integers(len(OPERATIONS)))
        counts[NAMES[number]] += 1
        assert torch.equal(augmented(grid, SIDE, seed), OPERATIONS[number](grid, places, rng))
    assert all(60 < count < 140 for count in counts.values()), counts


def test_draws_differ_between_images_batches_and_seeds_and_leave_the_input_unchanged() -> None:
    grids = tokens()[None].repeat(32, 1, 1)
    before = grids.clone()
    one, other = TensorAugmentation(), TensorAugmentation()
    one.reseed(0, 1)
    other.reseed(0, 2)
    first, second, third = one(grids, SIDE), one(grids, SIDE), other(grids, SIDE)
    assert torch.equal(grids, before)
    assert not any(torch.equal(left, right) for left, right in ((first, second), (first, third)))
    assert len({row.numpy().tobytes() for row in first}) > 5
    one.reseed(0, 1)
    assert torch.equal(one(grids, SIDE), first)


def test_micro_batches_have_the_draws_of_the_batch() -> None:
    grids = torch.stack([tokens(seed) for seed in range(8)])
    complete, divided = TensorAugmentation(), TensorAugmentation()
    for augmentation in (complete, divided):
        augmentation.reseed(3, 1)
    for size in (4, 8, 1):
        expected = complete(grids, SIDE)
        parts = []
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            divided.draw_part(None if size == 8 else rows, 8, again=start > 0)
            parts.append(divided(grids[rows], SIDE))
        assert torch.equal(torch.cat(parts), expected)
