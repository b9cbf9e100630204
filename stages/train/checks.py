"""Checks before training starts: features, rows, runs and classes must fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from schemas.errors import CacheIncompleteError, CacheMismatchError, SettingsError, TrainingError
from schemas.features import ExtractionReceipt, FeatureSpec, LpmInfo
from schemas.manifest import Manifest
from schemas.methods import METHODS, method_options
from schemas.resolve import expected_spec
from schemas.resolved import ResolvedSettings
from schemas.specs import Inputs
from schemas.views import manifest_rows
from stages.ranks import Ranks
from stages.store.reader import StoreReader
from stages.store.shards import REPAIR
from stages.train.targets import Target, balanced_weights, class_counts

TOKEN_FIELDS = frozenset({"kept", "importance"})
"""Fields of the features that determine only which tokens are cached."""

ENCODING_FIELDS = frozenset({"dtype", "codec", "bitround"})
"""Fields that determine how cached and hidden tokens are stored."""

SIDE_IMAGE_FIELDS = frozenset(
    {"feature_version", "resize", "filter", "normalisation", "lpm.mean", "lpm.std", "lpm.interpolation"}
)
"""Fields of the features that determine the stored small images and their normalisation."""

FREE = frozenset(
    {"lr", "weight_decay", "clip_norm", "dropout", "keep", "class_weights", "seed"}
    | {"members", "adaptive_members", "attentive", "attentive_weight", "probe_weight"}
    | {"loss", "focal_gamma", "label_smoothing", "kappa_weight"}
)
"""Fields of `train` in which runs that share their batches may differ."""


def check_shared(variants: Sequence[ResolvedSettings]) -> None:
    """Check that variants differ only in `FREE` fields of `train`.

    Raises:
        SettingsError: If they differ in others; lists these.
    """
    fixed = [shared_fields(settings) for settings in variants]
    differing = sorted(name for name in fixed[0] if any(one[name] != fixed[0][name] for one in fixed))
    if differing:
        problems = [(name, "must be the same for runs that share their batches") for name in differing]
        raise SettingsError("These runs cannot be trained in one pass.", problems, "Train them one after the other.")


def check_workers(settings: ResolvedSettings, ranks: Ranks) -> None:
    """Check that the workers of an extrapolation can be distributed to the processes.

    Raises:
        SettingsError: If their number is not a multiple of the processes.
    """
    workers = settings.train.extrapolation.workers
    if METHODS[settings.method].closed_form or not settings.train.extrapolates or workers % ranks.count == 0:
        return
    problem = f"must be a multiple of the {ranks.count} processes (is {workers}): each computes as many workers"
    raise SettingsError(
        "The settings do not fit the number of processes.",
        [("train.extrapolation.workers", problem)],
        "Change it, start another number of processes, or choose train.optimizer: adamw.",
    )


def shared_fields(settings: ResolvedSettings) -> dict[str, Any]:
    """Return the fields that must be equal in runs that share their batches, by dotted name."""
    method_settings = method_options(settings.methods, METHODS[settings.method])
    sections = {name: getattr(settings, name) for name in ("features", "lpm", "data", "train")}
    if method_settings is not None:
        sections[f"methods.{settings.method}"] = method_settings
    return {
        "method": settings.method,
        **{
            f"{section}.{name}": value
            for section, values in sections.items()
            for name, value in values.model_dump(mode="json").items()
            if section != "train" or name not in FREE
        },
    }


def check_features(settings: ResolvedSettings, lpm: LpmInfo, receipt: ExtractionReceipt) -> None:
    """Check that the extracted features fit the settings.

    Only fields that affect the inputs of the method are compared: features that were extracted for another method are
    accepted if the difference is not read.

    Raises:
        CacheMismatchError: If they do not; lists the differing fields.
    """
    extracted, row = receipt.spec, METHODS[settings.method]
    inputs = row.reads(settings)
    _check_arrays(settings.method, inputs, extracted)
    expected = expected_spec(settings, lpm, extracted)
    ignored = _ignored_fields(inputs, row.any_layers)
    differing = {
        name: values for name, values in expected.differing(extracted).items() if name.partition(".")[0] not in ignored
    }
    if inputs == {"side"}:
        # Only what determines the pixels of the small images must agree; they may be larger than the input.
        size = settings.train.side_image_size
        differing = {name: values for name, values in differing.items() if name in SIDE_IMAGE_FIELDS}
        if size > extracted.side_image_size:
            differing["side_image_size"] = (size, extracted.side_image_size)
    if differing:
        raise CacheMismatchError(
            "The extracted features do not fit the settings.",
            differing,
            "The settings changed after the features were extracted.",
            "Run `fpt extract` with these settings, or revert the change.",
        )


def _check_arrays(method: str, inputs: Inputs, extracted: FeatureSpec) -> None:
    """Refuse features without the arrays of these inputs.

    Raises:
        CacheMismatchError: If an array is missing.
    """
    present = {
        "tokens": ("cached tokens", bool(extracted.layers)),
        "pooled": ("pooled outputs", extracted.pooled),
        "statistics": ("token statistics", extracted.statistics),
    }
    for name, (title, there) in present.items():
        if name in inputs and not there:
            earlier = ", or by an earlier version of fpt" if name == "statistics" else ""
            raise CacheMismatchError(
                f"The extracted features have no {title} of the LPM, which {method} reads.",
                {name: (True, False)},
                f"They were extracted with features.{name}: false{earlier}.",
                f"Set features.{name}: true in params.yaml, then run `fpt extract`.",
            )


def _ignored_fields(inputs: Inputs, any_layers: bool) -> frozenset[str]:
    """Return the fields of the features that do not affect these inputs."""
    ignored = {"pooled", "statistics"}
    tokens = "tokens" in inputs
    if not tokens or any_layers:
        ignored.add("layers")
    if not tokens:
        ignored |= TOKEN_FIELDS
    if not tokens and "hidden" not in inputs:
        ignored |= ENCODING_FIELDS
    if "hidden" not in inputs:
        ignored.add("hidden")
    if "side" not in inputs:
        ignored.add("side_image_size")
    return frozenset(ignored)


def check_views(settings: ResolvedSettings, receipt: ExtractionReceipt) -> None:
    """Check that all views of the settings were extracted.

    Raises:
        CacheIncompleteError: If some were not; lists them.
    """
    features = settings.features
    absent: list[str] = [view for view in features.views if view not in receipt.views]
    if features.crops and (features.crops > receipt.crops or features.crop_scale != receipt.crop_scale):
        count = f"{features.crops} crop{'s' if features.crops != 1 else ''}"
        absent.append(f"{count} of {features.crop_scale[0]:g} to {features.crop_scale[1]:g} of the area")
    if absent:
        raise CacheIncompleteError(
            f"The settings list views that were not extracted: {', '.join(absent)}.",
            absent,
            "features.views or features.crops changed after the features were extracted.",
            "Run `fpt extract`, which computes only these views, or revert the change.",
        )


def check_rows(settings: ResolvedSettings, manifest: Manifest, store: StoreReader) -> None:
    """Check that the store contains all images of the manifest, and all views of training images.

    Raises:
        CacheIncompleteError: If it does not; lists the images.
    """
    rows = {row.row_id: row for row in manifest_rows(manifest, settings.features)}
    missing = list(dict.fromkeys(rows[row_id].image for row_id in store.missing(tuple(rows))))
    if missing:
        raise CacheIncompleteError(
            f"{len(missing)} of {len(manifest.ids())} images of the manifest have no features, or not of every view.",
            missing,
            "Images were added or moved to the training split after the features were extracted.",
            REPAIR,
        )


def class_weights(
    settings: ResolvedSettings, labels: Sequence[Target], classes: Sequence[str], device: torch.device
) -> torch.Tensor | None:
    """Return the class weights (C,) of the loss: none, balanced (`balanced_weights`), or as listed.

    Raises:
        TrainingError: If a class has no training images, or all training images have the same label.
        SettingsError: If the list does not have one weight per class.
    """
    counts = class_counts(labels, len(classes))
    if absent := [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]:
        raise TrainingError(
            f"No training image has the label {', '.join(absent)}.",
            "The split left the class out.",
            "Change data.split_column, the shares or data.seed, then run `fpt prepare`.",
        )
    if constant := [name for name, count in zip(classes, counts.tolist(), strict=True) if count == len(labels)]:
        raise TrainingError(
            f"Every training image has the label {', '.join(constant)}.",
            "The split left out all images without it, so that it cannot be learned.",
            "Change data.split_column, the shares or data.seed, then run `fpt prepare`.",
        )
    chosen = settings.train.class_weights
    if chosen == "none":
        return None
    if chosen == "balanced":
        return torch.from_numpy(balanced_weights(counts, len(labels), settings.data.task)).float().to(device)
    if len(chosen) != len(classes):
        problem = f"lists {len(chosen)} weights for {len(classes)} classes ({', '.join(classes)})"
        raise SettingsError("The settings do not fit the data.", [("train.class_weights", problem)])
    return torch.tensor(chosen, dtype=torch.float32, device=device)
