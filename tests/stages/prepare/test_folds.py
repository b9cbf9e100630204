"""Other splits of a manifest: no leaks, every image is tested once, and the first split is reproducible."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import by_patient, manifest_of
from study import make_study

from schemas.errors import DataError
from schemas.manifest import SPLITS, Manifest
from stages.groups import cluster_of
from stages.prepare.folds import all_to_train, draw_again, draw_folds


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Images of two or three classes with shared groups and contents, and some without for each class."""
    labels = "abc"[: draw(st.integers(2, 3))]
    some = st.tuples(st.sampled_from(labels), st.none() | st.integers(0, 9), st.integers(0, 30))
    rows = [
        (label, None if group is None else f"g{group}", f"{label}{content}")
        for label, group, content in draw(st.lists(some, max_size=50))
    ]
    rows += [(label, None, f"own {label}{number}") for label in labels for number in range(8)]
    return manifest_of(rows)


def test_copies_join_the_patients_that_have_them() -> None:
    manifest = manifest_of(
        [("a", "p1", "x"), ("a", "p2", "x"), ("b", "p2", "y"), ("b", None, "y"), ("b", None, "z"), ("a", "p3", "w")]
    )
    units = [cluster_of(manifest)[row.path] for row in manifest.rows]
    assert len(set(units[:4])) == 1
    assert len(set(units)) == 3


@given(manifest=manifests(), folds=st.integers(2, 5), seed=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_image_is_tested_once_and_nothing_leaks(manifest: Manifest, folds: int, seed: int) -> None:
    drawn = draw_folds(manifest, folds, 0.25, seed)
    assert len(drawn) == folds
    tested = Counter(row.path for fold in drawn for row in fold.of("test"))
    assert tested == Counter(row.path for row in manifest.rows)
    for fold in drawn:
        assert [row.model_copy(update={"split": "train"}) for row in fold.rows] == list(manifest.rows)
        places = defaultdict(set)
        for row in fold.rows:
            places[row.id].add(row.split)
            places[row.group].add(row.split)
        assert all(len(splits) == 1 for splits in places.values())
        assert {(row.label, row.split) for row in fold.rows} == {
            (label, split) for label in manifest.classes for split in SPLITS
        }


def test_folds_are_equal_and_stratified() -> None:
    drawn = draw_folds(by_patient({"rare": 10, "common": 40}), 5, 0.25, seed=0)
    for fold in drawn:
        counts = Counter((row.label, row.split) for row in fold.rows)
        assert counts == {
            ("rare", "test"): 6,
            ("rare", "val"): 6,
            ("rare", "train"): 18,
            ("common", "test"): 24,
            ("common", "val"): 24,
            ("common", "train"): 72,
        }
    assert drawn == draw_folds(by_patient({"rare": 10, "common": 40}), 5, 0.25, seed=0)
    (first, *_), (other, *_) = drawn, draw_folds(by_patient({"rare": 10, "common": 40}), 5, 0.25, seed=1)
    assert list(first.of("test")) != list(other.of("test"))
    same_test = draw_folds(by_patient({"rare": 10, "common": 40}), 5, 0.5, seed=0)[0]
    assert list(first.of("test")) == list(same_test.of("test")), "the folds do not depend on the validation share"
    validated = {row.path for fold in drawn for row in fold.of("val")}
    assert len(validated) > 60, "each fold draws its own validation images"


def test_the_splits_of_prepare_are_drawn_again_by_its_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    data = study.settings.data
    assert draw_again(study.manifest, data.val_share, data.test_share, data.seed) == study.manifest
    other = draw_again(study.manifest, data.val_share, data.test_share, data.seed + 1)
    assert other.ids() == study.manifest.ids()
    assert [row.split for row in other.rows] != [row.split for row in study.manifest.rows]


def test_too_few_patients_for_the_folds_are_named() -> None:
    with pytest.raises(DataError, match=r"'rare': 4 groups") as found:
        draw_folds(by_patient({"rare": 4, "common": 20}), 5, 0.25, seed=0)
    assert "--folds" in found.value.repair
    with pytest.raises(DataError, match="need at least 4 per class"):
        draw_folds(by_patient({"rare": 3, "common": 20}), 2, 0.25, seed=0)


def test_all_to_train_keeps_the_images() -> None:
    manifest = by_patient({"a": 3, "b": 3})
    (drawn, *_) = draw_folds(by_patient({"a": 4, "b": 4}), 2, 0.25, seed=0)
    assert all_to_train(drawn).rows == tuple(row.model_copy(update={"split": "train"}) for row in drawn.rows)
    assert all_to_train(manifest) == manifest
