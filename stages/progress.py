"""Callback type by which a stage reports progress; the caller chooses how to show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total)."""
