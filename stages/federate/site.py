"""A site: its images, and what it replies to the requests of a server.

The same functions run in a simulation, in one process, and behind Flower, on the machines of hospitals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load as load_tensors

from schemas.base import digest
from schemas.errors import TrainingError
from schemas.methods import METHODS, AnySpec, method_options
from schemas.resolved import ResolvedSettings, ResolvedTrain
from schemas.specs import MethodSpec
from stages.device import set_up
from stages.federate.messages import Exchange, Failure, Kind, Replies, Reply, Request, reason_of
from stages.federate.weights import State, constants_digest
from stages.files import read_regular
from stages.losses import plain_loss
from stages.methods.base import Model, build_model
from stages.scores import probabilities
from stages.tasks import decide, hits
from stages.train.bundle import WEIGHTS
from stages.train.data import EpochSampler, FeatureDataset, Reading, batches
from stages.train.gradient import initial_network, load_part
from stages.train.inputs import OpenInputs, StudyFiles
from stages.train.leg import Leg
from stages.train.targets import Target, class_counts, targets
from stages.train.trainer import open_checked, sum_rows, train_leg

BATCH = 64
"""Validation images per forward pass."""


class Site:
    """Images of one site, with the settings of the study."""

    def __init__(self, name: str, settings: ResolvedSettings, files: StudyFiles, folder: Path) -> None:
        """Take over the files; nothing is read yet.

        Args:
            name: Name of the site.
            settings: Settings of the study; the recipe of a training comes with each request.
            files: Manifest with the images of this site only, the LPM, and features of these images.
            folder: Folder for checkpoints of unfinished epochs.
        """
        self.name, self.settings, self.files, self.folder = name, settings, files, folder
        self._opened: OpenInputs | None = None

    @property
    def opened(self) -> OpenInputs:
        """The inputs, opened and checked once.

        Raises:
            FptError: As `stages.train.trainer.open_checked`.
        """
        if self._opened is None:
            _, self._opened = open_checked([self.settings], self.files)
        return self._opened

    @property
    def examples(self) -> int:
        """Training images."""
        return sum(1 for _ in self.files.manifest.of("train"))

    def close(self) -> None:
        """Close the inputs."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def answer(self, request: Request) -> Reply:
        """Return the reply to a request.

        Raises:
            Exception: Whatever went wrong.
        """
        return ANSWERS[request.kind](self, request)


@dataclass(frozen=True)
class Assignment:
    """What a site trains in a round."""

    train: ResolvedTrain
    """Recipe of the complete training; `epochs` counts those of all rounds."""
    first: int
    """First epoch, from 1."""
    last: int
    """Last epoch."""
    mu: float
    """Weight of the proximal term of FedProx; 0: none."""


def client_update(state: State, site: Site, assignment: Assignment) -> tuple[State, int]:
    """Train the local epochs of a round on the images of a site, with the training loop of `fpt train`.

    Args:
        state: Averaged weights.
        site: Whose images.
        assignment: Recipe and epochs.

    Returns:
        The weights after the last epoch, and the number of training images.

    Raises:
        FptError: If inputs are damaged, or the loss is not finite.
    """
    settings = with_recipe(site.settings, assignment.train)
    files = _with_validation(site.files)
    leg = Leg(state, assignment.first, assignment.last, assignment.mu)
    site.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=site.folder) as temporary:
        train_leg(settings, files, site.opened, Path(temporary), site.folder, leg)
        trained = load_tensors(read_regular(Path(temporary) / WEIGHTS))
    return {name: trained[name] for name in state}, site.examples


def with_recipe(settings: ResolvedSettings, train: ResolvedTrain) -> ResolvedSettings:
    """Return settings with another recipe; the last epoch is kept, which the server averages."""
    return settings.model_copy(update={"train": train.model_copy(update={"keep": "last"})})


def _with_validation(files: StudyFiles) -> StudyFiles:
    """Return files with validation images; of a site without any, its training images: only the log reads them."""
    manifest = files.manifest
    if any(True for _ in manifest.of("val")):
        return files
    rows = [row for row in manifest.rows if row.split == "train"]
    again = [row.model_copy(update={"split": "val", "path": f"{row.path}#val"}) for row in rows]
    every = sorted([*manifest.rows, *again], key=lambda row: row.path)
    return replace(files, manifest=manifest.model_copy(update={"rows": tuple(every)}))


def method_key(settings: ResolvedSettings) -> str:
    """Return the digest of the method and its settings, which all sites and the server share."""
    options = method_options(settings.methods, METHODS[settings.method])
    return digest([settings.method, None if options is None else options.model_dump(mode="json")])


def _settings(site: Site, request: Request) -> ResolvedSettings:
    """Return the settings of a site with the recipe of a request."""
    return with_recipe(site.settings, ResolvedTrain.model_validate_json(str(request.values["train"])))


def _describe(site: Site, request: Request) -> Reply:
    """Reply with counts, and with what has to be equal at all sites."""
    settings, files, opened = _settings(site, request), site.files, site.opened
    manifest = files.manifest
    labels = targets(manifest, "train")
    counts = class_counts(labels, len(manifest.classes)).tolist() if labels else [0] * len(manifest.classes)
    constants = ""
    if not METHODS[settings.method].closed_form:
        network = initial_network(settings, files.lpm, opened.features, opened.model, len(manifest.classes))
        constants = constants_digest(network)
    return Reply(
        values={
            "train": len(labels),
            "val": sum(1 for _ in manifest.of("val")),
            "counts": json.dumps(counts),
            "classes": json.dumps(manifest.classes),
            "method": method_key(settings),
            "features": opened.features.model_dump_json(),
            "constants": constants,
        }
    )


def _train(site: Site, request: Request) -> Reply:
    first, last, mu = (request.values[name] for name in ("first", "last", "mu"))
    assignment = Assignment(_settings(site, request).train, int(first), int(last), float(mu))
    state, examples = client_update(request.tensors, site, assignment)
    return Reply(state, {"examples": examples})


def _sums(site: Site, request: Request) -> Reply:
    """Reply with the sums of a closed form over the training images."""
    sums = sum_rows(_settings(site, request), site.files, site.opened)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in sums.items()}
    return Reply(tensors, {"examples": site.examples})


@torch.inference_mode()
def _validate(site: Site, request: Request) -> Reply:
    """Reply with the sums of log-losses and hits of a model over the validation images."""
    settings, manifest = _settings(site, request), site.files.manifest
    labels = targets(manifest, "val")
    if not labels:
        return Reply(values={"images": 0, "loss": 0.0, "hits": 0.0})
    spec: MethodSpec = TypeAdapter(AnySpec).validate_json(str(request.values["spec"]))
    model: Model
    if METHODS[settings.method].closed_form:
        model = build_model(spec)
    else:
        model = initial_network(
            settings, site.files.lpm, site.opened.features, site.opened.model, len(manifest.classes)
        )
    load_part(model, request.tensors)
    logits = _logits(site, model.eval(), settings, labels)
    target = torch.tensor(labels)
    loss = float(plain_loss(logits, target, manifest.task))
    right = hits(target.numpy(), decide(probabilities(logits, manifest.task).numpy(), manifest.task))
    if not np.isfinite(loss):
        raise TrainingError(f"The validation loss of {settings.method} is {loss}.")
    return Reply(values={"images": len(labels), "loss": loss * len(labels), "hits": float(right.sum())})


def _logits(site: Site, model: Model, settings: ResolvedSettings, labels: list[Target]) -> torch.Tensor:
    """Return the logits of the validation images, (n, C), on the CPU."""
    device = set_up(settings.compute)
    reading = Reading(METHODS[settings.method].trains_on(settings), settings.train.side_image_size)
    ids = [row.id for row in site.files.manifest.of("val")]
    dataset, model = FeatureDataset(site.opened.source, ids, labels, reading), model.to(device)
    loader = batches(dataset, EpochSampler(len(ids), BATCH))
    return torch.cat([model(one.to(device).prepared(site.opened.features)).float().cpu() for one in loader])


ANSWERS: Mapping[Kind, Callable[[Site, Request], Reply]] = {
    "describe": _describe,
    "train": _train,
    "sums": _sums,
    "validate": _validate,
}
"""What a site does on request."""


def in_process(sites: Mapping[str, Site]) -> Exchange:
    """Return an exchange with sites in this process, one after the other."""

    def exchange(names: Sequence[str], request: Request) -> Replies:
        replies: dict[str, Reply | Failure] = {}
        for name in names:
            try:
                replies[name] = sites[name].answer(request)
            except Exception as error:
                replies[name] = Failure(reason_of(error))
        return replies

    return exchange
