"""Callback type by which a stage reports progress; the caller chooses how to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class ExternalProgress:
    """Progress of the two parts of an external evaluation."""

    reading: Progress | None = None
    """Called with (images read, images)."""
    predicting: Progress | None = None
    """Called with (images predicted, images without cached features)."""
