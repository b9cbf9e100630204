import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from schemas.errors import EvaluationError
from stages.evaluate.bootstrap import auc_interval, weighted_auc
from stages.evaluate.metrics import compute_metrics


def random_rows(n: int, classes: int, signal: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    logits = generator.normal(size=(n, classes)) + signal * np.eye(classes)[labels]
    exp = np.exp(logits)
    return labels, exp / exp.sum(axis=1, keepdims=True)


def test_two_classes_use_the_probability_of_the_second() -> None:
    labels, p = [0, 0, 1, 1], np.array([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]])
    metrics = compute_metrics(labels, p, ("healthy", "ill"))
    assert metrics.auc == pytest.approx(0.75)  # three of four pairs are ordered correctly
    assert metrics.auc_per_class == pytest.approx({"healthy": 0.75, "ill": 0.75})
    assert metrics.accuracy == metrics.balanced_accuracy == metrics.f1 == 0.5
    assert metrics.cohen_kappa == 0.0
    assert metrics.confusion == ((1, 1), (1, 1))
    assert metrics.brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.04) / 4)
    assert (metrics.split, metrics.images, metrics.groups, metrics.absent_classes) == ("test", 4, 4, ())


def test_more_classes_equal_scikit_learn() -> None:
    labels, p = random_rows(90, 4)
    metrics = compute_metrics(labels, p, "abcd")
    predicted = p.argmax(axis=1)
    assert metrics.auc == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr", average="macro"))
    assert metrics.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert metrics.f1 == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert metrics.cohen_kappa == pytest.approx(sk.cohen_kappa_score(labels, predicted))
    assert "quadratic_kappa" not in metrics.model_dump()
    assert metrics.brier == pytest.approx(((p - np.eye(4)[labels]) ** 2).sum(axis=1).mean())
    assert np.sum(metrics.confusion) == 90


def test_calibration_error_by_hand() -> None:
    # Confidence 0.85 is right in half of four rows (0.35 off), 0.65 in two of two (0.35 off), 0.55 in one of two.
    confidence = np.array([0.85] * 4 + [0.65] * 2 + [0.55] * 2)
    labels = [0, 0, 1, 1, 0, 0, 0, 1]
    metrics = compute_metrics(labels, np.stack([confidence, 1 - confidence], axis=1), "ab")
    assert metrics.calibration_error == pytest.approx((4 * 0.35 + 2 * 0.35 + 2 * 0.05) / 8)


def test_an_absent_class_makes_its_auc_and_the_macro_auc_null() -> None:
    labels, p = random_rows(30, 3)
    labels = np.where(labels == 2, 0, labels)
    metrics = compute_metrics(labels, p, ("a", "b", "c"))
    assert metrics.auc is None
    assert metrics.auc_interval is None
    assert metrics.absent_classes == ("c",)
    assert metrics.auc_per_class["c"] is None
    assert metrics.auc_per_class["a"] is not None
    assert metrics.confusion[2] == (0, 0, 0)


@pytest.mark.filterwarnings("error")
def test_one_class_alone_gives_no_nan() -> None:
    metrics = compute_metrics([1, 1, 1], np.array([[0.2, 0.8]] * 3), ("a", "b"))
    assert metrics.auc is None
    assert metrics.cohen_kappa is None
    assert metrics.accuracy == metrics.f1 == 1.0
    assert "NaN" not in json.dumps(metrics.model_dump(mode="json"), allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_nan_leaves_and_no_warning(data: st.DataObject) -> None:
    classes, n = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 12))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    draw_row = st.lists(st.integers(0, 3), min_size=classes, max_size=classes)
    raw = np.array(data.draw(st.lists(draw_row, min_size=n, max_size=n)))
    p = (raw + 1e-3) / (raw + 1e-3).sum(axis=1, keepdims=True)
    metrics = compute_metrics(labels, p, tuple("abcd"[:classes]), groups=[str(i // 2) for i in range(n)])
    json.dumps(metrics.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize(
    ("labels", "p", "says"),
    [
        ([], np.empty((0, 2)), "no rows"),
        ([0, 1], np.array([[0.5, 0.5], [np.nan, 0.5]]), "row 1"),
        ([0, 1], np.array([[3.0, -1.0], [0.5, 0.5]]), "between 0 and 1"),
        ([0, 2], np.full((2, 2), 0.5), "not one of the 2 classes"),
        ([0, 1], np.full((3, 2), 0.5), "do not fit"),
    ],
)
def test_meaningless_input_is_refused(labels: list[int], p: np.ndarray, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        compute_metrics(labels, p, ("a", "b"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weighted_auc_equals_scikit_learn(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 20))
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    scores = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))) / 5
    weights = np.array([data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in range(2)], dtype=float)
    for row, found in zip(weights, weighted_auc(positive, scores, weights.T), strict=True):
        kept = row > 0
        if len(np.unique(positive[kept])) < 2:
            assert np.isnan(found)
        else:
            expected = sk.roc_auc_score(positive[kept], scores[kept], sample_weight=row[kept])
            assert found == pytest.approx(expected)


def test_interval_is_seeded_and_holds_the_auc() -> None:
    labels, p = random_rows(120, 3)
    groups = [str(i) for i in range(120)]
    metrics = compute_metrics(labels, p, "abc", groups=groups)
    assert metrics.auc_interval is not None and metrics.auc is not None
    low, high = metrics.auc_interval
    assert 0.5 < low < metrics.auc < high < 1.0
    assert auc_interval(labels, p, groups) == metrics.auc_interval
    assert auc_interval(labels, p, groups, seed=1) != metrics.auc_interval


def test_images_of_one_patient_are_drawn_together() -> None:
    # Ten copies of each row carry no more information than one: the interval by patient must not shrink.
    labels, p = random_rows(40, 2)
    once = auc_interval(labels, p, [str(i) for i in range(40)])
    copies = np.repeat(np.arange(40), 10)
    by_patient = auc_interval(labels[copies], p[copies], [str(i) for i in copies])
    by_image = auc_interval(labels[copies], p[copies], [str(i) for i in range(400)])
    assert once is not None and by_patient is not None and by_image is not None
    width = {name: high - low for name, (low, high) in {"once": once, "patient": by_patient, "image": by_image}.items()}
    assert width["patient"] == pytest.approx(width["once"])
    assert width["image"] < 0.5 * width["patient"]


def test_one_patient_gives_no_interval() -> None:
    labels, p = random_rows(10, 2)
    assert auc_interval(labels, p, ["same"] * 10) is None
