"""The Python API: the commands as functions, and a model in memory."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from study import make_images, save_weights

import fpt
from pipeline.params import as_assignments, override

SETTINGS = {
    "method": "fpt+",
    "lpm": {"name": "test_vit"},
    "features": {"image_size": 64, "shard_size": 4, "side_image_size": 40, "dtype": "float16"},
    "train": {"side_image_size": 32, "epochs": 1, "batch_size": 8, "side_reduction": 4},
    "compute": {"threads": 1, "device": "cpu"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, `lpm.safetensors` and a `study` with a trained model, made with the API only."""
    folder = tmp_path_factory.mktemp("api")
    make_images(folder / "images", per_class=8)
    weights = save_weights(folder / "lpm.safetensors")
    lpm = {"name": "test_vit", "weights": weights}
    study = fpt.init(folder / "study", folder / "images", version_control=False, **{**SETTINGS, "lpm": lpm})
    prepared = fpt.prepare(study)
    assert isinstance(prepared, fpt.PrepareResult) and prepared.images == 24
    receipt = fpt.extract(study)
    assert isinstance(receipt, fpt.ExtractionReceipt) and receipt.images == 24
    result = fpt.train(study)
    assert isinstance(result, fpt.TrainResult) and len(result.epochs) == 1
    return folder


@pytest.fixture(scope="module")
def study(folder: Path) -> fpt.Study:
    return fpt.open_study(folder / "study")


@pytest.fixture(scope="module")
def model(folder: Path) -> fpt.Model:
    return fpt.load(folder / "study/outputs/model", device="cpu")


def test_importing_fpt_imports_nothing_else() -> None:
    code = (
        "import sys, fpt\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'numpy', 'pydantic', 'typer', 'rich', 'pipeline', 'stages'}))\n"
        "fpt.open_study, fpt.FptError, fpt.load, fpt.Predictions\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'timm', 'zarr', 'dask', 'typer'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n[]\n", done.stderr


def test_every_public_name_is_there_and_unknown_ones_are_not() -> None:
    assert all(getattr(fpt, name) is not None for name in fpt.__all__)
    assert set(fpt.__all__) <= set(dir(fpt))
    with pytest.raises(AttributeError, match="'fpt' has no attribute 'fit'"):
        _ = fpt.fit


def test_functions_write_what_the_commands_write(folder: Path, study: fpt.Study) -> None:
    metrics = fpt.evaluate(study)
    outputs = folder / "study/outputs"
    for name in ("manifest/manifest.parquet", "features/receipt.json", "model/model.json", "train/metrics.json"):
        assert (outputs / name).is_file()
    assert metrics == fpt.Metrics.model_validate_json((outputs / "evaluation/metrics.json").read_bytes())
    for stage in ("manifest", "features", "model", "evaluation"):
        assert yaml.safe_load((outputs / stage / "settings.yaml").read_text())["method"] == "fpt+"


def test_other_images_are_evaluated(folder: Path, study: fpt.Study) -> None:
    make_images(folder / "clinic", per_class=2, seed=5)
    metrics = fpt.evaluate(study, images=folder / "clinic")
    assert (metrics.split, metrics.images) == ("external", 6)
    assert (folder / "study/outputs/external/clinic/report.html").is_file()
    with pytest.raises(fpt.FptError, match="labels belong to images"):
        fpt.evaluate(study, labels="labels.csv")


def test_a_method_in_place_of_that_of_the_settings(folder: Path) -> None:
    study = fpt.open_study(folder / "study", train={"epochs": 2})
    result = fpt.train(study, method="linear", output=folder / "linear")
    assert "C" in result.chosen
    saved = yaml.safe_load((folder / "linear/model/settings.yaml").read_text())
    assert (saved["method"], saved["train"]["epochs"]) == ("linear", 2), "overrides of the study stay"
    assert fpt.evaluate(study, model=folder / "linear/model", output=folder / "linear/evaluation").images > 0


def test_calls_are_quiet_and_notices_are_logged(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fpt"):
        study = fpt.open_study(folder / "study", features={"image_size": 70})
    assert study.lpm.image_size == 64
    assert [record.message for record in caplog.records] == [
        "Image size 70 -> 64: test_vit.r160_in1k needs a multiple of its 16-pixel patch."
    ]
    seen: list[tuple[int, int]] = []
    fpt.prepare(fpt.open_study(folder / "study"), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (24, 24)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_epochs_are_reported(folder: Path, study: fpt.Study) -> None:
    epochs: list[int] = []
    fpt.train(study, output=folder / "again", on_epoch=lambda log: epochs.append(log.epoch))
    assert epochs == [1]


def test_files_arrays_and_pil_images_get_the_same_probabilities(folder: Path, model: fpt.Model) -> None:
    path = sorted((folder / "images/plain").iterdir())[0]
    with Image.open(path) as opened:
        grey = np.asarray(opened)
        image = opened.copy()
    colour = np.stack([grey] * 3, axis=-1)
    predictions = model.predict([path, str(path), grey, colour, image, image.convert("RGB"), colour[:, ::-1]])
    assert [row.path for row in predictions[2:]] == [f"images[{position}]" for position in range(2, 7)]
    p = predictions.probabilities
    assert p.shape == (7, 3) and np.array_equal(p[:6], np.repeat(p[:1], 6, axis=0))
    assert not np.array_equal(p[0], p[6]), "another image has other probabilities"
    assert image.mode == "L" and image.size == (72, 64), "the image of the caller stays as it is"


def test_images_in_memory_are_converted_like_files(tmp_path: Path, model: fpt.Model) -> None:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (64, 72, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (64, 72), dtype=np.uint16))
    turned = Image.fromarray(rng.integers(0, 256, (64, 72, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba.save(tmp_path / "a.png")
    deep.save(tmp_path / "b.png")
    turned.save(tmp_path / "c.png", exif=exif)
    with Image.open(tmp_path / "c.png") as opened:
        p = model.predict([*sorted(tmp_path.iterdir()), rgba, deep, opened, turned]).probabilities
    assert np.array_equal(p[:3], p[3:6])
    assert not np.array_equal(p[2], p[6]), "without its orientation it is another image"


def test_one_image_a_batch_and_a_folder(folder: Path, model: fpt.Model, study: fpt.Study) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (3, 64, 72, 3), dtype=np.uint8)
    assert len(model.predict(batch)) == 3 and len(model.predict(batch[0])) == 1
    below = fpt.predict(study, folder / "images/grid")
    assert len(below) == 8 and below.classes == ("grid", "plain", "stripe")
    assert np.array_equal(below.probabilities, model.predict(str(folder / "images/grid")).probabilities)
    assert fpt.predict(folder / "study/outputs/model", batch)[1] == model.predict(batch)[1]
    assert len(model.predict([])) == 0 and model.predict([]).probabilities.shape == (0, 3)


def test_the_table_has_the_columns_of_the_command(tmp_path: Path, model: fpt.Model, folder: Path) -> None:
    predictions = model.predict(folder / "images/grid")
    table = predictions.to_dict()
    assert list(table) == ["path", "predicted", "p_grid", "p_plain", "p_stripe", "error"]
    assert all(len(column) == 8 for column in table.values())
    assert sum(table[f"p_{name}"][0] for name in predictions.classes) == pytest.approx(1, abs=1e-6)
    predictions.write(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == "path,predicted,p_grid,p_plain,p_stripe,error"
    assert "8 predictions" in repr(predictions)
    pandas = pytest.importorskip("pandas")
    assert list(predictions.to_pandas().columns) == list(table) and pandas


def test_unusable_images_raise_or_stay_as_rows(tmp_path: Path, model: fpt.Model, folder: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = sorted((folder / "images/grid").iterdir())[0]
    images = [tmp_path / "broken.png", good, tmp_path / "missing.png", Image.new("F", (64, 64))]
    with pytest.raises(fpt.FptError, match="3 images cannot be used") as caught:
        model.predict(images)
    assert isinstance(caught.value, ValueError) and "missing.png: no such file" in str(caught.value)
    kept = model.predict(images, on_error="keep")
    assert [row.error is None for row in kept] == [False, True, False, False]
    assert np.isnan(kept.probabilities[0]).all() and np.isfinite(kept.probabilities[1]).all()
    assert [path for path, _ in kept.failures] == [str(images[0]), str(images[2]), "images[3]"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "images\\[0\\] is an array of float32"),
        (np.zeros((8, 8, 4), np.uint8), "the shape \\(8, 8, 4\\)"),
        (np.zeros((0, 8), np.uint8), "the shape \\(0, 8\\)"),
        (17, "is of type int"),
    ],
)
def test_other_arrays_are_refused(array: object, message: str, model: fpt.Model) -> None:
    with pytest.raises(fpt.FptError, match=message):
        model.predict([array])


def test_other_weights_are_refused(tmp_path: Path, folder: Path) -> None:
    other = save_weights(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(fpt.FptError, match="the model was trained with"):
        fpt.load(folder / "study/outputs/model", weights=other)
    moved = folder / "study/outputs/model"
    assert fpt.load(moved, weights=folder / "lpm.safetensors", device="cpu", batch_size=1).task == "multiclass"


def test_mistakes_are_fpt_errors(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(fpt.FptError, match=r"There is no params\.yaml in .*nowhere"):
        fpt.open_study(tmp_path / "nowhere")
    with pytest.raises(fpt.FptError, match=r"did you mean 'train\.lr'"):
        fpt.open_study(folder / "study", train={"lrr": 1})
    with pytest.raises(fpt.FptError, match="No setting takes a value of type object"):
        fpt.open_study(folder / "study", method=object())
    with pytest.raises(fpt.FptError, match="There is no model bundle"):
        fpt.load(tmp_path)
    with pytest.raises(fpt.FptError, match=r"compute\.device"):
        fpt.load(folder / "study/outputs/model", device="gpu")
    with pytest.raises(fpt.FptError, match="already contains"):
        fpt.init(folder / "study", folder / "images")


def test_overrides_keep_their_values() -> None:
    values = {
        "method": "fpt+",
        "train": {"lr": np.float64(1e-05), "class_weights": (0.25, 1), "compile": True},
        "data": {"labels": None, "label_column": "a: b = c", "images": Path("x") / "y"},
        "cluster.slurm": {"queue": "gpu"},
    }
    assert override({"train": {"seed": 3}}, as_assignments(values)) == {
        "method": "fpt+",
        "train": {"seed": 3, "lr": 1e-05, "class_weights": [0.25, 1], "compile": True},
        "data": {"labels": None, "label_column": "a: b = c", "images": str(Path("x/y"))},
        "cluster": {"slurm": {"queue": "gpu"}},
    }
