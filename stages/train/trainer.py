"""Stage two: train a side network, or a baseline, on cached features. Opens no original image and no LPM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from schemas.base import digest
from schemas.cost import StoreMemory
from schemas.features import ExtractionReceipt, LpmInfo
from schemas.manifest import Manifest, Split
from schemas.resolve import network_spec
from schemas.resolved import ResolvedSettings
from schemas.results import BundleSpec, EpochLog, ModelSpec, TrainResult
from schemas.views import train_views
from stages.device import set_up
from stages.groups import cluster_of
from stages.manifest import fitted_sha256
from stages.methods.cached_tokens import Cached
from stages.methods.fit_rows import FittedRows
from stages.methods.fpt import Ensemble, learnable_parameters
from stages.methods.statistics import EvidenceFit, describe, fit_evidence
from stages.ranks import ALONE, Ranks
from stages.store.memory_rows import MemoryRows, Rows, plan_memory
from stages.store.reader import StoreReader
from stages.store.remote_rows import open_rows
from stages.threads import open_lanes
from stages.train.bundle import save_bundle, serialise
from stages.train.checkpoints import Fit, load_checkpoint
from stages.train.checks import check_features, check_rows, check_shared, check_views, class_weights
from stages.train.closed_form import FITTED, chosen, fit_rows
from stages.train.compiling import compile_blocks
from stages.train.data import FeatureDataset, array_names
from stages.train.loop import Recipe, Run, fit, make_optimizer
from stages.train.models import Model, Network, build_learner
from stages.train.parallel import begin_alike
from stages.train.targets import Target, check_task, targets

SPLITS: tuple[Split, Split] = ("train", "val")
"""What training reads."""

Fits = dict[str | tuple[float, ...], tuple[EvidenceFit, torch.Tensor]]
"""Linear probes by `train.class_weights`, and what they say of the validation images."""

RECIPE = 3
"""Recipe version. Bump it when the same settings would train a different model: older checkpoints are ignored."""

DESCRIBED = 16
"""Rows that are read at a time to be described."""
MANY = 64
"""Lanes that a fit can use, if there are as many cores."""


def train(
    settings: ResolvedSettings,
    lpm: LpmInfo,
    manifest: Manifest,
    receipt: ExtractionReceipt,
    cache_root: Path,
    output: Path,
    checkpoints: Path,
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_memory: Callable[[StoreMemory], None] | None = None,
    remote: str | None = None,
    ranks: Ranks = ALONE,
    on_notice: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train, and write the bundle of the epoch that is kept.

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
        ranks: Place of this process among those that train together, inside `parallel.process_group`. The first one
            writes.
        on_notice: Called with a line for the user where a checkpoint is there but cannot be resumed.

    Raises:
        CacheMismatchError: If the features were computed under other settings.
        CacheIncompleteError: If the store lacks images, views or shards.
        CacheCorruptError: If bytes of the store changed.
        TransferError: If the remote store cannot be reached.
        TrainingError: If a class has no training images, or the loss is not finite.
    """
    tell = on_epoch or (lambda _: None)
    (result,) = train_together(
        [settings],
        lpm,
        manifest,
        receipt,
        cache_root,
        [output],
        checkpoints,
        lambda _, log: tell(log),
        on_memory,
        remote,
        ranks,
        on_notice,
    )
    return result


def train_together(
    variants: Sequence[ResolvedSettings],
    lpm: LpmInfo,
    manifest: Manifest,
    receipt: ExtractionReceipt,
    cache_root: Path,
    outputs: Sequence[Path],
    checkpoints: Path,
    on_epoch: Callable[[int, EpochLog], None] | None = None,
    on_memory: Callable[[StoreMemory], None] | None = None,
    remote: str | None = None,
    ranks: Ranks = ALONE,
    on_notice: Callable[[str], None] | None = None,
) -> list[TrainResult]:
    """Train several variants on one stream of batches: the cached tokens are read and widened once for all.

    Each ends where it would alone, with the same `train.order_seed`, up to the rounding of larger matrix products.

    Args:
        variants: Resolved settings that differ in `FREE` fields of `train` alone.
        lpm: Shape of the LPM that they name.
        manifest: From `prepare`.
        receipt: From `extract`.
        cache_root: Folder of all stores.
        outputs: Folder of the bundle of each.
        checkpoints: As for `train`.
        on_epoch: Called after each epoch with the position of the variant.
        on_memory: As for `train`.
        remote: As for `train`.
        ranks: As for `train`.
        on_notice: As for `train`.

    Raises:
        SettingsError: If the variants cannot share their batches.
        Exception: As for `train`.
    """
    first = variants[0]
    check_shared(variants)
    check_task(first, manifest)
    for settings in variants:
        check_features(settings, lpm, receipt)
    check_views(first, receipt)
    store = open_rows(cache_root, receipt, remote)
    store.require_complete()
    check_rows(first, manifest, store)
    device = set_up(first.compute)
    labels = {split: targets(manifest, split) for split in SPLITS}
    tell = on_epoch or (lambda _position, _log: None)
    if first.method in FITTED:
        try:
            return _fit_closed_form(variants, manifest, receipt, store, labels, outputs, tell, device, ranks)
        finally:
            store.close()
    # What any of them reads is read for all.
    reading = max(variants, key=lambda settings: settings.train.probe_weight != 0)
    rows = _rows(reading, manifest, store, on_memory, ranks)
    data = {split: _dataset(reading, manifest, rows, split, labels[split]) for split in SPLITS}
    runs, specs, resumed, keys = [], [], [], []
    fits: Fits = {}
    for position, settings in enumerate(variants):
        # A baseline takes the layers that were extracted, whatever "auto" means for its method.
        layers = receipt.spec.layers if settings.method == "attentive" else settings.features.layers
        features = settings.features.model_copy(update={"layers": layers})
        spec = network_spec(settings.model_copy(update={"features": features}), lpm, len(manifest.classes))
        torch.manual_seed(settings.train.seed)
        network = build_learner(spec)
        probed = fit_probe(network, rows, manifest, labels, settings, fits)
        recipe = Recipe(
            settings=settings.train,
            mean=lpm.mean,
            std=lpm.std,
            class_weights=class_weights(settings, labels["train"], manifest.classes, device),
            device=device,
            workers=settings.compute.loader_workers,
            task=manifest.task,
            ranks=ranks,
        )
        state = Fit(network.to(device), make_optimizer(network, settings.train))
        key = run_key(settings, manifest, receipt)
        checkpoint = checkpoints / f"{key[:16]}.ckpt"
        problem = load_checkpoint(state, checkpoint, key)
        if problem is not None and on_notice is not None and ranks.first:
            on_notice(f"The checkpoint {checkpoint} {problem}: training starts from the first epoch.")
        resumed.append(len(state.epochs))
        keys.append(key)
        if settings.train.compile:
            compile_blocks([network], device)
        runs.append(Run(state, recipe, checkpoint, partial(tell, position), probed, key))
        specs.append(spec)
        for log in state.epochs:
            tell(position, log)
    begin_alike([run.network for run in runs], list(zip(keys, resumed, strict=True)), ranks)
    fit(runs, data["train"], data["val"], labels["val"], first.train.order_seed)
    results = []
    for settings, output, run, spec, done in zip(variants, outputs, runs, specs, resumed, strict=True):
        best = run.state.epochs[run.state.best - 1]
        run.network.load_state_dict(run.state.best_state)
        learnable = _save(output, run.network, spec, manifest, settings, receipt, best, ranks)
        if ranks.first:
            run.checkpoint.unlink(missing_ok=True)
        results.append(TrainResult(best=best, epochs=tuple(run.state.epochs), resumed_from=done, learnable=learnable))
    store.close()
    return results


def _fit_closed_form(
    variants: Sequence[ResolvedSettings],
    manifest: Manifest,
    receipt: ExtractionReceipt,
    store: StoreReader,
    labels: Mapping[Split, Sequence[Target]],
    outputs: Sequence[Path],
    tell: Callable[[int, EpochLog], None],
    device: torch.device,
    ranks: Ranks,
) -> list[TrainResult]:
    """Fit and save models without epochs: one read of the rows for all variants."""
    # To train on, every view of an image is a row.
    ids: dict[Split, list[list[str]]] = {
        "train": [[row.row_id for row in views] for views in train_views(manifest, variants[0].features)],
        "val": [[row.id] for row in manifest.of("val")],
    }
    results = []
    with open_lanes(MANY, torch.device("cpu")) as lanes:
        names = array_names(store.layouts, variants[0].method)
        train_rows, val_rows = _to_fit(store, manifest, ids, labels, names)
        for position, (settings, output) in enumerate(zip(variants, outputs, strict=True)):
            weights = class_weights(settings, labels["train"], manifest.classes, device)
            probe, log = fit_rows(settings, receipt.spec.layers, train_rows, val_rows, weights, lanes)
            tell(position, log)
            learnable = _save(output, probe, probe.spec, manifest, settings, receipt, log, ranks)
            results.append(
                TrainResult(best=log, epochs=(log,), resumed_from=0, learnable=learnable, chosen=chosen(probe.spec))
            )
    return results


def _save(
    output: Path,
    network: Model,
    spec: ModelSpec,
    manifest: Manifest,
    settings: ResolvedSettings,
    receipt: ExtractionReceipt,
    best: EpochLog,
    ranks: Ranks,
) -> int:
    """Write the bundle, as the first process; says how many parameters were trained."""
    if not ranks.first:
        return learnable_parameters(network)
    weights, weights_sha256 = serialise(network)
    bundle = BundleSpec(
        classes=manifest.classes,
        network=spec,
        features=receipt.spec,
        train=settings.train,
        best_epoch=best.epoch,
        val_auc=best.val_auc,
        learnable=learnable_parameters(network),
        weights_sha256=weights_sha256,
        fitted_sha256=fitted_sha256(manifest),
    )
    save_bundle(output, bundle, weights)
    return bundle.learnable


def fit_probe(
    network: Network,
    rows: Rows,
    manifest: Manifest,
    labels: Mapping[Split, Sequence[Target]],
    settings: ResolvedSettings,
    fits: Fits,
) -> torch.Tensor | None:
    """Fit the linear probes of an ensemble, where it has some; says what they say of validation images.

    Runs of one pass have the same images and differ in the class weights alone: equal ones share a fit, in `fits`.
    """
    if not isinstance(network, Ensemble) or network.probe is None:
        return None
    chosen = settings.train.class_weights
    if chosen not in fits:
        fits[chosen] = _fit(rows, manifest, labels, settings)
    found, probed = fits[chosen]
    found.copy_to(network.probe)
    return probed


def _fit(
    rows: Rows, manifest: Manifest, labels: Mapping[Split, Sequence[Target]], settings: ResolvedSettings
) -> tuple[EvidenceFit, torch.Tensor]:
    names = [name for name in array_names(rows.layouts, settings.method, probe=True) if name != "side"]
    weights = class_weights(settings, labels["train"], manifest.classes, torch.device("cpu"))
    originals = {split: [[row.id] for row in manifest.of(split)] for split in SPLITS}
    with open_lanes(MANY, torch.device("cpu")) as lanes:
        train_rows, val_rows = _to_fit(rows, manifest, originals, labels, names)
        return fit_evidence(train_rows, val_rows, None if weights is None else weights.tolist(), lanes)


def _described(rows: Rows, ids: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.float32]:
    """(n, S, 2 D) of `describe`."""
    found = []
    for start in range(0, len(ids), DESCRIBED):
        some = ids[start : start + DESCRIBED]
        arrays = rows.read_rows(rows.locate(some), some, names)
        found.append(describe(torch.from_numpy(arrays["pooled"]), Cached.of(arrays)).numpy())
    return np.concatenate(found)


def run_key(settings: ResolvedSettings, manifest: Manifest, receipt: ExtractionReceipt) -> str:
    """Names the checkpoint: two runs share it only if they would give the same model."""
    return digest(
        {
            "recipe": RECIPE,
            "method": settings.method,
            "train": settings.train.model_dump(mode="json"),
            "views": settings.features.model_dump(mode="json", include={"views", "crops", "crop_scale"}),
            "manifest": manifest.model_dump(mode="json"),
            "features": receipt.fingerprint,
            "shards": receipt.shards,
        }
    )


def _to_fit(
    rows: Rows,
    manifest: Manifest,
    ids: Mapping[Split, Sequence[Sequence[str]]],
    labels: Mapping[Split, Sequence[Target]],
    names: Sequence[str],
) -> Iterator[FittedRows]:
    """What regressions read of each split: the rows of each image that `ids` names, of the arrays `names`."""
    units = cluster_of(manifest)
    for split in SPLITS:
        counts = [len(views) for views in ids[split]]
        yield FittedRows(
            _described(rows, [row_id for views in ids[split] for row_id in views], names),
            np.repeat(np.asarray(labels[split], np.int64), counts, axis=0),
            np.repeat([units[row.path] for row in manifest.of(split)], counts).tolist(),
            len(manifest.classes),
        )


def _rows(
    settings: ResolvedSettings,
    manifest: Manifest,
    store: StoreReader,
    tell: Callable[[StoreMemory], None] | None,
    ranks: Ranks,
) -> Rows:
    """The store, or in memory what training reads of it."""
    views = (row.row_id for rows in train_views(manifest, settings.features) for row in rows)
    ids = tuple(dict.fromkeys([*views, *(row.id for row in manifest.of("val"))]))
    names = array_names(store.layouts, settings.method, bool(settings.train.probe_weight))
    memory = plan_memory(store, ids, names, settings.store, ranks.local_count)
    if tell is not None:
        tell(memory)
    return MemoryRows(store, ids, names) if memory.held else store


def _dataset(
    settings: ResolvedSettings, manifest: Manifest, store: Rows, split: Split, labels: Sequence[Target]
) -> FeatureDataset:
    training = split == "train"
    return FeatureDataset(
        store,
        [row.id for row in manifest.of(split)],
        labels,
        settings.train.side_image_size,
        augment=settings.train.augment if training else None,
        seed=settings.train.order_seed,
        method=settings.method,
        views=[[row.row_id for row in rows] for rows in train_views(manifest, settings.features)] if training else None,
    )
