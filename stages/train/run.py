"""Stage two: train a side network, or a baseline, on cached features. Opens no original image and no LPM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from schemas.base import digest
from schemas.errors import CacheIncompleteError, CacheMismatchError, SettingsError, TrainingError
from schemas.features import ExtractionReceipt, LpmInfo
from schemas.manifest import Manifest, Split
from schemas.resolve import feature_spec, network_spec
from schemas.results import BundleSpec, EpochLog, ModelSpec, StoreMemory, TrainResult
from schemas.settings import Method, Settings
from schemas.views import manifest_rows, train_views
from stages.device import set_up
from stages.store.memory import MemoryRows, Rows, decide
from stages.store.reader import StoreReader
from stages.store.remote_rows import open_rows
from stages.store.shards import REPAIR
from stages.train.bundle import save_bundle, serialise
from stages.train.data import FeatureDataset, array_names
from stages.train.loop import Fit, Recipe, fit, load_checkpoint, make_optimizer
from stages.train.models import Model, Network, build_learner
from stages.train.network import Ensemble, learnable_parameters
from stages.train.pooled import POOLED, PooledRows, chosen, fit_pooled
from stages.train.probes import copy_fit, fit_linear_probe

UNREAD: dict[Method, tuple[str, ...]] = {
    "linear": ("layers", "kept", "importance", "dtype", "codec", "bitround", "pooled", "side_image_size"),
    "knn": ("layers", "kept", "importance", "dtype", "codec", "bitround", "pooled", "side_image_size"),
    "attentive": ("layers", "pooled", "side_image_size"),
}
"""Fields of the features that may differ from the settings: the method does not read them, or takes what there is."""

SPLITS: tuple[Split, Split] = ("train", "val")
"""What training reads."""


def train(
    settings: Settings,
    lpm: LpmInfo,
    manifest: Manifest,
    receipt: ExtractionReceipt,
    cache_root: Path,
    output: Path,
    checkpoints: Path,
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_memory: Callable[[StoreMemory], None] | None = None,
    remote: str | None = None,
) -> TrainResult:
    """Train, and write the bundle of the best epoch.

    Args:
        settings: Resolved.
        lpm: Shape of the LPM that the settings name.
        manifest: From `prepare`.
        receipt: From `extract`.
        cache_root: Folder of all stores.
        output: Folder of the bundle.
        checkpoints: Folder for the checkpoint of an unfinished run; it is removed at the end.
        on_epoch: Called after each epoch; on resume also for the epochs that were done before.
        on_memory: Told before the first epoch whether the features are held in memory.
        remote: `store.remote` of the settings, a relative folder taken from the study's: read where the cache root
            lacks the store.

    Raises:
        CacheMismatchError: If the features were computed under other settings.
        CacheIncompleteError: If the store lacks images, views or shards.
        CacheCorruptError: If bytes of the store changed.
        TransferError: If the remote store cannot be reached.
        TrainingError: If a class has no training images, or the loss is not finite.
    """
    check_features(settings, lpm, receipt)
    check_views(settings, receipt)
    store = open_rows(cache_root, receipt, remote)
    store.require_whole()
    check_rows(settings, manifest, store)
    device = set_up(settings.compute)
    classes = manifest.classes
    labels = {split: _labels(manifest, split) for split in SPLITS}
    tell = on_epoch or (lambda _: None)
    weights = class_weights(settings, labels["train"], classes, device)
    if settings.method in POOLED:
        train_rows, val_rows = (_pooled(settings, manifest, store, split, labels[split]) for split in SPLITS)
        probe, log = fit_pooled(settings.method, train_rows, val_rows, len(classes), weights)
        store.close()
        tell(log)
        learnable = _save(output, probe, probe.spec, classes, settings, receipt, log)
        return TrainResult(best=log, epochs=(log,), resumed_from=0, learnable=learnable, chosen=chosen(probe.spec))
    # A baseline takes the layers that were extracted, whatever "auto" means for its method.
    layers = receipt.spec.layers if settings.method == "attentive" else settings.features.layers
    features = settings.features.model_copy(update={"layers": layers})
    spec = network_spec(settings.model_copy(update={"features": features}), lpm, len(classes))
    rows = _rows(settings, manifest, store, on_memory)
    data = {split: _dataset(settings, manifest, rows, split, labels[split]) for split in SPLITS}
    recipe = Recipe(
        settings=settings.train,
        mean=lpm.mean,
        std=lpm.std,
        class_weights=weights,
        device=device,
        workers=settings.compute.loader_workers,
    )
    torch.manual_seed(settings.train.seed)
    network = build_learner(spec)
    fit_probe(network, rows, manifest, labels, settings, classes)
    network = network.to(device)
    state = Fit(network, make_optimizer(network, settings.train))
    checkpoint = checkpoints / f"{run_key(settings, manifest, receipt)[:16]}.pt"
    resumed = len(state.epochs) if load_checkpoint(state, checkpoint) else 0
    for log in state.epochs:
        tell(log)
    fit(state, data["train"], data["val"], labels["val"], recipe, checkpoint, tell)
    best = state.epochs[state.best - 1]
    network.load_state_dict(state.best_state)
    learnable = _save(output, network, spec, classes, settings, receipt, best)
    checkpoint.unlink(missing_ok=True)
    store.close()
    return TrainResult(best=best, epochs=tuple(state.epochs), resumed_from=resumed, learnable=learnable)


def _save(
    output: Path,
    network: Model,
    spec: ModelSpec,
    classes: tuple[str, ...],
    settings: Settings,
    receipt: ExtractionReceipt,
    best: EpochLog,
) -> int:
    """Write the bundle; says how many parameters were trained."""
    weights, weights_sha256 = serialise(network)
    bundle = BundleSpec(
        classes=classes,
        network=spec,
        features=receipt.spec,
        train=settings.train,
        best_epoch=best.epoch,
        val_auc=best.val_auc,
        learnable=learnable_parameters(network),
        weights_sha256=weights_sha256,
    )
    save_bundle(output, bundle, weights)
    return bundle.learnable


def check_features(settings: Settings, lpm: LpmInfo, receipt: ExtractionReceipt) -> None:
    """Refuse features that were computed under other settings than these; the differing fields are named."""
    found = receipt.spec
    if settings.method in POOLED and not found.pooled:
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
    size = settings.train.side_image_size
    if settings.method == "side" and size != "auto" and size <= found.side_image_size:
        # The side network alone reads nothing but the small images: whatever lies beside them will do.
        return
    if differing := expected.differing(found):
        raise CacheMismatchError(
            "The extracted features do not fit the settings.",
            differing,
            "The settings changed after the features were extracted.",
            "Run `fpt extract` with these settings, or take the change back.",
        )


def check_views(settings: Settings, receipt: ExtractionReceipt) -> None:
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
            "Run `fpt extract`: it computes just these views. Or take the change back.",
        )


def check_rows(settings: Settings, manifest: Manifest, store: StoreReader) -> None:
    """Refuse a store that lacks an image of the manifest, or a view of one to train on."""
    rows = {row.id: row for row in manifest_rows(manifest, settings.features)}
    missing = list(dict.fromkeys(rows[row_id].image for row_id in store.missing(tuple(rows))))
    if missing:
        raise CacheIncompleteError(
            f"{len(missing)} of {len(manifest.ids())} images of the manifest have no features, or not of every view.",
            missing,
            "Images were added or moved to the training split after the features were extracted.",
            REPAIR,
        )


def class_weights(
    settings: Settings, labels: Sequence[int], classes: Sequence[str], device: torch.device
) -> torch.Tensor | None:
    """(C,) weights of the loss: none, balanced n / (C * n_c), or the listed ones.

    Raises:
        TrainingError: If a class has no training images.
        SettingsError: If the list does not have one weight a class.
    """
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=len(classes))
    if absent := [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]:
        raise TrainingError(
            f"No training image has the label {', '.join(absent)}.",
            "The split left the class out.",
            "Change data.split_column, the shares or data.seed, then run `fpt prepare`.",
        )
    chosen = settings.train.class_weights
    if chosen == "none":
        return None
    if chosen == "balanced":
        return (len(labels) / (len(classes) * counts.double())).float().to(device)
    if len(chosen) != len(classes):
        problem = f"lists {len(chosen)} weights for {len(classes)} classes ({', '.join(classes)})"
        raise SettingsError("The settings do not fit the data.", [("train.class_weights", problem)])
    return torch.tensor(chosen, dtype=torch.float32, device=device)


def fit_probe(
    network: Network,
    rows: Rows,
    manifest: Manifest,
    labels: Mapping[Split, Sequence[int]],
    settings: Settings,
    classes: Sequence[str],
) -> None:
    """Fit the linear probe of an ensemble, where it has one; its strength is chosen on the validation images."""
    if not isinstance(network, Ensemble) or network.probe is None:
        return
    found = []
    for split in SPLITS:
        ids = [row.id for row in manifest.of(split)]
        pooled = rows.read_rows(rows.locate(ids), ids, ("pooled",))["pooled"]
        found.append((pooled.reshape(len(ids), -1), labels[split]))
    weights = class_weights(settings, labels["train"], classes, torch.device("cpu"))
    fitted = fit_linear_probe(
        *found[0], *found[1], len(classes), class_weights=None if weights is None else weights.tolist()
    )
    copy_fit(fitted, network.probe)


def run_key(settings: Settings, manifest: Manifest, receipt: ExtractionReceipt) -> str:
    """Names the checkpoint: two runs share it only if they would give the same model."""
    return digest(
        {
            "method": settings.method,
            "train": settings.train.model_dump(mode="json"),
            "views": settings.features.model_dump(mode="json", include={"views", "crops", "crop_scale"}),
            "manifest": manifest.model_dump(mode="json"),
            "features": receipt.fingerprint,
            "shards": receipt.shards,
        }
    )


def _pooled(
    settings: Settings, manifest: Manifest, store: StoreReader, split: Split, labels: Sequence[int]
) -> PooledRows:
    """Pooled outputs and labels of a split; to train on, every view of an image is a row."""
    if split == "train":
        views = [[row.id for row in rows] for rows in train_views(manifest, settings.features)]
    else:
        views = [[row.id] for row in manifest.of(split)]
    ids = [row_id for rows in views for row_id in rows]
    x = store.read(ids, ["pooled"])["pooled"].reshape(len(ids), -1)
    return PooledRows(x, np.repeat(labels, [len(rows) for rows in views]).astype(np.int64))


def _labels(manifest: Manifest, split: Split) -> list[int]:
    index = {name: position for position, name in enumerate(manifest.classes)}
    return [index[row.label] for row in manifest.of(split)]


def _rows(
    settings: Settings, manifest: Manifest, store: StoreReader, tell: Callable[[StoreMemory], None] | None
) -> Rows:
    """The store, or in memory what training reads of it."""
    views = (row.id for rows in train_views(manifest, settings.features) for row in rows)
    ids = tuple(dict.fromkeys([*views, *(row.id for row in manifest.of("val"))]))
    names = array_names(store.layouts, settings.method, bool(settings.train.probe_weight))
    memory = decide(store, ids, names, settings.store)
    if tell is not None:
        tell(memory)
    return MemoryRows(store, ids, names) if memory.held else store


def _dataset(
    settings: Settings, manifest: Manifest, store: Rows, split: Split, labels: Sequence[int]
) -> FeatureDataset:
    size = settings.train.side_image_size
    if size == "auto":
        raise SettingsError("The settings are not resolved.")
    training = split == "train"
    return FeatureDataset(
        store,
        [row.id for row in manifest.of(split)],
        labels,
        size,
        augment=settings.train.augment if training else None,
        seed=settings.train.seed,
        method=settings.method,
        probe=bool(settings.train.probe_weight),
        views=[[row.id for row in rows] for rows in train_views(manifest, settings.features)] if training else None,
    )
