"""Read every image, or what is known of it, in threads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from schemas.data_settings import DataSettings
from schemas.rendering import DEFAULT_RENDERING, Rendering
from schemas.text import counted
from stages.image_remarks import EXPLAINED
from stages.prepare.image_index import FileState, ImageIndex
from stages.prepare.image_record import REMARKS_JOINED_BY, ImageRecord, ReadLimits, read_record
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.near_duplicates import NearDuplicates, find_near_duplicates
from stages.progress import Progress

_AHEAD = 512
"""Images submitted to the threads at a time: bounds memory for long lists and the delay after Ctrl-C."""


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

    def remark_lines(self) -> list[str]:
        """Describe the remarks about usable images (`stages.image_remarks`), as lines for the user."""
        joined = (record.remarks for record in self.records.values())
        counts = Counter(remark for remarks in joined for remark in remarks.split(REMARKS_JOINED_BY))
        return [f"{counted(counts[name], 'image')} {text}" for name, text in EXPLAINED.items() if counts[name]]

    @cached_property
    def near(self) -> NearDuplicates:
        """All near-duplicates among the usable images."""
        return find_near_duplicates(self.ids, {path: record.thumbnail for path, record in self.records.items()})


def read_images(
    items: Sequence[LabelledImage],
    images: Path,
    data: DataSettings,
    progress: Progress | None = None,
    index: Path | None = None,
    full: bool = False,
    rendering: Rendering = DEFAULT_RENDERING,
) -> Digests:
    """Read images with the limits of the settings.

    Args:
        items: Images to read.
        images: Image folder, to which paths are relative.
        data: Settings.
        progress: Called in this thread with (images read, images).
        index: Folder that remembers what was read of each file, or None to read all.
        full: Read every file again, and remember it.
        rendering: Window and frame of images that leave a choice.
    """
    limits = ReadLimits.of(data, rendering)
    seen = None if index is None else ImageIndex.open(index, images, limits, fresh=full)
    return digest_images(items, images, limits, progress, seen)


def digest_images(
    items: Sequence[LabelledImage],
    images: Path,
    limits: ReadLimits,
    progress: Progress | None = None,
    index: ImageIndex | None = None,
) -> Digests:
    """Decode images and compute their digests in threads.

    Args:
        items: Images to read.
        images: Image folder, to which paths are relative.
        limits: Which images are usable.
        progress: Called in this thread with (images read, images).
        index: What was read of these files before; updated and written. None: every image is read.
    """
    records: dict[str, ImageRecord] = {}
    if index is not None:
        folder = str(images)
        for item in items:
            if (known := index.find(item.path, FileState.of(os.path.join(folder, item.path)))) is not None:  # noqa: PTH118
                records[item.path] = known
        if records and progress is not None:
            progress(len(records), len(items))
    failures: dict[str, str] = {}

    def read(item: LabelledImage) -> ImageRecord | str:
        path = images / item.path
        before = None if index is None else FileState.of(path)
        record = read_record(path, limits)
        if index is not None and isinstance(record, ImageRecord):
            index.add(item.path, before, FileState.of(path), record)
        return record

    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        for batch in _batches([item for item in items if item.path not in records]):
            for item, record in zip(batch, pool.map(read, batch), strict=True):
                if isinstance(record, ImageRecord):
                    records[item.path] = record
                else:
                    failures[item.path] = record
                if progress is not None:
                    progress(len(records) + len(failures), len(items))
    if index is not None:
        index.write(records)
    return Digests({item.path: records[item.path] for item in items if item.path in records}, failures)


def _threads() -> int:
    """Return the number of usable CPUs, at most 16; decoding releases the interpreter lock."""
    if hasattr(os, "sched_getaffinity"):
        return min(16, len(os.sched_getaffinity(0)))
    return min(16, os.cpu_count() or 1)


def _batches(items: Sequence[LabelledImage]) -> Iterator[list[LabelledImage]]:
    rest = iter(items)
    while batch := list(islice(rest, _AHEAD)):
        yield batch
