"""Decode every image once to check that it is complete; compute the sha256 of its file and a thumbnail."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from schemas.errors import ImageError
from schemas.settings import DataSettings
from stages.files import sha256_file
from stages.images import decoded_image
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.near_duplicates import NearDuplicates, find_near_duplicates, thumbnail
from stages.progress import Progress

_AHEAD = 512
"""Images submitted to the threads at a time: bounds memory for long lists and the delay after Ctrl-C."""


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
class Digests:
    """Results of reading all images."""

    records: dict[str, ImageRecord]
    """Path -> record, for usable images."""
    failures: dict[str, str]
    """Path -> reason, for all other images."""

    @cached_property
    def ids(self) -> dict[str, str]:
        """Path -> sha256 of the file, for usable images."""
        return {path: record.id for path, record in self.records.items()}

    @property
    def warnings(self) -> dict[str, str]:
        """Path -> warning about corrupt data, for images that are used nevertheless."""
        return {path: record.warning for path, record in self.records.items() if record.warning}

    @cached_property
    def near(self) -> NearDuplicates:
        """All near-duplicates among the usable images."""
        return find_near_duplicates(self.ids, {path: record.thumbnail for path, record in self.records.items()})


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


def digest_images(
    items: Sequence[LabelledImage], images: Path, limits: ReadLimits, progress: Progress | None = None
) -> Digests:
    """Decode images and compute their digests in threads.

    Args:
        items: Images to read.
        images: Image folder, to which paths are relative.
        limits: Which images are usable.
        progress: Called in this thread with (images read, images).
    """

    def read(item: LabelledImage) -> ImageRecord | str:
        return read_record(images / item.path, limits)

    digests = Digests({}, {})
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        for batch in _batches(items):
            for item, record in zip(batch, pool.map(read, batch), strict=True):
                if isinstance(record, ImageRecord):
                    digests.records[item.path] = record
                else:
                    digests.failures[item.path] = record
                if progress is not None:
                    progress(len(digests.records) + len(digests.failures), len(items))
    return digests


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


def _threads() -> int:
    """Return the number of usable CPUs, at most 16; decoding releases the interpreter lock."""
    if hasattr(os, "sched_getaffinity"):
        return min(16, len(os.sched_getaffinity(0)))
    return min(16, os.cpu_count() or 1)


def _batches(items: Sequence[LabelledImage]) -> Iterator[list[LabelledImage]]:
    rest = iter(items)
    while batch := list(islice(rest, _AHEAD)):
        yield batch
