"""Read images within the limits of the settings of a study."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from schemas.data_settings import DataSettings
from schemas.rendering import Rendering
from stages.images import Accept, decoded_image


def within_limits(path: Path, data: DataSettings, rendering: Rendering) -> AbstractContextManager[Image.Image]:
    """Open the image of `stages.images.decoded_image` until a block ends.

    Args:
        path: The file.
        data: Limits of an image's size, and whether corrupt data is accepted.
        rendering: Window and frame of files that leave a choice.

    Raises:
        ImageError: If the file cannot be used.
        PlatformError: If the package that reads its format is not installed.
    """
    return decoded_image(
        path, max_pixels=data.max_pixels, min_side=data.min_side, accept=accepted(data), rendering=rendering
    )


def accepted(data: DataSettings) -> Accept:
    """Return what is called with a warning about corrupt data; None: `data.on_warning` refuses such images."""
    return None if data.on_warning == "error" else lambda _: None
