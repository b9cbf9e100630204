import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, make_study

from schemas.errors import BundleError, CacheIncompleteError, CacheMismatchError, EvaluationError
from schemas.features import ExtractionReceipt
from schemas.manifest import Manifest, Split
from schemas.results import Metrics
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.evaluate.scoring import CHANGED
from stages.prepare.folds import draw_again
from stages.store.reader import open_store
from stages.train.bundle import load_bundle
from stages.train.infer import source_logits
from stages.train.trainer import train


@dataclass
class Trained:
    study: Study
    receipt: ExtractionReceipt
    model: Path


def trained_study(root: Path, **keywords: object) -> Trained:
    study = make_study(root, **keywords)  # type: ignore[arg-type]
    receipt = study.extract()
    model = root / "outputs/model"
    train(study.settings, study.files(receipt), model, root / ".fpt/checkpoints")
    return Trained(study, receipt, model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_study(tmp_path_factory.mktemp("study"))


def run(trained: Trained, output: Path, split: Split = "test", **changes: Any) -> Metrics:
    """Evaluate; `changes` replace fields of what the study reads."""
    return evaluate(trained.study.files(**{"receipt": trained.receipt, **changes}), trained.model, output, split)


def test_every_result_is_written_and_says_the_same(trained: Trained, tmp_path: Path) -> None:
    metrics = run(trained, tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "metrics.json", "plots/confusion.csv", "plots/roc.csv", "predictions.parquet", "report.html",
    ]  # fmt: skip
    assert Metrics.model_validate_json((tmp_path / "metrics.json").read_text()) == metrics
    predictions = read_predictions(tmp_path / "predictions.parquet")
    assert predictions.rows == tuple(trained.study.manifest.of("test"))
    assert metrics.images == len(predictions.rows) > 0
    assert metrics.accuracy == pytest.approx((predictions.labels == predictions.predicted).mean())
    lines = (tmp_path / "plots/confusion.csv").read_text().splitlines()
    assert lines[0] == "actual,predicted"
    assert len(lines) == metrics.images + 1
    assert f"{metrics.auc:.3f}" in (tmp_path / "report.html").read_text()


def test_probabilities_are_the_softmax_of_the_bundles_logits(trained: Trained, tmp_path: Path) -> None:
    run(trained, tmp_path, "val")
    found = read_predictions(tmp_path / "predictions.parquet")
    store = open_store(trained.study.cache, trained.receipt)
    logits = source_logits(load_bundle(trained.model), store, [row.id for row in found.rows])
    np.testing.assert_allclose(found.probabilities, logits.softmax(dim=1).numpy(), atol=1e-6)
    assert {row.split for row in found.rows} == {"val"}


def test_splits_that_changed_after_the_training_are_warned_of(trained: Trained, tmp_path: Path) -> None:
    assert run(trained, tmp_path / "before").warnings == ()
    manifest = draw_again(trained.study.manifest, 0.2, 0.2, seed=9)
    assert {row.id for row in manifest.of("test")} & {row.id for row in trained.study.manifest.of("train")}
    metrics = run(trained, tmp_path / "after", manifest=manifest)
    assert metrics.warnings == (CHANGED,)
    assert "changed after the model was trained" in (tmp_path / "after/report.html").read_text()
    # Test images that come or go touch no image that was trained on.
    fewer = trained.study.manifest
    rows = [row for row in fewer.rows if row.split != "test"] + list(fewer.of("test"))[1:]
    less = run(trained, tmp_path, manifest=fewer.model_copy(update={"rows": tuple(rows)}))
    assert less.warnings == ()


def test_twice_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(trained, tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path.name


def test_other_features_are_refused_with_the_fields(trained: Trained, tmp_path: Path) -> None:
    spec = trained.receipt.spec.model_copy(update={"kept": 1})
    receipt = trained.receipt.model_copy(update={"spec": spec, "fingerprint": spec.fingerprint})
    with pytest.raises(CacheMismatchError, match="kept") as error:
        run(trained, tmp_path, receipt=receipt)
    assert error.value.differing == {"kept": (trained.receipt.spec.kept, 1)}
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(trained: Trained, tmp_path: Path) -> None:
    manifest = trained.study.manifest
    turned = Manifest(classes=manifest.classes[::-1], rows=manifest.rows)
    with pytest.raises(BundleError, match="stripe, plain, grid"):
        run(trained, tmp_path, manifest=turned)


def test_an_empty_split_is_refused(trained: Trained, tmp_path: Path) -> None:
    manifest = trained.study.manifest
    rows = tuple(row for row in manifest.rows if row.split != "test")
    with pytest.raises(EvaluationError, match="test split has no images"):
        run(trained, tmp_path, manifest=Manifest(classes=manifest.classes, rows=rows))


def test_a_store_that_is_gone_is_noticed(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CacheIncompleteError, match="fpt extract"):
        run(trained, tmp_path, cache_root=tmp_path / "nowhere")


def test_a_file_under_two_names_is_evaluated_twice(trained: Trained, tmp_path: Path) -> None:
    manifest = trained.study.manifest
    first = next(manifest.of("test"))
    twin = first.model_copy(update={"path": "zz/copy.png"})
    metrics = run(trained, tmp_path, manifest=Manifest(classes=manifest.classes, rows=(*manifest.rows, twin)))
    assert metrics.images == len(list(manifest.of("test"))) + 1
    found = read_predictions(tmp_path / "predictions.parquet")
    np.testing.assert_array_equal(found.probabilities[-1], found.probabilities[found.rows.index(first)])


def test_a_split_without_a_class_is_evaluated_without_auc(trained: Trained, tmp_path: Path) -> None:
    manifest = trained.study.manifest
    rows = tuple(row for row in manifest.rows if (row.split, row.label) != ("test", "grid"))
    metrics = run(trained, tmp_path, manifest=Manifest(classes=manifest.classes, rows=rows))
    assert metrics.auc is None
    assert metrics.absent_classes == ("grid",)
    assert "The AUC is not defined" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "plots/roc.csv").read_text() == "fpr,tpr\n"
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
