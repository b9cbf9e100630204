"""Federated training in one process: the sites of a study, and its folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from pipeline.params import write_settings
from schemas.base import digest
from schemas.federated import SUMMARY, FederatedPlan, FederatedResult, Partition, RoundLog
from schemas.methods import METHODS

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.manifest import Manifest
    from schemas.resolved import ResolvedSettings
    from stages.federate.messages import Exchange
    from stages.federate.site import Site
    from stages.train.inputs import StudyFiles


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
    from stages.federate.site import in_process
    from stages.manifest import read_manifest

    manifest = read_manifest(study.manifest)
    manifests = sites_of(manifest) if partition is None else simulate(manifest, partition)
    files = study.files(manifest)
    note_use(study, files.receipt)
    sites = {name: site_at(study, files, name, own) for name, own in manifests.items()}
    exchange = in_process(sites)
    try:
        return conduct(study, files, exchange, tuple(sites), plan, folder, on_round)
    finally:
        for site in sites.values():
            site.close()


def conduct(
    study: Study,
    files: StudyFiles,
    exchange: Exchange,
    names: Sequence[str],
    plan: FederatedPlan,
    folder: Path,
    on_round: Callable[[RoundLog], None],
) -> FederatedResult:
    """Train at sites that an exchange reaches, and write `model/` with its settings, then the summary.

    Args:
        study: Of the server.
        files: Its manifest, which has the classes, and its LPM.
        exchange: Carries requests to the sites.
        names: Sites.
        plan: Rounds and local epochs.
        folder: Folder of `model/` and of the summary.
        on_round: Called after each round.

    Raises:
        FptError: As `stages.federate.server.federate`.
    """
    from stages.federate.server import Server, federate
    from stages.files import atomic_write

    server = Server(
        settings=study.settings,
        files=files,
        exchange=exchange,
        output=folder / "model",
        checkpoints=study.checkpoints,
        on_round=on_round,
        on_notice=say,
    )
    result = federate(server, names, plan)
    epochs = study.settings.train.model_copy(update={"epochs": plan.epochs})
    write_settings(study.settings.model_copy(update={"train": epochs}), folder / "model")
    # Last: who waits for it finds a complete bundle.
    atomic_write(folder / SUMMARY, (result.model_dump_json(indent=1) + "\n").encode())
    return result


def site_at(study: Study, files: StudyFiles, name: str, manifest: Manifest) -> Site:
    """Return a site with the images of a manifest, and a folder of its own for checkpoints; it may have any name."""
    from stages.federate.site import Site

    return Site(
        name, study.settings, replace(files, manifest=manifest), study.checkpoints / f"site-{digest(name)[:16]}"
    )
