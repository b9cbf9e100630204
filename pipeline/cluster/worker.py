"""Code that runs on a worker: a plugin that holds the LPM, and the task that computes one shard.

Errors that the user must fix are returned as values and not raised, because Dask would retry the task in vain.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distributed import Worker, WorkerPlugin, get_worker
from distributed.versions import get_package_info

from schemas.errors import CacheCorruptError, CacheIncompleteError, ClusterError, FptError, StorageError, WeightsError
from schemas.resolved import ResolvedSettings
from schemas.version import DISTRIBUTION

if TYPE_CHECKING:
    from stages.extract.shard_task import Extractor, ShardDone, ShardTask
    from stages.store.layout import Store

PACKAGES = (DISTRIBUTION, "torch", "torchvision", "timm", "numpy", "pillow", "zarr", "dask", "distributed")
"""Packages whose versions must be equal: others may compute different features or fail to unpickle tasks."""


def stop_file(store: Store, name: str) -> Path:
    """Return the file whose existence makes the workers of an extraction save their finished rows and stop."""
    return store.path / "locks" / f"{name}.stop"


def versions() -> dict[str, str]:
    """Return the versions in this process of Python (without its patch level) and of `PACKAGES`."""
    packages = get_package_info(PACKAGES)
    return {"python": ".".join(platform.python_version_tuple()[:2])} | {name: str(packages[name]) for name in PACKAGES}


def require_versions(expected: Mapping[str, str], reported: Mapping[str, str], process: str) -> None:
    """Compare the versions of another process with those of this one.

    Raises:
        ClusterError: With each version that differs.
    """
    differing = [name for name in expected if expected[name] != reported.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {expected[name]} here, {reported.get(name)} there" for name in differing)
        raise ClusterError(
            f"{process} runs other versions than this process.", lines, "Use the same environment everywhere."
        )


class ShardPlugin(WorkerPlugin):
    """Worker plugin that holds the LPM of one extraction."""

    def __init__(
        self, name: str, settings: ResolvedSettings, root: Path, store: Store, share: int, started_here: bool
    ) -> None:
        """Describe the work; the LPM is loaded for the first task.

        Args:
            name: Name of this extraction; a file of that name is among the store's locks while it runs.
            settings: Resolved settings.
            root: Folder of `params.yaml`.
            store: Store to write to.
            share: Number of workers that share the cores of a machine.
            started_here: Whether the extraction started the workers, and ends them.
        """
        self.name, self._started_here = name, started_here
        self._settings, self._root, self._store, self._share = settings, root, store, share
        self._versions = versions()
        self._extractor: Extractor | None = None

    def setup(self, worker: Worker) -> None:  # noqa: ARG002
        """Start on a worker. Nothing here may fail: a restarted worker whose plugin fails disappears silently."""
        self._loading = threading.Lock()
        if self._started_here and threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches all processes of a terminal, but the client has to end the workers in order.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        """Release the memory, since workers may outlive the extraction."""
        self._extractor = None

    def check(self) -> str:
        """Compare this worker with the client.

        Returns:
            Type of the device that will run the LPM.

        Raises:
            ClusterError: If versions differ, or the worker does not see the client's files.
            WeightsError: If its weights differ.
            SettingsError: If it lacks the device.
        """
        from stages.device import pick_device
        from stages.files import sha256_file
        from stages.lpm.weights import locate_weights

        host = f"The worker on {platform.node()}"
        require_versions(self._versions, versions(), host)
        for folder in (self._store.path / "locks" / self.name, self._root / self._settings.data.images):
            if not folder.exists():
                raise ClusterError(
                    f"{host} does not see {folder.parent if folder.name == self.name else folder}.",
                    "The store, the study and its images must be on a disk that all machines share, at the same path.",
                    "Mount it there, or set FPT_CACHE_DIR (the store) and data.images to shared folders.",
                )
        weights = locate_weights(self._settings.lpm, self._root)
        if sha256_file(weights) != self._store.spec.weights_sha256:
            raise WeightsError(
                f"{host} has other weights in {weights} than the client.", repair="Copy the client's file there."
            )
        return pick_device(self._settings.compute.device).type

    def extractor(self) -> Extractor:
        """Return the extractor with the loaded LPM; concurrent tasks load it only once."""
        from stages.extract.shard_task import Extractor

        with self._loading:
            if self._extractor is None:
                self.check()
                self._extractor = Extractor(on_worker(self._settings, self._share), self._root, self._store)
            return self._extractor

    def compute(self, task: ShardTask) -> ShardDone:
        """Compute the shard of a task, or the rows that it lacks."""
        from stages.extract.shard_task import ShardDone, ShardTask

        stored = self._stored_rows(task.number)
        missing = tuple(row for row in task.images if (row[0], row[2]) not in stored)
        present = len(task.images) - len(missing)
        stop = stop_file(self._store, self.name).exists
        if not missing or stop():
            return ShardDone(present, ())
        # The extractor yields nothing if it is stopped while the LPM loads.
        done = next(self.extractor().run([ShardTask(task.number, missing)], lambda _: None, stop), ShardDone(0, ()))
        return ShardDone(present + done.rows, done.failures)

    def _stored_rows(self, number: int) -> frozenset[tuple[str, str]]:
        """Return (image id, view) of rows already in a task's shard, whose earlier result was lost in transit."""
        from stages.files import storage_errors
        from stages.store.reader import read_receipt

        with suppress(CacheIncompleteError, CacheCorruptError), storage_errors(self._store.receipts):
            return frozenset(read_receipt(self._store, number).origins)
        return frozenset()


def on_worker(settings: ResolvedSettings, share: int) -> ResolvedSettings:
    """Return settings with the torch threads of a worker.

    Args:
        settings: Resolved settings.
        share: Number of workers that share the cores of this machine.
    """
    threads = settings.cluster.threads_per_worker or settings.compute.threads
    # Dask starts its workers with OMP_NUM_THREADS=1, so torch's default would be a single thread.
    compute = {"threads": threads or max(1, _cores() // share)}
    return settings.model_copy(update={"compute": settings.compute.model_copy(update=compute)})


def compute_shard(name: str, task: ShardTask) -> ShardDone | FptError:
    """Compute one shard with its receipt; errors that the user must fix are returned."""
    try:
        return _plugin(get_worker(), name).compute(task)
    except FptError as error:
        return _noted(error)


async def check_worker(name: str, dask_worker: Worker) -> str | FptError:
    """Return the device type of this worker, or why it cannot be used; Dask passes the second argument."""
    # In a thread: importing torch and reading the weights takes seconds, and the worker must answer the scheduler.
    return await asyncio.to_thread(_checked, _plugin(dask_worker, name))


def _checked(plugin: ShardPlugin) -> str | FptError:
    try:
        return plugin.check()
    except FptError as error:
        return _noted(error)
    except OSError as error:
        return _noted(StorageError(f"A file cannot be read: {error}", "The worker may not see the client's disk."))


def _plugin(worker: Worker, name: str) -> ShardPlugin:
    plugin = worker.plugins[name]
    if not isinstance(plugin, ShardPlugin):
        raise TypeError(f"{name} is a {type(plugin).__name__}")
    return plugin


def _noted(error: FptError) -> FptError:
    # Tracebacks are not sent with an error; --debug shows the note.
    error.add_note(f"On {platform.node()}:\n{traceback.format_exc()}")
    return error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
