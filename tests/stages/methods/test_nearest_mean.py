"""Nearest class mean: against scikit-learn, with several labels, and through the stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from study import make_study, predict

from schemas.errors import TrainingError
from schemas.tasks import Task
from stages.evaluate.evaluator import evaluate
from stages.methods.base import FitInputs
from stages.methods.fit_rows import FitRows
from stages.methods.nearest_mean import METHOD
from stages.train.bundle import load_bundle
from stages.train.trainer import train


def rows(labels: np.ndarray, seed: int = 0, classes: int = 3) -> FitRows:
    rng = np.random.default_rng(seed)
    first = labels if labels.ndim == 1 else labels @ np.arange(1, classes + 1)
    x = rng.normal(size=(len(labels), 8)) + 1.5 * np.eye(8)[first % 8]
    return FitRows(x.astype(np.float32), labels, [str(n) for n in range(len(labels))], classes)


def test_the_nearest_mean_of_unit_vectors_is_that_of_scikit_learn() -> None:
    train_rows, other = rows(np.arange(30) % 3), rows(np.arange(21) % 3, seed=1)
    model, held_out = METHOD.fit(FitInputs(train_rows, other))
    assert held_out is None
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train_rows.x, other.x)]
    reference = NearestCentroid().fit(unit[0], train_rows.y)
    # Of unit means the nearest is the one with the largest cosine.
    means = reference.centroids_ / np.linalg.norm(reference.centroids_, axis=1, keepdims=True)
    expected = (unit[1] @ means.T).argmax(axis=1)
    logits = model.row_logits(torch.from_numpy(other.x))
    assert logits.argmax(dim=1).tolist() == expected.tolist()
    np.testing.assert_allclose(0.07 * logits.numpy(), unit[1] @ means.T, atol=1e-5)


def test_with_several_labels_a_row_is_compared_with_the_rows_without_each() -> None:
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0]] * 4)
    train_rows = rows(labels, classes=2)
    task: Task = "multilabel"
    model, _ = METHOD.fit(FitInputs(train_rows, train_rows, task=task))
    predicted = model.row_logits(torch.from_numpy(train_rows.x)) > 0
    assert (predicted.numpy() == labels).mean() > 0.7


def test_a_class_without_rows_is_refused() -> None:
    with pytest.raises(TrainingError, match="no training images"):
        METHOD.fit(FitInputs(rows(np.zeros(6, np.int64)), rows(np.arange(3))))


def test_it_is_trained_evaluated_and_predicts_like_every_method(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="nearest-mean")
    files = study.files(study.extract())
    result = train(study.settings, files, tmp_path / "model", tmp_path / "checkpoints")
    assert result.learnable == 0
    metrics = evaluate(files, tmp_path / "model", tmp_path / "evaluation", "train")
    assert metrics.accuracy > 0.8
    assert "nearest class mean" in (tmp_path / "evaluation/report.html").read_text()
    image = next((tmp_path / "images/stripe").iterdir())
    row = predict(tmp_path / "model", [image], study.settings.lpm, tmp_path)[0]
    assert row.predicted in load_bundle(tmp_path / "model").spec.classes
