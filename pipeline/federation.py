"""Federated training in one process: the sites of a study, and its folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from pipeline.params import write_settings
from schemas.base import digest
from schemas.federated import FederatedPlan, FederatedResult, Partition, RoundLog
from schemas.methods import METHODS

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.resolved import ResolvedSettings
    from stages.federate.site import Site

SUMMARY = "summary.json"
"""Sites, rounds and bytes, in the folder of the results."""


def plan_rounds(settings: ResolvedSettings, rounds: int | None, local_epochs: int, mu: float) -> FederatedPlan:
    """Return the plan: by default as many epochs in all rounds as `train.epochs`; one round for a closed form."""
    if METHODS[settings.method].closed_form:
        return FederatedPlan(rounds=1)
    default = max(1, settings.train.epochs // local_epochs)
    return FederatedPlan(rounds=default if rounds is None else rounds, local_epochs=local_epochs, mu=mu)


def run_federation(
    study: Study,
    partition: Partition | None,
    plan: FederatedPlan,
    folder: Path,
    on_round: Callable[[RoundLog], None],
) -> FederatedResult:
    """Train a method at several sites, each of which reads only its own rows of the study's store.

    Args:
        study: With manifest, and features where the method reads them.
        partition: How sites are simulated; None: the sites of the manifest.
        plan: Rounds and local epochs.
        folder: Folder of `model/` and of the summary.
        on_round: Called after each round.

    Raises:
        DataError: If the manifest has no sites, patients are at several, or images cannot be dealt.
        FptError: As `stages.federate.server.federate`.
    """
    from pipeline.sweep_jobs import note_use
    from stages.federate.partition import simulate, sites_of
    from stages.federate.server import Server, federate
    from stages.federate.site import Site, in_process
    from stages.files import atomic_write
    from stages.manifest import read_manifest

    manifest = read_manifest(study.manifest)
    manifests = sites_of(manifest) if partition is None else simulate(manifest, partition)
    files = study.files(manifest)
    note_use(study, files.receipt)
    sites: dict[str, Site] = {
        # A site may have any name.
        name: Site(name, study.settings, replace(files, manifest=own), study.checkpoints / f"site-{digest(name)[:16]}")
        for name, own in manifests.items()
    }
    server = Server(
        settings=study.settings,
        files=files,
        exchange=in_process(sites),
        output=folder / "model",
        checkpoints=study.checkpoints,
        on_round=on_round,
        on_notice=say,
    )
    try:
        result = federate(server, tuple(sites), plan)
    finally:
        for site in sites.values():
            site.close()
    atomic_write(folder / SUMMARY, (result.model_dump_json(indent=1) + "\n").encode())
    epochs = study.settings.train.model_copy(update={"epochs": plan.epochs})
    write_settings(study.settings.model_copy(update={"train": epochs}), folder / "model")
    return result
