"""Evaluate a bundle on labelled images outside of its study: features from the cache where they are, else computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import DataError, ImageError, UnreadableImagesError
from schemas.features import FeatureSpec
from schemas.manifest import SPLITS, Manifest, ManifestRow
from schemas.results import BundleSpec, Metrics
from schemas.settings import DataSettings, LpmSettings
from schemas.tasks import names_in, written
from schemas.text import counted
from stages.evaluate.evaluator import evaluated_model, probabilities, write_evaluation
from stages.evaluate.predictions import Predictions
from stages.evaluate.report import confident_mistakes, render_report
from stages.evaluate.scoring import score
from stages.extract.features import to_pixels
from stages.images import read_image
from stages.predict.classifier import check_task, load_classifier
from stages.prepare import QUARANTINE_FILE
from stages.prepare.dataset_listing import Listing, check_listing, read_listing
from stages.prepare.error_text import did_you_mean, listed
from stages.prepare.exports import write_quarantine
from stages.prepare.image_digests import Digests, digest_images
from stages.prepare.image_files import skipped_lines
from stages.prepare.label_checks import check_conflicts
from stages.prepare.label_table import check_files
from stages.prepare.labelled_image import LabelledImage
from stages.progress import Progress
from stages.store.index import refresh_index
from stages.store.layout import open_store_layout
from stages.store.reader import StoreReader
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import store_logits

Shares = dict[str, npt.NDArray[np.float32]]
"""Image id -> (C,) probabilities."""


@dataclass(frozen=True)
class ExternalResult:
    """What an external evaluation gave."""

    metrics: Metrics
    """Of all images that can be used."""
    cached: int
    """Image contents whose features were in the cache."""
    computed: int
    """Image contents that the LPM ran on."""
    quarantined: int
    """Images, and class folders without any, set aside."""
    notes: tuple[str, ...]
    """What was chosen by header or layout, and what was passed over."""


def evaluate_external(
    bundle_dir: Path,
    data: DataSettings,
    root: Path,
    output: Path,
    *,
    lpm: LpmSettings | None,
    cache_root: Path,
    study: Manifest | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    reading: Progress | None = None,
    predicting: Progress | None = None,
) -> ExternalResult:
    """Evaluate a model on other images and write what `stages.evaluate.evaluator.evaluate` writes.

    Beside that `quarantine.csv`, where images were set aside (`data.on_error`). Nothing is written to the cache.

    Args:
        bundle_dir: From `train`.
        data: Images and labels, as for `prepare`; a ready split is not read.
        root: Folder that relative paths of the settings start at.
        output: Folder of the results.
        lpm: Where the LPM's weights are; None: the hub. Not loaded where all features are in the cache.
        cache_root: Folder of all stores.
        study: Manifest of the bundle's study, to find images that the model was trained on; None: not known.
        device: Of both networks.
        batch_size: Images per forward pass of the LPM.
        reading: Called with (images read, images).
        predicting: Called with (images predicted, images without cached features).

    Raises:
        FptError: As `prepare` and `predict`; also DataError where a label is none of the bundle's classes.
    """
    bundle = load_bundle(bundle_dir, device)
    spec = bundle.spec
    check_task(spec, data)
    data = data.model_copy(update={"task": spec.task, "split_column": None})
    listing = _list_labelled(data, root, spec)
    images, items = listing.images, listing.items
    digests = _digests(items, images, data, reading)
    rows = _rows(items, digests, spec)
    paths = {row.id: images / row.path for row in reversed(rows)}
    found, cached = _probabilities(bundle, paths, data, root, lpm, cache_root, batch_size, predicting)
    p = np.stack([found[row.id] for row in rows])
    predictions = Predictions(spec.classes, rows, p, evaluated_model(spec), spec.task, listing.unit)
    metrics = score(predictions, (*_overlap(rows, spec, study), *_absent(rows, spec)))
    report = render_report(
        metrics,
        predictions,
        Manifest(classes=spec.classes, rows=rows, task=spec.task, unit=listing.unit),
        spec,
        thumbnails=_thumbnails(predictions, paths, spec.features, data),
        train_dir=bundle_dir.parent / "train",
    )
    write_evaluation(predictions, metrics, report, output)
    aside = listing.set_aside()
    write_quarantine(aside, items, digests.failures, output / QUARANTINE_FILE)
    notes = (*listing.notes, *skipped_lines(listing.skipped, images))
    return ExternalResult(metrics, cached, len(paths) - cached, len(aside) + len(digests.failures), notes)


def _list_labelled(data: DataSettings, root: Path, spec: BundleSpec) -> Listing:
    """List the images, with labels that the model was trained on."""
    listing = read_listing(data, root)
    if data.on_error == "fail":
        check_listing(listing)
    _check_labels(listing.items, spec)
    if data.label_columns is not None:
        _check_columns([(data.class_names or {}).get(name, name) for name in data.label_columns], spec)
    return listing


def _check_labels(items: Sequence[LabelledImage], spec: BundleSpec) -> None:
    counts = Counter(name for item in items for name in names_in(item.label, spec.task))
    unknown = [
        f"{name!r}, {counted(count, 'image')}{did_you_mean(name, spec.classes)}"
        for name, count in sorted(counts.items())
        if name not in spec.classes
    ]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'label')} that the model was not trained on.",
            listed([*unknown, f"classes of the model: {', '.join(map(repr, spec.classes))}"]),
            "Correct the labels, name another column (--set data.label_column=NAME), or leave these images out.",
        )


def _check_columns(columns: Sequence[str], spec: BundleSpec) -> None:
    """Without a column it is not known whether an image has the label, and absence would be a guess."""
    missing = [name for name in spec.classes if name not in columns]
    if missing:
        raise DataError(
            f"data.label_columns lacks {counted(len(missing), 'label')} of the model.",
            listed(map(repr, missing)),
            "Add these columns, with 0 or 1 for each image.",
        )


def _digests(items: Sequence[LabelledImage], images: Path, data: DataSettings, progress: Progress | None) -> Digests:
    if data.labels is not None and data.on_error == "fail":
        check_files(items, images, data.labels)
    digests = digest_images(
        items,
        images,
        max_pixels=data.max_pixels,
        min_side=data.min_side,
        accept_warnings=data.on_warning == "accept",
        progress=progress,
    )
    if digests.failures and data.on_error == "fail":
        raise UnreadableImagesError(
            sorted(digests.failures.items()),
            "Repair or remove them, or evaluate without them: --set data.on_error=quarantine",
        )
    return digests


def _rows(items: Sequence[LabelledImage], digests: Digests, spec: BundleSpec) -> tuple[ManifestRow, ...]:
    usable = [item for item in items if item.path in digests.ids]
    if not usable:
        reasons = listed(f"{path}: {reason}" for path, reason in sorted(digests.failures.items()))
        raise DataError(f"None of {counted(len(items), 'image')} can be used.", reasons)
    check_conflicts(usable, digests.ids)
    return tuple(_row(item, digests.ids[item.path], spec) for item in usable)


def _row(item: LabelledImage, image_id: str, spec: BundleSpec) -> ManifestRow:
    label = written(sorted(names_in(item.label, spec.task), key=spec.classes.index))
    group = item.path if item.group is None else item.group
    return ManifestRow(id=image_id, path=item.path, label=label, group=group, split="external")


def _probabilities(
    bundle: Bundle,
    paths: Mapping[str, Path],
    data: DataSettings,
    root: Path,
    lpm: LpmSettings | None,
    cache_root: Path,
    batch_size: int,
    progress: Progress | None,
) -> tuple[Shares, int]:
    """Probabilities of each image content, and how many came from cached features."""
    found: Shares = {}
    with _local_store(cache_root, bundle.spec.features) as store:
        ids = list(paths)
        there = [] if store is None else [ids[at] for at in np.flatnonzero(store.find(ids) >= 0).tolist()]
        if store is not None and there:
            found = dict(zip(there, probabilities(store_logits(bundle, store, there), bundle.spec.task), strict=True))
    missing = [image_id for image_id in paths if image_id not in found]
    if missing:
        classifier = load_classifier(bundle, lpm, root, data)
        computed = classifier.probabilities([paths[image_id] for image_id in missing], batch_size, progress)
        for image_id, p in zip(missing, computed, strict=True):
            if isinstance(p, ImageError):  # It was read a moment ago.
                raise p
            found[image_id] = p
    return found, len(paths) - len(missing)


@contextmanager
def _local_store(cache_root: Path, spec: FeatureSpec) -> Iterator[StoreReader | None]:
    """Every finished shard of the local store of these features; None where there is no such store."""
    try:
        layout = open_store_layout(cache_root, spec)
    except FileNotFoundError:
        yield None
        return
    index, _ = refresh_index(layout)
    store = StoreReader(layout, {str(number): digest for number, digest in index.digests().items()}, index)
    try:
        yield store
    finally:
        store.close()


def _overlap(rows: Sequence[ManifestRow], spec: BundleSpec, study: Manifest | None) -> list[str]:
    """Images that the study has, too, by their content."""
    if study is None:
        return []
    split_of = {row.id: row.split for row in study.rows}
    counts = Counter(split_of[row.id] for row in rows if row.id in split_of)
    trained = sum(counts[split] for split in spec.learnt_from)
    others = {split: counts[split] for split in SPLITS if counts[split] and split not in spec.learnt_from}
    total = counted(len(rows), "image")
    found = []
    if trained:
        found.append(f"the model was trained on {trained} of {total}; this is not a test result.")
    if others:
        named = ", ".join(f"{count} {split}" for split, count in others.items())
        found.append(f"already in the study of the model: {sum(others.values())} of {total} ({named}).")
    return found


def _absent(rows: Sequence[ManifestRow], spec: BundleSpec) -> list[str]:
    there = {name for row in rows for name in names_in(row.label, spec.task)}
    absent = [f'"{name}"' for name in spec.classes if name not in there]
    if not absent:
        return []
    return [f"no image of class {', '.join(absent)}: metrics that need every class (the AUC) are not defined."]


def _thumbnails(
    predictions: Predictions, paths: Mapping[str, Path], spec: FeatureSpec, data: DataSettings
) -> dict[str, npt.NDArray[np.uint8]]:
    """Side images of the mistakes that the report shows, by image id."""
    ids = {predictions.rows[row].id for row in confident_mistakes(predictions)}
    accept = None if data.on_warning == "error" else lambda _: None
    return {
        image_id: to_pixels(read_image(paths[image_id], max_pixels=data.max_pixels, accept=accept), spec).side
        for image_id in sorted(ids)
    }
