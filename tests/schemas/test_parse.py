"""Settings from raw values: all problems at once, by the path in the file, with the most similar key."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.errors import SettingsError
from schemas.parse import parse_settings
from schemas.settings import Settings


def problems(raw: Any) -> dict[str, str]:
    with pytest.raises(SettingsError) as caught:
        parse_settings(raw)
    return dict(caught.value.problems)


def test_nothing_gives_the_defaults() -> None:
    assert parse_settings({}) == Settings()


def test_all_problems_at_once() -> None:
    raw = {
        "method": "ftp",
        "train": {"lr": -1, "epoch": 3, "augment": {"flip": 2}},
        "features": {"ratio": 0, "layers": "all"},
        "lmp": {"name": "x"},
    }
    found = problems(raw)
    assert set(found) == {
        "method",
        "train.lr",
        "train.epoch",
        "train.augment.flip",
        "features.ratio",
        "features.layers",
        "lmp",
    }


def test_message_names_file_count_paths_and_repair() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({"train": {"lr": -1, "epoch": 3}}, source="study.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "study.yaml is not valid: 2 problems."
    assert any(line.startswith("  train.lr: ") and "-1" in line for line in lines)
    assert "study.yaml" in lines[-1]
    with pytest.raises(SettingsError, match="1 problem\\."):
        parse_settings({"x": 1})


@pytest.mark.parametrize(
    ("raw", "path", "near"),
    [
        ({"train": {"epoch": 3}}, "train.epoch", "train.epochs"),
        ({"train": {"augment": {"flips": 1}}}, "train.augment.flips", "train.augment.flip"),
        ({"epochs": 3}, "epochs", "train.epochs"),
        ({"trian": {}}, "trian", "train"),
        ({"data": {"learning_rate": 1}}, "data.learning_rate", None),
        ({"features": {"batch_size": 1}}, "features.batch_size", "train.batch_size"),
        ({"train": {"weight-decay": 1}}, "train.weight-decay", "train.weight_decay"),
        ({"train": {"int": 1}}, "train.int", None),
        ({"side_image_size": 1}, "side_image_size", "features.side_image_size"),
    ],
)
def test_unknown_keys_come_with_the_nearest_valid_one(raw: dict[str, Any], path: str, near: str | None) -> None:
    message = problems(raw)[path]
    assert message.startswith("unknown key")
    assert (f"did you mean {near!r}?" in message) if near else ("did you mean" not in message)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ({"features": {"layers": "all"}}, "features.layers"),
        ({"features": {"layers": [1, -2]}}, "features.layers"),
        ({"features": {"layers": [1, "x"]}}, "features.layers"),
        ({"features": {"side_image_size": 7}}, "features.side_image_size"),
        ({"features": {"side_image_size": "big"}}, "features.side_image_size"),
        ({"train": {"side_image_size": 100}}, "train.side_image_size"),
        ({"train": {"class_weights": "blanced"}}, "train.class_weights"),
        ({"train": {"class_weights": [1.0, -1.0]}}, "train.class_weights"),
        ({"train": {"augment": {"crop_scale": [0.9, 0.1]}}}, "train.augment"),
    ],
)
def test_paths_are_those_that_the_user_wrote(raw: dict[str, Any], path: str) -> None:
    """Paths contain no union alternatives or validators, but may contain an index."""
    found = problems(raw)
    assert all(key == path or (key.startswith(f"{path}.") and key[len(path) + 1 :].isdigit()) for key in found), found


@pytest.mark.parametrize("raw", [{"train": None}, {"train": 3}, {"train": [1]}, {"train": "fast"}])
def test_a_section_that_is_no_section(raw: dict[str, Any]) -> None:
    assert set(problems(raw)) == {"train"}


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_a_file_that_is_no_mapping(raw: Any) -> None:
    assert set(problems(raw)) == {"(top level)"}


def test_values_are_shown_but_not_whole_trees() -> None:
    assert "(is 'ftp')" in problems({"method": "ftp"})["method"]
    assert "secret" not in problems({"train": {"lr": {"secret": 1}}})["train.lr"]


def test_a_union_is_one_problem() -> None:
    found = problems({"features": {"layers": "all"}})
    assert "'auto'" in found["features.layers"]
    assert "a list" in found["features.layers"]
    assert set(problems({"features": {"layers": [1, "x"]}})) == {"features.layers.1"}


def test_a_problem_of_a_whole_section_is_at_the_section() -> None:
    found = problems({"data": {"val_share": 0.5, "test_share": 0.5}})
    assert found == {"data": "val_share + test_share leave no images to train on"}


def test_strings_are_not_taken_for_other_types() -> None:
    assert set(problems({"train": {"epochs": 2.5}})) == {"train.epochs"}
    assert parse_settings({"train": {"lr": "1e-3"}}).train.lr == 1e-3
