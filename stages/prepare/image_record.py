"""Decode one image: is it complete, what is its content, and what does it look like in small?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from schemas.data_settings import DataSettings
from schemas.errors import ImageError
from schemas.rendering import DEFAULT_RENDERING, Rendering
from stages.files import sha256_file
from stages.images import decoded_image
from stages.prepare.near_duplicates import thumbnail

REMARKS_JOINED_BY = "|"


@dataclass(frozen=True)
class ImageRecord:
    """What is read of a usable image."""

    id: str
    """Sha256 of the file."""
    thumbnail: bytes
    """From `near_duplicates.thumbnail`."""
    width: int
    """In pixels, upright."""
    height: int
    """In pixels, upright."""
    file_size: int
    """In bytes."""
    warning: str = ""
    """Warning about corrupt data, if the image is used nevertheless."""
    remarks: str = ""
    """Remarks about the file (`stages.image_remarks`), joined by `REMARKS_JOINED_BY`."""


@dataclass(frozen=True)
class ReadLimits:
    """Which images are usable."""

    max_pixels: int
    """Images with more pixels are failures."""
    min_side: int
    """Images with a side shorter than this, in pixels, are failures."""
    accept_warnings: bool = False
    """Whether to use images that the decoder reports as corrupt, for example by a wrong checksum."""
    rendering: Rendering = DEFAULT_RENDERING
    """Window and frame of images that leave a choice."""

    @classmethod
    def of(cls, data: DataSettings, rendering: Rendering = DEFAULT_RENDERING) -> ReadLimits:
        """Take the limits from the settings."""
        return cls(data.max_pixels, data.min_side, data.on_warning == "accept", rendering)


def read_record(path: Path, limits: ReadLimits) -> ImageRecord | str:
    """Decode one image; return its record, or the reason why it cannot be used."""
    warnings, remarks = [""], list[str]()
    try:
        with decoded_image(
            path,
            max_pixels=limits.max_pixels,
            min_side=limits.min_side,
            accept=warnings.append if limits.accept_warnings else None,
            rendering=limits.rendering,
            remark=remarks.append,
        ) as image:
            small, (width, height) = thumbnail(image), image.size
        joined = REMARKS_JOINED_BY.join(remarks)
        return ImageRecord(sha256_file(path), small, width, height, path.stat().st_size, warnings[-1], joined)
    except ImageError as error:
        return error.reason
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
