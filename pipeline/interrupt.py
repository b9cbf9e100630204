"""Ctrl-C and SIGTERM: what a verb keeps, and how it is resumed."""

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
    "prepare": "Nothing is kept: prepare reads all images again.",
    "extract": "Finished shards are kept.",
    "train": "Finished epochs are kept.",
    "sweep": "Finished trainings and epochs are kept.",
    "evaluate": "Nothing is kept: evaluate starts from the beginning.",
    "predict": "Nothing is kept: predict starts from the beginning.",
}
"""Verb -> what an interruption leaves behind."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"
"""A progress bar hides it."""


def interrupted_message(words: Sequence[str], error: BaseException) -> str:
    """Return what is kept of an interrupted command, and the command that resumes it.

    Args:
        words: After `fpt`.
        error: A KeyboardInterrupt; its own message comes first.
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
    """Return an `Execute` that keeps what is computed on the first Ctrl-C or SIGTERM, and ends at once on the second.

    Args:
        execute: Does tasks until its last argument returns true; then it saves what is finished, and ends.

    Raises:
        InterruptedRunError: After a signal, when everything that was computed is in the store.
    """

    def run(
        settings: ResolvedSettings, root: Path, store: Store, tasks: Sequence[ShardTask], tell: Callable[[int], None]
    ) -> Iterator[ShardDone]:
        left = sum(len(task.images) for task in tasks)
        with _signals_counted() as stop:
            for done in execute(settings, root, store, tasks, tell, stop):
                left -= done.rows + len(done.failures)
                yield done
            if stop() and left > 0:
                raise InterruptedRunError

    return run


@contextmanager
def _signals_counted() -> Iterator[Callable[[], bool]]:
    """Whether a signal to stop came, within the block; a second one ends the process.

    A thread reads them from Python's wake-up socket: the main thread may be in a forward pass for many seconds, and
    handlers written in Python wait for its end.
    """
    taken = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader, frozenset(taken), asked), daemon=True)
    previous = {number: signal.signal(number, lambda *_: None) for number in taken}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield asked.is_set
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()


def _watch(reader: socket.socket, taken: frozenset[int], asked: threading.Event) -> None:
    while received := reader.recv(64):
        for number in received:
            if number not in taken:
                continue
            if asked.is_set():
                # Shards are written so that a process may die at any time; threads of libraries are not waited for.
                os.write(2, f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}Stopped. {KEPT['extract']}\n".encode())
                os._exit(130)
            asked.set()
            say("Stopping: the images at hand are finished and saved. Press Ctrl-C again to stop at once.")
