"""The one base class of every contract."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

LONGEST_TEXT = 4096
"""Characters of a text in the settings; also the longest path on Linux."""

LONGEST_LIST = 10_000
"""Entries of a list in the settings, such as class names."""


class Contract(BaseModel):
    """A frozen record that refuses fields it does not know and documents each field beside it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class SettingsSection(Contract):
    """A section of the settings: whatever a user writes has a bounded length."""

    @field_validator("*", mode="after")
    @classmethod
    def _check_size(cls, value: object) -> object:
        for item in _flat(value):
            if isinstance(item, str) and "\0" in item:
                raise ValueError("holds a NUL character")
            if isinstance(item, str) and len(item) > LONGEST_TEXT:
                raise ValueError(f"has {len(item):,} characters; at most {LONGEST_TEXT:,} are allowed")
            if isinstance(item, tuple | dict) and len(item) > LONGEST_LIST:
                raise ValueError(f"has {len(item):,} entries; at most {LONGEST_LIST:,} are allowed")
        return value


def _flat(value: object) -> Iterator[object]:
    """The value itself, and the entries of lists and mappings."""
    yield value
    if isinstance(value, tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.keys()
        yield from value.values()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN. Digests are taken of this text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
