"""What training refuses before it starts: features, rows, runs and classes that do not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from schemas.errors import CacheIncompleteError, CacheMismatchError, SettingsError, TrainingError
from schemas.features import ExtractionReceipt, LpmInfo
from schemas.manifest import Manifest
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.settings import Method
from schemas.views import manifest_rows
from stages.store.reader import StoreReader
from stages.store.shards import REPAIR
from stages.train.closed_form import FITTED
from stages.train.targets import Target, balanced_weights, class_counts

UNREAD: dict[Method, tuple[str, ...]] = {
    "linear": ("layers", "kept", "importance", "dtype", "codec", "bitround", "pooled", "side_image_size"),
    "knn": ("layers", "kept", "importance", "dtype", "codec", "bitround", "pooled", "side_image_size"),
    "attentive": ("layers", "pooled", "side_image_size"),
    "statistics": ("layers", "pooled", "side_image_size"),
}
"""Fields of the features that may differ from the settings: the method does not read them, or takes what there is."""

SIDE_IMAGE_FIELDS = frozenset({"feature_version", "resize", "lpm.mean", "lpm.std", "lpm.interpolation"})
"""Fields of the features that determine the stored small images and their normalisation."""

FREE = frozenset(
    {"lr", "weight_decay", "clip_norm", "dropout", "keep", "class_weights", "seed"}
    | {"members", "attentive", "attentive_weight", "probe_weight"}
    | {"loss", "focal_gamma", "label_smoothing", "kappa_weight"}
)
"""Fields of `train` in which runs that share their batches may differ."""


def check_shared(variants: Sequence[ResolvedSettings]) -> None:
    """Refuse variants that differ in more than what each can have for itself.

    Raises:
        SettingsError: With every field that they would have to share.
    """
    fixed = [shared_fields(settings) for settings in variants]
    differing = sorted(name for name in fixed[0] if any(one[name] != fixed[0][name] for one in fixed))
    if differing:
        problems = [(name, "must be the same for runs that share their batches") for name in differing]
        raise SettingsError("These runs cannot be trained in one pass.", problems, "Train them one after the other.")


def shared_fields(settings: ResolvedSettings) -> dict[str, Any]:
    """Dotted name -> value of what runs that share their batches have in common."""
    return {
        "method": settings.method,
        **{
            f"{section}.{name}": value
            for section in ("features", "lpm", "data", "train")
            for name, value in getattr(settings, section).model_dump(mode="json").items()
            if section != "train" or name not in FREE
        },
    }


def check_features(settings: ResolvedSettings, lpm: LpmInfo, receipt: ExtractionReceipt) -> None:
    """Refuse features that were computed under other settings than these; the differing fields are named."""
    found = receipt.spec
    if settings.method in FITTED and not found.pooled:
        raise CacheMismatchError(
            f"The extracted features have no pooled outputs of the LPM, which {settings.method} reads.",
            {"pooled": (True, False)},
            "They were extracted with features.pooled: false.",
            "Set features.pooled: true in params.yaml, then run `fpt extract`.",
        )
    # Stage two needs no weights file: their digest is the one field that the settings cannot say.
    expected = feature_spec(settings, lpm, found.weights_sha256)
    # What "auto" means depends on the method: features of another one serve a baseline that does not read what differs.
    expected = expected.model_copy(update={name: getattr(found, name) for name in UNREAD.get(settings.method, ())})
    differing = expected.differing(found)
    size = settings.train.side_image_size
    if settings.method == "side" and size <= found.side_image_size:
        # The other arrays are irrelevant: only what determines the pixels of the small images must agree.
        differing = {name: values for name, values in differing.items() if name in SIDE_IMAGE_FIELDS}
    if differing:
        raise CacheMismatchError(
            "The extracted features do not fit the settings.",
            differing,
            "The settings changed after the features were extracted.",
            "Run `fpt extract` with these settings, or revert the change.",
        )


def check_views(settings: ResolvedSettings, receipt: ExtractionReceipt) -> None:
    """Refuse an extraction that lacks views of the settings; they are named. Fewer views than extracted will do."""
    asked = settings.features
    absent: list[str] = [view for view in asked.views if view not in receipt.views]
    if asked.crops and (asked.crops > receipt.crops or asked.crop_scale != receipt.crop_scale):
        count = f"{asked.crops} crop{'s' if asked.crops != 1 else ''}"
        absent.append(f"{count} of {asked.crop_scale[0]:g} to {asked.crop_scale[1]:g} of the area")
    if absent:
        raise CacheIncompleteError(
            f"The settings ask for views that were not extracted: {', '.join(absent)}.",
            absent,
            "features.views or features.crops changed after the features were extracted.",
            "Run `fpt extract`: it computes just these views. Or revert the change.",
        )


def check_rows(settings: ResolvedSettings, manifest: Manifest, store: StoreReader) -> None:
    """Refuse a store that lacks an image of the manifest, or a view of one to train on."""
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
    """(C,) weights of the loss: none, balanced (`balanced_weights`), or the listed ones.

    Raises:
        TrainingError: If a class has no training images, or a label all of them.
        SettingsError: If the list does not have one weight a class.
    """
    counts = class_counts(labels, len(classes))
    if absent := [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]:
        raise TrainingError(
            f"No training image has the label {', '.join(absent)}.",
            "The split left the class out.",
            "Change data.split_column, the shares or data.seed, then run `fpt prepare`.",
        )
    if full := [name for name, count in zip(classes, counts.tolist(), strict=True) if count == len(labels)]:
        raise TrainingError(
            f"Every training image has the label {', '.join(full)}.",
            "There is nothing to tell it from: the split left the others out.",
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
