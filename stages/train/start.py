"""Warm start: training from the weights of an earlier bundle (`train.start_from`), whose images must not be tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.errors import BundleError, TrainingError
from schemas.features import FeatureSpec
from schemas.manifest import Manifest
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.results import BundleSpec, StartSpec
from schemas.specs import Inputs, MethodSpec
from schemas.text import counted
from stages.fitted_images import count_fitted, encode, union
from stages.manifest import fitted_sha256
from stages.methods.base import Network
from stages.train.bundle import read_weights
from stages.train.bundle_spec import read_spec

NEW = "or train from new weights (train.start_from: null)."
"""End of the repair of every error."""


@dataclass(frozen=True)
class Start:
    """A bundle whose weights training starts from."""

    folder: Path
    """Its folder."""
    spec: BundleSpec
    """Its spec."""
    weights: Mapping[str, torch.Tensor]
    """Its weights."""
    fitted_images: str
    """Images that trained it or chose its epoch, as in `BundleSpec`, and those of the bundles before it."""

    @property
    def saved(self) -> StartSpec:
        """What the new bundle records of it."""
        return StartSpec(
            weights_sha256=self.spec.weights_sha256,
            image_size=self.spec.features.lpm.image_size,
            fitted_images=self.fitted_images,
        )

    def apply(self, network: Network, epochs: int) -> None:
        """Give a new network the weights of the bundle.

        Args:
            network: Network with new weights.
            epochs: Epochs of its training.

        Raises:
            BundleError: If its method, or settings that determine its shape, differ, or its training has phases.
            UnsupportedModelError: If the weights cannot be resampled to another image size.
        """
        method = network.spec.method
        if network.phase(1, epochs) != network.phase(epochs, epochs):
            raise BundleError(
                f"A training of {method} with these settings cannot start from a model.",
                "Its epochs have phases, of which the first starts from new weights.",
                f"Choose another method, {NEW}",
            )
        self._check_spec(network.spec)
        network.continue_from(self.spec.network, self.weights)

    def _check_spec(self, spec: MethodSpec) -> None:
        saved = self.spec.network
        ours, theirs = spec.model_dump(mode="json"), saved.model_dump(mode="json")
        names = [name for name in ours if name not in spec.free_fields and ours[name] != theirs.get(name)]
        _refuse(self.folder, {name: (ours[name], theirs.get(name)) for name in names})


def start_key(settings: ResolvedSettings, root: Path) -> dict[str, str]:
    """Return what identifies the bundle that training starts from, for the keys of runs; empty without one.

    Raises:
        BundleError: If there is no bundle.
    """
    folder = start_folder(settings, root)
    return {} if folder is None else {"start": read_spec(folder).weights_sha256}


def start_folder(settings: ResolvedSettings, root: Path) -> Path | None:
    """Return the folder of the bundle that training starts from, or None.

    Raises:
        BundleError: If the method is fitted in closed form.
    """
    start = settings.train.start_from
    if start is None:
        return None
    if METHODS[settings.method].closed_form:
        raise BundleError(
            f"A training of {settings.method} cannot start from a model.",
            "It is fitted in closed form, from no weights.",
            "Set train.start_from: null.",
        )
    return root / Path(start).expanduser()


def open_start(settings: ResolvedSettings, root: Path, manifest: Manifest, features: FeatureSpec) -> Start | None:
    """Read the bundle that training starts from, and check that it belongs to this training.

    Args:
        settings: Resolved settings.
        root: Folder at which relative paths start.
        manifest: Manifest of the study.
        features: Features that are trained on.

    Returns:
        The bundle; None without `train.start_from`.

    Raises:
        BundleError: If it is missing or damaged, or of another method, LPM, task or classes.
        TrainingError: If images that it was trained on, or that chose its epoch, are in the test split, or unknown.
    """
    folder = start_folder(settings, root)
    if folder is None:
        return None
    spec = read_spec(folder)
    expected = {
        "method": (settings.method, spec.network.method),
        "task": (manifest.task, spec.task),
        "classes": (list(manifest.classes), list(spec.classes)),
        "lpm": (features.lpm.name, spec.features.lpm.name),
        "weights of the LPM": (features.weights_sha256[:12], spec.features.weights_sha256[:12]),
        **_layers(METHODS[settings.method].reads(settings), features, spec.features),
    }
    _refuse(folder, {name: pair for name, pair in expected.items() if pair[0] != pair[1]})
    return Start(folder, spec, read_weights(folder, spec), _fitted(folder, spec, manifest))


def _layers(inputs: Inputs, ours: FeatureSpec, theirs: FeatureSpec) -> dict[str, tuple[object, object]]:
    return {"features.layers": (list(ours.layers), list(theirs.layers))} if "tokens" in inputs else {}


def _refuse(folder: Path, differing: Mapping[str, tuple[object, object]]) -> None:
    """Raise a BundleError if there are differences."""
    if differing:
        lines = [f"  {name}: {ours!r} here, {theirs!r} there" for name, (ours, theirs) in differing.items()]
        raise BundleError(
            f"Training cannot start from the model in {folder}.",
            "\n".join(["It differs in what its weights depend on:", *lines]),
            f"Name a model of these settings, {NEW}",
        )


def _fitted(folder: Path, spec: BundleSpec, manifest: Manifest) -> str:
    """Return the images of a bundle, none of which is in the test split.

    Raises:
        TrainingError: If one is, or the images are not known.
    """
    images = spec.fitted_images
    if images is None:
        # Written by an earlier version; with these splits, its images are known all the same.
        if spec.fitted_sha256 is None or spec.fitted_sha256 != fitted_sha256(manifest):
            raise TrainingError(
                f"The images that the model in {folder} was trained on are not known.",
                "An earlier version of fpt wrote it, with other splits: it may have been trained on test images.",
                f"Train it again, {NEW}",
            )
        images = own_images(manifest)
    fitted = images if spec.start is None else union(images, spec.start.fitted_images)
    tested = {row.id for row in manifest.of("test")}
    if leaks := count_fitted(fitted, tested):
        raise TrainingError(
            f"{leaks} of {counted(len(tested), 'test image')} trained the model in {folder}, or chose its epoch.",
            "The splits changed since it was trained, or it is the model of other splits: a test would be none.",
            f"Train it again with these splits, {NEW}",
        )
    return fitted


def own_images(manifest: Manifest) -> str:
    """Return the training and validation images of a manifest, as a bundle records them."""
    return encode(row.id for split in ("train", "val") for row in manifest.of(split))
