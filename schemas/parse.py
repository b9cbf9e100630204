"""Raw values to `Settings`: every problem at once, by dotted path, with the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from schemas.errors import SettingsError
from schemas.settings import Settings


def parse_settings(raw: Mapping[str, Any], source: str = "params.yaml") -> Settings:
    """Validate a whole settings tree.

    Args:
        raw: The tree as YAML gives it.
        source: Name of the file, for the message.

    Raises:
        SettingsError: With every problem; `problems` holds (dotted path, message).
    """
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for item in error.errors(include_url=False):
            path = tuple(str(part) for part in item["loc"])
            problems.setdefault(_shown(path), _message(path, item["type"], item["msg"], item.get("input")))
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise SettingsError(
            f"{source} is not valid: {count}.", tuple(problems.items()), f"Correct {source}, or the --set override."
        ) from None


def _message(path: tuple[str, ...], kind: str, message: str, value: object) -> str:
    if kind == "extra_forbidden":
        near = _nearest(path)
        return f"unknown key{f', did you mean {near!r}?' if near else ''}"
    text = message.removeprefix("Value error, ")
    plain = isinstance(value, str | int | float | bool) or value is None
    return f"{text} (is {value!r})" if plain else text


def _shown(path: tuple[str, ...]) -> str:
    # A union adds its alternatives to the location ("literal['auto']"); the user wrote none of them.
    known = [part for part in path if part.isidentifier() or part.isdigit()]
    return ".".join(part for part in known if part not in {"int", "float", "tuple"}) or "(top level)"


def _nearest(path: tuple[str, ...]) -> str | None:
    """The nearest valid key: in the same section first, then anywhere in the tree."""
    section: type[BaseModel] | None = Settings
    for part in path[:-1]:
        section = _child(section, part)
    if section is not None:
        here = difflib.get_close_matches(path[-1], list(section.model_fields), n=1)
        if here:
            return ".".join((*path[:-1], here[0]))
    every = settings_keys()
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(every)}
    anywhere = difflib.get_close_matches(path[-1], list(leaves), n=1)
    return leaves[anywhere[0]] if anywhere else None


def _child(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    if model is None or name not in model.model_fields:
        return None
    annotation = model.model_fields[name].annotation
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def settings_keys(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every dotted key that `params.yaml` may hold, leaves only, in order."""
    keys: list[str] = []
    for name in model.model_fields:
        child = _child(model, name)
        keys += settings_keys(child, f"{prefix}{name}.") if child else [f"{prefix}{name}"]
    return keys
