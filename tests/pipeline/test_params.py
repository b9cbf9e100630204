from pathlib import Path

import pytest
import yaml

from pipeline.params import dump_settings, load_settings, override, read_params, write_settings
from pipeline.yaml_text import load_yaml
from schemas.errors import FptError, ProjectError, SettingsError
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.settings import Settings
from stages.lpm.loading import describe_lpm

BOMB = "data:\n  classes:\n    - &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"    - &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
"""4 KiB of text that stand for 300 thousand million values."""


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_an_empty_file_holds_all_defaults(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "")) == Settings()


def test_a_missing_file_names_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="fpt init"):
        read_params(tmp_path / "params.yaml")


def test_a_missing_folder_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProjectError):
        read_params(tmp_path / "no" / "params.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: [1, 2", "line"),
        ("method: fpt\nmethod: fpt+", "twice"),
        ("train:\n  lr: 1\n  lr: 2", "'lr' twice"),
        ("- a\n- b", "contains a list"),
        ("just words", "contains a str"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [a, b]\n: 1", "unhashable"),
        ("a: &a [*a]", "line 1, column 8: an alias inside of its"),
        ("a: &a {b: [*a]}", "an alias inside of its"),
        ("x: " + "[" * 10_000, "more than 32 levels of nesting"),
        (BOMB, "more than 100,000 values"),
        ("data:\n  seed: " + "9" * 5000, "line 2, column 9: not a valid int"),
        ("data: {seed: 0x" + "f" * 5000 + "}", "more than 64 bits"),
        ("x: 2024-13-45", "not a valid timestamp"),
        ("x: !!int ''", "not a valid int"),
        ("x: !!bool maybe", "not a valid bool"),
        ('x: "a\\0b"', r"text with \\x00"),
        ('"\\ud800": 1', r"text with \\ud800"),
        ("x: \x1b[31m", r"character 4: U\+001B"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_bad_yaml_is_a_settings_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_params(write(tmp_path, text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="UTF-8"):
        read_params(tmp_path / "params.yaml")


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="line 3"):
        read_params(write(tmp_path, "method: fpt\ntrain:\n  lr: ]\n"))


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  lr: 0.1\n  epochs: 3\n")
    settings = load_settings(path, ["train.lr=1e-3", "train.epochs=4", "features.layers=[1, 2]", "train.epochs=5"])
    assert (settings.train.lr, settings.train.epochs, settings.features.layers) == (1e-3, 5, (1, 2))


def test_an_override_may_hold_an_equals_sign() -> None:
    assert override({}, ["data.images=/a=b"]) == {"data": {"images": "/a=b"}}


def test_an_override_leaves_the_tree_that_it_was_given() -> None:
    raw = {"train": {"lr": 1}}
    override(raw, ["train.lr=2"])
    assert raw == {"train": {"lr": 1}}


def test_an_unknown_override_suggests_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"train\.epoch: unknown key, did you mean 'train\.epochs'"):
        load_settings(write(tmp_path, ""), ["train.epoch=3"])


@pytest.mark.parametrize("words", ["train.lr", "=3", "train..lr=1", "", "method.x=1"])
def test_overrides_that_cannot_be_read(words: str) -> None:
    with pytest.raises(SettingsError):
        override({"method": "fpt"}, [words])


def test_a_bad_value_of_an_override_names_it() -> None:
    with pytest.raises(SettingsError, match=r"--set data\.classes"):
        override({}, ["data.classes=[a"])


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(write(tmp_path, "method: best\ntrain:\n  lr: -1\n"), ["data.seed=x"])
    assert {path for path, _ in caught.value.problems} == {"method", "train.lr", "data.seed"}


def test_written_settings_give_the_same_settings(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, ""), ["data.images=/some/ø dir", "data.classes=['no', b]"])
    write_settings(settings, tmp_path)
    assert load_settings(tmp_path / "settings.yaml") == settings
    assert load_yaml(dump_settings(settings), "text") == yaml.safe_load(dump_settings(settings))


@pytest.mark.parametrize(("members", "written"), [("auto", "auto"), (3, 3)])
def test_written_settings_train_the_same_networks(members: int | str, written: int | str) -> None:
    lpm = describe_lpm("test_vit", 64)
    raw = {"method": "fpt-x", "lpm": {"name": "test_vit"}, "train": {"side_reduction": 4, "members": members}}
    resolved = resolve(parse_settings(raw), lpm)
    tree = yaml.safe_load(dump_settings(resolved))
    assert tree["train"]["members"] == written
    assert resolve(parse_settings(tree), lpm) == resolved


def test_errors_are_of_the_one_tree() -> None:
    assert issubclass(SettingsError, FptError)


def test_aliases_within_the_limits_are_read(tmp_path: Path) -> None:
    text = "features: {image_size: &size 64}\ntrain: {side_image_size: *size}\n"
    settings = load_settings(write(tmp_path, text))
    assert (settings.features.image_size, settings.train.side_image_size) == (64, 64)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"\xef\xbb\xbfmethod: fpt\n")
    assert load_settings(tmp_path / "params.yaml").method == "fpt"


@pytest.mark.parametrize("text", ["on: 1", "1: 2", "data: {on: 1}", "data: {2024-01-01: 1}"])
def test_keys_that_are_no_text_are_unknown_keys(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="unknown key"):
        load_settings(write(tmp_path, text))


def test_a_folder_names_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"is a folder\.\nName the file in it: --params .*params\.yaml"):
        read_params(tmp_path)


def test_of_many_problems_the_first_are_listed() -> None:
    error = SettingsError("state", [(f"key{number}", "bad\nworse") for number in range(5000)])
    assert len(error.problems) == 5000
    assert len(str(error).splitlines()) == 32
    assert str(error).endswith("... and 4,970 more")
