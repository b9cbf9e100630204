"""Submit the shards of an extraction to the workers of a cluster, a few at a time, and collect their results.

The executor keeps no state of its own: whatever dies, shards with a receipt are finished, and the next run computes the
rest.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from distributed import Client, Future

from pipeline.cluster.check import fitting_workers, require_same_versions, require_usable_workers, require_workers
from pipeline.cluster.heartbeat import Heartbeat
from pipeline.cluster.start import connect
from pipeline.cluster.worker import ShardPlugin, compute_shard, stop_file
from pipeline.project import extraction_log
from schemas.errors import ClusterError, FptError
from schemas.machine import ClusterSettings
from schemas.resolved import ResolvedSettings
from schemas.text import counted
from stages.extract.shard_task import ShardDone, ShardTask
from stages.files import storage_errors
from stages.store.layout import Store

TASKS_AHEAD = 2
"""Tasks in the scheduler per Dask thread: enough to keep every thread busy, without queueing a million tasks."""
WATCH_SECONDS = 5.0
"""Interval between checks of the workers."""
POLL_SECONDS = 0.5
"""Longest wait for a result before Ctrl-C is noticed."""
ATTEMPTS = 5
"""Attempts to register the plugin on all workers."""
RERUN = "Finished shards are kept: run `fpt extract` again."


def on_cluster(
    settings: ResolvedSettings,
    root: Path,
    store: Store,
    tasks: Sequence[ShardTask],
    on_rows: Callable[[int], None],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[ShardDone]:
    """Run all tasks on the cluster of the settings; an `Execute`.

    Args:
        settings: Resolved; `settings.cluster.kind` is not inline.
        root: Folder of `params.yaml`.
        store: Store to write to.
        tasks: Shards to compute.
        on_rows: Called after each shard with the number of its rows.
        stop: Once it returns true, workers save the rows they have as smaller shards, and no further task starts.

    Raises:
        ClusterError: If the cluster cannot be reached, has no suitable worker, or lost a shard too often.
        FptError: The error of a worker that retrying would not fix.
    """
    with connect(settings.cluster) as client:
        require_same_versions(client)
        workers = require_workers(client, settings.cluster)
        with _plugin(client, settings, root, store, workers) as name:
            require_usable_workers(client, name)
            heartbeat = Heartbeat(extraction_log(root), len(tasks))
            run = _Run(client, settings.cluster, name, on_rows, heartbeat)
            try:
                yield from run.results(tasks, stop, stop_file(store, name))
            finally:
                run.cancel()


@contextmanager
def _plugin(
    client: Client, settings: ResolvedSettings, root: Path, store: Store, workers: dict[str, Any]
) -> Iterator[str]:
    """Register the plugin on all workers, later ones included, and yield its name; unregister it after the block."""
    kind, share = settings.cluster.kind, workers_per_machine(settings.cluster, workers)
    name = f"fpt-{uuid4().hex}"
    # A worker that sees this file shares the disk, and not only a folder of the same name.
    sign = store.path / "locks" / name
    with storage_errors(sign):
        sign.touch()
    try:
        plugin = ShardPlugin(name, settings, root.absolute(), store, share, started_here=kind != "scheduler")
        try:
            _register(client, plugin)
        except Exception as error:
            raise ClusterError(
                f"The workers cannot load fpt: {type(error).__name__}: {error}",
                "They run in another environment.",
                "Install the same version of fpt there.",
            ) from error
        try:
            yield name
        finally:
            # A scheduler that has ended cannot unregister anything.
            with suppress(Exception):
                client.unregister_worker_plugin(name)
    finally:
        with suppress(OSError):
            sign.unlink(missing_ok=True)
            stop_file(store, name).unlink(missing_ok=True)


def workers_per_machine(settings: ClusterSettings, workers: Mapping[str, Any]) -> int:
    """Return the largest number of workers that share the cores of a machine."""
    # A SLURM job sees only its own cores, so it shares them with no other worker.
    return 1 if settings.kind == "slurm" else max(Counter(worker["host"] for worker in workers.values()).values())


def _register(client: Client, plugin: ShardPlugin) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            client.register_plugin(plugin, name=plugin.name)
        except OSError:
            # A worker died during the registration.
            if attempt == ATTEMPTS:
                raise
        else:
            return


class _Run:
    """The tasks of an extraction in the scheduler, and the state of its workers."""

    def __init__(
        self, client: Client, settings: ClusterSettings, name: str, on_rows: Callable[[int], None], heartbeat: Heartbeat
    ) -> None:
        self._client, self._settings, self._name = client, settings, name
        self._on_rows, self._heartbeat = on_rows, heartbeat
        self._submitted: dict[Future[Any], ShardTask] = {}
        self._finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._workers: dict[str, Any] = {}
        self._last_check = self._last_worker = 0.0

    def results(self, tasks: Sequence[ShardTask], stop: Callable[[], bool], stop_sign: Path) -> Iterator[ShardDone]:
        """Yield each shard when it is finished; once `stop()` is true, create the file `stop_sign` for the workers."""
        waiting = iter(tasks)
        self._watch()
        self._heartbeat.beat(self._workers, "begins")
        while True:
            if stop() and not stop_sign.exists():
                with storage_errors(stop_sign):
                    stop_sign.touch()
            while not stop() and len(self._submitted) < self._capacity() and (task := next(waiting, None)) is not None:
                self._submit(task)
            if not self._submitted:
                self._heartbeat.beat(self._workers, "done")
                return
            with suppress(queue.Empty):
                done = self._result(self._finished.get(timeout=POLL_SECONDS))
                self._heartbeat.count(done.rows)
                self._on_rows(done.rows)
                yield done
            if time.monotonic() - self._last_check >= WATCH_SECONDS:
                self._watch()

    def cancel(self) -> None:
        """Cancel tasks that have not started; a shard in progress is finished, or lost with its worker."""
        if self._submitted:
            with suppress(Exception):
                self._client.cancel(list(self._submitted))

    def _capacity(self) -> int:
        threads: int = sum(worker["nthreads"] for worker in self._workers.values())
        return TASKS_AHEAD * max(1, threads)

    def _submit(self, task: ShardTask) -> None:
        future = self._client.submit(
            compute_shard,
            self._name,
            task,
            key=f"fpt-shard-{task.number}-{uuid4().hex}",
            pure=False,
            retries=self._settings.retries,
            resources=self._settings.resources or None,
        )
        self._submitted[future] = task
        future.add_done_callback(self._finished.put)

    def _result(self, future: Future[Any]) -> ShardDone:
        task = self._submitted.pop(future)
        if future.cancelled():
            raise self._lost_scheduler()
        # Not result(), which would add the worker's traceback to this process's.
        error = future.exception()
        if error is not None:
            kind = type(error).__name__
            cause = (
                "Every worker that computed it died: too little memory (cluster.memory), or a machine that failed."
                if kind == "KilledWorker"
                else f"{kind}: {error}"
            )
            raise ClusterError(
                f"Shard {task.number} ({counted(len(task.images), 'image')}, the first is {task.images[0][1]}) was "
                f"given up after {counted(self._settings.retries, 'retry')}.",
                cause,
                f"Check the workers' logs. {RERUN}",
            ) from error
        try:
            done = future.result()
        except OSError as error:
            # The shard is finished, but the scheduler died before its result arrived (distributed's CommClosedError).
            raise self._lost_scheduler() from error
        if isinstance(done, FptError):
            raise done
        if not isinstance(done, ShardDone):
            raise TypeError(f"Shard {task.number} came back as {type(done).__name__}")
        return done

    def _watch(self) -> None:
        """Update the list of workers.

        Raises:
            ClusterError: If the scheduler is gone, or has had no suitable worker for too long.
        """
        now = self._last_check = time.monotonic()
        try:
            self._workers = fitting_workers(self._client, self._settings.resources)
        except Exception as error:
            raise self._lost_scheduler() from error
        if self._workers or not self._last_worker:
            self._last_worker = now
        elif now - self._last_worker > self._settings.wait:
            raise ClusterError(
                f"No worker that can compute a shard has been available for {self._settings.wait:.0f} s.",
                "All died, reached the time limit of their jobs, or are short of memory.",
                RERUN,
            )
        self._heartbeat.beat(self._workers)

    def _lost_scheduler(self) -> ClusterError:
        return ClusterError("The connection to the scheduler is lost.", "It ended, or the network failed.", RERUN)
