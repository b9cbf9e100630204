"""Read every image once: is it complete, and what is the sha256 of its content."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from schemas.errors import ImageError
from stages.files import sha256_file
from stages.images import check_image
from stages.prepare.scan import Item
from stages.progress import Progress

_AHEAD = 512
"""Images handed to the threads at a time: bounds memory for long lists and the wait after Ctrl-C."""


@dataclass(frozen=True)
class Digests:
    """What reading all images gave."""

    ids: dict[str, str]
    """Path -> sha256 of the content, of every image that can be used."""
    failures: dict[str, str]
    """Path -> reason, of every other."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Path -> warning about corrupt data, of every image that is used all the same."""


def digest_images(
    items: Sequence[Item],
    images: Path,
    *,
    max_pixels: int,
    min_side: int,
    accept_warnings: bool = False,
    progress: Progress | None = None,
) -> Digests:
    """Decode and digest images in threads.

    Args:
        items: What to read.
        images: Folder that their paths start at.
        max_pixels: Images with more pixels cannot be used.
        min_side: Images with a shorter side, in pixels, cannot be used.
        accept_warnings: Whether an image is used whose data is corrupt by its checksums or its decoder.
        progress: Called in this thread after each image.
    """

    def read(item: Item) -> tuple[str | None, str]:
        path, seen = images / item.path, [""]
        accept = seen.append if accept_warnings else None
        try:
            check_image(path, max_pixels=max_pixels, min_side=min_side, accept=accept)
            return sha256_file(path), seen[-1]
        except ImageError as error:
            return None, error.reason
        except OSError as error:
            return None, (error.strerror or "cannot be read").lower()

    ids: dict[str, str] = {}
    failures: dict[str, str] = {}
    warnings: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        for batch in _batches(items):
            for item, (content, reason) in zip(batch, pool.map(read, batch), strict=True):
                if content is None:
                    failures[item.path] = reason
                else:
                    ids[item.path] = content
                    if reason:
                        warnings[item.path] = reason
                if progress is not None:
                    progress(len(ids) + len(failures), len(items))
    return Digests(ids, failures, warnings)


def _threads() -> int:
    """As many as this process may use; decoding releases the interpreter lock."""
    if hasattr(os, "sched_getaffinity"):
        return min(16, len(os.sched_getaffinity(0)))
    return min(16, os.cpu_count() or 1)


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, _AHEAD)):
        yield batch
