"""What runs on a worker: the LPM in a plugin, and the task that makes one shard.

What a user can mend comes back as a value, not as an exception: Dask would try it again, and it would fail again.
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
"""Another version of one of these may give other features, or not understand what it is sent."""


def stop_file(store: Store, name: str) -> Path:
    """File by which the workers of an extraction learn that they shall save what they have and end."""
    return store.path / "locks" / f"{name}.stop"


def versions() -> dict[str, str]:
    """Versions of this process: Python without its patch level, and `PACKAGES`."""
    found = get_package_info(PACKAGES)
    return {"python": ".".join(platform.python_version_tuple()[:2])} | {name: str(found[name]) for name in PACKAGES}


def require_versions(expected: Mapping[str, str], found: Mapping[str, str], where: str) -> None:
    """Compare versions.

    Raises:
        ClusterError: Naming each one that differs.
    """
    differing = [name for name in expected if expected[name] != found.get(name)]
    if differing:
        lines = "\n".join(f"  {name}: {expected[name]} here, {found.get(name)} there" for name in differing)
        raise ClusterError(
            f"{where} runs other versions than this process.", lines, "Give all of them the same environment."
        )


class ShardPlugin(WorkerPlugin):
    """Holds the LPM of one extraction on a worker."""

    def __init__(self, name: str, settings: ResolvedSettings, root: Path, store: Store, share: int, own: bool) -> None:
        """Describe the work; nothing is loaded before the first task.

        Args:
            name: Of this extraction; a file of that name lies with the store's locks while it runs.
            settings: Resolved.
            root: Folder of `params.yaml`.
            store: Where the shards go.
            share: Workers that share the cores of a machine.
            own: Whether the workers live and die with this extraction.
        """
        self.name, self._own = name, own
        self._settings, self._root, self._store, self._share = settings, root, store, share
        self._versions = versions()
        self._extractor: Extractor | None = None

    def setup(self, worker: Worker) -> None:  # noqa: ARG002
        """Start on a worker. Nothing here may fail: a restarted worker whose plugin fails is lost without a word."""
        self._loading = threading.Lock()
        if self._own and threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches all processes of a terminal; the client ends the workers in order.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        """Give the memory back: the workers may outlive the extraction."""
        self._extractor = None

    def check(self) -> str:
        """Compare this worker with the client.

        Returns:
            Type of the device that the LPM will be on.

        Raises:
            ClusterError: If its versions are others, or it does not see the client's files.
            WeightsError: If its weights are others.
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
                    "The store, the study and its images must lie on a disk that all machines share, at the same path.",
                    "Mount it there, or set FPT_CACHE_DIR (the store) and data.images to folders that are shared.",
                )
        weights = locate_weights(self._settings.lpm, self._root)
        if sha256_file(weights) != self._store.spec.weights_sha256:
            raise WeightsError(
                f"{host} has other weights in {weights} than the client.", repair="Copy the client's file there."
            )
        return pick_device(self._settings.compute.device).type

    def extractor(self) -> Extractor:
        """The loaded LPM. Two tasks that start together load it once."""
        from stages.extract.shard_task import Extractor

        with self._loading:
            if self._extractor is None:
                self.check()
                threads = self._settings.cluster.threads_per_worker or self._settings.compute.threads
                # Dask starts its workers with one OpenMP thread, so "as many as I may use" would mean one.
                compute = {"threads": threads or max(1, _cores() // self._share)}
                settings = self._settings.model_copy(
                    update={"compute": self._settings.compute.model_copy(update=compute)}
                )
                self._extractor = Extractor(settings, self._root, self._store)
            return self._extractor

    def compute(self, task: ShardTask) -> ShardDone:
        """Make the shard of a task, or what is missing of it."""
        from stages.extract.shard_task import ShardDone, ShardTask

        held = self._held(task.number)
        rest = tuple(row for row in task.images if (row[0], row[2]) not in held)
        there = len(task.images) - len(rest)
        stop = stop_file(self._store, self.name).exists
        if not rest or stop():
            return ShardDone(there, ())
        # Nothing comes where the stop arrived while the LPM was loaded.
        done = next(self.extractor().run([ShardTask(task.number, rest)], lambda _: None, stop), ShardDone(0, ()))
        return ShardDone(there + done.rows, done.failures)

    def _held(self, number: int) -> frozenset[tuple[str, str]]:
        """(image id, view) of the rows that a task's shard holds: its result was lost on the way, after its receipt."""
        from stages.files import storage_errors
        from stages.store.reader import read_receipt

        with suppress(CacheIncompleteError, CacheCorruptError), storage_errors(self._store.receipts):
            return frozenset(read_receipt(self._store, number).origins)
        return frozenset()


def compute_shard(name: str, task: ShardTask) -> ShardDone | FptError:
    """The task: a shard with its receipt, or why there can be none."""
    try:
        return _plugin(get_worker(), name).compute(task)
    except FptError as error:
        return _noted(error)


async def check_worker(name: str, dask_worker: Worker) -> str | FptError:
    """Device of this worker, or why it cannot take part; Dask gives the second argument."""
    # In a thread: importing torch and reading the weights takes seconds, in which the worker must answer the scheduler.
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
    # The traceback stays behind when an error is sent; --debug shows the note.
    error.add_note(f"On {platform.node()}:\n{traceback.format_exc()}")
    return error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
