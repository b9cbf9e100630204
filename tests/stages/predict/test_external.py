"""Images outside of the study: labels of the bundle, features from the cache or computed, results as of `evaluate`."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, make_images, make_study

from schemas.data_settings import DataSettings
from schemas.errors import BundleError, DataError, UnreadableImagesError, WeightsError
from schemas.features import ExtractionReceipt
from schemas.results import Metrics
from stages.evaluate.compare import compare
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.predict.external import ExternalContext, ExternalResult, evaluate_external
from stages.train.trainer import train


@dataclass
class Trained:
    study: Study
    receipt: ExtractionReceipt
    model: Path


def trained_study(root: Path, method: str) -> Trained:
    study = make_study(root, method=method)
    receipt, model = study.extract(), root / "outputs/model"
    train(study.settings, study.files(receipt), model, root / "checkpoints")
    return Trained(study, receipt, model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_study(tmp_path_factory.mktemp("study"), "fpt+")


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """12 images that the study does not have."""
    make_images(tmp_path / "others", 4, seed=5)
    return tmp_path / "others"


def run(trained: Trained, images: Path, output: Path, cache: Path | None = None, **data: Any) -> ExternalResult:
    study = trained.study
    cache = study.cache if cache is None else cache
    context = ExternalContext(study.root, study.settings.lpm, cache, study.manifest)
    return evaluate_external(trained.model, DataSettings(images=str(images), **data), output, context)


def test_results_are_those_of_an_evaluation(trained: Trained, others: Path, tmp_path: Path) -> None:
    result = run(trained, others, tmp_path / "out")
    metrics = result.metrics
    assert (result.cached, result.computed, result.quarantined) == (0, 12, 0)
    assert (metrics.split, metrics.images, metrics.warnings) == ("external", 12, ())
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")) == [
        "metrics.json", "plots/confusion.csv", "plots/roc.csv", "predictions.parquet", "report.html",
    ]  # fmt: skip
    assert Metrics.model_validate_json((tmp_path / "out/metrics.json").read_text()) == metrics
    found = read_predictions(tmp_path / "out/predictions.parquet")
    assert {row.split for row in found.rows} == {"external"}
    assert [row.label for row in found.rows] == [Path(row.path).parent.name for row in found.rows]
    assert "images outside of the study" in (tmp_path / "out/report.html").read_text()
    run(trained, others, tmp_path / "again")
    assert compare([tmp_path / "out", tmp_path / "again"]).models[1].differences["auc"].interval == (0.0, 0.0)


def test_cached_features_are_read_and_give_what_computed_ones_give(trained: Trained, tmp_path: Path) -> None:
    images = trained.study.root / "images"
    evaluate(trained.study.files(trained.receipt), trained.model, tmp_path / "test")
    cached = run(trained, images, tmp_path / "cached")
    computed = run(trained, images, tmp_path / "computed", cache=tmp_path / "nothing")
    assert (cached.cached, cached.computed) == (24, 0)
    assert (computed.cached, computed.computed) == (0, 24)
    one, other = (read_predictions(tmp_path / name / "predictions.parquet") for name in ("cached", "computed"))
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-3)
    of_id = {row.id: p for row, p in zip(one.rows, one.probabilities, strict=True)}
    tested = read_predictions(tmp_path / "test/predictions.parquet")
    np.testing.assert_allclose([of_id[row.id] for row in tested.rows], tested.probabilities, atol=1e-6)


def test_some_cached_some_computed(trained: Trained, others: Path, tmp_path: Path) -> None:
    for path in sorted((trained.study.root / "images/grid").iterdir())[:3]:
        shutil.copy(path, others / "grid" / f"copy-{path.name}")
    result = run(trained, others, tmp_path / "out")
    assert (result.cached, result.computed, result.metrics.images) == (3, 12, 15)


def test_the_lpm_is_needed_only_for_images_without_features(trained: Trained, others: Path, tmp_path: Path) -> None:
    study = trained.study
    gone = study.settings.lpm.model_copy(update={"weights": "gone.safetensors"})

    def without(images: Path) -> ExternalResult:
        data = DataSettings(images=str(images))
        return evaluate_external(trained.model, data, tmp_path / "out", ExternalContext(study.root, gone, study.cache))

    assert without(study.root / "images").cached == 24
    with pytest.raises(WeightsError):
        without(others)


def test_images_of_the_study_are_counted_by_content(trained: Trained, others: Path, tmp_path: Path) -> None:
    study = trained.study
    for split in ("train", "test"):
        row = next(study.manifest.of(split))  # type: ignore[arg-type]
        shutil.copy(study.root / "images" / row.path, others / row.label / f"{split}.png")
    metrics = run(trained, others, tmp_path / "out").metrics
    assert metrics.warnings == (
        "the model was trained on 1 of 14 images; this is not a test result.",
        "already in the study of the model: 1 of 14 images (1 test).",
    )
    assert json.loads((tmp_path / "out/metrics.json").read_text())["warnings"] == list(metrics.warnings)
    report = (tmp_path / "out/report.html").read_text()
    assert report.index("trained on 1 of 14 images") < report.index("Headline")


def test_unknown_labels_are_listed(trained: Trained, others: Path, tmp_path: Path) -> None:
    (others / "plain").rename(others / "plane")
    with pytest.raises(DataError, match=r"1 label that") as caught:
        run(trained, others, tmp_path / "out")
    assert "'plane', 4 images, did you mean 'plain'?" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_class_without_images_leaves_its_metrics_undefined(trained: Trained, others: Path, tmp_path: Path) -> None:
    shutil.rmtree(others / "plain")
    metrics = run(trained, others, tmp_path / "out").metrics
    assert metrics.auc is None
    assert metrics.absent_classes == ("plain",)
    assert metrics.warnings == ('no image of class "plain": metrics that need every class (the AUC) are not defined.',)
    assert metrics.accuracy >= 0


def test_unreadable_images_are_listed_or_set_aside(trained: Trained, others: Path, tmp_path: Path) -> None:
    (others / "grid/=broken.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImagesError) as caught:
        run(trained, others, tmp_path / "out")
    assert [path for path, _ in caught.value.failures] == ["grid/=broken.png"]
    result = run(trained, others, tmp_path / "out", on_error="quarantine")
    assert (result.quarantined, result.metrics.images) == (1, 12)
    (row,) = csv.DictReader((tmp_path / "out/quarantine.csv").open())
    assert (row["path"], row["label"]) == ("grid/=broken.png", "grid")
    (others / "grid/=broken.png").unlink()
    run(trained, others, tmp_path / "out")
    assert not (tmp_path / "out/quarantine.csv").exists()


def test_corrupt_data_is_an_error_unless_it_is_accepted(trained: Trained, others: Path, tmp_path: Path) -> None:
    # Pixels are complete, the last chunk is missing; all of them, so that some are among the mistakes of the report.
    for path in others.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UnreadableImagesError):
        run(trained, others, tmp_path / "out")
    assert run(trained, others, tmp_path / "out", on_warning="accept").metrics.images == 12


def test_a_table_gives_labels_and_patients(trained: Trained, others: Path, tmp_path: Path) -> None:
    paths = sorted(path.relative_to(others) for path in others.rglob("*.png"))
    lines = [f"{path.as_posix()},{path.parent.name},p{number // 3}" for number, path in enumerate(paths)]
    (tmp_path / "t.csv").write_text("\n".join(["file,diagnosis,patient", *lines]))
    columns = {"path_column": "file", "label_column": "diagnosis", "group_column": "patient"}
    metrics = run(trained, others, tmp_path / "out", labels=str(tmp_path / "t.csv"), **columns).metrics
    assert (metrics.images, metrics.groups) == (12, 4)


def test_another_task_is_refused(trained: Trained, others: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="trained for multiclass"):
        run(trained, others, tmp_path / "out", task="ordinal", classes=("grid", "plain", "stripe"))


def test_one_content_under_two_labels_is_refused(trained: Trained, others: Path, tmp_path: Path) -> None:
    shutil.copy(next((others / "grid").iterdir()), others / "plain/twin.png")
    with pytest.raises(DataError, match="two labels"):
        run(trained, others, tmp_path / "out")


def test_the_side_method_needs_no_lpm(tmp_path: Path) -> None:
    trained = trained_study(tmp_path / "study", "side")
    (trained.study.root / "lpm.safetensors").unlink()
    make_images(tmp_path / "others", 2, seed=5)
    assert run(trained, tmp_path / "others", tmp_path / "out").metrics.images == 6


@pytest.mark.parametrize("method", ["ept-lse", "cvpt"])
def test_an_adaptation_runs_the_upper_blocks_of_the_lpm_on_cached_tokens(
    method: str, others: Path, tmp_path: Path
) -> None:
    study = make_study(tmp_path, method=method, features={"hidden": 3}, train={"start_block": 3, "epochs": 1})
    receipt, model = study.extract(), tmp_path / "model"
    train(study.settings, study.files(receipt), model, tmp_path / "checkpoints")
    trained = Trained(study, receipt, model)
    evaluate(study.files(receipt), model, tmp_path / "evaluation")
    expected = read_predictions(tmp_path / "evaluation/predictions.parquet")
    # Some images are cached, the others are computed: both by the same model.
    shutil.copytree(others, tmp_path / "images", dirs_exist_ok=True)
    result = run(trained, tmp_path / "images", tmp_path / "external")
    assert (result.cached, result.computed) == (24, 12)
    found = read_predictions(tmp_path / "external/predictions.parquet")
    position = {row.id: number for number, row in enumerate(found.rows)}
    mine = found.probabilities[[position[row.id] for row in expected.rows]]
    np.testing.assert_allclose(mine, expected.probabilities, atol=1e-6)
    again = run(trained, tmp_path / "images", tmp_path / "again", cache=tmp_path / "nothing")
    assert (again.cached, again.computed) == (0, 36)
    computed = read_predictions(tmp_path / "again/predictions.parquet")
    assert [row.id for row in computed.rows] == [row.id for row in found.rows]
    np.testing.assert_allclose(computed.probabilities, found.probabilities, atol=2e-3)
