"""Comparison of models: paired differences on the same rows, and errors for different rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from schemas.errors import EvaluationError
from schemas.manifest import ManifestRow
from stages.evaluate.bootstrap import group_draws
from stages.evaluate.compare import compare
from stages.evaluate.metrics import compute_metrics
from stages.evaluate.predictions import Predictions, write_predictions

CLASSES = ("a", "b", "c")


def predictions(strength: float, seed: int = 0, n: int = 120, classes: tuple[str, ...] = CLASSES) -> Predictions:
    """Predictions with two rows per group; the noise of a seed does not depend on the strength."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(classes)
    logits = rng.normal(size=(n, len(classes))) + strength * np.eye(len(classes))[labels]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = tuple(
        ManifestRow(id=f"{i:064x}", path=f"{i:03d}.png", label=classes[label], group=f"g{i // 2}", split="test")
        for i, label in enumerate(labels)
    )
    return Predictions(classes, rows, p.astype(np.float32))


def write(folder: Path, table: Predictions) -> Path:
    write_predictions(table, folder / "predictions.parquet")
    return folder


def test_identical_predictions_differ_by_nothing(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, predictions(1.0)) for name in "ab"]
    first, second = compare(folders).models
    assert first.differences == {}
    assert set(second.differences) == {"auc", "accuracy", "balanced_accuracy", "brier"}
    assert all((found.value, found.interval) == (0.0, (0.0, 0.0)) for found in second.differences.values())


@pytest.mark.parametrize("classes", [CLASSES, ("a", "b")])
def test_the_intervals_are_of_the_same_draws(
    tmp_path: Path, classes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [predictions(1.0, 0, classes=classes), predictions(1.4, 0, classes=classes)]
    comparison = compare([write(tmp_path / str(number), table) for number, table in enumerate(tables)])
    assert (comparison.split, comparison.images, comparison.groups) == ("test", 120, 60)
    found = comparison.models[1].differences
    y = tables[0].labels
    groups = [row.group for row in tables[0].rows]
    weights = np.concatenate(list(group_draws(groups)), axis=1)
    samples: dict[str, list[float]] = {name: [] for name in found}
    # An interval of each model itself, which is not compared, takes most of the time.
    monkeypatch.setattr("stages.evaluate.metrics.auc_interval", lambda *_: None)
    for draw in weights.T[:200]:
        rows = np.repeat(np.arange(len(y)), draw.astype(int))
        own = [compute_metrics(y[rows], table.probabilities[rows], classes) for table in tables]
        for name, values in samples.items():
            values.append(getattr(own[1], name) - getattr(own[0], name))
    for name, difference in found.items():
        assert difference.interval is not None
        low, high = np.percentile(samples[name], [2.5, 97.5])
        # With 200 of the 1,000 samples, each end of the interval is determined by five.
        width = difference.interval[1] - difference.interval[0]
        assert difference.interval == pytest.approx((low, high), abs=0.2 * width)
        assert difference.interval[0] < difference.value < difference.interval[1]
    assert found["auc"].interval is not None
    assert found["auc"].interval[0] > 0, "the same noise with a stronger signal is better on nearly every draw"


def test_the_difference_is_that_of_the_metrics(tmp_path: Path) -> None:
    tables = [predictions(1.0, 0), predictions(1.0, 1)]
    models = compare([write(tmp_path / str(number), table) for number, table in enumerate(tables)]).models
    y = tables[0].labels
    aucs = [sk.roc_auc_score(y, table.probabilities, multi_class="ovr", average="macro") for table in tables]
    assert models[1].differences["auc"].value == pytest.approx(aucs[1] - aucs[0], abs=1e-6)
    assert models[1].metrics.auc == pytest.approx(aucs[1], abs=1e-6)


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    table = predictions(1.0)
    turned = Predictions(table.classes, table.rows[::-1], table.probabilities[::-1])
    models = compare([write(tmp_path / "a", table), write(tmp_path / "b", turned)]).models
    assert models[1].differences["auc"].interval == (0.0, 0.0)


def changed(case: str) -> Predictions:
    table = predictions(1.0)
    update: dict[str, Any] = {"label": {"label": "b"}, "split": {"split": "val"}, "group": {"group": "x"}}.get(case, {})
    if case == "fewer":
        return Predictions(table.classes, table.rows[:-1], table.probabilities[:-1])
    if case == "classes":
        return replace(table, classes=("c", "b", "a"))
    return replace(table, rows=(table.rows[0].model_copy(update=update), *table.rows[1:]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fewer", "120 rows of test against 119 of test; 119 images"),
        ("split", "test and val"),
        ("label", "labels or groups"),
        ("group", "labels or groups"),
        ("classes", "different classes"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, case: str, message: str) -> None:
    folders = [write(tmp_path / "a", predictions(1.0)), write(tmp_path / "b", changed(case))]
    with pytest.raises(EvaluationError, match=message) as caught:
        compare(folders)
    assert "fpt evaluate" in str(caught.value)


def test_a_class_that_does_not_occur_leaves_the_auc_out(tmp_path: Path) -> None:
    tables = [predictions(strength, classes=("a", "b")) for strength in (1.0, 2.0)]
    wider = [Predictions(CLASSES, t.rows, np.pad(t.probabilities, ((0, 0), (0, 1)))) for t in tables]
    models = compare([write(tmp_path / str(number), table) for number, table in enumerate(wider)]).models
    assert set(models[1].differences) == {"accuracy", "balanced_accuracy", "brier"}


def test_one_group_has_no_interval(tmp_path: Path) -> None:
    table = predictions(1.0)
    alone = replace(table, rows=tuple(row.model_copy(update={"group": "g"}) for row in table.rows))
    models = compare([write(tmp_path / name, alone) for name in "ab"]).models
    assert all(found.interval is None for found in models[1].differences.values())


def test_folders_without_predictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no predictions"):
        compare([tmp_path])
    with pytest.raises(EvaluationError, match="No evaluations to compare"):
        compare([])
