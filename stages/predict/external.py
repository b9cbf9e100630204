"""Evaluate a bundle on labelled images outside of its study, with cached features if available."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from schemas.data_settings import DataSettings
from schemas.errors import DataError, ImageError, UnreadableImagesError
from schemas.features import FeatureSpec
from schemas.manifest import SPLITS, Manifest, ManifestRow
from schemas.methods import model_inputs
from schemas.rendering import Rendering
from schemas.results import BundleSpec, Metrics
from schemas.settings import LpmSettings
from schemas.tasks import names_in, written
from schemas.test_time import Adapted, AdaptOptions
from schemas.text import counted
from stages.evaluate.adapted import write_adapted
from stages.evaluate.evaluator import evaluated_model, probabilities, write_evaluation
from stages.evaluate.predictions import Predictions
from stages.evaluate.report import confident_mistakes, render_report
from stages.evaluate.scoring import carried_over, score
from stages.extract.features import to_pixels
from stages.fitted_images import count_fitted
from stages.images import read_image
from stages.lpm.matching import load_matching
from stages.methods.batch import IMAGE, array_names
from stages.predict.adapted import adapted_probabilities
from stages.predict.classifier import check_task, load_classifier
from stages.prepare import QUARANTINE_FILE
from stages.prepare.dataset_listing import Listing, check_listing, read_listing
from stages.prepare.error_text import did_you_mean, listed
from stages.prepare.exports import write_quarantine
from stages.prepare.image_digests import Digests, digest_images
from stages.prepare.image_files import skipped_lines
from stages.prepare.image_record import ReadLimits
from stages.prepare.label_checks import check_conflicts
from stages.prepare.label_table import check_files
from stages.prepare.labelled_image import LabelledImage
from stages.progress import ExternalProgress, Progress
from stages.store.index import refresh_index
from stages.store.layout import open_store_layout
from stages.store.reader import StoreReader
from stages.study_images import accepted
from stages.test_time.stream import AdaptContext, check_count, open_for, stream_logits
from stages.test_time.targets import check_adaptable, runs_lpm
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import source_logits
from stages.train.inputs import StudyFiles

Probabilities = dict[str, npt.NDArray[np.float32]]
"""Image id -> (C,) probabilities."""


@dataclass(frozen=True)
class ExternalResult:
    """Result of an external evaluation."""

    metrics: Metrics
    """Metrics of all usable images."""
    cached: int
    """Number of distinct images whose features were cached."""
    computed: int
    """Number of distinct images on which the LPM ran."""
    quarantined: int
    """Number of images and empty class folders that were set aside."""
    adapted: Adapted | None
    """Metrics without and with adaptation; None without `ExternalContext.adapt`."""
    notes: tuple[str, ...]
    """Choices made from the header or the layout, and skipped files."""


@dataclass(frozen=True)
class ExternalContext:
    """What an external evaluation needs apart from the model and the images."""

    root: Path
    """Folder where relative paths of the settings start."""
    lpm: LpmSettings | None
    """Location of the LPM's weights; None: the hub. Loaded where features are missing, or where the model runs upper
    blocks of it."""
    cache_root: Path
    """Folder of all stores."""
    study: Manifest | None = None
    """Manifest of the bundle's study, to detect images that the model was trained on; None: unknown."""
    device: torch.device | str = "cpu"
    """Device of LPM and side network."""
    batch_size: int = 4
    """Images per forward pass of the LPM."""
    adapt: AdaptOptions | None = None
    """Adaptation at test time, in addition to the evaluation without it; None: no adaptation."""
    files: StudyFiles | None = None
    """Study of the model, for statistics of source images that the bundle lacks; None: unknown."""
    private: Path | None = None
    """Folder with the key of the study, so that patients of DICOM files have its pseudonyms; None: new ones."""


def evaluate_external(
    bundle_dir: Path,
    data: DataSettings,
    output: Path,
    context: ExternalContext,
    progress: ExternalProgress | None = None,
) -> ExternalResult:
    """Evaluate a model on other images and write the files of `stages.evaluate.evaluator.evaluate`.

    Also writes `quarantine.csv` if images were set aside (`data.on_error`). Nothing is written to the cache.

    Args:
        bundle_dir: From `train`.
        data: Images and labels, as for `prepare`; splits are ignored.
        output: Output folder.
        context: Study, cache, LPM and device.
        progress: Callbacks.

    Raises:
        FptError: As `prepare` and `predict`; also DataError if a label is not one of the bundle's classes.
    """
    progress = progress or ExternalProgress()
    bundle = load_bundle(bundle_dir, context.device)
    spec = bundle.spec
    check_task(spec, data)
    # What belongs to the splits of the study means nothing here.
    study_only = {"split_column": None, "site_column": None, "test_sites": None, "keep_columns": ()}
    data = data.model_copy(update={"task": spec.task, **study_only})
    listing = _list_labelled(data, context, spec)
    digests = _digests(listing, data, spec.features.rendering, progress.reading)
    rows = _rows(listing.items, digests, spec)
    paths = {row.id: listing.images / row.path for row in reversed(rows)}
    if context.adapt is not None:
        check_adaptable(context.adapt.name, spec, bundle.network)
    loaded = _Source(bundle, data, context)
    probability_of, cached = loaded.probabilities(paths, progress.predicting)
    p = np.stack([probability_of[row.id] for row in rows])
    predictions = Predictions(spec.classes, rows, p, evaluated_model(spec), spec.task, listing.unit)
    metrics = score(predictions, (*_overlap(rows, spec, context.study), *_absent(rows, spec)))
    manifest = Manifest(classes=spec.classes, rows=rows, task=spec.task, unit=listing.unit)
    report = render_report(
        metrics,
        predictions,
        manifest,
        spec,
        thumbnails=_thumbnails(predictions, paths, spec.features, data),
        train_dir=bundle_dir.parent / "train",
    )
    write_evaluation(predictions, metrics, report, output)
    adapted = None
    if context.adapt is not None:
        adapted_of = loaded.adapted(paths, bundle_dir, context.adapt)
        again = np.stack([adapted_of[row.id] for row in rows])
        adapted = write_adapted(predictions, again, manifest, spec, output, metrics, context.adapt)
    aside = listing.set_aside()
    write_quarantine(aside, listing.items, digests.failures, output / QUARANTINE_FILE)
    without = counted(len(listing.unlabelled), "image")
    unlabelled = [f"{without} without a label, not evaluated (data.unlabelled: allow)."] if listing.unlabelled else []
    notes = (*listing.notes, *unlabelled, *skipped_lines(listing.skipped, listing.images))
    return ExternalResult(metrics, cached, len(paths) - cached, len(aside) + len(digests.failures), adapted, notes)


def _list_labelled(data: DataSettings, context: ExternalContext, spec: BundleSpec) -> Listing:
    """List the images, and check that the model was trained on their labels."""
    listing = read_listing(data, context.root, context.private)
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
    """Refuse missing label columns: without one it is unknown whether an image has the label."""
    missing = [name for name in spec.classes if name not in columns]
    if missing:
        raise DataError(
            f"data.label_columns lacks {counted(len(missing), 'label')} of the model.",
            listed(map(repr, missing)),
            "Add these columns, with 0 or 1 for each image.",
        )


def _digests(listing: Listing, data: DataSettings, rendering: Rendering, progress: Progress | None) -> Digests:
    if data.labels_file is not None and data.on_error == "fail":
        check_files(listing.items, listing.images, data.labels_file)
    digests = digest_images(listing.items, listing.images, ReadLimits.of(data, rendering), progress)
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


@dataclass(frozen=True)
class _Source:
    """Bundle, cache and LPM, from which probabilities of images are computed."""

    bundle: Bundle
    data: DataSettings
    context: ExternalContext

    def probabilities(self, paths: Mapping[str, Path], progress: Progress | None) -> tuple[Probabilities, int]:
        """Compute image id -> (C,) probabilities, and the number of images with cached features."""
        probability_of = self._from_cache(list(paths))
        missing = [image_id for image_id in paths if image_id not in probability_of]
        if missing:
            classifier = load_classifier(self.bundle, self.context.lpm, self.context.root, self.data)
            images = [paths[image_id] for image_id in missing]
            computed = classifier.probabilities(images, self.context.batch_size, progress)
            for image_id, p in zip(missing, computed, strict=True):
                if isinstance(p, ImageError):  # Unexpected, since the image was readable a moment ago.
                    raise p
                probability_of[image_id] = p
        return probability_of, len(paths) - len(missing)

    def adapted(self, paths: Mapping[str, Path], bundle_dir: Path, options: AdaptOptions) -> Probabilities:
        """Compute image id -> (C,) probabilities with adaptation; no image is opened if cached features are enough."""
        spec, ids = self.bundle.spec, list(paths)
        place = AdaptContext(bundle_dir, self.context.root, self.context.lpm, self.context.files)
        with _local_store(self.context.cache_root, spec.features) as store:
            names = array_names(model_inputs(spec.network))
            cached = store is not None and IMAGE not in names and bool((store.find(ids) >= 0).all())
            if store is not None and cached and not runs_lpm(options.name, spec):
                check_count(options, len(ids))
                logits = stream_logits(open_for(self.bundle, options, place), self.bundle, store, ids, options)
                return dict(zip(ids, probabilities(logits, spec.task), strict=True))
        classifier = load_classifier(self.bundle, self.context.lpm, self.context.root, self.data)
        both = adapted_probabilities(classifier, list(paths.values()), options, place, self.context.batch_size)
        found: Probabilities = {}
        for image_id, one in zip(ids, both, strict=True):
            if isinstance(one, ImageError):  # Unexpected, since the image was readable a moment ago.
                raise one
            found[image_id] = one[1]
        return found

    def _from_cache(self, ids: list[str]) -> Probabilities:
        spec = self.bundle.spec
        if "image" in model_inputs(spec.network):
            return {}
        with _local_store(self.context.cache_root, spec.features) as store:
            if store is None:
                return {}
            cached = [ids[index] for index in np.flatnonzero(store.find(ids) >= 0).tolist()]
            if not cached:
                return {}
            if self.bundle.network.needs_lpm:
                lpm = load_matching(spec.features, self.context.lpm, self.context.root, self.bundle.device)
                self.bundle.network.use_lpm(lpm.model)
            return dict(zip(cached, probabilities(source_logits(self.bundle, store, cached), spec.task), strict=True))


@contextmanager
def _local_store(cache_root: Path, spec: FeatureSpec) -> Iterator[StoreReader | None]:
    """Open the finished shards of the local store of these features; None if the store does not exist."""
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
    """Warn of images that are also in the study or trained the model before, by their content."""
    carried = 0 if spec.start is None else count_fitted(spec.start.fitted_images, [row.id for row in rows])
    earlier = [carried_over(carried, len(rows))] if carried else []
    if study is None:
        return earlier
    split_of = {row.id: row.split for row in study.rows}
    counts = Counter(split_of[row.id] for row in rows if row.id in split_of)
    trained = sum(counts[split] for split in spec.fitted_splits)
    others = {split: counts[split] for split in SPLITS if counts[split] and split not in spec.fitted_splits}
    total = counted(len(rows), "image")
    warnings = earlier
    if trained:
        warnings.append(f"the model was trained on {trained} of {total}; this is not a test result.")
    if others:
        by_split = ", ".join(f"{count} {split}" for split, count in others.items())
        warnings.append(f"already in the study of the model: {sum(others.values())} of {total} ({by_split}).")
    return warnings


def _absent(rows: Sequence[ManifestRow], spec: BundleSpec) -> list[str]:
    present = {name for row in rows for name in names_in(row.label, spec.task)}
    absent = [f'"{name}"' for name in spec.classes if name not in present]
    if not absent:
        return []
    return [f"no image of class {', '.join(absent)}: metrics that need every class (the AUC) are not defined."]


def _thumbnails(
    predictions: Predictions, paths: Mapping[str, Path], spec: FeatureSpec, data: DataSettings
) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the side images of the misclassified rows in the report, by image id."""
    ids = {predictions.rows[row].id for row in confident_mistakes(predictions)}

    def side(path: Path) -> npt.NDArray[np.uint8]:
        image = read_image(path, max_pixels=data.max_pixels, accept=accepted(data), rendering=spec.rendering)
        return to_pixels(image, spec).side

    return {image_id: side(paths[image_id]) for image_id in sorted(ids)}
