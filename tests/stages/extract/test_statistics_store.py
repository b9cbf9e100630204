"""Token statistics in stores, and the stages that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from study import Study, make_study, predict, train_study

from schemas.errors import CacheMismatchError, SettingsError
from schemas.features import FeatureSpec
from schemas.parse import parse_settings
from schemas.resolve import resolve
from stages.evaluate.evaluator import evaluate
from stages.store.layout import open_store_layout
from stages.store.reader import open_store
from stages.train.bundle import load_bundle


def group_of(study: Study, spec: FeatureSpec) -> Any:
    return zarr.open_group(open_store_layout(study.cache, spec).path / "features.zarr", mode="r")


def test_a_store_lists_its_statistics(study: Study) -> None:
    receipt = study.extract()
    group = group_of(study, receipt.spec)
    listed = group.attrs["statistics"]
    assert listed == [[one.name, one.start, one.stop] for one in receipt.spec.segments]
    assert group["statistics"].shape[1] == listed[-1][2]
    assert group["statistics"].dtype == np.float16
    ids = study.manifest.ids()
    read = open_store(study.cache, receipt).read(ids, ["statistics", "keys"])
    last = receipt.spec.layers[-1]
    start, stop = next((start, stop) for name, start, stop in listed if name == f"kept keys of block {last}")
    keys = read["keys"][:, -1].astype(np.float32)
    expected = np.concatenate([moment(axis=2).reshape(len(ids), -1) for moment in (keys.mean, keys.std)], axis=1)
    # Of keys before they were rounded to the type of the store.
    np.testing.assert_allclose(
        read["statistics"][:, start:stop], expected, rtol=3e-3, atol=3e-3 * np.abs(expected).max()
    )


def test_stores_with_and_without_statistics_have_the_same_other_arrays(tmp_path: Path) -> None:
    read = {}
    for present in (True, False):
        study = make_study(tmp_path / str(present), features={"statistics": present})
        receipt = study.extract()
        assert ("statistics" in group_of(study, receipt.spec).attrs) == present
        names = ["keys", "values", "indices", "pooled", "side"]
        read[present] = open_store(study.cache, receipt).read(study.manifest.ids(), names)
    for name, array in read[False].items():
        assert np.array_equal(array, read[True][name]), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study without cached tokens."""
    return make_study(tmp_path_factory.mktemp("small"), method="linear", features={"tokens": False})


def test_without_tokens_a_store_has_only_what_closed_forms_and_side_networks_read(small: Study) -> None:
    receipt = small.extract()
    group = group_of(small, receipt.spec)
    assert set(group.array_keys()) == {"pooled", "statistics", "side", "sha256"}
    assert "dequantise" not in group.attrs
    assert all(not name.startswith("kept") for name, _, _ in group.attrs["statistics"])


@pytest.mark.parametrize("method", ["linear", "knn", "nearest-mean", "statistics", "side"])
def test_without_tokens_such_methods_train_evaluate_and_predict(small: Study, method: str) -> None:
    receipt = small.extract()
    settings = small.settings.model_copy(update={"method": method})
    output = f"model-{method}"
    train_study(small, receipt, output, settings)
    metrics = evaluate(small.files(receipt), small.root / output, small.root / f"evaluation-{method}", "train")
    if method != "side":
        assert metrics.accuracy > 0.7
    image = next((small.root / "images/stripe").iterdir())
    row = predict(small.root / output, [image], small.settings.lpm, small.root)[0]
    assert row.error is None
    assert row.predicted in load_bundle(small.root / output).spec.classes


TOKEN_METHODS = ("fpt", "fpt+", "fpt-x", "attentive")


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_without_tokens_methods_that_read_them_are_refused(small: Study, method: str) -> None:
    raw = {"method": method, "train": {"side_reduction": 4, "side_image_size": 32}}
    with pytest.raises(SettingsError, match=r"features\.tokens") as refused:
        resolve(parse_settings({**raw, "features": {"tokens": False}}), small.lpm)
    assert dict(refused.value.problems) == {"features.tokens": f"must be true: {method} reads cached tokens"}
    # The setting is right now, but the store was extracted without tokens.
    receipt = small.extract()
    features = {**small.settings.features.model_dump(), "tokens": True}
    wanted = resolve(parse_settings({**raw, "features": features}), small.lpm)
    settings = small.settings.model_copy(update={"method": method, "features": wanted.features, "train": wanted.train})
    with pytest.raises(CacheMismatchError, match=r"features\.tokens"):
        train_study(small, receipt, "refused", settings)


def test_without_statistics_only_the_probes_that_read_them_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="linear", features={"statistics": False})
    receipt = study.extract()
    assert "statistics" not in group_of(study, receipt.spec)
    train_study(study, receipt)
    for method in ("statistics", "fpt-x"):
        raw = {"method": method, "train": {"side_reduction": 4, "side_image_size": 32}}
        with pytest.raises(SettingsError, match=r"features\.statistics"):
            resolve(parse_settings({**raw, "features": {"statistics": False}}), study.lpm)
        wanted = resolve(
            parse_settings({**raw, "features": study.settings.features.model_dump() | {"statistics": True}}), study.lpm
        )
        changed = {"method": method, "features": wanted.features, "train": wanted.train}
        with pytest.raises(CacheMismatchError, match=r"features\.statistics"):
            train_study(study, receipt, "refused", study.settings.model_copy(update=changed))


def test_a_model_of_pooled_outputs_may_read_a_store_with_more(tmp_path: Path) -> None:
    """Trained with and without tokens and statistics in the store, the model is the same."""
    models = []
    for number, features in enumerate(({}, {"tokens": False}, {"statistics": False})):
        study = make_study(tmp_path / str(number), method="linear", features=features)
        train_study(study, study.extract())
        models.append((study.root / "model/model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]
