"""Figures of a bench: the choice of a learning rate, the log loss, and differences pooled over samplings."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from schemas.errors import EvaluationError
from schemas.manifest import ManifestRow
from schemas.sweeps import RunRecord
from stages.evaluate import bootstrap
from stages.evaluate.bench_report import rates_text
from stages.evaluate.bench_summary import auc_difference, choose_rate, log_loss
from stages.evaluate.bootstrap import group_draws
from stages.evaluate.predictions import Predictions

CLASSES = ("a", "b", "c")


def record(loss: float, auc: float | None = 0.5) -> RunRecord:
    return RunRecord(run="", best_epoch=1, val_auc=auc, val_loss=loss)


def rows_of(labels: list[str]) -> tuple[ManifestRow, ...]:
    """Two images of each patient."""
    return tuple(
        ManifestRow(id=f"{number:064x}", path=f"{number}.png", label=label, group=f"p{number // 2}", split="test")
        for number, label in enumerate(labels)
    )


def table(seed: int, skill: float = 1.0) -> Predictions:
    labels = [CLASSES[number // 2 % 3] for number in range(36)]
    rng = np.random.default_rng(seed)
    own = np.eye(3)[[CLASSES.index(label) for label in labels]]
    logits = skill * own + rng.standard_normal((36, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(CLASSES, rows_of(labels), p.astype(np.float32))


def test_the_lowest_mean_validation_loss_chooses_and_ties_go_to_the_higher_auc() -> None:
    assert choose_rate({"1": [record(0.5), record(0.7)], "2": [record(0.55), record(0.55)]}) == "2"
    assert choose_rate({"1": [record(0.5, 0.6)], "2": [record(0.5, 0.9)], "3": [record(0.6, 1.0)]}) == "2"
    assert choose_rate({"1": [record(0.5, None)], "2": [record(0.5, 0.1)]}) == "2"


def test_the_log_loss_is_that_of_scikit_learn() -> None:
    one = table(0)
    wide = one.probabilities.astype(np.float64)
    expected = sk.log_loss(one.labels, wide / wide.sum(axis=1, keepdims=True), labels=range(3))
    assert log_loss(one) == pytest.approx(expected)
    several = Predictions(CLASSES, rows_of(["a", "a|b", "", "c"]), one.probabilities[:4], task="multilabel")
    p = several.probabilities.astype(np.float64)
    columns = [sk.log_loss(several.labels[:, at], p[:, at], labels=[0, 1]) for at in range(3)]
    assert log_loss(several) == pytest.approx(np.mean(columns))


def test_the_difference_is_paired_and_pooled_over_samplings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 60)
    reference = {0: [table(0)], 1: [table(1)]}
    method = {0: [table(2, 2.0), table(3, 2.0)], 1: [table(4, 2.0), table(5, 2.0)]}
    found = auc_difference(reference, method)
    assert found is not None and found.interval is not None

    def auc(one: Predictions, weights: np.ndarray | None = None) -> float:
        own = np.eye(3)[one.labels]
        p = one.probabilities
        return float(np.mean([sk.roc_auc_score(own[:, at], p[:, at], sample_weight=weights) for at in range(3)]))

    def difference(number: int, weights: np.ndarray | None = None) -> float:
        seeds = [auc(one, weights) for one in method[number]]
        return float(np.mean(seeds)) - auc(reference[number][0], weights)

    assert found.difference.values == pytest.approx([difference(0), difference(1)])
    drawn = np.concatenate(list(group_draws([row.group for row in table(0).rows])), axis=1).T
    pooled = [np.mean([difference(0, weights), difference(1, weights)]) for weights in drawn]
    assert found.interval == pytest.approx(np.percentile(pooled, [2.5, 97.5]))
    # The same predictions have no difference on any draw, however few images there are.
    same = auc_difference(reference, reference)
    assert same is not None
    assert (same.difference.mean, same.interval) == (0.0, (0.0, 0.0))
    assert auc_difference(reference, {2: [table(1)]}) is None


def test_predictions_of_other_images_are_refused() -> None:
    one = table(0)
    other = Predictions(one.classes, one.rows[::-1], one.probabilities)
    with pytest.raises(EvaluationError, match="different test images"):
        auc_difference({0: [one]}, {0: [other]})


def test_chosen_rates_are_counted_where_they_differ() -> None:
    assert rates_text([]) == "-"
    assert rates_text([1e-3, 1e-3]) == "0.001"
    assert rates_text([2e-2, 1e-3, 1e-3]) == "0.001 (2), 0.02 (1)"
