"""Multi-label and ordinal metrics, compared with scikit-learn and manual calculation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from schemas.errors import EvaluationError
from schemas.manifest import Manifest, ManifestRow
from schemas.results import Metrics
from schemas.tasks import Task
from stages.evaluate.bootstrap import group_draws
from stages.evaluate.compare import compare
from stages.evaluate.curves import roc_curves
from stages.evaluate.metrics import compute_metrics
from stages.evaluate.predictions import Predictions, read_predictions, write_predictions
from stages.evaluate.reliability import reliability
from stages.evaluate.report import confident_mistakes
from stages.scores import macro_auc
from stages.tasks import decide, label_array, pool, texts

CLASSES = ("a", "b", "c")


def labelled(n: int = 90, seed: int = 0, strength: float = 1.0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = (np.random.default_rng(9).random((n, classes)) < [0.5, 0.3, 0.15][:classes]).astype(np.int64)
    return y, 1 / (1 + np.exp(-(rng.normal(size=y.shape) + strength * (2 * y - 1.5))))


def table(task: Task, strength: float = 1.0, seed: int = 0, n: int = 90) -> Predictions:
    if task == "multilabel":
        y, p = labelled(n, seed, strength)
    else:
        y = np.arange(n) % 3
        logits = np.random.default_rng(seed).normal(size=(n, 3)) - strength * np.abs(np.arange(3) - y[:, None])
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = tuple(
        ManifestRow(id=f"{i:064x}", path=f"{i:03d}.png", label=label, group=f"g{i // 2}", split="test")
        for i, label in enumerate(texts(y, CLASSES))
    )
    return Predictions(CLASSES, rows, p.astype(np.float32), None, task)


def test_labels_are_judged_each_by_itself() -> None:
    y, p = labelled()
    metrics = compute_metrics(y, p, CLASSES, groups=[str(i // 3) for i in range(90)], task="multilabel")
    said = p >= 0.5
    assert metrics.task == "multilabel"
    assert metrics.auc == pytest.approx(sk.roc_auc_score(y, p))
    assert list(metrics.auc_per_class.values()) == pytest.approx(list(sk.roc_auc_score(y, p, average=None)))
    assert metrics.average_precision == pytest.approx(sk.average_precision_score(y, p))
    assert metrics.f1 == pytest.approx(sk.f1_score(y, said, average="macro"))
    assert metrics.f1_micro == pytest.approx(sk.f1_score(y, said, average="micro"))
    assert metrics.accuracy == pytest.approx((said == y).all(axis=1).mean())
    assert metrics.hamming == pytest.approx((said != y).mean())
    assert metrics.balanced_accuracy == pytest.approx(
        np.mean([sk.balanced_accuracy_score(y[:, c], said[:, c]) for c in range(3)])
    )
    assert metrics.brier == pytest.approx(np.mean([sk.brier_score_loss(y[:, c], p[:, c]) for c in range(3)]))
    for (tn, fp, fn, tp), c in zip(metrics.confusion, range(3), strict=True):
        assert (tp, fn) == ((y[:, c] & said[:, c]).sum(), (y[:, c] & ~said[:, c]).sum())
        assert tn + fp + fn + tp == 90
    assert metrics.quadratic_kappa is None
    assert metrics.auc_interval is not None
    assert metrics.auc_interval[0] < metrics.auc < metrics.auc_interval[1]
    assert Metrics.model_validate_json(metrics.model_dump_json()) == metrics


def test_the_calibration_of_labels_is_that_of_their_probabilities() -> None:
    p = np.full((1000, 2), 0.25)
    y = np.zeros((1000, 2), np.int64)
    y[:250, 0] = y[:500, 1] = 1
    metrics = compute_metrics(y, p, ("a", "b"), task="multilabel")
    assert metrics.calibration_error == pytest.approx((0.0 + 0.25) / 2, abs=1e-6)
    curve = reliability(y, p)
    assert (curve.confidence.tolist(), curve.rows.tolist()) == ([0.25], [2000])
    assert curve.accuracy[0] == pytest.approx(0.375)


def test_two_labels_both_count() -> None:
    y, p = labelled(classes=2)
    assert macro_auc(y, p) == pytest.approx(sk.roc_auc_score(y, p))
    roc = roc_curves(y, p, ("a", "b"))
    assert not roc.single
    assert roc.mean is not None
    assert roc_curves(y[:, 1], p, ("a", "b")).single


def test_a_label_without_rows_is_not_averaged_away() -> None:
    y, p = labelled()
    for value in (0, 1):
        y[:, 1] = value
        metrics = compute_metrics(y, p, CLASSES, task="multilabel")
        assert metrics.auc is None
        assert metrics.absent_classes == ("b",)
        assert (metrics.average_precision is None) == (value == 0)
    nothing = compute_metrics(np.zeros((4, 2)), np.full((4, 2), 0.1), ("a", "b"), task="multilabel")
    assert (nothing.f1, nothing.accuracy, nothing.hamming) == (0.0, 1.0, 0.0)


def test_shapes_that_do_not_fit_the_task() -> None:
    y, p = labelled()
    for labels, task in ((y[:, 0], "multilabel"), (y, "multiclass"), (2 * y, "multilabel")):
        with pytest.raises(EvaluationError):
            compute_metrics(labels, p, CLASSES, task=task)  # type: ignore[arg-type]


def test_the_predicted_grade_costs_least() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.5), 500)
    costs = p @ (np.arange(5)[:, None] - np.arange(5)) ** 2
    np.testing.assert_array_equal(decide(p, "ordinal"), costs.argmin(axis=1))
    assert (decide(p, "ordinal") != p.argmax(axis=1)).any()
    assert decide(np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]), "ordinal").tolist() == [0, 1, 1]
    np.testing.assert_array_equal(decide(p.astype(np.float32), "ordinal"), decide(p, "ordinal"))


def test_grades_are_judged_by_their_prediction() -> None:
    found = table("ordinal")
    metrics = compute_metrics(found.labels, found.probabilities, CLASSES, task="ordinal")
    assert metrics.quadratic_kappa == pytest.approx(
        sk.cohen_kappa_score(found.labels, found.predicted, weights="quadratic")
    )
    assert metrics.cohen_kappa is None
    assert metrics.accuracy == pytest.approx((found.labels == found.predicted).mean())
    assert metrics.auc == pytest.approx(
        sk.roc_auc_score(found.labels, found.probabilities, multi_class="ovr"), abs=1e-6
    )


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_paired_intervals_are_of_the_same_draws(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [table(task, 1.0), table(task, 1.5)]
    for number, one in enumerate(tables):
        write_predictions(one, tmp_path / str(number) / "predictions.parquet")
    found = compare([tmp_path / "0", tmp_path / "1"]).models[1].differences
    groups = [row.group for row in tables[0].rows]
    weights = np.concatenate(list(group_draws(groups)), axis=1)
    samples: dict[str, list[float]] = {name: [] for name in found}
    # An interval of each model itself, which is not compared, takes most of the time.
    for module in ("metrics", "multilabel"):
        monkeypatch.setattr(f"stages.evaluate.{module}.auc_interval", lambda *_: None)
    for draw in weights.T[:150]:
        rows = np.repeat(np.arange(len(groups)), draw.astype(int))
        own = [compute_metrics(one.labels[rows], one.probabilities[rows], CLASSES, task=task) for one in tables]
        for name, values in samples.items():
            values.append(getattr(own[1], name) - getattr(own[0], name))
    assert {"auc", "balanced_accuracy", "brier"} < found.keys()
    for name, difference in found.items():
        assert difference.interval is not None
        low, high = np.percentile(samples[name], [2.5, 97.5])
        width = difference.interval[1] - difference.interval[0]
        assert difference.interval == pytest.approx((low, high), abs=0.25 * width)


def test_models_of_other_tasks_are_not_compared(tmp_path: Path) -> None:
    ordinal = table("ordinal")
    write_predictions(ordinal, tmp_path / "a/predictions.parquet")
    plain = Predictions(ordinal.classes, ordinal.rows, ordinal.probabilities)
    write_predictions(plain, tmp_path / "b/predictions.parquet")
    with pytest.raises(EvaluationError, match="different tasks"):
        compare([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_predictions_come_back(tmp_path: Path, task: Task) -> None:
    written = table(task)
    write_predictions(written, tmp_path / "p.parquet")
    found = read_predictions(tmp_path / "p.parquet")
    assert (found.task, found.rows) == (task, written.rows)
    np.testing.assert_array_equal(found.labels, written.labels)
    np.testing.assert_array_equal(found.predicted, written.predicted)


def test_labels_and_their_text() -> None:
    array = label_array(["", "a|c", "b"], CLASSES, "multilabel")
    assert array.tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert texts(array, CLASSES) == ["", "a|c", "b"]
    assert texts(label_array(["b", "a"], CLASSES, "ordinal"), CLASSES) == ["b", "a"]


def test_the_pool_of_sure_models_stays_a_probability() -> None:
    p = pool([np.array([[1.0, 0.0]]), np.array([[0.0, 0.0]])], "multilabel")
    assert p[0] == pytest.approx([0.5, 0.0], abs=1e-6)


def test_mistakes_are_sorted_by_what_is_wrong_most() -> None:
    rows = tuple(
        ManifestRow(id=f"{i:064x}", path=f"{i}.png", label=label, group="g", split="test")
        for i, label in enumerate(("a", "a|b", "", "c"))
    )
    p = np.array([[0.9, 0.6, 0.1], [0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.99, 0.0, 0.8]], np.float32)
    found = Predictions(CLASSES, rows, p, None, "multilabel")
    assert confident_mistakes(found) == [3, 1, 0]
    assert Manifest(classes=CLASSES, rows=rows, task="multilabel").names(rows[1]) == ("a", "b")
