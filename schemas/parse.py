"""Validate raw values as `Settings`, and report all problems at once with suggestions for unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from schemas.errors import SettingsError
from schemas.settings import Settings
from schemas.urls import masked

_LONGEST_GUESS = 100
"""Longest unknown key, in characters, for which a similar valid key is sought; comparing takes quadratic time."""

SHOWN = 20
"""Number of problems that a message lists."""
MOST = 1000
"""Number of problems after which counting stops; a long list of wrong values has one for each."""
LONG = 60
"""Length in characters beyond which a key or a value is abbreviated."""


def parse_settings(raw: Mapping[str, Any], source: str = "params.yaml") -> Settings:
    """Validate a complete settings tree.

    Args:
        raw: Nested mapping, as loaded from YAML.
        source: Name of the file, for the message.

    Raises:
        SettingsError: With all problems, up to `SHOWN`, as (dotted path, message) in `problems`.
    """
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        problems = _problems(error)
        more = "at least " if error.error_count() > MOST else ""
        count = f"{more}{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        if len(problems) > SHOWN:
            problems = (*problems[:SHOWN], ("...", f"and {len(problems) - SHOWN} more"))
        raise SettingsError(
            f"{source} is not valid: {count}.", problems, f"Correct {source}, or the --set override."
        ) from None


def _problems(error: ValidationError) -> tuple[tuple[str, str], ...]:
    """Return (dotted path, message) for each problem, merging the failed alternatives of a union."""
    messages: dict[tuple[str, ...], list[str]] = {}
    rejected: dict[tuple[str, ...], object] = {}
    for item in error.errors(include_url=False)[:MOST]:
        path = _user_path(item["loc"], item["type"])
        if item["type"] == "extra_forbidden":
            near = _nearest(path)
            text = f"unknown key{f', did you mean {near!r}?' if near else ''}"
        else:
            text = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
            rejected[path] = item.get("input")
        texts = messages.setdefault(path, [])
        if text not in texts:
            texts.append(text)
    lines = []
    for path, texts in messages.items():
        # For [1, "x"], report the invalid "x" rather than that the list is not "auto".
        if isinstance(rejected.get(path), list | tuple) and any(p[: len(path)] == path for p in messages if p != path):
            continue
        value = rejected.get(path)
        plain = path in rejected and (isinstance(value, str | int | float | bool) or value is None)
        lines.append(
            (
                ".".join(map(_short_key, path)) or "(top level)",
                "; or: ".join(texts) + (f" (is {_short(value)})" if plain else ""),
            )
        )
    return tuple(lines)


def _short(value: object) -> str:
    """Format a value for a message."""
    # Python refuses to write integers of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of about {value.bit_length() * 3 // 10} digits"
    text = masked(repr(value))
    return text if len(text) <= LONG else f"{text[: LONG // 2]}... ({len(text):,} characters)"


def _short_key(key: str) -> str:
    return key if len(key) <= LONG and key.isprintable() else _short(key)


def _user_path(location: tuple[int | str, ...], kind: str) -> tuple[str, ...]:
    """Return the keys of a location without the union alternatives that pydantic adds, such as "literal['auto']"."""
    if kind == "extra_forbidden":
        return tuple(str(key) for key in location)
    section: type[BaseModel] | None = Settings
    path: list[str] = []
    for key in location:
        if section is not None or isinstance(key, int):
            path.append(str(key))
        section = _child(section, str(key))
    return tuple(path)


def _nearest(path: tuple[str, ...]) -> str | None:
    """Return the most similar valid key: the same name elsewhere, else in the same section, else anywhere."""
    if len(path[-1]) > _LONGEST_GUESS:
        return None
    section: type[BaseModel] | None = Settings
    for key in path[:-1]:
        section = _child(section, key)
    every = settings_keys()
    if len(path[-1]) > LONG:
        return None
    if (same := [key for key in every if key.rsplit(".", 1)[-1] == path[-1]]) and len(same) == 1:
        return same[0]
    if section is not None:
        here = difflib.get_close_matches(path[-1], list(section.model_fields), n=1)
        if here:
            return ".".join((*path[:-1], here[0]))
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
    """Return all dotted leaf keys of `params.yaml`, in order."""
    keys: list[str] = []
    for name in model.model_fields:
        child = _child(model, name)
        keys += settings_keys(child, f"{prefix}{name}.") if child else [f"{prefix}{name}"]
    return keys
