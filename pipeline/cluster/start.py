"""Start or find the workers: processes of this machine, one per GPU, SLURM jobs, or those of a running scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import dask
from distributed import Client, LocalCluster

from pipeline.console import say
from schemas.errors import ClusterError, FptError, PlatformError
from schemas.machine import ClusterSettings
from schemas.version import DISTRIBUTION

TASKS_PER_WORKER = 2
"""Dask threads per worker: while one shard is in the LPM, another is decoded or written."""
CONNECT_SECONDS = 10
"""Timeout for connecting to a scheduler, in seconds."""


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Client]:
    """Yield a client of the cluster in the settings; workers that were started here end with the block.

    Raises:
        ClusterError: If the scheduler does not answer, or the workers do not start.
        PlatformError: If an optional package is not installed.
    """
    with ExitStack() as stack:
        if settings.kind == "scheduler":
            address = settings.address
        else:
            config = {"distributed.scheduler.allowed-failures": settings.retries, **NEVER_PAUSED}
            stack.enter_context(dask.config.set(config))
            try:
                cluster = stack.enter_context(STARTERS[settings.kind](settings))
            except (OSError, RuntimeError, TimeoutError, ValueError) as error:
                if isinstance(error, FptError):
                    raise
                raise ClusterError(
                    f"The workers did not start: {type(error).__name__}: {_first_line(error)}",
                    repair="Check the section `cluster` of params.yaml; --debug shows more.",
                ) from error
            address = cluster
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"No scheduler answers at {settings.address}.",
                f"It is not running, or a firewall blocks it: {_first_line(error)}",
                "Start it with `dask scheduler`, correct cluster.address, or use --cluster local.",
            ) from error
        if settings.kind == "scheduler" or find_spec("bokeh"):
            say(f"Dashboard: {client.dashboard_link}")
        yield client


NEVER_PAUSED = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}
"""Results of tasks are tiny; the memory of a worker is filled by the LPM, which spilling or pausing does not reduce. A
paused worker would therefore wait forever."""


def _local(settings: ClusterSettings) -> Any:
    return LocalCluster(
        n_workers=settings.workers,
        threads_per_worker=TASKS_PER_WORKER,
        processes=True,
        memory_limit=settings.memory,
        # Local address and free port: an open port would expose the workers to the network.
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.ERROR,
    )


def _cuda(settings: ClusterSettings) -> Any:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError:
        raise _missing("dask-cuda", "cuda-cluster") from None
    return LocalCUDACluster(
        threads_per_worker=TASKS_PER_WORKER,
        memory_limit=settings.memory,
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.ERROR,
    )


def _slurm(settings: ClusterSettings) -> Any:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise _missing("dask-jobqueue", "slurm") from None
    job = settings.slurm
    # Options that are not set default to the site's jobqueue.yaml.
    options: dict[str, Any] = {"queue": job.queue, "account": job.account, "walltime": job.walltime}
    if job.directives:
        options["job_extra_directives"] = list(job.directives)
    # Jobs do not inherit the Dask configuration of this process.
    exports = [f"export DASK_{key.upper().replace('.', '__')}={value}" for key, value in NEVER_PAUSED.items()]
    prologue = [*dask.config.get("jobqueue.slurm.job-script-prologue", []), *exports]
    return SLURMCluster(
        cores=TASKS_PER_WORKER,
        processes=1,
        job_cpu=job.cores,
        memory=settings.memory,
        n_workers=settings.workers,
        job_script_prologue=prologue,
        **{name: value for name, value in options.items() if value is not None},
    )


STARTERS: dict[str, Callable[[ClusterSettings], Any]] = {"local": _local, "cuda": _cuda, "slurm": _slurm}
"""Kind of cluster -> function that starts its workers."""


def _missing(package: str, extra: str) -> PlatformError:
    return PlatformError(
        f"{package} is not installed.",
        "It is needed for this kind of cluster only.",
        f"Run `pip install {package}`, or install fpt with its extra: `pip install '{DISTRIBUTION}[{extra}]'`.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
