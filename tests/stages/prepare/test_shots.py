"""Few-shot samplings: no patient on both sides, exact counts, the same draw whatever the order of the rows."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import by_patient, manifest_of

from schemas.errors import DataError
from schemas.manifest import Manifest
from stages.groups import cluster_of
from stages.prepare.folds import draw_folds, draw_validation
from stages.prepare.shots import draw_shots

SPLITS = st.sampled_from(["train", "train", "train", "val", "test"])


@st.composite
def studies(draw: st.DrawFn, labels: str = "abc") -> Manifest:
    """At least four patients of each class outside of the test images; some patients and some contents are shared."""
    rows = [(label, f"{label}{patient}", f"{label}{patient}") for label in labels for patient in range(4)]
    splits = ["train", "val"] * (len(rows) // 2)
    for number in range(draw(st.integers(0, 25))):
        label = draw(st.sampled_from(labels))
        group = draw(st.none() | st.integers(0, 6))
        content = f"{label}/{draw(st.integers(0, 20))}" if draw(st.booleans()) else f"own {number}"
        rows.append((label, None if group is None else f"{label}g{group}", content))
        splits.append(draw(SPLITS))
    made = manifest_of(rows)
    placed = (row.model_copy(update={"split": split}) for row, split in zip(made.rows, splits, strict=True))
    return made.model_copy(update={"rows": tuple(placed)})


@given(manifest=studies(), shots=st.integers(1, 2), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_counts_are_exact_and_no_patient_is_on_both_sides(manifest: Manifest, shots: int, seed: int) -> None:
    drawn = draw_shots(manifest, shots, seed)
    cluster = cluster_of(manifest)
    of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in drawn.rows:
        of[row.split, row.label].add(cluster[row.path])
    # Patients have one class here, so that the counts are exact.
    assert {key: len(patients) for key, patients in of.items() if key[0] != "test"} == {
        (split, label): shots for split in ("train", "val") for label in manifest.classes
    }
    places = defaultdict(set)
    for row in drawn.rows:
        places[cluster[row.path]].add(row.split)
    assert all(len(splits) == 1 or splits == {"test"} for splits in places.values())
    assert list(drawn.of("test")) == list(manifest.of("test")), "the test images are those of the study"
    # Every image of a drawn patient is there.
    chosen = {cluster[row.path] for row in drawn.rows if row.split != "test"}
    kept = {row.path for row in drawn.rows}
    assert all(row.path in kept for row in manifest.rows if cluster[row.path] in chosen)


@given(manifest=studies(), seed=st.integers(0, 5), order=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_draw_depends_on_seed_and_contents_only(manifest: Manifest, seed: int, order: int) -> None:
    drawn = draw_shots(manifest, 1, seed)
    rows = list(manifest.rows)
    random.Random(order).shuffle(rows)
    shuffled = draw_shots(manifest.model_copy(update={"rows": tuple(rows)}), 1, seed)
    assert sorted(shuffled.rows, key=lambda row: row.path) == sorted(drawn.rows, key=lambda row: row.path)


def test_other_seeds_draw_other_patients() -> None:
    manifest = by_patient({"a": 30, "b": 30}, images=1)
    drawn = {tuple(row.path for row in draw_shots(manifest, 2, seed).of("train")) for seed in range(8)}
    assert len(drawn) > 5


@given(seed=st.integers(0, 20), shots=st.integers(1, 2), combinations=st.lists(st.integers(1, 7), max_size=15))
@settings(max_examples=100, deadline=None)
def test_patients_with_several_labels_count_for_each(seed: int, shots: int, combinations: list[int]) -> None:
    sets = [*combinations, *(1 << place for place in range(3) for _ in range(4))]
    labels = ["|".join(name for place, name in enumerate("abc") if bits >> place & 1) for bits in sets]
    made = manifest_of([(label, f"p{number}", f"{number}") for number, label in enumerate(labels)])
    manifest = made.model_copy(update={"classes": ("a", "b", "c"), "task": "multilabel"})
    drawn = draw_shots(manifest, shots, seed)
    for split in ("train", "val"):
        counts = Counter(name for row in drawn.of(split) for name in manifest.names(row))
        assert all(counts[name] >= shots for name in manifest.classes)
        assert sum(1 for _ in drawn.of(split)) <= 3 * shots, "no patient is drawn without need"


def test_too_few_patients_are_an_error_that_names_the_class() -> None:
    manifest = by_patient({"rare": 5, "common": 12})
    with pytest.raises(DataError, match=r"'rare': 5 patients") as caught:
        draw_shots(manifest, 3, seed=0)
    assert "'common'" not in str(caught.value)
    assert "3 shots" in caught.value.state
    assert "--shots" in caught.value.repair
    assert Counter(row.split for row in draw_shots(manifest, 2, seed=0).rows) == {"train": 12, "val": 12}
    # Patients of test images are not there to be drawn.
    rows = [row.model_copy(update={"split": "test"}) if row.group == "rare0" else row for row in manifest.rows]
    with pytest.raises(DataError, match=r"'rare': 4 patients"):
        draw_shots(manifest.model_copy(update={"rows": tuple(rows)}), 3, seed=0)


def test_a_patient_with_a_test_image_is_not_drawn() -> None:
    manifest = by_patient({"a": 3, "b": 3}, images=2)
    rows = [
        row.model_copy(update={"split": "test"}) if position % 2 and row.group == "a0" else row
        for position, row in enumerate(manifest.rows)
    ]
    drawn = draw_shots(manifest.model_copy(update={"rows": tuple(rows)}), 1, seed=0)
    assert {row.group for row in drawn.rows if row.split != "test"}.isdisjoint({"a0"})


def test_validation_images_are_drawn_again_without_the_test_images() -> None:
    manifest = draw_folds(by_patient({"a": 15, "b": 15}, images=2), 5, 0.25, seed=0)[0]
    drawn = [draw_validation(manifest, 0.25, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert list(drawn[0].of("val")) != list(drawn[2].of("val"))
    for one in drawn:
        assert list(one.of("test")) == list(manifest.of("test"))
        assert Counter(row.split for row in one.rows) == Counter(row.split for row in manifest.rows)
        groups = {split: {row.group for row in one.of(split)} for split in ("train", "val", "test")}
        assert groups["train"].isdisjoint(groups["val"] | groups["test"])
