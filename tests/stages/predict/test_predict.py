import csv
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from study import Study, make_images, make_study, predict, save_weights

from schemas.data_settings import DataSettings
from schemas.errors import BundleError, CacheMismatchError, DataError, WeightsError
from schemas.results import Prediction
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.predict import predictions_csv, write_predictions_table
from stages.predict.inputs import find_images
from stages.train.trainer import train


@dataclass
class Trained:
    study: Study
    model: Path
    from_store: dict[str, np.ndarray]
    """Path of each training image -> (C,) probabilities through the store."""


def trained_study(root: Path, method: str, dtype: str = "float16") -> Trained:
    study = make_study(root, method=method, features={"dtype": dtype})
    receipt, model = study.extract(), root / "outputs/model"
    train(study.settings, study.files(receipt), model, root / "checkpoints")
    evaluate(study.files(receipt), model, root / "evaluation", "train")
    found = read_predictions(root / "evaluation/predictions.parquet")
    return Trained(study, model, {row.path: p for row, p in zip(found.rows, found.probabilities, strict=True)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained_study(tmp_path_factory.mktemp("study"), "fpt+")


def run(trained: Trained, images: list[Path], **keywords: object) -> list[Prediction]:
    study = trained.study
    return predict(trained.model, images, study.settings.lpm, study.root, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("fpt", "float16"), ("fpt+", "float16"), ("side", "float16"), ("fpt+", "int8"), ("fpt+", "int4")],
)
def test_a_training_image_gives_what_the_store_gives(method: str, dtype: str, tmp_path: Path) -> None:
    trained = trained_study(tmp_path, method, dtype)
    folder = tmp_path / "images"
    rows = run(trained, [folder / name for name in trained.from_store], batch_size=5)
    for row, (name, expected) in zip(rows, trained.from_store.items(), strict=True):
        assert row.path == str(folder / name)
        assert row.error is None
        assert row.probabilities is not None
        assert tuple(row.probabilities) == trained.study.manifest.classes
        # Batches of another size may round differently before the features become float16.
        np.testing.assert_allclose(list(row.probabilities.values()), expected, atol=1e-3)
        assert row.predicted == max(row.probabilities, key=row.probabilities.__getitem__)


def test_probabilities_differ_between_images(trained: Trained, tmp_path: Path) -> None:
    make_images(tmp_path, 2, seed=7)
    rows = run(trained, sorted(tmp_path.rglob("*.png")))
    assert len({tuple((row.probabilities or {}).values()) for row in rows}) == 6


def test_unusable_images_are_rows_with_a_reason(trained: Trained, tmp_path: Path) -> None:
    make_images(tmp_path, 1)
    good = sorted(tmp_path.rglob("*.png"))
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(good[0].read_bytes()[:300])
    images = [broken, good[0], missing, good[1]]
    seen: list[tuple[int, int]] = []
    rows = run(trained, images, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert [row.path for row in rows] == [str(path) for path in images]
    assert [row.error is None for row in rows] == [False, True, False, True]
    assert all((row.predicted is None) == (row.error is not None) for row in rows)
    assert seen == [(2, 4), (4, 4)]


def test_limits_of_the_settings_hold(trained: Trained, tmp_path: Path) -> None:
    make_images(tmp_path, 1)
    (row, *_) = run(trained, sorted(tmp_path.rglob("*.png")), data=DataSettings(max_pixels=100))
    assert row.predicted is None
    assert row.error


def test_corrupt_data_is_an_error_unless_it_is_accepted(trained: Trained, tmp_path: Path) -> None:
    make_images(tmp_path, 1)
    path = next(tmp_path.rglob("*.png"))
    # Pixels are complete, the last chunk is missing.
    path.write_bytes(path.read_bytes()[:-12])
    assert run(trained, [path])[0].error == "the file is truncated"
    assert run(trained, [path], data=DataSettings(on_warning="accept"))[0].error is None


def test_other_weights_are_refused(trained: Trained) -> None:
    study = trained.study
    save_weights(study.root / "other.safetensors", seed=1)
    lpm = study.settings.lpm.model_copy(update={"weights": "other.safetensors"})
    with pytest.raises(WeightsError, match="sha256"):
        predict(trained.model, [], lpm, study.root)


def test_another_model_is_refused(trained: Trained) -> None:
    study = trained.study
    lpm = study.settings.lpm.model_copy(update={"name": "test_vit2"})
    with pytest.raises(CacheMismatchError, match=r"lpm\.name"):
        predict(trained.model, [], lpm, study.root)


def test_the_side_network_alone_needs_no_weights(tmp_path: Path) -> None:
    trained = trained_study(tmp_path, "side")
    (tmp_path / "lpm.safetensors").unlink()
    (row,) = run(trained, [next((tmp_path / "images").rglob("*.png"))])
    assert row.predicted is not None


def test_a_damaged_bundle_is_refused(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.model, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError):
        predict(tmp_path / "model", [], trained.study.settings.lpm, trained.study.root)


def test_csv_has_a_row_an_image(tmp_path: Path) -> None:
    rows = [
        Prediction(path="a,1.png", predicted="b", probabilities={"a": 0.25, "b": 0.75}, error=None),
        Prediction(path="x.png", predicted=None, probabilities=None, error="is truncated"),
    ]
    write_predictions_table(rows, tmp_path / "out/predictions.csv")
    text = (tmp_path / "out/predictions.csv").read_text()
    assert text == predictions_csv(rows)
    assert list(csv.reader(text.splitlines())) == [
        ["path", "predicted", "p_a", "p_b", "error"],
        ["a,1.png", "b", "0.250000", "0.750000", ""],
        ["x.png", "", "", "", "is truncated"],
    ]


@pytest.mark.timeout(20)
def test_a_named_pipe_is_no_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(DataError, match="cannot be read"):
        find_images([f"@{tmp_path / 'list.txt'}"], DataSettings(), tmp_path)
