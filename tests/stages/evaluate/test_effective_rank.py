"""Effective rank: of spectra that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from stages.evaluate.effective_rank import effective_rank


def features(spectrum: Sequence[float], rows: int = 40, width: int = 12) -> torch.Tensor:
    """Features whose centred singular values are these, with a mean."""
    torch.manual_seed(0)
    centred = torch.randn(rows, len(spectrum), dtype=torch.double)
    left = torch.linalg.qr(centred - centred.mean(dim=0)).Q  # orthogonal to the vector of ones
    right = torch.linalg.qr(torch.randn(width, len(spectrum), dtype=torch.double)).Q
    return left * torch.tensor(spectrum, dtype=torch.double) @ right.T + 5 * torch.randn(width, dtype=torch.double)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_equal_spreads_count_the_directions(count: int) -> None:
    assert effective_rank(features([2.0] * count)) == pytest.approx(count)


@pytest.mark.parametrize("spectrum", [(3.0, 1.0), (8.0, 4.0, 2.0, 1.0, 0.0)])
def test_unequal_spreads_count_by_their_entropy(spectrum: Sequence[float]) -> None:
    shares = [value / sum(spectrum) for value in spectrum if value]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(features(spectrum)) == pytest.approx(expected)
    assert effective_rank(1e3 * features(spectrum) - 7.0) == pytest.approx(expected)
    assert effective_rank(features(spectrum).float()) == pytest.approx(expected, rel=1e-4)


def test_there_are_no_more_directions_than_rows_less_one() -> None:
    assert effective_rank(torch.randn(3, 50)) <= 2.0


def test_equal_rows_have_none() -> None:
    assert effective_rank(torch.full((7, 3), 0.1)) == 0.0
    assert effective_rank(torch.zeros(7, 3)) == 0.0
    assert effective_rank(torch.randn(1, 3)) == 0.0
