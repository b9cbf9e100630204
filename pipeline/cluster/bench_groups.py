"""Run a bench on the workers of a cluster: one task is one method on one sampling.

As in an extraction, the state is on the shared disk: what has its record is finished, whatever dies. A task returns why
it failed as a value: Dask would retry an exception in vain.
"""

from __future__ import annotations

import asyncio
import platform
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from distributed import Client, Future

from pipeline.bench_plan import Group, reason
from pipeline.bench_runs import Skip, attempt
from pipeline.cluster.check import fitting_workers, require_same_versions, require_workers
from pipeline.cluster.executor import POLL_SECONDS, workers_per_machine
from pipeline.cluster.start import connect
from pipeline.cluster.worker import on_worker
from pipeline.console import notices_to, say
from pipeline.project import Study
from schemas.errors import ClusterError, FptError
from schemas.machine import ClusterSettings
from schemas.text import counted
from stages.files import storage_errors
from stages.train.inputs import StudyFiles

RERUN = "Finished trainings are kept: run `fpt bench` again."
_one_at_a_time = threading.Lock()
"""A worker has several threads, but initial weights and dropout are drawn with torch's global generator."""


def on_cluster(study: Study, files: StudyFiles, groups: Sequence[Group], skip: Skip) -> Iterator[tuple[Group, str]]:
    """Run groups on the cluster of the settings, at most one per worker at a time; an `Execute`.

    Raises:
        ClusterError: If the cluster cannot be reached, has no suitable worker, or is lost.
        FptError: If a worker lacks the device, or does not see the study.
    """
    settings = study.settings.cluster
    # Finished groups need no worker.
    waiting = [group for group in groups if any(job.record is None for job in group.jobs)]
    for group in groups:
        if group not in waiting:
            yield group, attempt(study, files, group)
    if not waiting:
        return
    with connect(settings) as client:
        require_same_versions(client)
        workers = require_workers(client, settings)
        _require_study(client, study, files)
        share = workers_per_machine(settings, workers)
        yield from _Tasks(client, settings).run(study, files, waiting, skip, share)


class _Tasks:
    """The groups in the scheduler."""

    def __init__(self, client: Client, settings: ClusterSettings) -> None:
        self._client, self._settings = client, settings
        self._submitted: dict[Future[Any], Group] = {}
        self._ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._last_worker = time.monotonic()

    def run(
        self, study: Study, files: StudyFiles, groups: Sequence[Group], skip: Skip, share: int
    ) -> Iterator[tuple[Group, str]]:
        """Submit groups as workers become free, and yield each when it ends."""
        left = list(groups)
        try:
            while left or self._submitted:
                capacity = self._capacity()
                while left and len(self._submitted) < capacity:
                    group = left.pop(0)
                    if not skip(group):
                        say(f"{len(groups) - len(left)} of {len(groups)}: {group.name}")
                        self._submit(study, files, group, share)
                yield from self._next()
        finally:
            if self._submitted:
                self._client.cancel(list(self._submitted))

    def _submit(self, study: Study, files: StudyFiles, group: Group, share: int) -> None:
        future = self._client.submit(
            train_group,
            study,
            files,
            group,
            share,
            key=f"fpt-bench-{uuid4().hex}",
            pure=False,
            retries=self._settings.retries,
            resources=self._settings.resources or None,
        )
        self._submitted[future] = group
        future.add_done_callback(self._ended.put)

    def _capacity(self) -> int:
        """Return the number of suitable workers.

        Raises:
            ClusterError: If there has been none for too long, or the scheduler is gone.
        """
        try:
            count = len(fitting_workers(self._client, self._settings.resources))
        except Exception as error:
            raise self._lost() from error
        now = time.monotonic()
        if count:
            self._last_worker = now
        elif now - self._last_worker > self._settings.wait:
            raise ClusterError(
                f"No worker has been available for {self._settings.wait:.0f} s.",
                "All died, reached the time limit of their jobs, or are short of memory.",
                RERUN,
            )
        return count

    def _next(self) -> Iterator[tuple[Group, str]]:
        """Wait a moment, and yield a group that ended, if there is one."""
        with suppress(queue.Empty):
            future = self._ended.get(timeout=POLL_SECONDS)
            group = self._submitted.pop(future)
            if future.cancelled():
                raise self._lost()
            error = future.exception()
            yield group, future.result() if error is None else self._failure(error)

    def _failure(self, error: BaseException) -> str:
        if type(error).__name__ != "KilledWorker":
            return reason(error)
        return (
            f"Every worker that trained it died, {counted(self._settings.retries, 'retry')} included: too little "
            "memory (cluster.memory), or a machine that failed."
        )

    def _lost(self) -> ClusterError:
        return ClusterError("The connection to the scheduler is lost.", "It ended, or the network failed.", RERUN)


def train_group(study: Study, files: StudyFiles, group: Group, share: int) -> str:
    """Finish a group on a worker; return why it failed, or an empty text."""
    jobs = tuple(replace(job, settings=on_worker(job.settings, share)) for job in group.jobs)
    with _one_at_a_time, notices_to(lambda _: None):
        return attempt(study, files, replace(group, jobs=jobs))


def _require_study(client: Client, study: Study, files: StudyFiles) -> None:
    """Check that every worker has the device and sees the study, its features and its images.

    Raises:
        FptError: The first error of a worker.
    """
    sign = study.checkpoints / f"bench-{uuid4().hex}"
    folders = [sign, study.root / study.settings.data.images]
    if files.receipt is not None and study.remote is None:
        folders.append(study.cache)
    with storage_errors(sign):
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.touch()
    try:
        answers = client.run(check_worker, study.settings.compute.device, folders, on_error="ignore")
    finally:
        sign.unlink(missing_ok=True)
    for answer in answers.values():
        if isinstance(answer, FptError):
            raise answer


async def check_worker(device: str, paths: Sequence[Path]) -> FptError | None:
    """Return why this worker cannot be used, or None."""
    # In a thread: importing torch takes seconds, and the worker must answer the scheduler.
    return await asyncio.to_thread(_checked, device, paths)


def _checked(device: str, paths: Sequence[Path]) -> FptError | None:
    from stages.device import pick_device

    if missing := [path for path in paths if not path.exists()]:
        return ClusterError(
            f"The worker on {platform.node()} does not see {missing[0]}.",
            "The store, the study and its images must be on a disk that all machines share, at the same path.",
            "Mount it there, or set FPT_CACHE_DIR (the store) and data.images to shared folders.",
        )
    try:
        pick_device(device)
    except FptError as error:
        return error
    return None
