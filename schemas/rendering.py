"""How a file with more than 8 bits per pixel, or with several frames, is shown as one 8-bit image."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from schemas.base import Contract


def _positive_width(value: tuple[float, float]) -> tuple[float, float]:
    if value[1] <= 0:
        raise ValueError("must be [center, width] with a width above 0")
    return value


Window = Literal["stored", "percentile", "full"] | Annotated[tuple[float, float], AfterValidator(_positive_width)]
Frame = Literal["middle", "first"] | Annotated[int, Field(ge=0, le=10**6)]


class Rendering(Contract):
    """Window and frame of files that leave a choice; PNG, JPEG and other 8-bit images do not depend on it."""

    window: Window = "stored"
    """Grey values that become black and white: stored, percentile, full, or (center, width)."""
    frame: Frame = "middle"
    """Frame or slice of a file that has several: middle, first, or its number from 0."""

    def frame_of(self, frames: int) -> int | None:
        """Return the frame to use of a file with this many, or None if it has no such frame."""
        if self.frame == "middle":
            return frames // 2
        # A file with a single frame leaves no choice.
        number = 0 if self.frame == "first" or frames == 1 else self.frame
        return number if number < frames else None


DEFAULT_RENDERING = Rendering()
"""Rendering of stores that were made before there was a choice."""
