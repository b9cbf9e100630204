"""Decode one image: is it complete, what is its content, and what does it look like in small?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from schemas.errors import ImageError
from schemas.settings import DataSettings
from stages.files import sha256_file
from stages.images import decoded_image
from stages.prepare.near_duplicates import thumbnail


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


@dataclass(frozen=True)
class ReadLimits:
    """Which images are usable."""

    max_pixels: int
    """Images with more pixels are failures."""
    min_side: int
    """Images with a side shorter than this, in pixels, are failures."""
    accept_warnings: bool = False
    """Whether to use images that the decoder reports as corrupt, for example by a wrong checksum."""

    @classmethod
    def of(cls, data: DataSettings) -> ReadLimits:
        """Take the limits from the settings."""
        return cls(data.max_pixels, data.min_side, data.on_warning == "accept")


def read_record(path: Path, limits: ReadLimits) -> ImageRecord | str:
    """Decode one image; return its record, or the reason why it cannot be used."""
    warnings = [""]
    accept = warnings.append if limits.accept_warnings else None
    try:
        with decoded_image(path, max_pixels=limits.max_pixels, min_side=limits.min_side, accept=accept) as image:
            small, (width, height) = thumbnail(image), image.size
        return ImageRecord(sha256_file(path), small, width, height, path.stat().st_size, warnings[-1])
    except ImageError as error:
        return error.reason
    except OSError as error:
        return (error.strerror or "cannot be read").lower()
