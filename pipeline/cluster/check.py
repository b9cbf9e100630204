"""Is there a worker that can do a shard? Asked before anything waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from distributed import Client

from pipeline.cluster.worker import PACKAGES, check_worker, require_versions, versions
from schemas.errors import ClusterError, FptError
from schemas.machine import ClusterSettings


def fitting_workers(client: Client, resources: Mapping[str, float]) -> dict[str, Any]:
    """Address -> description of each worker that takes tasks and offers the resources."""
    workers = client.scheduler_info()["workers"]
    return {
        address: worker
        for address, worker in workers.items()
        # A paused worker is one whose memory is nearly full.
        if worker["status"] == "running"
        and all(worker["resources"].get(name, 0) >= amount for name, amount in resources.items())
    }


def require_workers(client: Client, settings: ClusterSettings) -> dict[str, Any]:
    """The workers that can do a shard; jobs in a queue are waited for.

    Raises:
        ClusterError: If there are no workers, or none offers `cluster.resources`.
    """
    if settings.kind == "slurm":
        try:
            client.wait_for_workers(1, timeout=settings.wait)
        except TimeoutError:
            raise ClusterError(
                f"No job of SLURM became a worker within {settings.wait:.0f} s.",
                "The queue is full, or the jobs fail at their start: `squeue --me` and their output files tell.",
                "Run `fpt extract` again, raise cluster.wait, or correct cluster.slurm.",
            ) from None
    found = fitting_workers(client, settings.resources)
    if found:
        return found
    workers = client.scheduler_info()["workers"]
    if not workers:
        raise ClusterError(
            f"The scheduler at {settings.address} has no workers.",
            repair=f"Start some: `dask worker {settings.address} --nthreads 2`.",
        )
    wanted = ", ".join(f"{name}={amount:g}" for name, amount in settings.resources.items())
    offers = Counter(
        ", ".join(f"{name}={amount:g}" for name, amount in worker["resources"].items()) or "nothing"
        for worker in workers.values()
    )
    offered = "; ".join(f"{count} x {offer}" for offer, count in offers.items())
    if not wanted:
        raise ClusterError(
            f"None of the {len(workers)} workers takes tasks.",
            "Their memory is nearly full.",
            "Start them with a larger --memory-limit, or restart them.",
        )
    raise ClusterError(
        f"No worker offers what a shard asks for: {wanted}.",
        f"The workers offer: {offered}.",
        "Correct cluster.resources, or start workers with it: `dask worker ... --resources GPU=1`.",
    )


def require_same_versions(client: Client) -> None:
    """Compare the scheduler and all workers with this process.

    Raises:
        ClusterError: Naming the first that differs and each of its versions that does.
    """
    expected = versions()
    found: Any = client.get_versions(packages=list(PACKAGES))
    places = {"The scheduler": found["scheduler"]}
    places |= {f"The worker {address}": answer for address, answer in found["workers"].items()}
    for place, answer in places.items():
        packages = {name: str(version) for name, version in answer["packages"].items()}
        packages["python"] = ".".join(packages["python"].split(".")[:2])
        require_versions(expected, packages, place)


def require_usable_workers(client: Client, name: str) -> None:
    """Let each worker look for the client's files, and compare the devices.

    Args:
        client: Of the cluster.
        name: Of the plugin.

    Raises:
        FptError: The first one that a worker met.
        ClusterError: If some workers would compute on another kind of device than others.
    """
    # A worker that dies meanwhile says nothing; who comes in its place is asked before its first shard.
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
