"""Hands the shards of an extraction to the workers of a cluster, a few at a time, and takes their results.

Nothing here has to be remembered: whatever dies, the shards with a receipt are done, and the next run does the rest.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
"""Tasks in the scheduler for each Dask thread: it never runs dry, and never holds a million of them."""
WATCH_SECONDS = 5.0
"""Time between two looks at the workers."""
POLL_SECONDS = 0.5
"""Longest wait for a result before Ctrl-C is noticed."""
ATTEMPTS = 5
"""To tell all workers what they shall do."""
AGAIN = "Finished shards are kept: run `fpt extract` again."


def on_cluster(
    settings: ResolvedSettings,
    root: Path,
    store: Store,
    tasks: Sequence[ShardTask],
    tell: Callable[[int], None],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[ShardDone]:
    """Do all tasks on the cluster of the settings; an `Execute`.

    Args:
        settings: Resolved; `settings.cluster.kind` is not inline.
        root: Folder of `params.yaml`.
        store: Where the shards go.
        tasks: What to compute.
        tell: Called after each shard with the number of its rows.
        stop: Once it is true, workers save the rows they have as smaller shards, and no further task is begun.

    Raises:
        ClusterError: If there is no cluster, no worker that fits, or a shard was lost too often.
        FptError: Whatever a worker met that trying again would not mend.
    """
    with connect(settings.cluster) as client:
        require_same_versions(client)
        workers = require_workers(client, settings.cluster)
        with _plugin(client, settings, root, store, workers) as name:
            require_usable_workers(client, name)
            heartbeat = Heartbeat(extraction_log(root), len(tasks))
            run = _Run(client, settings.cluster, name, tell, heartbeat)
            try:
                yield from run.results(tasks, stop, stop_file(store, name))
            finally:
                run.cancel()


@contextmanager
def _plugin(
    client: Client, settings: ResolvedSettings, root: Path, store: Store, workers: dict[str, Any]
) -> Iterator[str]:
    """Name of the plugin that every worker has within the block, later ones too."""
    kind = settings.cluster.kind
    # A job of SLURM has cores of its own, so it shares those it sees with nobody.
    share = 1 if kind == "slurm" else max(Counter(worker["host"] for worker in workers.values()).values())
    name = f"fpt-{uuid4().hex}"
    # By this file a worker knows that it sees the same disk, and not just a folder of the same name.
    sign = store.path / "locks" / name
    with storage_errors(sign):
        sign.touch()
    try:
        plugin = ShardPlugin(name, settings, root.absolute(), store, share, own=kind != "scheduler")
        try:
            _register(client, plugin)
        except Exception as error:
            raise ClusterError(
                f"The workers cannot load fpt: {type(error).__name__}: {error}",
                "They run in another environment.",
                "Install the same version of fpt for them.",
            ) from error
        try:
            yield name
        finally:
            # A scheduler that is gone has nothing to forget.
            with suppress(Exception):
                client.unregister_worker_plugin(name)
    finally:
        with suppress(OSError):
            sign.unlink(missing_ok=True)
            stop_file(store, name).unlink(missing_ok=True)


def _register(client: Client, plugin: ShardPlugin) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            client.register_plugin(plugin, name=plugin.name)
        except OSError:
            # A worker died while it was told.
            if attempt == ATTEMPTS:
                raise
        else:
            return


class _Run:
    """The tasks that are under way."""

    def __init__(
        self, client: Client, settings: ClusterSettings, name: str, tell: Callable[[int], None], heartbeat: Heartbeat
    ) -> None:
        self._client, self._settings, self._name = client, settings, name
        self._tell, self._heartbeat = tell, heartbeat
        self._flying: dict[Future[Any], ShardTask] = {}
        self._landed: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._workers: dict[str, Any] = {}
        self._watched = self._seen = 0.0

    def results(self, tasks: Sequence[ShardTask], stop: Callable[[], bool], sign: Path) -> Iterator[ShardDone]:
        """Each shard as it is finished; once `stop()` is true, the file `sign` tells the workers."""
        waiting = iter(tasks)
        self._watch()
        self._heartbeat.beat(self._workers, "begins")
        while True:
            if stop() and not sign.exists():
                with storage_errors(sign):
                    sign.touch()
            while not stop() and len(self._flying) < self._room() and (task := next(waiting, None)) is not None:
                self._submit(task)
            if not self._flying:
                self._heartbeat.beat(self._workers, "done")
                return
            with suppress(queue.Empty):
                done = self._take(self._landed.get(timeout=POLL_SECONDS))
                self._heartbeat.count(done.rows)
                self._tell(done.rows)
                yield done
            if time.monotonic() - self._watched >= WATCH_SECONDS:
                self._watch()

    def cancel(self) -> None:
        """Take back what has not begun; a shard that a worker has begun is finished, or lost with its worker."""
        if self._flying:
            with suppress(Exception):
                self._client.cancel(list(self._flying))

    def _room(self) -> int:
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
        self._flying[future] = task
        future.add_done_callback(self._landed.put)

    def _take(self, future: Future[Any]) -> ShardDone:
        task = self._flying.pop(future)
        if future.cancelled():
            raise self._lost_scheduler()
        # Not result(): it would raise the worker's traceback through this process.
        error = future.exception()
        if error is not None:
            kind = type(error).__name__
            cause = (
                "Each worker that took it died: too little memory (cluster.memory), or a machine that went away."
                if kind == "KilledWorker"
                else f"{kind}: {error}"
            )
            raise ClusterError(
                f"Shard {task.number} ({counted(len(task.images), 'image')}, the first is {task.images[0][1]}) was "
                f"given up after {counted(self._settings.retries, 'retry')}.",
                cause,
                f"Look at the workers' logs. {AGAIN}",
            ) from error
        try:
            done = future.result()
        except OSError as error:
            # The shard is done, and the scheduler died while its result was on the way: distributed's CommClosedError.
            raise self._lost_scheduler() from error
        if isinstance(done, FptError):
            raise done
        if not isinstance(done, ShardDone):
            raise TypeError(f"Shard {task.number} came back as {type(done).__name__}")
        return done

    def _watch(self) -> None:
        """Look at the workers.

        Raises:
            ClusterError: If the scheduler is gone, or no worker has been there for too long.
        """
        now = self._watched = time.monotonic()
        try:
            self._workers = fitting_workers(self._client, self._settings.resources)
        except Exception as error:
            raise self._lost_scheduler() from error
        if self._workers or not self._seen:
            self._seen = now
        elif now - self._seen > self._settings.wait:
            raise ClusterError(
                f"No worker that could do a shard has been there for {self._settings.wait:.0f} s.",
                "All died, ran into the end of their jobs, or are short of memory.",
                AGAIN,
            )
        self._heartbeat.beat(self._workers)

    def _lost_scheduler(self) -> ClusterError:
        return ClusterError("The connection to the scheduler is lost.", "It ended, or the network failed.", AGAIN)
