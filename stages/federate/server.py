"""The server of a federated training: rounds, and one ordinary bundle.

FedAvg (arXiv 1602.05629): every round the sites train some epochs from the same weights, and the new weights are the
mean of theirs, weighted by training images. FedProx (arXiv 1812.06127) adds a proximal term to the loss of the sites.
Learning rates and random draws are those of the epochs of one training of rounds x local epochs; the optimiser starts
without state in each round. A method that is fitted to sums takes one round, and gives the fit to all rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from schemas.base import digest
from schemas.errors import SettingsError, TrainingError
from schemas.federated import FederatedPlan, FederatedResult, RoundLog
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.results import BundleSpec
from schemas.specs import MethodSpec
from stages.federate.handshake import Members, handshake, recipe
from stages.federate.messages import Exchange, Failure, Replies, Reply, Request
from stages.federate.progress import Progress, load_progress, save_progress
from stages.federate.weights import (
    State,
    bytes_of,
    constants_digest,
    spoiled,
    state_of,
    travelling,
    weighted_mean,
)
from stages.manifest import fitted_sha256
from stages.methods.base import Model, Network, learnable_parameters
from stages.methods.summed import Sums, summed_method
from stages.train.bundle import save_bundle, serialise
from stages.train.fit_cost import fit_shape
from stages.train.gradient import initial_network, load_part
from stages.train.inputs import StudyFiles, load_weights
from stages.train.job import ignore
from stages.train.leg import digest_of
from stages.train.start import own_images

VERSION = 1
"""Bump it when the same plan would train a different model: older checkpoints are ignored."""


@dataclass(frozen=True)
class Server:
    """What the server has."""

    settings: ResolvedSettings
    """Settings of the study."""
    files: StudyFiles
    """Classes and LPM of the study; its images are not read."""
    exchange: Exchange
    """Carries requests to the sites."""
    output: Path
    """Folder of the bundle."""
    checkpoints: Path
    """Folder of the checkpoint of an unfinished training."""
    on_round: Callable[[RoundLog], None] = ignore
    """Called after each round, on resume also for the earlier ones."""
    on_notice: Callable[[str], None] = ignore
    """Called with a line for the user."""


def federate(server: Server, names: Sequence[str], plan: FederatedPlan) -> FederatedResult:
    """Train a method at several sites, and write the bundle.

    Args:
        server: Settings, sites and folders.
        names: Sites.
        plan: Rounds and local epochs.

    Raises:
        SettingsError: If the method or a site cannot take part.
        TrainingError: If no site is left in a round, or a class has no training images.
        StorageError: If a checkpoint or the bundle cannot be written.
    """
    row = METHODS[server.settings.method]
    if row.closed_form and not row.summed:
        summed = ", ".join(one.name for one in METHODS.values() if one.summed)
        raise SettingsError(
            f"{row.name} is fitted to rows, which do not leave a site.",
            [("method", f"must be trained by gradient, or be fitted to sums: {summed}")],
            f"Choose another method, such as --method {summed.partition(',')[0]}.",
        )
    train = server.settings.train.model_copy(update={"epochs": plan.epochs})
    settings = server.settings.model_copy(update={"train": train})
    members = handshake(settings, server.files.manifest.classes, names, server.exchange)
    for name, reason in members.left_out.items():
        server.on_notice(f"Site {name} takes no part: {reason}")
    return _fit_sums(server, members) if row.summed else _average(server, members, plan)


def _average(server: Server, members: Members, plan: FederatedPlan) -> FederatedResult:
    """Train by rounds of averaging."""
    settings, classes = members.settings, len(server.files.manifest.classes)
    lpm = load_weights(server.files).model if METHODS[settings.method].adapts_lpm else None
    network = initial_network(settings, server.files.lpm, members.features, lpm, classes)
    _check_network(network, settings, plan)
    if constants_digest(network) != members.constants:
        raise SettingsError(
            "The server draws other random numbers than the sites.",
            [("train.seed", "gives other initial weights")],
            "Use the same version of torch everywhere.",
        )
    progress = Progress(state_of(network, travelling(network)))
    key = _key(members, plan, progress.state)
    path = server.checkpoints / f"federated-{key[:16]}.ckpt"
    found, problem = load_progress(path, key, frozenset(progress.state))
    if problem:
        server.on_notice(f"The checkpoint {path} {problem}: training starts from the first round.")
    progress = found or progress
    resumed, down = len(progress.rounds), bytes_of(progress.state)
    for log in progress.rounds:
        server.on_round(log)
    for number in range(resumed + 1, plan.rounds + 1):
        log, state = _round(server, members, network.spec, plan, number, progress.state)
        progress.add(log, state, settings.train.keep, plan.rounds)
        save_progress(progress, path, key)
        server.on_round(log)
    load_part(network, progress.best_state)
    learnable = _save(server, members, network, plan.epochs_of(progress.best)[1])
    path.unlink(missing_ok=True)
    return FederatedResult(
        method=settings.method,
        plan=plan,
        sites=members.sites,
        left_out=dict(members.left_out),
        rounds=tuple(progress.rounds),
        best=progress.best,
        resumed_from=resumed,
        learnable=learnable,
        down_bytes=down,
        up_bytes=down,
    )


def _round(
    server: Server, members: Members, spec: MethodSpec, plan: FederatedPlan, number: int, start: State
) -> tuple[RoundLog, State]:
    """Train a round, and return its log and the averaged weights."""
    began, (first, last) = time.perf_counter(), plan.epochs_of(number)
    values = {**recipe(members.settings), "first": first, "last": last, "mu": plan.mu}
    replies = server.exchange(members.names, Request("train", start, values))
    used, failed = _usable(replies, start, members)
    if not used:
        raise TrainingError(
            f"No site finished round {number}.",
            "\n".join(f"  {name}: {reason}" for name, reason in failed.items()),
            "Fix what the sites report, then run the same command again: finished rounds are kept.",
        )
    counts = {site.name: site.train for site in members.sites if site.name in used}
    state = weighted_mean([used[name].tensors for name in counts], list(counts.values()))
    loss, accuracy = _validated(server, members, state, spec, failed)
    return (
        RoundLog(
            number=number,
            sites=counts,
            failed=failed,
            val_loss=loss,
            val_accuracy=accuracy,
            seconds=round(time.perf_counter() - began, 3),
        ),
        state,
    )


def _usable(replies: Replies, start: State, members: Members) -> tuple[dict[str, Reply], dict[str, str]]:
    """Return the replies that can be averaged, and why the others cannot, by site in the order of the members."""
    used, failed = {}, {}
    for name in members.names:
        reply = replies.get(name, Failure("no reply"))
        if isinstance(reply, Failure):
            failed[name] = reply.reason
        elif (tensor := spoiled(reply.tensors, start)) is not None:
            failed[name] = f"{tensor} is missing, has another shape, or is not finite"
        else:
            used[name] = reply
    return used, failed


def _validated(
    server: Server, members: Members, state: State, spec: MethodSpec, failed: dict[str, str]
) -> tuple[float | None, float | None]:
    """Return log-loss and accuracy of a model on the validation images of all sites that answer; None without any.

    Args:
        server: Sites.
        members: Their names and settings.
        state: Weights.
        spec: Spec of the model.
        failed: Sites that failed before; those that fail now are added.
    """
    values = {**recipe(members.settings), "spec": spec.model_dump_json()}
    replies = server.exchange(members.names, Request("validate", state, values))
    totals = dict.fromkeys(("images", "loss", "hits"), 0.0)
    for name in members.names:
        reply = replies.get(name, Failure("no reply"))
        if isinstance(reply, Failure):
            failed.setdefault(name, f"validation: {reply.reason}")
            continue
        for field in totals:
            totals[field] += float(reply.values[field])
    if not totals["images"]:
        return None, None
    return totals["loss"] / totals["images"], totals["hits"] / totals["images"]


def _fit_sums(server: Server, members: Members) -> FederatedResult:
    """Fit a summed method to the sums of all sites, in one round."""
    began, settings = time.perf_counter(), members.settings
    method, rows = summed_method(settings.method), sum(site.train for site in members.sites)
    shape = fit_shape(settings, members.features, len(server.files.manifest.classes), rows)
    zeros: State = {name: torch.zeros(size, dtype=torch.float64) for name, size in method.sums_size(shape).items()}
    sums, counts, failed = _added(server, members, zeros)
    model = method.fit_sums(sums, shape)
    state = state_of(model, tuple(model.state_dict()))
    loss, accuracy = _validated(server, members, state, model.saved_spec, failed)
    log = RoundLog(
        number=1,
        sites=counts,
        failed=failed,
        val_loss=loss,
        val_accuracy=accuracy,
        seconds=round(time.perf_counter() - began, 3),
    )
    server.on_round(log)
    return FederatedResult(
        method=settings.method,
        plan=FederatedPlan(rounds=1),
        sites=members.sites,
        left_out=dict(members.left_out),
        rounds=(log,),
        best=1,
        learnable=_save(server, members, model, 1),
        down_bytes=0,
        up_bytes=bytes_of(zeros),
    )


def _added(server: Server, members: Members, zeros: State) -> tuple[Sums, dict[str, int], dict[str, str]]:
    """Request the sums of all sites, and return their sum, training images by site, and why other sites failed.

    Args:
        server: Sites.
        members: Their names and settings.
        zeros: Sums over no rows.

    Raises:
        TrainingError: If no site sent sums, or a class has training images only at sites that did not.
    """
    replies = server.exchange(members.names, Request("sums", values=recipe(members.settings)))
    used, failed = _usable(replies, zeros, members)
    counts = {site.name: site.train for site in members.sites if site.name in used}
    images = np.sum([site.counts for site in members.sites if site.name in used] or [(0,)], axis=0)
    if not used or not images.all():
        classes = server.files.manifest.classes
        absent = [name for name, count in zip(classes, images.tolist(), strict=False) if not count]
        raise TrainingError(
            f"No site that sent its sums has training images of {', '.join(absent)}." if used else "No site sent sums.",
            "\n".join(f"  {name}: {reason}" for name, reason in failed.items()),
            "Fix what the sites report, then run the same command again.",
        )
    sums = {name: np.sum([reply.tensors[name].numpy() for reply in used.values()], axis=0) for name in zeros}
    return sums, counts, failed


def _check_network(network: Network, settings: ResolvedSettings, plan: FederatedPlan) -> None:
    """Refuse networks with parts that depend on the rows of one site.

    Raises:
        SettingsError: If it has such parts, or a phase of its training begins within a round.
    """
    problems = []
    if settings.train.start_from is not None:
        problems.append(("train.start_from", "must be null: every site starts from the weights of the server"))
    if network.probe is not None:
        problems.append(("train.probe_weight", "must be 0: rows that probes are fitted to do not leave a site"))
    if network.standardises:
        problems.append(("method", f"must not be {settings.method}: it standardises with the rows of one site"))
    begins = {network.phase(epoch, plan.epochs).first for epoch in range(1, plan.epochs + 1)}
    if any((epoch - 1) % plan.local_epochs for epoch in begins):
        problems.append(("--local-epochs", "must divide the phases of the training, which begin with a round"))
    if problems:
        raise SettingsError(f"{settings.method} cannot be trained at several sites.", problems, "Choose method fpt+.")


def _key(members: Members, plan: FederatedPlan, start: Mapping[str, torch.Tensor]) -> str:
    """Return the key of a training; two trainings share it only if they give the same model."""
    return digest(
        {
            "version": VERSION,
            "plan": plan.model_dump(mode="json"),
            "method": members.settings.method,
            "train": members.settings.train.model_dump(mode="json"),
            "features": members.features.fingerprint,
            "constants": members.constants,
            "start": digest_of(start),
            "sites": [site.model_dump(mode="json") for site in members.sites],
        }
    )


def _save(server: Server, members: Members, model: Model, best_epoch: int) -> int:
    """Write the bundle, and return the number of trained parameters."""
    weights, weights_sha256 = serialise(model)
    manifest = server.files.manifest
    bundle = BundleSpec(
        classes=manifest.classes,
        network=model.saved_spec,
        features=members.features,
        train=members.settings.train,
        best_epoch=best_epoch,
        val_auc=None,
        learnable=learnable_parameters(model),
        weights_sha256=weights_sha256,
        fitted_sha256=fitted_sha256(manifest) if manifest.rows else None,
        fitted_images=own_images(manifest) if manifest.rows else None,
    )
    save_bundle(server.output, bundle, weights)
    return bundle.learnable
