"""Separation of classes in a space of features: by hand on few points, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
from study import Study
from task_studies import task_study

from stages.evaluate.separation import centroid_margin, separate, separation_of_lpm, separation_of_model
from stages.store.reader import open_store
from stages.tasks import label_array
from stages.train.trainer import train


def test_the_margin_of_five_points_by_hand() -> None:
    x = np.array([[0.0], [2.0], [10.0], [14.0], [100.0]])
    labels = np.array([0, 0, 1, 1, 2])
    # Own mean without the point itself, nearest other mean with all its points; the only point of class 2 is left out.
    terms = [(12 - 2) / 14, (10 - 2) / 12, (9 - 4) / 13, (13 - 4) / 17]
    assert centroid_margin(x, labels) == pytest.approx(np.mean(terms))
    assert centroid_margin(x, np.zeros(5, np.int64)) is None
    assert centroid_margin(x, np.arange(5)) is None


def test_nothing_depends_on_scale_and_clear_classes_are_far_apart() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 60)
    mixed = rng.standard_normal((60, 8))
    apart = mixed + 20 * np.eye(8)[labels]
    near, far = separate(mixed, labels), separate(apart, labels)
    scaled = separate(1000 * apart, labels)
    assert scaled.silhouette == pytest.approx(far.silhouette)
    assert scaled.margin == pytest.approx(far.margin)
    assert scaled.effective_rank == pytest.approx(far.effective_rank)
    assert far.silhouette is not None and near.silhouette is not None and far.silhouette > 0.7 > 0.2 > near.silhouette
    assert far.margin is not None and near.margin is not None and far.margin > 0.7 > 0.2 > near.margin
    assert far.effective_rank is not None and near.effective_rank is not None
    assert far.effective_rank < near.effective_rank


def test_several_labels_are_averaged() -> None:
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((30, 4)), rng.integers(0, 2, (30, 3))
    each = [separate(x, column) for column in labels.T]
    together = separate(x, labels)
    assert together.silhouette == pytest.approx(np.mean([one.silhouette for one in each]))
    assert together.margin == pytest.approx(np.mean([one.margin for one in each]))


def test_features_of_the_frozen_and_of_an_adapted_lpm(study: Study) -> None:
    receipt = study.extract()
    rows = list(study.manifest.of("test"))
    ids = [row.id for row in rows]
    store = open_store(study.cache, receipt)
    pooled = store.read_rows(store.locate(ids), ids, ["pooled"])["pooled"]
    labels = label_array([row.label for row in rows], study.manifest.classes, "multiclass")
    before = separation_of_lpm(study.files(receipt))
    assert before == separate(pooled[:, 0], labels), "test_vit reads its class token"
    assert separation_of_lpm(study.files(None)) is None
    files = study.files(None)
    # A learning rate of nearly nothing leaves the blocks as they are.
    settings = study.changed(train={"epochs": 1, "lr": 1e-9}).model_copy(update={"method": "finetune"})
    settings = settings.model_copy(
        update={
            "methods": settings.methods.model_copy(
                update={"finetune": settings.methods.finetune.model_copy(update={"source": "image"})}
            )
        }
    )
    train(settings, files, study.root / "model", study.root / "checkpoints")
    after = separation_of_model(files, study.root / "model", "cpu")
    assert before is not None and after is not None
    assert after.silhouette == pytest.approx(before.silhouette, abs=1e-3)
    assert after.margin == pytest.approx(before.margin, abs=1e-3)
    assert after.effective_rank == pytest.approx(before.effective_rank, rel=1e-3)
    train(
        study.settings.model_copy(update={"method": "linear"}), study.files(receipt), study.root / "probe", study.root
    )
    assert separation_of_model(study.files(receipt), study.root / "probe", "cpu") is None


def test_a_study_with_several_labels(tmp_path) -> None:  # type: ignore[no-untyped-def]
    study = task_study(tmp_path, "multilabel")
    measured = separation_of_lpm(study.files(study.extract()))
    assert measured is not None and measured.silhouette is not None and measured.margin is not None
