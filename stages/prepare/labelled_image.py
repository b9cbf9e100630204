"""An image of a study with the label, group and split that the user gave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from schemas.manifest import Split


@dataclass(frozen=True)
class LabelledImage:
    """One image as the user listed it, before its file is opened."""

    path: str
    """Relative to the image folder, with forward slashes."""
    label: str
    """In the notation of manifests; empty only in a multi-label study, for an image without labels."""
    group: str | None = None
    """Patient or other group, or None if unknown."""
    split: Split | None = None
    """Split given by the user, or None if it is still to be drawn."""
    site: str | None = None
    """Hospital or other site, or None if unknown."""
    others: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Column without another role -> value of this image."""
    line: int | None = field(default=None, compare=False)
    """Line of the table, or None without a table."""
