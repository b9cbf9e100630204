"""Decode every image once to check that it is complete, and compute the sha256 of its file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from schemas.errors import ImageError
from schemas.rendering import DEFAULT_RENDERING, Rendering
from schemas.text import counted
from stages.files import sha256_file
from stages.image_remarks import EXPLAINED
from stages.images import check_image
from stages.prepare.labelled_image import LabelledImage
from stages.progress import Progress

_AHEAD = 512
"""Images submitted to the threads at a time: bounds memory for long lists and the delay after Ctrl-C."""


@dataclass(frozen=True)
class Digests:
    """Results of reading all images."""

    ids: dict[str, str]
    """Path -> sha256 of the file, for usable images."""
    failures: dict[str, str]
    """Path -> reason, for all other images."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Path -> warning about corrupt data, for images that are used nevertheless."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Remark about usable images (`stages.image_remarks`) -> their number."""

    def remark_lines(self) -> list[str]:
        """Describe the remarks, as lines for the user."""
        return [
            f"{counted(self.remarks[name], 'image')} {text}" for name, text in EXPLAINED.items() if self.remarks[name]
        ]


def digest_images(
    items: Sequence[LabelledImage],
    images: Path,
    *,
    max_pixels: int,
    min_side: int,
    accept_warnings: bool = False,
    rendering: Rendering = DEFAULT_RENDERING,
    progress: Progress | None = None,
) -> Digests:
    """Decode images and compute their digests in threads.

    Args:
        items: Images to read.
        images: Image folder, to which paths are relative.
        max_pixels: Images with more pixels are failures.
        min_side: Images with a side shorter than this, in pixels, are failures.
        accept_warnings: Whether to use images that the decoder reports as corrupt, for example by a wrong checksum.
        rendering: Window and frame of images that leave a choice.
        progress: Called in this thread with (images read, images).
    """

    def read(item: LabelledImage) -> tuple[str | None, str, list[str]]:
        path, warnings_seen, seen = images / item.path, [""], list[str]()
        accept = warnings_seen.append if accept_warnings else None
        try:
            check_image(
                path,
                max_pixels=max_pixels,
                min_side=min_side,
                accept=accept,
                rendering=rendering,
                remark=seen.append,
            )
            return sha256_file(path), warnings_seen[-1], seen
        except ImageError as error:
            return None, error.reason, []
        except OSError as error:
            return None, (error.strerror or "cannot be read").lower(), []

    ids: dict[str, str] = {}
    failures: dict[str, str] = {}
    warnings: dict[str, str] = {}
    remarks = Counter[str]()
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        for batch in _batches(items):
            for item, (content, reason, seen) in zip(batch, pool.map(read, batch), strict=True):
                if content is None:
                    failures[item.path] = reason
                else:
                    ids[item.path] = content
                    remarks.update(seen)
                    if reason:
                        warnings[item.path] = reason
                if progress is not None:
                    progress(len(ids) + len(failures), len(items))
    return Digests(ids, failures, warnings, remarks)


def _threads() -> int:
    """Return the number of usable CPUs, at most 16; decoding releases the interpreter lock."""
    if hasattr(os, "sched_getaffinity"):
        return min(16, len(os.sched_getaffinity(0)))
    return min(16, os.cpu_count() or 1)


def _batches(items: Sequence[LabelledImage]) -> Iterator[list[LabelledImage]]:
    rest = iter(items)
    while batch := list(islice(rest, _AHEAD)):
        yield batch
