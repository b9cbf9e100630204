"""Normalisation by the training images, and the filter of the resize: from pixels to predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import command_line
from PIL import Image
from study import Study, make_images, make_study, predict

from pipeline.params import dump_settings
from schemas.errors import CacheMismatchError, DataError, UnreadableImagesError
from schemas.features import ChannelStatistics, ExtractionReceipt
from schemas.manifest import Manifest
from schemas.resolve import resolve
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.extract import normalisation
from stages.extract.extractor import ExtractProgress
from stages.extract.features import compute_features, to_pixels
from stages.extract.normalisation import known_statistics, moments, training_statistics
from stages.extract.plan import plan_extraction, requested_spec
from stages.extract.precision import stored_precision
from stages.extract.resize import without_padding
from stages.lpm.loading import load_lpm
from stages.store.layout import open_store_layout
from stages.store.reader import open_store
from stages.train.bundle import load_bundle
from stages.train.inputs import StudyFiles
from stages.train.trainer import train


def colour_study(root: Path, **sections: Any) -> Study:
    """A study whose images have another mean and deviation in each channel."""
    features = {"normalisation": "dataset", **sections.pop("features", {})}
    study = make_study(root, per_class=5, features=features, **sections)
    rng = np.random.default_rng(3)
    for row in study.manifest.rows:
        path = root / "images" / row.path
        grey = np.asarray(Image.open(path).convert("L")).astype(float)
        colours = grey[..., None] * [0.9, 0.5, 0.2] + rng.integers(0, 30, 3)
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(path)
    study.prepare()
    return study


def training_pixels(study: Study) -> np.ndarray[Any, Any]:
    """(pixels, 3) in [0, 1] of the training images at the LPM's input size, by a direct computation."""
    images = []
    for row in study.manifest.of("train"):
        with Image.open(study.root / "images" / row.path) as image:
            size = (64, 64)
            if study.settings.features.resize == "letterbox":
                size = (64, round(64 * image.height / image.width))
            images.append(np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)).reshape(-1, 3))
    return np.concatenate(images) / 255


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_statistics_are_those_of_the_training_pixels(tmp_path: Path, resize: str) -> None:
    study = colour_study(tmp_path, features={"resize": resize})
    spec = study.extract().spec
    pixels = training_pixels(study)
    assert spec.normalisation == "dataset"
    np.testing.assert_allclose(spec.lpm.mean, pixels.mean(axis=0), atol=5.1e-5)
    np.testing.assert_allclose(spec.lpm.std, pixels.std(axis=0), atol=5.1e-5)
    assert spec.lpm.mean[0] > spec.lpm.mean[2], "channels in the order of RGB"
    assert all(round(value, 4) == value for value in (*spec.lpm.mean, *spec.lpm.std))


def test_a_letterbox_is_padded_with_the_mean_of_the_training_images(tmp_path: Path) -> None:
    study = colour_study(tmp_path, features={"resize": "letterbox"})
    receipt = study.extract()
    side = open_store(study.cache, receipt).read(study.manifest.ids(), ["side"])["side"]
    assert (side[:, :, 0, 0] == [round(255 * value) for value in receipt.spec.lpm.mean]).all()
    image = Image.new("RGB", (72, 64), (10, 20, 30))
    assert without_padding(image, receipt.spec).shape == (57, 64, 3)


def test_the_lpm_reads_pixels_that_are_normalised_by_them(tmp_path: Path) -> None:
    study = colour_study(tmp_path)
    receipt = study.extract()
    row = study.manifest.rows[0]
    with Image.open(study.root / "images" / row.path) as image:
        pixels = to_pixels(image.convert("RGB"), receipt.spec)
    loaded = load_lpm(study.settings.lpm, 64, study.root)
    entered: list[torch.Tensor] = []
    loaded.model.patch_embed.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    compute_features(loaded, receipt.spec, [pixels])
    mean, std = torch.tensor(receipt.spec.lpm.mean), torch.tensor(receipt.spec.lpm.std)
    expected = ((torch.tensor(pixels.lpm) / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(entered[0][0], expected, rtol=0, atol=1e-5)


def test_moments_of_a_histogram_are_exact() -> None:
    histogram = np.zeros((3, 256), np.int64)
    histogram[0, [0, 255]] = 10**12  # beyond what float32 adds up
    histogram[1, [51, 102]] = 3
    histogram[2, [100, 101]] = 1, 3
    mean, std = moments(histogram)
    assert mean == (0.5, 0.3, round(100.75 / 255, 4))
    assert std == (0.5, 0.1, round(0.1875**0.5 / 255, 4))
    histogram[1] = 0
    histogram[1, 7] = 5
    with pytest.raises(DataError, match="no contrast"):
        moments(histogram)


def test_they_are_computed_once_and_for_the_training_images_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = colour_study(tmp_path)
    decoded: list[str] = []
    original = normalisation.pixel_histogram

    def counted(path: Path, image_id: str, *rest: Any) -> Any:
        decoded.append(image_id)
        return original(path, image_id, *rest)

    monkeypatch.setattr(normalisation, "pixel_histogram", counted)
    steps: list[tuple[str, int, int]] = []
    first = study.extract(preparing=lambda *step: steps.append(step))
    training = {row.id for row in study.manifest.of("train")}
    assert set(decoded) == training
    assert steps[-1] == ("statistics", len(training), len(training))
    decoded.clear()
    (study.features / "receipt.json").unlink()
    seen: list[ExtractProgress] = []
    assert study.extract(progress=seen.append) == first, "DVC removes the receipt before it runs a stage again"
    assert (seen[-1].cached, decoded) == (15, [])
    saved = ChannelStatistics.model_validate_json((study.features / "normalisation.json").read_text())
    assert (saved.mean, saved.std, saved.images) == (first.spec.lpm.mean, first.spec.lpm.std, len(training))
    # Other splits, labels and views of the same training images change nothing; other training images do.
    assert study.extract(all_views=True).fingerprint == first.fingerprint
    assert decoded == []
    rows = tuple(row.model_copy(update={"split": "train"}) for row in study.manifest.rows)
    study.manifest = Manifest(classes=study.manifest.classes, rows=rows)
    assert study.extract().fingerprint != first.fingerprint
    assert len(set(decoded)) == 15


@pytest.mark.parametrize("content", [b"", b"{}", b'{"mean": "x"}', b"\xff" * 10, None])
def test_a_damaged_file_of_statistics_is_replaced(tmp_path: Path, content: bytes | None) -> None:
    study = colour_study(tmp_path)
    first = study.extract()
    (path,) = (study.cache / normalisation.FOLDER).iterdir()
    good = path.read_bytes()
    if content is None:
        content = json.dumps({**json.loads(good), "images_sha256": "f" * 64}).encode()
    path.write_bytes(content)
    placeholder = requested_spec(study.settings, study.root)
    assert known_statistics(placeholder, study.manifest, study.cache) is None
    assert study.extract() == first
    assert path.read_bytes() == good


def test_size_filter_and_resize_rule_have_statistics_of_their_own(tmp_path: Path) -> None:
    study = colour_study(tmp_path)
    study.extract()
    for changes in ({"image_size": 96}, {"filter": "lanczos"}, {"resize": "letterbox"}):
        spec = requested_spec(study.changed(features=changes), study.root)
        assert known_statistics(spec, study.manifest, study.cache) is None, changes
    other = requested_spec(study.changed(features={"dtype": "int8", "layers": (5,)}), study.root)
    assert known_statistics(other, study.manifest, study.cache) is not None


def test_an_image_that_changed_since_prepare_stops_it(tmp_path: Path) -> None:
    study = colour_study(tmp_path)
    gone, changed = list(study.manifest.of("train"))[:2]
    (study.root / "images" / gone.path).unlink()
    Image.new("RGB", (72, 64)).save(study.root / "images" / changed.path)
    with pytest.raises(UnreadableImagesError, match="fpt prepare") as caught:
        study.extract()
    reasons = {Path(path).name: reason for path, reason in caught.value.failures}
    assert reasons == {
        Path(gone.path).name: "no such file",
        Path(changed.path).name: "its content changed since `fpt prepare`",
    }
    spec = requested_spec(study.settings, study.root)
    with pytest.raises(UnreadableImagesError):
        training_statistics(spec, study.manifest, study.settings.data, study.root, study.cache)


def files_of(study: Study, receipt: ExtractionReceipt | None) -> StudyFiles:
    """What training and evaluation read."""
    return StudyFiles(
        study.manifest, study.lpm, receipt, study.cache, study.root, study.settings.data, study.settings.lpm
    )


def trained(study: Study, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Train on the extracted features; probabilities of the test images through the store."""
    receipt = study.extract()
    files = files_of(study, receipt)
    train(study.settings, files, folder / "model", folder / "checkpoints")
    evaluate(files, folder / "model", folder / "evaluation", "test")
    found = read_predictions(folder / "evaluation/predictions.parquet")
    return {row.path: p for row, p in zip(found.rows, found.probabilities, strict=True)}


@pytest.mark.parametrize("features", [{}, {"filter": "lanczos"}, {"resize": "letterbox", "filter": "bilinear"}])
def test_a_study_trains_and_predicts_with_them(tmp_path: Path, features: dict[str, Any]) -> None:
    study = colour_study(tmp_path, features=features)
    expected = trained(study, tmp_path / "out")
    spec = load_bundle(tmp_path / "out/model", torch.device("cpu")).spec.features
    assert spec.normalisation == "dataset"
    assert spec.lpm.mean != study.lpm.mean
    assert spec.filter == features.get("filter")
    paths = [study.root / "images" / name for name in expected]
    rows = predict(tmp_path / "out/model", paths, study.settings.lpm, study.root)
    for row, p in zip(rows, expected.values(), strict=True):
        assert row.error is None
        assert row.probabilities is not None
        np.testing.assert_allclose(list(row.probabilities.values()), p, atol=1e-3)


@pytest.mark.parametrize("source", ["hidden", "image"])
def test_fine_tuning_reads_images_that_are_normalised_by_them(tmp_path: Path, source: str) -> None:
    hidden = {"hidden": 4} if source == "hidden" else {}
    study = colour_study(tmp_path, method="finetune", features={"filter": "bilinear", **hidden})
    receipt = study.extract() if hidden else None
    folder = tmp_path / "out"
    files = files_of(study, receipt)
    train(study.settings, files, folder / "model", folder / "checkpoints")
    spec = load_bundle(folder / "model", torch.device("cpu")).spec.features
    expected = study.extract().spec
    assert (spec.lpm, spec.normalisation, spec.filter) == (expected.lpm, "dataset", "bilinear")
    evaluate(files, folder / "model", folder / "evaluation", "test")
    found = read_predictions(folder / "evaluation/predictions.parquet")
    paths = [study.root / "images" / row.path for row in found.rows]
    rows = predict(folder / "model", paths, study.settings.lpm, study.root)
    for row, p in zip(rows, found.probabilities, strict=True):
        assert row.probabilities is not None
        np.testing.assert_allclose(list(row.probabilities.values()), p, atol=1e-3)


def test_the_side_image_is_normalised_by_them_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = colour_study(tmp_path)
    receipt = study.extract()
    used: list[tuple[Any, Any]] = []

    def noted(pixels: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
        used.append((tuple(mean), tuple(std)))
        return (pixels.float() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    monkeypatch.setattr("stages.methods.batch.normalise", noted)
    folder = tmp_path / "out"
    train(study.settings, files_of(study, receipt), folder / "model", folder / "checkpoints")
    assert set(used) == {(receipt.spec.lpm.mean, receipt.spec.lpm.std)}


def test_settings_and_features_of_another_normalisation_do_not_meet(tmp_path: Path) -> None:
    study = colour_study(tmp_path)
    receipt = study.extract()
    folder = tmp_path / "out"
    for method in ("fpt+", "side"):
        other = study.changed(features={"normalisation": "lpm"}).model_copy(update={"method": method})
        with pytest.raises(CacheMismatchError) as caught:
            train(other, files_of(study, receipt), folder / "model", folder / "checkpoints")
        assert set(caught.value.differing) == {"normalisation", "lpm.mean", "lpm.std"}
        filtered = study.changed(features={"filter": "lanczos"}).model_copy(update={"method": method})
        with pytest.raises(CacheMismatchError) as caught:
            train(filtered, files_of(study, receipt), folder / "model", folder / "checkpoints")
        assert set(caught.value.differing) == {"filter"}


def test_a_plan_before_the_statistics_has_no_store(tmp_path: Path) -> None:
    study = colour_study(tmp_path)
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.fingerprint, plan.store, plan.to_compute, plan.cached) == (None, None, 15, 0)
    assert not study.cache.exists(), "a plan computes nothing"
    receipt = study.extract()
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.fingerprint, plan.cached) == (receipt.fingerprint, 15)
    assert plan.store == str(open_store_layout(study.cache, receipt.spec).path)


def test_the_commands_work_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = colour_study(tmp_path)
    (study.root / "params.yaml").write_text(dump_settings(study.settings))
    fpt = command_line(capsys, monkeypatch)
    # `test_vit` has no published weights, and nothing here needs the network.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert json.loads(fpt("extract", "--plan", "--json", cwd=study.root)[0])["store"] is None
    assert "named once" in fpt("extract", "--plan", cwd=study.root)[0]
    report = json.loads(fpt("extract", "--json", cwd=study.root)[0])
    assert report["computed"] == 15
    plan = json.loads(fpt("extract", "--plan", "--json", cwd=study.root)[0])
    assert (plan["store"], plan["to_compute"]) == (report["store"], 0)
    fpt("cost", "--json", cwd=study.root)
    findings = json.loads(fpt("doctor", "--json", cwd=study.root)[0])["findings"]
    (store,) = [finding for finding in findings if finding["name"] == "store"]
    assert store["status"] == "ok", store
    other = json.loads(fpt("doctor", "--json", "--set", "features.normalisation=lpm", cwd=study.root)[0])["findings"]
    (store,) = [finding for finding in other if finding["name"] == "store"]
    assert "normalisation" in store["detail"]
    fpt("train", cwd=study.root)
    fpt("evaluate", cwd=study.root)
    make_images(tmp_path / "new", 1, seed=5)
    rows = list(csv.DictReader(fpt("predict", "new", cwd=study.root)[0].splitlines()))
    assert len(rows) == 3
    assert all(row["predicted"] and not row["error"] for row in rows)


def test_auto_precision_is_that_of_a_store_of_unknown_statistics(tmp_path: Path) -> None:
    study = colour_study(tmp_path, features={"precision": "bfloat16"})
    study.extract()
    placeholder = requested_spec(study.changed(features={"precision": "float32"}), study.root)
    assert stored_precision(study.cache, placeholder) == "bfloat16"
    other = placeholder.model_copy(update={"normalisation": "lpm"})
    assert stored_precision(study.cache, other) is None


def test_a_filter_that_is_the_lpms_own_is_auto(tmp_path: Path) -> None:
    study = make_study(tmp_path, per_class=4)
    assert study.settings.features.filter == study.lpm.interpolation == "bicubic"
    plain = study.extract()
    study.settings = resolve(study.changed(features={"filter": "auto"}), study.lpm)
    assert study.extract().fingerprint == plain.fingerprint
    assert plain.spec.filter is None


@pytest.mark.parametrize("name", ["bilinear", "lanczos"])
def test_another_filter_gives_other_pixels_for_both_networks(tmp_path: Path, name: str) -> None:
    study = make_study(tmp_path, per_class=4)
    plain = study.extract()
    study.settings = study.changed(features={"filter": name})
    receipt = study.extract()
    assert receipt.spec.filter == name
    assert receipt.fingerprint != plain.fingerprint
    row = study.manifest.rows[0]
    with Image.open(study.root / "images" / row.path) as image:
        resized = image.convert("RGB").resize((40, 40), Image.Resampling[name.upper()])
        pixels = to_pixels(image.convert("RGB"), receipt.spec)
        large = image.convert("RGB").resize((64, 64), Image.Resampling[name.upper()])
    stored = open_store(study.cache, receipt).read([row.id], ["side", "keys"])
    assert np.array_equal(stored["side"][0], np.asarray(resized).transpose(2, 0, 1))
    assert np.array_equal(pixels.lpm, np.asarray(large))
    before = open_store(study.cache, plain).read([row.id], ["keys"])
    assert not np.array_equal(stored["keys"], before["keys"])
