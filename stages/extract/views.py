"""The geometry of views: flips, turns and crops of a decoded image, the same for the LPM and the side network."""

from __future__ import annotations

from PIL import Image

from schemas.views import CROP, IDENTITY

_TRANSPOSE = {
    "hflip": Image.Transpose.FLIP_LEFT_RIGHT,
    "vflip": Image.Transpose.FLIP_TOP_BOTTOM,
    "rot90": Image.Transpose.ROTATE_90,
    "rot180": Image.Transpose.ROTATE_180,
    "rot270": Image.Transpose.ROTATE_270,
}
"""Turns are counter-clockwise."""


def apply_view(image: Image.Image, view: str) -> Image.Image:
    """Flip, turn or crop a decoded image, before it is resized.

    Args:
        image: As it was decoded.
        view: As in `ViewRow.view`.

    Raises:
        ValueError: If `view` is not the name of a view.
    """
    if view == IDENTITY:
        return image
    if view.startswith(CROP):
        return image.crop(crop_box(view, image.size))
    try:
        return image.transpose(_TRANSPOSE[view])
    except KeyError:
        raise ValueError(f"{view} is not a view of an image") from None


def crop_box(view: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop of an image of (width, height), in pixels; at least one each way."""
    top, left, height, width = map(float, view.removeprefix(CROP).split(","))
    x, y = min(round(left * size[0]), size[0] - 1), min(round(top * size[1]), size[1] - 1)
    right, bottom = round((left + width) * size[0]), round((top + height) * size[1])
    return x, y, min(size[0], max(x + 1, right)), min(size[1], max(y + 1, bottom))
