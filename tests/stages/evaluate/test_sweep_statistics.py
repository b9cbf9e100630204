"""Sweep statistics: means and deviations, choices only by validation, and pooled folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schemas.errors import EvaluationError
from schemas.manifest import ManifestRow
from schemas.results import EvaluatedModel
from schemas.sweeps import SweptRun
from stages.evaluate.compare import compare
from stages.evaluate.ensemble import score_pooled
from stages.evaluate.predictions import Predictions, read_predictions, write_predictions
from stages.evaluate.sweep_statistics import best_settings, by_axis, chosen_test_auc, find_rate, gather, spread
from stages.evaluate.sweep_summary import summarise
from stages.scores import macro_auc


def run(part: str, lr: str, seed: int, val: float | None, test: float, loss: float = 0.5) -> SweptRun:
    return SweptRun(
        name=f"{part}/lr={lr}_seed={seed}",
        part=part,
        values={"lr": lr, "seed": str(seed)},
        settings=f"lr={lr}",
        val_auc=val,
        val_loss=loss,
        test={"auc": test},
    )


RUNS = [
    run("a", "1", 0, 0.90, 0.60),
    run("a", "1", 1, 0.92, 0.62),
    run("a", "2", 0, 0.80, 0.99),
    run("a", "2", 1, 0.82, 0.97),
    run("b", "1", 0, 0.70, 0.72),
    run("b", "1", 1, 0.72, 0.70),
    run("b", "2", 0, 0.71, 0.81),
    run("b", "2", 1, 0.77, 0.85),
]


def test_spread_is_of_the_sample() -> None:
    found = spread([0.1, 0.2, 0.6])
    assert (found.mean, found.std) == pytest.approx((0.3, np.std([0.1, 0.2, 0.6], ddof=1)))
    assert spread([0.5]).std is None


def test_the_test_has_no_say_in_the_choice() -> None:
    assert best_settings(RUNS) == "lr=1"
    # Split a chooses lr 1 (0.91 against 0.81), split b lr 2 (0.74 against 0.71), regardless of their test AUC.
    chosen = chosen_test_auc(RUNS)
    assert chosen is not None
    assert chosen.values == pytest.approx((0.61, 0.83))


def test_equal_auc_is_decided_by_the_loss_and_so_is_an_auc_that_is_not_defined() -> None:
    assert best_settings([run("", "1", 0, 1.0, 0.9, 0.4), run("", "2", 0, 1.0, 0.5, 0.3)]) == "lr=2"
    assert best_settings([run("", "1", 0, None, 0.9, 0.4), run("", "2", 0, None, 0.5, 0.3)]) == "lr=2"


def test_values_of_an_axis_are_over_everything_else() -> None:
    axes = by_axis(RUNS)
    assert list(axes) == ["lr", "seed"]
    assert axes["lr"]["2"].test["auc"].values == pytest.approx((0.99, 0.97, 0.81, 0.85))
    assert axes["seed"]["1"].runs == 4
    assert gather([run("", "1", 0, None, 0.5), run("", "1", 1, 0.5, 0.5)]).val_auc is None


def test_neighbours_outvote_a_lucky_rate() -> None:
    losses = {1e-4: [0.9], 2e-4: [0.30], 4e-4: [0.9], 8e-4: [0.5], 1.6e-3: [0.45], 3.2e-3: [0.5]}
    found = find_rate(losses, {rate: [0.8] for rate in losses})
    assert (found.lr, found.at_edge) == (1.6e-3, False)
    assert [trial.lr for trial in found.trials] == sorted(losses)
    middle = found.trials[1]
    assert middle.smoothed_loss == pytest.approx((0.9 + 2 * 0.30 + 0.9) / 4)
    assert found.trials[0].smoothed_loss == pytest.approx((2 * 0.9 + 0.30) / 3)
    assert find_rate({1e-4: [0.3], 2e-4: [0.5]}, {1e-4: [0.8], 2e-4: [0.8]}).at_edge


def table(folder: Path, fold: int, seed: int, method: str = "fpt+", rows: int = 12) -> Path:
    """Predictions of a fold, whose paths are not in the order of the folds."""
    rng = np.random.default_rng((fold, seed, len(method)))
    made = tuple(
        ManifestRow(
            id=f"{fold * 100 + n:064x}",
            path=f"{n:02d}-{fold}.png",
            label="ab"[n % 2],
            group=f"{fold}-{n}",
            split="test",
        )
        for n in range(rows)
    )
    p = rng.uniform(0.05, 0.6, rows) + 0.3 * (np.arange(rows) % 2)
    model = EvaluatedModel(method=method, lpm="vit", learnable=10, weights_sha256=f"{fold}{seed}{method}")
    write_predictions(
        Predictions(("a", "b"), made, np.stack([1 - p, p], axis=1).astype(np.float32), model),
        folder / "predictions.parquet",
    )
    return folder


def test_folds_are_averaged_then_joined(tmp_path: Path) -> None:
    parts = [[table(tmp_path / f"{fold}-{seed}", fold, seed) for seed in range(3)] for fold in range(2)]
    metrics = score_pooled(parts, tmp_path / "out")
    labels, pools = [], []
    for folders in parts:
        tables = [read_predictions(folder / "predictions.parquet") for folder in folders]
        mean = np.exp(np.mean([np.log(one.probabilities) for one in tables], axis=0))
        pools.append(mean / mean.sum(axis=1, keepdims=True))
        labels.append(tables[0].labels)
    assert metrics.images == 24
    assert metrics.auc == pytest.approx(macro_auc(np.concatenate(labels), np.concatenate(pools)))
    joined = read_predictions(tmp_path / "out" / "predictions.parquet")
    paths = [row.path for row in joined.rows]
    assert paths == sorted(paths)
    by_path = {row.path: p for row, p in zip(joined.rows, joined.probabilities, strict=True)}
    assert by_path["03-1.png"] == pytest.approx(pools[1][3], abs=1e-6)
    assert joined.model is not None
    assert (joined.model.method, joined.model.learnable) == ("fpt+", 30)


def test_a_row_in_two_folds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be pooled"):
        score_pooled([[table(tmp_path / "one", 0, 0)], [table(tmp_path / "two", 0, 1)]])


def test_methods_are_compared_on_equal_rows(tmp_path: Path) -> None:
    judged = [
        (
            SweptRun(
                name=f"{fold}-{method}-{seed}",
                part=str(fold),
                values={"method": method, "seed": str(seed)},
                settings=f"method={method}",
                val_auc=0.9,
                val_loss=0.5,
                test={"auc": 0.7},
            ),
            table(tmp_path / f"{fold}-{method}-{seed}", fold, seed, method),
        )
        for method in ("fpt+", "attentive")
        for fold in range(2)
        for seed in range(2)
    ]
    summary, (found,) = summarise(judged, tmp_path / "folds", cross_validated=True)
    assert found.images == 24
    again = compare([tmp_path / "folds/method=fpt+", tmp_path / "folds/method=attentive"])
    difference = summary.differences["method=attentive"]["auc"]
    assert difference.interval == again.models[1].differences["auc"].interval
    assert difference.difference.values == (again.models[1].differences["auc"].value,)
    pooled = summary.settings["method=fpt+"].pooled_auc
    assert pooled is not None
    assert len(pooled.values) == 2, "one a seed"

    summary, comparisons = summarise(judged, tmp_path / "splits", cross_validated=False)
    assert [one.images for one in comparisons] == [12, 12]
    difference = summary.differences["method=attentive"]["auc"]
    assert difference.interval is None
    assert difference.difference.values == tuple(one.models[1].differences["auc"].value for one in comparisons)
    averaged = summary.settings["method=attentive"].averaged_auc
    assert averaged is not None
    assert len(averaged.values) == 2, "one per split"
