"""Base classes of all contracts, and their canonical JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def _plain(value: str) -> str:
    # Paths cannot contain NUL; NEL (U+0085) is a line break in YAML, which PyYAML writes unescaped.
    if "\0" in value or "\x85" in value:
        raise ValueError("must not contain the characters NUL or NEL (U+0085)")
    return value


Text = Annotated[str, Field(max_length=4096), AfterValidator(_plain)]
"""Text of settings: a path, a URL, a name."""
Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_plain)]
"""Non-empty text."""
Word = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_plain)]
"""Short non-empty text."""


class Contract(BaseModel):
    """A frozen record that refuses unknown fields; the docstring of each field follows it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class Section(Contract):
    """A section of the settings."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_yes_or_no(cls, value: Any, info: ValidationInfo) -> Any:
        # `off` and `no` are booleans in YAML, which pydantic would convert to the numbers 0 and 1.
        switch = cls.model_fields[info.field_name or ""].annotation is bool
        several = value if isinstance(value, list | tuple) else [value]
        if not switch and any(isinstance(item, bool) for item in several):
            raise ValueError("must not be true or false (nor yes, no, on, off)")
        return value


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value, from which digests are computed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
