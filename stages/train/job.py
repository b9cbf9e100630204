"""A training job: variants of settings on one stream of inputs, and the steps that all kinds of training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from schemas.base import digest
from schemas.cost import StoreMemory
from schemas.features import FeatureSpec
from schemas.manifest import Manifest, Split
from schemas.methods import METHODS, method_options
from schemas.resolved import ResolvedSettings, ResolvedTrain
from schemas.results import BundleSpec, EpochLog
from schemas.specs import Inputs
from stages.groups import cluster_of
from stages.manifest import fitted_sha256
from stages.methods.base import Model, learnable_parameters
from stages.methods.batch import Batch, array_names
from stages.methods.fit_rows import FitRows, describe_rows
from stages.ranks import ALONE, Ranks
from stages.store.memory_rows import RowSource
from stages.train.bundle import save_bundle, serialise
from stages.train.checks import class_weights
from stages.train.inputs import OpenInputs, StudyFiles
from stages.train.leg import Leg
from stages.train.source_statistics import Moments
from stages.train.start import Start, own_images
from stages.train.targets import Target

SPLITS: tuple[Split, Split] = ("train", "val")
"""Splits that training reads."""

RECIPE = 3
"""Recipe version. Bump it when the same settings would train a different model: older checkpoints are ignored."""

DESCRIBED = 16
"""Rows that are read at a time to compute token statistics."""


def ignore(*_: object) -> None:
    """Do nothing: the callback of a caller that needs none."""


@dataclass(frozen=True)
class Watch:
    """Callbacks of a training."""

    on_epoch: Callable[[int, EpochLog], None] = ignore
    """Called after each epoch with the position of the variant, on resume also for the earlier epochs. It starts again
    from epoch 1 where side networks are added to a first one."""
    on_memory: Callable[[StoreMemory], None] = ignore
    """Called before the first epoch, with whether the inputs fit into memory."""
    on_notice: Callable[[str], None] = ignore
    """Called with a line for the user: a checkpoint exists but cannot be resumed, or more side networks are trained."""


@dataclass(frozen=True)
class Job:
    """Variants that are trained together."""

    variants: Sequence[ResolvedSettings]
    """Settings that differ only in `checks.FREE` fields of `train`."""
    outputs: Sequence[Path]
    """Bundle folder of each variant."""
    checkpoints: Path
    """Folder of the checkpoints of unfinished runs."""
    files: StudyFiles
    """Manifest, LPM and features of the study."""
    inputs: Inputs
    """Union of the inputs of all variants."""
    opened: OpenInputs
    """Row source of the inputs."""
    labels: Mapping[Split, Sequence[Target]]
    """Labels of each split."""
    device: torch.device
    """Device of the networks."""
    start: Start | None = None
    """Bundle whose weights training starts from; None: new weights."""
    watch: Watch = Watch()
    """Callbacks."""
    ranks: Ranks = ALONE
    """Position of this process among those that train together. Only rank 0 writes files."""
    leg: Leg | None = None
    """Epochs to train, from given weights; None: a training from its start to its end."""

    @property
    def first(self) -> ResolvedSettings:
        """Settings of the first variant, for fields that all variants share."""
        return self.variants[0]

    @property
    def step_inputs(self) -> Inputs:
        """Union of what the training steps of all variants read: without what only linear probes read."""
        return frozenset().union(*(METHODS[variant.method].trains_on(variant) for variant in self.variants))

    @property
    def manifest(self) -> Manifest:
        """Manifest of the study."""
        return self.files.manifest

    def class_weights(self, settings: ResolvedSettings, device: torch.device) -> torch.Tensor | None:
        """Return the class weights (C,) in the loss of a variant, or None."""
        if self.leg is not None:
            # A site may lack classes that others have: weights were computed from the images of all sites.
            chosen = settings.train.class_weights
            return None if isinstance(chosen, str) else torch.tensor(chosen, dtype=torch.float32, device=device)
        return class_weights(settings, self.labels["train"], self.manifest.classes, device)


def run_key(
    settings: ResolvedSettings, manifest: Manifest, inputs_key: Mapping[str, object], leg: Leg | None = None
) -> str:
    """Return the key of a run; two runs share a key only if they train the same model.

    Args:
        settings: Settings of the run.
        manifest: Manifest written by `prepare`.
        inputs_key: Content of the row source, from `stages.train.inputs.inputs_key`.
        leg: Epochs to train, from given weights; None: all of them.
    """
    method_settings = method_options(settings.methods, METHODS[settings.method])
    return digest(
        {
            "recipe": RECIPE,
            "method": settings.method,
            "train": _recipe(settings.train),
            "views": settings.features.model_dump(mode="json", include={"views", "crops", "crop_scale"}),
            "manifest": manifest.model_dump(mode="json"),
            **({} if method_settings is None else {"methods": method_settings.model_dump(mode="json")}),
            **({} if leg is None else {"leg": leg.key}),
            **inputs_key,
        }
    )


def _recipe(train: ResolvedTrain) -> dict[str, object]:
    """Return the fields of stage two for a key, without those that have no effect with their optimiser.

    The key of a training with AdamW is that of versions that had no other optimiser.
    """
    # Not where the model of a warm start lies; `start_key` is its content.
    without_effect = {"start_from"} if train.extrapolates else {"start_from", "extrapolation"}
    if not train.optimizer.endswith("sgd"):
        without_effect.add("momentum")
    if train.optimizer == "adamw":
        without_effect.add("optimizer")
    return train.model_dump(mode="json", exclude=without_effect)


def taps_of(settings: ResolvedSettings, extracted: FeatureSpec) -> ResolvedSettings:
    """Return the settings with the extracted layers as tapped layers, if the method accepts any."""
    if not METHODS[settings.method].any_layers:
        return settings
    features = settings.features.model_copy(update={"layers": extracted.layers})
    return settings.model_copy(update={"features": features})


def save_model(
    job: Job, position: int, model: Model, best: EpochLog, source: Mapping[str, Moments] | None = None
) -> int:
    """Write the bundle of a variant if this is rank 0; return the number of trained parameters.

    Args:
        job: Job.
        position: Position of the variant.
        model: Trained model.
        best: Epoch whose weights it has.
        source: Statistics of the training images, for adaptation at test time; None: none.
    """
    if not job.ranks.first:
        return learnable_parameters(model)
    weights, weights_sha256 = serialise(model)
    bundle = BundleSpec(
        classes=job.manifest.classes,
        network=model.saved_spec,
        features=job.opened.features,
        # A bundle holds no path.
        train=job.variants[position].train.model_copy(update={"start_from": None}),
        best_epoch=best.epoch,
        val_auc=best.val_auc,
        learnable=learnable_parameters(model),
        weights_sha256=weights_sha256,
        fitted_sha256=fitted_sha256(job.manifest),
        fitted_images=own_images(job.manifest),
        start=None if job.start is None else job.start.saved,
    )
    save_bundle(job.outputs[position], bundle, weights, source)
    return bundle.learnable


def rows_to_fit(
    job: Job, source: RowSource, ids: Mapping[Split, Sequence[Sequence[str]]], inputs: Inputs
) -> Iterator[FitRows]:
    """Yield the rows that closed-form methods are fitted to, per split.

    Args:
        job: Job with the labels.
        source: Source of the rows.
        ids: Split -> row ids of each image: one, or one per view.
        inputs: Inputs to read.
    """
    clusters = cluster_of(job.manifest)
    names = array_names(inputs) & set(source.layouts)
    for split in SPLITS:
        counts = [len(views) for views in ids[split]]
        yield FitRows(
            _described(source, [row_id for views in ids[split] for row_id in views], sorted(names)),
            np.repeat(np.asarray(job.labels[split], np.int64), counts, axis=0),
            np.repeat([clusters[row.path] for row in job.manifest.of(split)], counts).tolist(),
            len(job.manifest.classes),
        )


def _described(source: RowSource, ids: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return `describe_rows`, (n, F), of rows of a source."""
    described = []
    for start in range(0, len(ids), DESCRIBED):
        chunk = ids[start : start + DESCRIBED]
        arrays = source.read_rows(source.locate(chunk), chunk, names)
        described.append(describe_rows(Batch.of(arrays, torch.zeros(len(chunk)))).numpy())
    return np.concatenate(described)
