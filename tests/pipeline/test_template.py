import re
from pathlib import Path

import pytest
import yaml

from pipeline.template import DEMO, DEMO_HEAD, demo_dvc_yaml, dvc_yaml, four_stages, params_yaml
from schemas.parse import parse_settings, settings_keys
from schemas.settings import Settings

ROOT = Path(__file__).parents[2]


def keys(tree: dict[str, object], prefix: str = "") -> list[str]:
    found = []
    for name, value in tree.items():
        found += keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return found


def test_params_hold_every_key_with_its_default() -> None:
    tree = yaml.safe_load(params_yaml(Settings()))
    assert keys(tree) == settings_keys()
    assert parse_settings(tree) == Settings()


def test_every_key_is_explained_right_above_it() -> None:
    lines = params_yaml(Settings(), "Head").splitlines()
    assert lines[:2] == ["# Head", ""]
    for number, line in enumerate(lines):
        if re.match(r"\s*\w+:", line):
            assert lines[number - 1].lstrip().startswith("# "), line
    assert any("Choices: " in line for line in lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("value", ["/a path/with: colon", "#x", "null", "ø", "1e3", "'"])
def test_values_survive(value: str) -> None:
    settings = parse_settings({"data": {"images": value}})
    assert parse_settings(yaml.safe_load(params_yaml(settings))) == settings


def test_a_small_learning_rate_is_a_number_for_every_yaml() -> None:
    text = params_yaml(parse_settings({"train": {"lr": 5e-5}}))
    assert "lr: 5.0e-05" in text


def test_the_pair_at_the_root_comes_from_the_template() -> None:
    assert (ROOT / "dvc.yaml").read_text() == demo_dvc_yaml()
    assert (ROOT / "params.yaml").read_text() == params_yaml(parse_settings(DEMO), DEMO_HEAD)


def test_demo_and_scaffold_share_the_four_stages() -> None:
    stages = four_stages(labels=False, weights=True)
    assert stages in demo_dvc_yaml()
    assert stages in dvc_yaml(labels=False, weights=True)


def test_labels_and_weights_are_watched_where_they_are_files() -> None:
    stages = yaml.safe_load(dvc_yaml(labels=True, weights=True))["stages"]
    assert "${data.labels}" in stages["prepare"]["deps"]
    assert "${lpm.weights}" in stages["extract"]["deps"]
    stages = yaml.safe_load(dvc_yaml(labels=False, weights=False))["stages"]
    assert stages["prepare"]["deps"] == ["${data.images}"]
    assert stages["prepare"]["params"] == ["data", "features.window", "features.frame"]
    assert stages["extract"]["deps"] == ["outputs/manifest/manifest.parquet"]


def test_the_store_is_no_output() -> None:
    stages = yaml.safe_load(dvc_yaml(labels=False, weights=False))["stages"]
    assert stages["extract"]["outs"] == ["outputs/features"]
    assert ".fpt" not in dvc_yaml(labels=False, weights=False)
