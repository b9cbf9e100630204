"""Read `params.yaml`, apply `--set` overrides, and write the resolved settings next to a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from pipeline.plugins import load_plugins
from pipeline.yaml_text import load_yaml
from schemas.errors import ProjectError, SettingsError, StorageError
from schemas.parse import parse_settings
from schemas.settings import Settings
from stages.files import read_small

PARAMS = "params.yaml"
MAX_BYTES = 2**20
"""Largest `params.yaml`; a file with all keys and comments has 20 KiB."""


def read_params(path: Path) -> dict[str, Any]:
    """Read the raw settings tree of a file; an empty file means all defaults.

    Raises:
        ProjectError: The file does not exist.
        SettingsError: The file is not a YAML mapping.
        StorageError: The file is not a regular file, or cannot be read.
    """
    try:
        if path.is_dir():
            raise ProjectError(f"{path} is a folder.", "", f"Name the file in it: --params {path / PARAMS}")
        text = read_small(path, MAX_BYTES).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ProjectError(
            f"There is no {path.name} in {path.absolute().parent}.",
            "fpt runs in a study, which is a folder with a params.yaml.",
            "Create one with `fpt init my-study --images DIR`, change to it with `cd`, or name its file with --params.",
        ) from None
    except StorageError:
        raise
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text.", repair="Save it as UTF-8.") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from None
    raw = load_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(
            f"{path} contains a {type(raw).__name__} instead of keys with values.",
            repair="Compare it with one from `fpt init`.",
        )
    return _copy(raw)


def read_optional_params(path: Path) -> dict[str, Any]:
    """Like `read_params`, but empty outside of a study, when no file was named and the default one does not exist."""
    return read_params(path) if path != Path(PARAMS) or path.exists() else {}


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return the tree with `key.path=value` assignments applied in order; values are YAML.

    Raises:
        SettingsError: An assignment has no `=`, an empty key, a value that is not YAML, or a path through a value.
    """
    # OmegaConf does not replace this function: its dot lists have another key syntax (`a[0]`, `${...}`), and its YAML
    # loader lacks the limits and error messages of `load_yaml`.
    tree = _copy(raw)
    problems: list[tuple[str, str]] = []
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            problems.append((assignment or "(empty)", "must be key.path=value, such as train.lr=0.001"))
            continue
        section = tree
        for depth, key in enumerate(keys[:-1]):
            if not isinstance(section.setdefault(key, {}), dict):
                problems.append((path, f"{'.'.join(keys[: depth + 1])} is a value and has no keys"))
                break
            section = section[key]
        else:
            section[keys[-1]] = load_yaml(text, f"The value of --set {path}")
    if problems:
        raise SettingsError("Invalid --set override.", problems)
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
    # YAML parses the keys `on`, `1` and dates as other types; as text they are reported like any unknown key.
    return {str(key): _copy(item) if isinstance(item, dict) else item for key, item in value.items()}


def load_settings(path: Path, assignments: Sequence[str] = ()) -> Settings:
    """Load and validate the settings of a file with overrides, without resolving them.

    Raises:
        ProjectError: The file does not exist.
        SettingsError: Lists all problems.
    """
    load_plugins()
    return parse_settings(override(read_params(path), assignments), source=path.name)


def dump_settings(settings: Settings) -> str:
    """Format all settings as YAML that `load_settings` accepts."""
    tree = settings.model_dump(mode="json")
    if tree["train"].pop("adaptive_members", False):
        # A number would train as many whatever the held-out loss.
        tree["train"]["members"] = "auto"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def write_settings(settings: Settings, folder: Path) -> None:
    """Write `settings.yaml` next to the result in `folder`."""
    from stages.files import atomic_write

    head = "# The resolved settings that produced this result.\n"
    atomic_write(folder / "settings.yaml", (head + dump_settings(settings)).encode())
