"""FOA by hand: fitness, the order of the running mean, the search, and batches."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import PlatformError
from schemas.test_time import AdaptOptions, remarks
from stages.methods.batch import Batch
from stages.test_time.foa import ActivationShift, Foa, fitness
from stages.test_time.stream import in_batches, shuffled
from stages.train.source_statistics import Moments, moments_of


def transcribed(logits: Any, tokens: list[Any], mu: list[Any], sigma: list[Any]) -> float:
    """The fitness, from its equation: logits (B, C), per layer class tokens (B, D), source mean and deviation (D,)."""
    count = len(logits)
    entropy = 0.0
    for row in logits:
        exponents = [math.exp(value - max(row)) for value in row]
        p = [value / sum(exponents) for value in exponents]
        entropy -= sum(value * math.log(value) for value in p)
    distance = 0.0
    for layer, mean, deviation in zip(tokens, mu, sigma, strict=True):
        for channel in range(len(mean)):
            column = [row[channel] for row in layer]
            own = sum(column) / count
            spread = math.sqrt(sum((value - own) ** 2 for value in column) / (count - 1))
            distance += (own - mean[channel]) ** 2 + (spread - deviation[channel]) ** 2
    return entropy + 0.4 * (count / 64) * distance


def test_the_fitness_is_that_of_its_equation() -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(9, 4)), [rng.normal(size=(9, 5)) * (layer + 1) for layer in range(3)]
    mu, sigma = [rng.normal(size=5) for _ in range(3)], [rng.uniform(0.5, 2, 5) for _ in range(3)]
    source = Moments(torch.tensor(np.concatenate(mu)), torch.tensor(np.concatenate(sigma)), 32)
    found = fitness(torch.tensor(logits), torch.tensor(np.concatenate(tokens, axis=1)), source)
    expected = transcribed(logits.tolist(), [one.tolist() for one in tokens], mu, sigma)
    assert found == pytest.approx(expected, rel=1e-12)
    # The weight is tied to 64 images: the same statistics in a batch twice as large weigh twice as much.
    uniform = torch.zeros(128, 4)
    far = Moments(torch.full((15,), 3.0), torch.ones(15), 32)
    activations = torch.tensor(rng.normal(size=(128, 15)))
    apart = fitness(uniform, activations, far) - 128 * math.log(4)
    assert apart == pytest.approx(0.8 * float((activations.mean(0) - 3).square().sum()
                                              + (activations.std(0) - 1).square().sum()), rel=1e-9)  # fmt: skip


def test_labels_of_their_own_have_an_entropy_each() -> None:
    source = Moments(torch.zeros(2), torch.zeros(2), 2)
    assert fitness(torch.zeros(8, 3), torch.zeros(8, 2), source, "multilabel") == pytest.approx(8 * 3 * math.log(2))
    assert fitness(torch.full((8, 3), 800.0), torch.zeros(8, 2), source, "multilabel") == 0.0, "no 0 log 0"


def test_the_shift_uses_the_batches_before() -> None:
    shift = ActivationShift(Moments(torch.tensor([1.0, 2.0]), torch.ones(2), 32))
    vectors = torch.tensor([[5.0, 5.0], [7.0, 9.0]])
    assert torch.equal(shift.shifted(vectors), vectors), "the first batch is not shifted"
    shift.update(torch.tensor([6.0, 7.0]))
    torch.testing.assert_close(shift.shifted(vectors), vectors + torch.tensor([1.0 - 6.0, 2.0 - 7.0]))
    shift.update(torch.tensor([16.0, 7.0]))
    torch.testing.assert_close(shift.shifted(vectors), vectors + torch.tensor([1.0 - 7.0, 2.0 - 7.0]))


class Quadratic:
    """Activations move with the candidate; the source is where the candidate is (1, -1, 1, -1)."""

    numbers = 4

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def begin(self, batch: Batch) -> torch.Tensor:
        return torch.linspace(-1, 1, len(batch.labels))[:, None].expand(-1, 4)

    def run(self, state: torch.Tensor, candidate: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert candidate is not None
        self.seen.append(candidate)
        return state + candidate, state + candidate

    def logits(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(vectors), 2)


def run_search(seed: int, batches: int = 12) -> Quadratic:
    target = Quadratic()
    wanted = torch.tensor([1.0, -1.0, 1.0, -1.0])
    source = Moments(wanted, torch.linspace(-1, 1, 16).std().expand(4), 32)
    foa = Foa(target, source, source, seed)
    for _ in range(batches):
        foa.step(Batch(torch.zeros(16, dtype=torch.int64)))
    return target


def test_a_seeded_search_repeats_and_goes_on_from_the_best() -> None:
    first = run_search(7)
    # Another search and numpy's own generator in between change nothing.
    np.random.seed(3)
    run_search(8, 1)
    again = run_search(7)
    assert all(map(torch.equal, first.seen, again.seen))
    assert not torch.equal(first.seen[0], run_search(8, 1).seen[0])
    assert len(first.seen) == 12 * 28
    wanted = torch.tensor([1.0, -1.0, 1.0, -1.0])
    distances = torch.stack([(one - wanted).norm() for one in first.seen]).view(12, 28)
    assert torch.equal(first.seen[27], torch.zeros(4)), "the first best candidate is the mean of the search"
    for number in range(1, 12):
        best = distances[number - 1].argmin()
        assert torch.equal(first.seen[number * 28 + 27], first.seen[(number - 1) * 28 + int(best)])
    assert distances[-1].min() < 0.2 < distances[0].min()


def test_without_cma_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    source = Moments(torch.zeros(4), torch.ones(4), 2)
    with pytest.raises(PlatformError, match=r"\[adapt\]"):
        Foa(Quadratic(), source, source, 1)


def test_batches_are_never_too_small() -> None:
    sizes = {count: [len(batch) for batch in in_batches(range(count), 16)] for count in (5, 16, 23, 24, 40, 47, 48)}
    assert sizes == {5: [5], 16: [16], 23: [23], 24: [16, 8], 40: [16, 16, 8], 47: [16, 16, 15], 48: [16, 16, 16]}
    assert [one for batch in in_batches(range(47), 16) for one in batch] == list(range(47))
    assert sorted(shuffled(50, 1)) == list(range(50))
    assert shuffled(50, 1) == shuffled(50, 1) != shuffled(50, 2)


def test_moments_in_parts_are_those_of_all_rows() -> None:
    rows = torch.randn(50, 7, generator=torch.manual_seed(0)) * 3 + 100
    whole = moments_of([rows])
    parts = moments_of(rows.split(9))
    torch.testing.assert_close(parts.mean, rows.mean(0))
    torch.testing.assert_close(parts.spread, rows.std(0))
    torch.testing.assert_close(parts.spread, whole.spread)
    assert parts.images == 50
    assert moments_of([rows[:1]]).spread.eq(0).all()


def test_remarks_say_what_is_not_shifted() -> None:
    first, second = remarks(AdaptOptions(name="foa", batch=16), 40)
    assert "first 16 of 40 images are not shifted" in first and "order" in first
    assert "shares of the classes" in second
    with pytest.raises(ValueError, match="batch"):
        AdaptOptions(name="foa", batch=7)
