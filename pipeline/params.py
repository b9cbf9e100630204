"""`params.yaml`: read safely, override with `--set`, write the resolved settings beside a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from pipeline.yaml_text import load_yaml
from schemas.errors import ProjectError, SettingsError, StorageError
from schemas.parse import parse_settings
from schemas.settings import Settings
from stages.files import read_small

PARAMS = "params.yaml"
LARGEST = 2**20
"""Bytes of a `params.yaml`; one with all keys and their comments has 20 KiB."""


def read_params(path: Path) -> dict[str, Any]:
    """The raw settings tree of a file; an empty file holds all defaults.

    Raises:
        ProjectError: There is no such file.
        SettingsError: It is not a YAML mapping.
        StorageError: It is no regular file, or cannot be read.
    """
    try:
        if path.is_dir():
            raise ProjectError(f"{path} is a folder.", "", f"Name the file in it: --params {path / PARAMS}")
        text = read_small(path, LARGEST).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ProjectError(
            f"There is no {path.name} in {path.absolute().parent}.",
            "fpt works inside a study, a folder with a params.yaml.",
            "Make one with `fpt init my-study --images DIR`, go into it with `cd`, or name its file with --params.",
        ) from None
    except StorageError:
        raise
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text in UTF-8.", repair="Save it as UTF-8.") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from None
    raw = load_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(
            f"{path} holds a {type(raw).__name__}, not keys with values.", repair="Compare it with one from `fpt init`."
        )
    return _copy(raw)


def read_optional_params(path: Path) -> dict[str, Any]:
    """Like `read_params`, but empty outside of a study: where no file was named and the usual one is not there."""
    return read_params(path) if path != Path(PARAMS) or path.exists() else {}


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The tree with `key.path=value` assignments applied, later ones last; values are YAML.

    Raises:
        SettingsError: An assignment has no `=`, an empty key, a value that is not YAML, or a path through a value.
    """
    tree = _copy(raw)
    problems: list[tuple[str, str]] = []
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        parts = path.strip().split(".")
        if not separator or not all(parts):
            problems.append((assignment or "(empty)", "must be key.path=value, such as train.lr=0.001"))
            continue
        place = tree
        for depth, part in enumerate(parts[:-1]):
            if not isinstance(place.setdefault(part, {}), dict):
                problems.append((path, f"{'.'.join(parts[: depth + 1])} is a value and holds no keys"))
                break
            place = place[part]
        else:
            place[parts[-1]] = load_yaml(text, f"The value of --set {path}")
    if problems:
        raise SettingsError("A --set override cannot be read.", problems)
    return tree


def as_assignments(overrides: Mapping[str, Any]) -> list[str]:
    """Express Python values as `key.path=value` overrides, so that both are checked by the same rules.

    Args:
        overrides: Key -> value. A mapping changes the named keys of a section; `{"train.lr": 1e-3}` is
            `{"train": {"lr": 1e-3}}`.

    Raises:
        SettingsError: A value is of a type that no setting takes.
    """
    pairs = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping) and "." not in key:
            pairs.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            pairs[key] = value
    try:
        return [f"{key}={_as_yaml(value)}" for key, value in pairs.items()]
    except yaml.representer.RepresenterError as error:
        kind = type(error.args[-1]).__name__
        raise SettingsError(
            f"No setting takes a value of type {kind}.", repair="Pass numbers, text, lists and dictionaries."
        ) from None


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # a number or an array of numpy
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _copy(value: dict[Any, Any]) -> dict[str, Any]:
    # YAML reads a bare `on`, `1` or date as a key that is no text; as text it is reported like any unknown key.
    return {str(key): _copy(item) if isinstance(item, dict) else item for key, item in value.items()}


def load_settings(path: Path, assignments: Sequence[str] = ()) -> Settings:
    """The settings of a file with overrides, valid but not yet resolved.

    Raises:
        ProjectError: There is no such file.
        SettingsError: With every problem at once.
    """
    return parse_settings(override(read_params(path), assignments), source=path.name)


def dump_settings(settings: Settings) -> str:
    """YAML text of all settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_settings(settings: Settings, folder: Path) -> None:
    """Write `settings.yaml` beside the result in `folder`."""
    from stages.files import atomic_write

    head = "# The resolved settings that this result was made with.\n"
    atomic_write(folder / "settings.yaml", (head + dump_settings(settings)).encode())
