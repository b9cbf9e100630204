"""Views of an image: flipped, rotated or cropped before the LPM reads it. Each view is a separate row of the store."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from schemas.manifest import Manifest
from schemas.settings import FixedView

IDENTITY: FixedView = "identity"
CROP = "crop:"
_MILLION = 1_000_000


class ViewSettings(Protocol):
    """Which views exist: implemented by the feature settings and by the extraction receipt."""

    @property
    def views(self) -> tuple[FixedView, ...]:
        """Flips and rotations, including the identity."""

    @property
    def crops(self) -> int:
        """Random crops per image."""

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Fraction of the image area in a crop, (lowest, highest)."""


class ViewRow(NamedTuple):
    """One row of a store."""

    image: str
    """Image id: sha256 of the file."""
    view: str
    """identity, hflip, vflip, rot90, rot180, rot270, or crop:top,left,height,width as fractions of the image."""

    @property
    def row_id(self) -> str:
        """Name of this row in a store."""
        return row_id(self.image, self.view)


def row_id(image_id: str, view: str) -> str:
    """Return the row id of a view; for the unmodified image it is the image id, as in stores without views."""
    return image_id if view == IDENTITY else hashlib.sha256(f"{image_id}:{view}".encode()).hexdigest()


def crop_view(image_id: str, number: int, scale: tuple[float, float]) -> str:
    """Return a random crop with the aspect ratio of the image, the same on every machine.

    The crop is drawn from a digest because the random streams of numpy and Python may change between versions.

    Args:
        image_id: Image id.
        number: Number of the crop, from 0; earlier crops do not change when more are added.
        scale: Fraction of the image area, (lowest, highest).
    """
    drawn = hashlib.sha256(f"{image_id}:crop:{number}".encode()).digest()
    area, down, right = (int.from_bytes(drawn[at : at + 8], "big") / 2**64 for at in (0, 8, 16))
    # Integer millionths: six decimals are exact, and position plus size never exceeds the image.
    side = max(1, math.floor(_MILLION * math.sqrt(scale[0] + area * (scale[1] - scale[0]))))
    top, left = (math.floor(place * (_MILLION - side + 1)) for place in (down, right))
    return CROP + ",".join(f"{value / _MILLION:.6f}" for value in (top, left, side, side))


def views_of(image_id: str, settings: ViewSettings) -> tuple[str, ...]:
    """Return every view of a training image once, the unmodified image first."""
    crops = (crop_view(image_id, number, settings.crop_scale) for number in range(settings.crops))
    return tuple(dict.fromkeys((IDENTITY, *settings.views, *crops)))


def train_views(manifest: Manifest, settings: ViewSettings) -> Iterator[tuple[ViewRow, ...]]:
    """Yield the rows of each training image, the unmodified image first, in the order of the manifest."""
    return (tuple(ViewRow(row.id, view) for view in views_of(row.id, settings)) for row in manifest.of("train"))


def manifest_rows(manifest: Manifest, settings: ViewSettings) -> list[ViewRow]:
    """Return every row that a study needs once: all unmodified images, then other views of the training images.

    The views of an image are adjacent, so that it is decoded only once for all of them.
    """
    rows = [ViewRow(image_id, IDENTITY) for image_id in manifest.ids()]
    return [*rows, *dict.fromkeys(row for views in train_views(manifest, settings) for row in views[1:])]
