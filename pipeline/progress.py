"""Show the progress of a stage: a live bar on a terminal, or periodic plain lines if stderr is not a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.console import duration, say, stderr_console

LINE_EVERY = 15.0
"""Seconds between plain lines."""


class ImageBar:
    """Progress over images with rate and remaining time; call it with (done, total).

    The rate only counts work since the first call, not the results of earlier runs.
    """

    def __init__(self, what: str, unit: str = "image") -> None:
        self.what, self.unit = what, unit
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._task: TaskID | None = None
        self._progress: Progress | None = None
        console = stderr_console()
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> ImageBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` images are finished."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now
        seconds = now - self._start
        rate = (done - self._first) / seconds if seconds > 0 else 0.0
        shown = f"{rate:.1f} {self.unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s/{self.unit}"
        if self._progress is not None:
            if self._task is None:
                self._task = self._progress.add_task(self.what, total=total, rate="")
            self._progress.update(self._task, completed=done, total=total, rate=shown if rate else "")
        elif now - self._last_line >= LINE_EVERY and rate:
            self._last_line = now
            say(f"{self.what}: {done} of {total}, {shown}, {duration((total - done) / rate)} left")
