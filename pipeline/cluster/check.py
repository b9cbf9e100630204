"""Check that some worker can compute a shard, before anything waits for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from distributed import Client

from pipeline.cluster.worker import PACKAGES, check_worker, require_versions, versions
from schemas.errors import ClusterError, FptError
from schemas.machine import ClusterSettings


def fitting_workers(client: Client, resources: Mapping[str, float]) -> dict[str, Any]:
    """Return address -> description of each worker that accepts tasks and offers the resources."""
    workers = client.scheduler_info()["workers"]
    return {
        address: worker
        for address, worker in workers.items()
        # Dask pauses workers whose memory is nearly full.
        if worker["status"] == "running"
        and all(worker["resources"].get(name, 0) >= amount for name, amount in resources.items())
    }


def require_workers(client: Client, settings: ClusterSettings) -> dict[str, Any]:
    """Return the workers that can compute a shard; waits for the first SLURM job to start.

    Raises:
        ClusterError: If the scheduler has no workers, or none offers `cluster.resources`.
    """
    if settings.kind == "slurm":
        try:
            client.wait_for_workers(1, timeout=settings.wait)
        except TimeoutError:
            raise ClusterError(
                f"No job of SLURM became a worker within {settings.wait:.0f} s.",
                "The queue is full, or the jobs fail at their start: see `squeue --me` and their output files.",
                "Run `fpt extract` again, raise cluster.wait, or correct cluster.slurm.",
            ) from None
    if fitting := fitting_workers(client, settings.resources):
        return fitting
    workers = client.scheduler_info()["workers"]
    if not workers:
        raise ClusterError(
            f"The scheduler at {settings.address} has no workers.",
            repair=f"Start some: `dask worker {settings.address} --nthreads 2`.",
        )
    required = ", ".join(f"{name}={amount:g}" for name, amount in settings.resources.items())
    offers = Counter(
        ", ".join(f"{name}={amount:g}" for name, amount in worker["resources"].items()) or "nothing"
        for worker in workers.values()
    )
    offered = "; ".join(f"{count} x {offer}" for offer, count in offers.items())
    if not required:
        raise ClusterError(
            f"None of the {len(workers)} workers accepts tasks.",
            "Their memory is nearly full.",
            "Start them with a larger --memory-limit, or restart them.",
        )
    raise ClusterError(
        f"No worker offers what a shard needs: {required}.",
        f"The workers offer: {offered}.",
        "Correct cluster.resources, or start workers with it: `dask worker ... --resources GPU=1`.",
    )


def require_same_versions(client: Client) -> None:
    """Compare the versions of the scheduler and all workers with those of this process.

    Raises:
        ClusterError: If one differs, with each of its versions that does.
    """
    expected = versions()
    reported: Any = client.get_versions(packages=list(PACKAGES))
    processes = {"The scheduler": reported["scheduler"]}
    processes |= {f"The worker {address}": answer for address, answer in reported["workers"].items()}
    for process, answer in processes.items():
        packages = {name: str(version) for name, version in answer["packages"].items()}
        packages["python"] = ".".join(packages["python"].split(".")[:2])
        require_versions(expected, packages, process)


def require_usable_workers(client: Client, name: str) -> None:
    """Check on each worker that it sees the client's files, and that all workers use the same type of device.

    Args:
        client: Client of the cluster.
        name: Name of the plugin.

    Raises:
        FptError: The first error that a worker returned.
        ClusterError: If the workers would compute on different types of devices.
    """
    # A worker that dies meanwhile returns nothing; its replacement is checked before its first shard.
    answers: dict[str, str | FptError] = client.run(check_worker, name, on_error="ignore")
    for answer in answers.values():
        if isinstance(answer, FptError):
            raise answer
    kinds = Counter(str(answer) for answer in answers.values())
    if len(kinds) > 1:
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        raise ClusterError(
            f"The workers compute on different kinds of devices: {listed}.",
            "Their features would differ in the last digits.",
            "Set compute.device, or choose the workers with cluster.resources.",
        )
