"""The settings tree: its defaults are the published recipe, and it cannot be changed in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from schemas.data_settings import DataSettings
from schemas.errors import SettingsError
from schemas.parse import parse_settings, settings_keys
from schemas.settings import FeatureSettings, Settings, TrainSettings


def test_defaults_are_the_published_recipe() -> None:
    settings = Settings()
    assert settings.method == "fpt-x"
    assert settings.lpm.name == "vit_base_patch16_384.orig_in21k_ft_in1k"
    features, train, augment = settings.features, settings.train, settings.train.augment
    assert (features.image_size, features.ratio, features.importance) == (512, 0.2, "global")
    assert (train.prompts, train.dropout, train.side_reduction) == (16, 0.5, 8)
    assert (train.batch_size, train.epochs, train.weight_decay, train.clip_norm) == (16, 20, 0.1, 1.0)
    assert 5e-5 <= train.lr <= 5e-3
    assert (augment.flip, augment.brightness, augment.contrast) == (0.5, 0.2, 0.2)
    assert (augment.crop_scale, augment.crop_ratio) == ((0.8, 1.0), (0.7, 1.3))
    assert train.class_weights == "none"


def test_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.method = "fpt"
    with pytest.raises(ValidationError, match="frozen"):
        settings.train.lr = 1.0


CHANGED: dict[str, Any] = {
    "method": "fpt",
    "data": {"labels": "labels.csv", "group_column": "patient", "classes": ["b", "a"]},
    "features": {"layers": [1, 2], "side_image_size": 64, "dtype": "float32"},
    "train": {"lr": 0.001, "class_weights": [1.0, 2.5], "augment": {"crop_scale": [0.5, 0.9]}},
    "compute": {"device": "cpu"},
}


@pytest.mark.parametrize("raw", [{}, CHANGED])
def test_yaml_round_trip(raw: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings.model_validate(raw)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    assert Settings.model_validate(yaml.safe_load(file.read_text())) == settings


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (DataSettings, {"val_share": 0.6, "test_share": 0.4}, "no images to train"),
        (DataSettings, {"classes": ("a", "a")}, "twice"),
        (DataSettings, {"group_column": "patient"}, "labels table"),
        (FeatureSettings, {"layers": ()}, "at least one"),
        (FeatureSettings, {"layers": (2, 1)}, "ascending"),
        (FeatureSettings, {"layers": (1, 1)}, "ascending"),
        (FeatureSettings, {"ratio": 0.0}, "greater than 0"),
        (FeatureSettings, {"ratio": 1.1}, "less than or equal to 1"),
        (TrainSettings, {"side_image_size": 100}, "multiple of 16"),
        (TrainSettings, {"dropout": 1.0}, "less than 1"),
        (TrainSettings, {"augment": {"crop_scale": (1.0, 0.8)}}, "lowest, highest"),
        (TrainSettings, {"lr": float("nan")}, "finite"),
    ],
)
def test_values_that_make_no_sense_are_refused(section: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        section(**values)


def test_every_field_is_documented() -> None:
    def undocumented(model: Any, prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if not field.description:
                found.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                found += undocumented(field.annotation, f"{prefix}{name}.")
        return found

    assert undocumented(Settings) == []


def test_keys_are_the_leaves() -> None:
    keys = settings_keys()
    assert {"method", "lpm.name", "train.augment.crop_ratio", "compute.threads"} <= set(keys)
    assert "train" not in keys
    assert "train.augment" not in keys
    assert len(keys) == len(set(keys))


BEYOND: list[tuple[str, Any, str]] = [
    ("data.seed", -1, "greater than or equal to 0"),
    ("data.seed", 2**64, "less than or equal to 9223372036854775807"),
    ("data.classes", [], "at least 1"),
    ("data.images", "", "at least 1"),
    ("data.images", "a\0b", "NUL"),
    ("data.max_pixels", 10**12, "less than or equal to 100000000000"),
    ("lpm.name", "x" * 5000, "at most 4096"),
    ("features.layers", [1000], "less than or equal to 999"),
    ("features.crops", 100_000, "less than or equal to 256"),
    ("features.crop_scale", [1e-9, 1.0], "greater than or equal to 0.01"),
    ("train.augment.crop_ratio", [1e-300, 1.0], "greater than or equal to 0.1"),
    ("train.augment.crop_ratio", [1.0, 1e300], "less than or equal to 10"),
    ("train.prompts", 1e8, "less than or equal to 1024"),
    ("train.lr", 1e30, "less than or equal to 100"),
    ("train.lr", 1e-300, "greater than or equal to"),
    ("train.epochs", 10**9, "less than or equal to 100000"),
    ("train.class_weights", [0.0, 0.0], "at least 1e-6"),
    ("train.order_seed", -1, "greater than or equal to 0"),
    ("train.order_seed", False, "true or false"),
    ("train.clip_norm", float("inf"), "finite"),
    ("store.memory_budget", "9" * 60 + "GB", "such as 2GB"),
    ("compute.threads", 10**6, "less than or equal to 1024"),
    ("compute.loader_workers", 10**6, "less than or equal to 1024"),
    ("cluster.workers", 10**6, "less than or equal to 10000"),
    ("cluster.wait", 1e300, "less than or equal to 10000000"),
    ("cluster.slurm.cores", 10**6, "less than or equal to 4096"),
]


@pytest.mark.parametrize(("path", "value", "message"), BEYOND)
def test_values_that_no_one_means_are_refused_with_the_bound(path: str, value: Any, message: str) -> None:
    raw: Any = value
    for name in reversed(path.split(".")):
        raw = {name: raw}
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw)
    assert all(found.startswith(path) for found, _ in caught.value.problems)
    assert any(message in text for _, text in caught.value.problems)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ({"train": {"seed": 10**5000}}, "an integer of about"),
        ({"method": "x" * 100_000}, "... (100,002 characters)"),
        ({"x" * 100_000: 1}, "... (100,002 characters)"),
        ({"features": {"views": ["x"] * 100_000}}, "and 980 more"),
    ],
)
def test_long_values_are_cut_short(raw: dict[str, Any], shown: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw)
    assert shown in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("raw", "path", "message"),
    [
        ({"kind": "scheduler"}, "cluster.address", "tcp://host:8786"),
        ({"kind": "scheduler", "address": "host"}, "cluster.address", "must be like tcp://host:8786"),
        ({"kind": "slurm"}, "cluster.memory", "such as 16GiB"),
        ({"memory": "much"}, "cluster.memory", "such as 16GiB"),
        ({"workers": 0}, "cluster.workers", "greater than or equal to 1"),
        ({"resources": {"GPU": 0}}, "cluster.resources", "greater than 0"),
        ({"kind": "dask"}, "cluster.kind", "inline"),
        ({"worker": 3}, "cluster.worker", "did you mean 'cluster.workers'?"),
    ],
)
def test_a_cluster_that_cannot_be(raw: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({"cluster": raw})
    ((found, text),) = caught.value.problems
    assert found == path
    assert message in text


def test_a_cluster_that_can_be() -> None:
    raw = {"kind": "slurm", "memory": "16GiB", "slurm": {"queue": "gpu", "directives": ["--gres=gpu:1"]}}
    cluster = parse_settings({"cluster": raw}).cluster
    assert cluster.slurm.directives == ("--gres=gpu:1",)
    assert Settings().cluster.kind == "inline"
