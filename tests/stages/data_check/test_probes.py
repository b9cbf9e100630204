"""Probes: shortcuts are found, chance is not mistaken for one, and patients do not vote on themselves."""

from __future__ import annotations

import numpy as np
import pytest

from stages.data_check.probes import _neighbours, _permutation, probe_column, probe_vectors

CLASSES = 3
IMAGES = 120


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def labels(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.arange(IMAGES) % CLASSES)


def targets(labels: np.ndarray) -> np.ndarray:
    return np.eye(CLASSES)[labels]


def test_a_shortcut_is_suspected_and_noise_is_not(rng: np.random.Generator, labels: np.ndarray) -> None:
    noise = rng.normal(size=(IMAGES, 3))
    alone = np.arange(IMAGES)
    assert not probe_vectors("noise", noise, targets(labels), alone, True).suspected
    shortcut = probe_vectors("shift", noise + 2 * labels[:, None], targets(labels), alone, True)
    assert shortcut.suspected and shortcut.accuracy > 0.8
    assert shortcut.chance[1] < 1 / CLASSES < shortcut.chance[2]


def test_similar_images_of_a_patient_are_no_shortcut(rng: np.random.Generator) -> None:
    patient = np.repeat(np.arange(30), 4)
    rows = np.repeat(rng.normal(size=(30, 3)), 4, axis=0) + rng.normal(size=(120, 3)) * 0.01
    by_patient = targets(np.repeat(rng.integers(0, CLASSES, 30), 4))
    assert not probe_vectors("patient", rows, by_patient, patient, True).suspected
    assert probe_vectors("patient", rows, by_patient, np.arange(120), True).suspected


def test_equal_vectors_predict_nothing(labels: np.ndarray) -> None:
    probe = probe_vectors("constant", np.ones((IMAGES, 2)), targets(labels), np.arange(IMAGES), True)
    assert not probe.suspected and probe.accuracy < 0.5


def test_a_column_that_depends_on_the_class(rng: np.random.Generator, labels: np.ndarray) -> None:
    alone = np.arange(IMAGES)
    assert not probe_column(
        "site", rng.choice(["A", "B", "C"], IMAGES).tolist(), targets(labels), alone, True
    ).suspected
    site = np.where((labels == 0) & (rng.random(IMAGES) < 0.4), "A", "B").tolist()
    assert probe_column("site", site, targets(labels), alone, True).suspected


def test_several_labels(rng: np.random.Generator) -> None:
    flags = (rng.random((IMAGES, 4)) < 0.3).astype(float)
    alone = np.arange(IMAGES)
    assert not probe_vectors("noise", rng.normal(size=(IMAGES, 2)), flags, alone, False).suspected
    assert probe_vectors("flags", flags + rng.normal(size=flags.shape) * 0.1, flags, alone, False).suspected


def test_neighbours_are_of_other_clusters(rng: np.random.Generator) -> None:
    clusters = rng.integers(0, 5, 60)
    nearest = _neighbours(rng.normal(size=(60, 2)), clusters)
    assert (clusters[nearest] != clusters[:, None]).all()
    few = _neighbours(np.zeros((4, 1)), np.array([0, 0, 0, 1]))
    assert (few[:3] == 3).sum() == 3 and (few == 4).sum() == 6


def test_a_permutation_passes_labels_on_by_cluster(rng: np.random.Generator) -> None:
    clusters = np.array([2, 0, 0, 1, 1, 1])
    for _ in range(20):
        source = clusters[_permutation(clusters, rng)]
        givers = [set(source[clusters == number].tolist()) for number in range(3)]
        assert all(len(giver) == 1 for giver in givers) and len(set.union(*givers)) == 3
