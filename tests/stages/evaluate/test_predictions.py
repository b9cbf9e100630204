from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import EvaluationError
from schemas.manifest import ManifestRow
from stages.evaluate.predictions import Predictions, read_predictions, write_predictions


def some_predictions() -> Predictions:
    rows = tuple(
        ManifestRow(id=f"{i:064x}", path=f"ä/{i}.png", label="b/1" if i % 2 else "a", group=f"g{i // 2}", split="test")
        for i in range(5)
    )
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=5).astype(np.float32)
    return Predictions(("a", "b/1", "c"), rows, p)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    predictions = some_predictions()
    write_predictions(predictions, tmp_path / "predictions.parquet")
    found = read_predictions(tmp_path / "predictions.parquet")
    assert (found.classes, found.rows) == (predictions.classes, predictions.rows)
    np.testing.assert_array_equal(found.probabilities, predictions.probabilities)
    np.testing.assert_array_equal(found.labels, [0, 1, 0, 1, 0])


def test_columns_and_predicted_class(tmp_path: Path) -> None:
    predictions = some_predictions()
    write_predictions(predictions, tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == ["id", "path", "label", "group", "split", "predicted", "p_a", "p_b/1", "p_c"]
    best = [predictions.classes[index] for index in predictions.probabilities.argmax(axis=1)]
    assert table.column("predicted").to_pylist() == best


def test_same_predictions_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_predictions(some_predictions(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no predictions"):
        read_predictions(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not a table")
    with pytest.raises(EvaluationError, match="not a table of predictions"):
        read_predictions(tmp_path / "text.parquet")
