"""Handle Ctrl-C and SIGTERM: save finished work, and print how to resume."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from schemas.errors import InterruptedRunError

if TYPE_CHECKING:
    from schemas.resolved import ResolvedSettings
    from stages.extract.shard_task import ShardDone, ShardTask
    from stages.store.layout import Store

KEPT = {
    "prepare": "No results were saved; prepare reads all images again.",
    "extract": "Finished shards are kept.",
    "train": "Finished epochs are kept.",
    "sweep": "Finished trainings and epochs are kept.",
    "bench": "Finished trainings and epochs are kept.",
    "evaluate": "No results were saved; evaluate starts from the beginning.",
    "predict": "No results were saved; predict starts from the beginning.",
}
"""Verb -> description of what an interruption leaves behind."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"
"""Progress bars hide the cursor."""


def interrupted_message(words: Sequence[str], error: BaseException) -> str:
    """Describe what is kept of an interrupted command, and the command that resumes it.

    Args:
        words: Arguments after `fpt`.
        error: A KeyboardInterrupt, whose message takes precedence.
    """
    verb = next((word for word in words if not word.startswith("-")), "")
    kept = str(error) or KEPT.get(verb, "")
    again = f" Run `{shlex.join(['fpt', *words])}` again." if kept else ""
    return f"Interrupted. {kept}{again}".rstrip()


def stop_gently(
    execute: Callable[
        [ResolvedSettings, Path, Store, Sequence[ShardTask], Callable[[int], None], Callable[[], bool]],
        Iterable[ShardDone],
    ],
) -> Callable[[ResolvedSettings, Path, Store, Sequence[ShardTask], Callable[[int], None]], Iterator[ShardDone]]:
    """Return an `Execute` that saves finished work on the first Ctrl-C or SIGTERM, and exits immediately on the second.

    Args:
        execute: Runs tasks until its last argument returns true; then it saves finished work and returns.

    Raises:
        InterruptedRunError: After a signal, when everything that was computed is in the store.
    """

    def run(
        settings: ResolvedSettings, root: Path, store: Store, tasks: Sequence[ShardTask], report: Callable[[int], None]
    ) -> Iterator[ShardDone]:
        left = sum(len(task.images) for task in tasks)
        with _signals_counted() as stop:
            for done in execute(settings, root, store, tasks, report, stop):
                left -= done.rows + len(done.failures)
                yield done
            if stop() and left > 0:
                raise InterruptedRunError

    return run


@contextmanager
def _signals_counted() -> Iterator[Callable[[], bool]]:
    """Provide a function that returns whether a stop signal arrived; a second signal exits the process.

    A thread reads the signals from Python's wake-up socket, because the main thread may be in a forward pass for many
    seconds, and signal handlers in Python would only run after it.
    """
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    stopping = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader, frozenset(handled), stopping), daemon=True)
    previous = {number: signal.signal(number, lambda *_: None) for number in handled}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield stopping.is_set
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()


def _watch(reader: socket.socket, handled: frozenset[int], stopping: threading.Event) -> None:
    while received := reader.recv(64):
        for number in received:
            if number not in handled:
                continue
            if stopping.is_set():
                # Exit without waiting for library threads: shards are written so that a process may die at any time.
                os.write(2, f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}Stopped. {KEPT['extract']}\n".encode())
                os._exit(130)
            stopping.set()
            say("Stopping: finishing and saving the current images. Press Ctrl-C again to stop immediately.")
