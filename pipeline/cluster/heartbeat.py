"""One line a minute about a long extraction, in a file that outlives the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.console import size

EVERY = 60.0
"""Seconds between two lines."""


class Heartbeat:
    """Appends to the log of a study's extractions; a disk that is full stops no extraction here."""

    def __init__(self, path: Path, shards: int) -> None:
        """Begin.

        Args:
            path: The log; it is made with its folder.
            shards: To do.
        """
        self._path, self._shards = path, shards
        self._done = self._images = 0
        self._start = time.monotonic()
        self._due = self._start + EVERY

    def count(self, images: int) -> None:
        """A shard with so many images is done."""
        self._done += 1
        self._images += images

    def beat(self, workers: Mapping[str, Any], word: str = "") -> None:
        """Write a line if it is time for one, or if there is something to say.

        Args:
            workers: Those that are alive, as the scheduler describes them.
            word: What happened.
        """
        now = time.monotonic()
        if now < self._due and not word:
            return
        self._due = now + EVERY
        memory = sum(worker.get("metrics", {}).get("memory", 0) for worker in workers.values())
        rate = self._images / max(now - self._start, 1e-9)
        line = (
            f"{datetime.now().astimezone().isoformat(timespec='seconds')} shards {self._done}/{self._shards} "
            f"images {self._images} {rate:.2f} images/s workers {len(workers)} memory {size(memory)} {word}"
        )
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line.rstrip()}\n")
