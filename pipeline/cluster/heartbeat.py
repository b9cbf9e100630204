"""Log one line per minute about a long extraction, to a file that outlives the terminal."""

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
    """Writer of the log of a study's extractions; errors such as a full disk are ignored."""

    def __init__(self, path: Path, shards: int) -> None:
        """Start the clock.

        Args:
            path: The log file; it is created with its folder.
            shards: Number of shards to compute.
        """
        self._path, self._shards = path, shards
        self._done = self._images = 0
        self._start = time.monotonic()
        self._due = self._start + EVERY

    def count(self, images: int) -> None:
        """Count a finished shard with this many images."""
        self._done += 1
        self._images += images

    def beat(self, workers: Mapping[str, Any], event: str = "") -> None:
        """Write a line if one is due, or if an event is given.

        Args:
            workers: Descriptions of the running workers from the scheduler.
            event: What happened.
        """
        now = time.monotonic()
        if now < self._due and not event:
            return
        self._due = now + EVERY
        memory = sum(worker.get("metrics", {}).get("memory", 0) for worker in workers.values())
        rate = self._images / max(now - self._start, 1e-9)
        line = (
            f"{datetime.now().astimezone().isoformat(timespec='seconds')} shards {self._done}/{self._shards} "
            f"images {self._images} {rate:.2f} images/s workers {len(workers)} memory {size(memory)} {event}"
        )
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line.rstrip()}\n")
