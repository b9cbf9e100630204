"""Sampling: shares of the classes, epoch by epoch, the same from the same seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.parse import parse_settings
from stages.train.data import EpochSampler
from stages.train.sampling import ClassSampler, make_sampler, strata


def sampler(labels: list[Any], classes: int = 3, seed: int = 0, **keys: Any) -> EpochSampler:
    return make_sampler(parse_settings({"train": {"batch_size": 8, **keys}}).train, labels, classes, seed)


def epoch(sampler: EpochSampler, number: int) -> list[tuple[int, int]]:
    sampler.epoch = number
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(len(batch) == sampler.batch_size for batch in batches[:-1])
    return [index for batch in batches for index in batch]


LABELS = [0] * 60 + [1] * 9 + [2] * 3


def test_natural_is_the_published_order() -> None:
    found, published = sampler(LABELS), EpochSampler(len(LABELS), 8, 0)
    assert type(found) is EpochSampler
    assert epoch(found, 3) == epoch(published, 3)


def test_balanced_draws_each_class_equally_often() -> None:
    found = sampler(LABELS, sampling="balanced", epochs=5)
    for number in (1, 2, 5):
        drawn = [position for _, position in epoch(found, number)]
        assert Counter(LABELS[position] for position in drawn) == {0: 24, 1: 24, 2: 24}
        times = Counter(drawn)
        assert len([position for position in times if position < 60]) == 24, "none again before all were there"
        assert {times[position] for position in range(69, 72)} == {8}
        assert {times[position] for position in range(60, 69)} == {2, 3}


def test_decay_goes_from_balanced_to_natural() -> None:
    found = sampler(LABELS, sampling="decay", epochs=5)
    counts = [Counter(LABELS[position] for _, position in epoch(found, number)) for number in range(1, 6)]
    assert counts[0] == {0: 24, 1: 24, 2: 24}
    assert counts[4] == {0: 60, 1: 9, 2: 3}
    assert [count[0] for count in counts] == [24, 33, 42, 51, 60]
    assert sorted(position for _, position in epoch(found, 5)) == list(range(72)), "at the end each image once"
    assert Counter(LABELS[position] for _, position in epoch(sampler(LABELS, sampling="decay", epochs=1), 1))[2] == 24


def test_a_repeat_is_augmented_anew() -> None:
    drawn = epoch(sampler(LABELS, sampling="balanced", epochs=5), 2)
    assert len(set(drawn)) == len(drawn)
    others = epoch(sampler(LABELS, sampling="balanced", epochs=5), 3)
    assert not set(drawn) & set(others)


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    seed=st.integers(0, 9),
    mode=st.sampled_from(["balanced", "decay"]),
    epochs=st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_shares_are_kept_to_within_one_draw(counts: list[int], seed: int, mode: str, epochs: int) -> None:
    labels = [name for name, count in enumerate(counts) for _ in range(count)]
    n = len(labels)
    found = sampler(labels, len(counts), seed, sampling=mode, epochs=epochs)
    for number in range(1, epochs + 1):
        drawn = Counter(labels[position] for _, position in epoch(found, number))
        t = (number - 1) / max(epochs - 1, 1) if mode == "decay" else 0.0
        assert drawn.total() == n
        for name, count in enumerate(counts):
            share = (1 - t) / len(counts) + t * count / n
            assert abs(drawn[name] - share * n) < 1 + 1e-6
        assert epoch(found, number) == epoch(found, number)


def test_on_average_the_shares_are_exact() -> None:
    labels = [0] * 8 + [1] * 2
    drawn = Counter(
        labels[position]
        for seed in range(400)
        for _, position in epoch(sampler(labels, 3, seed, sampling="balanced", epochs=3), 1)
    )
    assert drawn[0] == pytest.approx(2000, abs=1)
    odd = Counter(
        position
        for seed in range(600)
        for _, position in epoch(sampler([0, 0, 1, 1, 1], 2, seed, sampling="balanced"), 1)
    )
    assert odd[0] + odd[1] == pytest.approx(1500, abs=60)
    assert odd[0] == pytest.approx(odd[1], abs=100)


def test_seeds_and_epochs_differ() -> None:
    first = epoch(sampler(LABELS, sampling="balanced"), 1)
    assert first != epoch(sampler(LABELS, seed=1, sampling="balanced"), 1)
    assert first != [(1, position) for _, position in epoch(sampler(LABELS, sampling="balanced"), 2)]


def test_an_image_with_several_labels_counts_as_its_rarest() -> None:
    labels = [[1, 0, 0]] * 6 + [[1, 1, 0]] * 3 + [[1, 1, 1]] * 1 + [[0, 0, 0]] * 2
    np.testing.assert_array_equal(strata(labels, 3), [0] * 6 + [1] * 3 + [2] + [3] * 2)
    found = make_sampler(parse_settings({"train": {"sampling": "balanced"}}).train, labels, 3, 0)
    assert isinstance(found, ClassSampler)
    np.testing.assert_allclose(found.shares(), 0.25)
    assert Counter(strata(labels, 3)[position] for _, position in epoch(found, 1)) == {0: 3, 1: 3, 2: 3, 3: 3}
