"""Views of an image: flipped, turned or cropped before the LPM reads it. Each is a row of the store of its own."""

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
    """What says which views there are: the settings of the features, or an extraction receipt."""

    @property
    def views(self) -> tuple[FixedView, ...]:
        """Flips and turns, the image itself among them."""

    @property
    def crops(self) -> int:
        """Random crops of each image."""

    @property
    def crop_scale(self) -> tuple[float, float]:
        """Share of the area that a crop keeps, (lowest, highest)."""


class ViewRow(NamedTuple):
    """One row of a store."""

    image: str
    """Image id: sha256 of the file."""
    view: str
    """identity, hflip, vflip, rot90, rot180, rot270, or crop:top,left,height,width in shares of the image."""

    @property
    def row_id(self) -> str:
        """Name of this row in a store."""
        return row_id(self.image, self.view)


def row_id(image_id: str, view: str) -> str:
    """The image id for the image itself, so that stores from before there were views hold it under the same name."""
    return image_id if view == IDENTITY else hashlib.sha256(f"{image_id}:{view}".encode()).hexdigest()


def crop_view(image_id: str, number: int, scale: tuple[float, float]) -> str:
    """A random crop in the aspect of the image, the same on every machine.

    Drawn from a digest and not from a generator of numpy or Python, whose streams may change between versions.

    Args:
        image_id: Of the image.
        number: Of the crop, from 0: more crops leave the earlier ones as they are.
        scale: Share of the area, (lowest, highest).
    """
    drawn = hashlib.sha256(f"{image_id}:crop:{number}".encode()).digest()
    area, down, right = (int.from_bytes(drawn[at : at + 8], "big") / 2**64 for at in (0, 8, 16))
    # Whole millionths: what the text says is exact, and no sum leaves the image.
    side = max(1, math.floor(_MILLION * math.sqrt(scale[0] + area * (scale[1] - scale[0]))))
    top, left = (math.floor(place * (_MILLION - side + 1)) for place in (down, right))
    return CROP + ",".join(f"{value / _MILLION:.6f}" for value in (top, left, side, side))


def views_of(image_id: str, wanted: ViewSettings) -> tuple[str, ...]:
    """Every view of a training image, each once; the image itself first."""
    crops = (crop_view(image_id, number, wanted.crop_scale) for number in range(wanted.crops))
    return tuple(dict.fromkeys((IDENTITY, *wanted.views, *crops)))


def train_views(manifest: Manifest, wanted: ViewSettings) -> Iterator[tuple[ViewRow, ...]]:
    """The rows of each training image of a manifest, the image itself first; in the order of the manifest."""
    return (tuple(ViewRow(row.id, view) for view in views_of(row.id, wanted)) for row in manifest.of("train"))


def manifest_rows(manifest: Manifest, wanted: ViewSettings) -> list[ViewRow]:
    """Every row that a study needs, each once: all images themselves, then the other views of the training images.

    Views of one image are neighbours, so that it is decoded once for them.
    """
    rows = [ViewRow(image_id, IDENTITY) for image_id in manifest.ids()]
    return [*rows, *dict.fromkeys(row for views in train_views(manifest, wanted) for row in views[1:])]
