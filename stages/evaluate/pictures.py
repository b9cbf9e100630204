"""Pictures of the report as data URIs: thumbnails of images, and maps of a number per patch next to them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image

from stages.evaluate.predictions import Predictions

MAPPED = 6
"""Images whose maps the report shows."""


def mapped_rows(predictions: Predictions) -> list[int]:
    """Return the positions of different images at equal distances in the order of their paths, at most `MAPPED`."""
    first: dict[str, int] = {}
    for row in sorted(range(len(predictions.rows)), key=lambda row: predictions.rows[row].path):
        first.setdefault(predictions.rows[row].id, row)
    by_path = list(first.values())
    chosen = np.linspace(0, len(by_path) - 1, min(MAPPED, len(by_path))).round().astype(int)
    return [by_path[index] for index in chosen]


def thumbnail_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode pixels (3, S, S) as JPEG."""
    return _uri(np.ascontiguousarray(pixels.transpose(1, 2, 0)), "JPEG", quality=88)


def map_uri(values: npt.NDArray[np.float32], low: float, high: float) -> str:
    """Encode a number per patch (gh, gw) as PNG, one pixel per patch, coloured from `low` (dark) to `high` (bright)."""
    shares = (values - low) / max(high - low, 1e-12)
    return _uri((colormaps["viridis"](shares)[..., :3] * 255).round().astype(np.uint8), "PNG")


def map_figures(
    maps: Mapping[str, npt.NDArray[np.float32]],
    predictions: Predictions,
    thumbnails: Mapping[str, npt.NDArray[np.uint8]],
) -> list[dict[str, Any]]:
    """Return the figures of maps for the template: of each kind its name, range, and images.

    Args:
        maps: By name, (rows, blocks, gh, gw) of the rows `mapped_rows`; the mean over blocks is drawn, with the same
            colours for all images.
        predictions: The evaluated rows.
        thumbnails: Image id -> (3, S, S).
    """
    return [_figure(name, values.mean(axis=1), predictions, thumbnails) for name, values in maps.items()]


def _figure(
    name: str,
    values: npt.NDArray[np.float32],
    predictions: Predictions,
    thumbnails: Mapping[str, npt.NDArray[np.uint8]],
) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    images = []
    for number, row in enumerate(mapped_rows(predictions)):
        item, one = predictions.rows[row], values[number]
        pixels = thumbnails.get(item.id)
        images.append(
            {
                "path": item.path,
                "image": None if pixels is None else thumbnail_uri(pixels),
                "map": map_uri(one, low, high),
                "alt": f"Map of {item.path}: {one.min():.3f} to {one.max():.3f}, mean {one.mean():.3f}",
            }
        )
    return {"name": name, "low": f"{low:.3f}", "high": f"{high:.3f}", "images": images}


def _uri(pixels: npt.NDArray[np.uint8], kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
