"""Inputs of training and evaluation: rows of the feature store, or images that pass through the LPM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from schemas.data_settings import DataSettings
from schemas.errors import CacheIncompleteError, CacheMismatchError
from schemas.features import ExtractionReceipt, FeatureSpec, LpmInfo
from schemas.manifest import Manifest
from schemas.methods import METHODS
from schemas.rendering import DEFAULT_RENDERING
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.settings import LpmSettings
from schemas.specs import Inputs
from stages.files import sha256_file
from stages.store.memory_rows import RowSource
from stages.store.reader import StoreReader
from stages.store.remote_rows import open_rows
from stages.train.start import start_key

if TYPE_CHECKING:
    from stages.lpm.loading import LoadedLpm


@dataclass(frozen=True)
class StudyFiles:
    """Files of a study that training and evaluation read, and where they are."""

    manifest: Manifest
    """Manifest written by `prepare`."""
    lpm: LpmInfo
    """Shape of the LPM in the settings."""
    receipt: ExtractionReceipt | None
    """Receipt written by `extract`; None before an extraction, which only methods that read images accept."""
    cache_root: Path
    """Folder of all stores."""
    root: Path = Path()
    """Folder of the study, the base of relative paths of images and weights."""
    data: DataSettings = field(default_factory=DataSettings)
    """Folder and size limits of the images, for methods that read them."""
    weights: LpmSettings | None = None
    """Name and weights of the LPM, for methods that adapt it; None: the hub."""
    remote: str | None = None
    """`store.remote` of the settings, relative to the study's folder: read if the cache root lacks the store."""

    @property
    def weights_source(self) -> LpmSettings:
        """Name and weights of the LPM."""
        return self.weights or LpmSettings(name=self.lpm.name)

    def need_receipt(self, images_setting: str = "") -> ExtractionReceipt:
        """Return the receipt.

        Args:
            images_setting: Setting with which the method reads images, for the message; empty: none.

        Raises:
            CacheIncompleteError: If nothing was extracted.
        """
        if self.receipt is None:
            images = f", or train from images (--set {images_setting})" if images_setting else ""
            raise CacheIncompleteError(
                "There is no extraction receipt, and this method reads cached features.",
                repair=f"Run `fpt extract` first{images}.",
            )
        return self.receipt


@dataclass(frozen=True)
class OpenInputs:
    """An open row source, and the spec of its content."""

    source: RowSource
    """Source of the rows."""
    features: FeatureSpec
    """Preprocessing of the images, and spec of the cached features if these are read."""
    key: dict[str, Any]
    """Identifies the content of the source, for checkpoints."""
    lpm: LoadedLpm | None = None
    """The LPM with its weights, for methods that adapt it."""

    @property
    def store(self) -> StoreReader | None:
        """The feature store; None if images are read."""
        return self.source if isinstance(self.source, StoreReader) else None

    @property
    def model(self) -> nn.Module | None:
        """The frozen LPM; None if the method does not run it."""
        return None if self.lpm is None else self.lpm.model

    def close(self) -> None:
        """Close the store."""
        if self.store is not None:
            self.store.close()


def reads_images(settings: ResolvedSettings) -> bool:
    """Return whether the method reads images rather than the feature store under these settings."""
    return "image" in METHODS[settings.method].reads(settings)


def inputs_kind(settings: ResolvedSettings) -> tuple[bool, str | None]:
    """Return what `inputs_key` depends on among settings of one study: whether images are read, and the start."""
    return reads_images(settings), settings.train.start_from


def open_inputs(settings: ResolvedSettings, files: StudyFiles, inputs: Inputs) -> OpenInputs:
    """Open the inputs of a method under these settings.

    Raises:
        CacheIncompleteError: If the store lacks shards.
        CacheMismatchError: If the LPM's weights are not those of the features.
        WeightsError: If the method needs the LPM's weights and they cannot be loaded.
    """
    if "image" in inputs:
        lpm = load_weights(files)
        spec = _image_spec(settings, files, lpm.weights_sha256)
        key = _image_key(spec) | start_key(settings, files.root)
        return OpenInputs(image_rows(files, spec), spec, key, lpm)
    row = METHODS[settings.method]
    receipt = files.need_receipt(row.images_setting)
    loaded = load_weights(files) if row.adapts_lpm else None
    if loaded is not None and loaded.weights_sha256 != receipt.spec.weights_sha256:
        raise CacheMismatchError(
            "The features were extracted with weights of the LPM that differ from lpm.weights.",
            {"weights_sha256": (loaded.weights_sha256, receipt.spec.weights_sha256)},
            "lpm.weights changed after the features were extracted.",
            "Run `fpt extract` with these settings, or revert the change.",
        )
    store = open_rows(files.cache_root, receipt, files.remote)
    return OpenInputs(store, receipt.spec, _store_key(receipt) | start_key(settings, files.root), loaded)


def inputs_key(settings: ResolvedSettings, files: StudyFiles) -> dict[str, Any]:
    """Return the `OpenInputs.key` of a method's inputs under these settings, without opening them.

    Raises:
        CacheMismatchError: If the method reads cached features and nothing was extracted.
        WeightsError: If the method reads images and the LPM's weights cannot be found.
    """
    start = start_key(settings, files.root)
    if not reads_images(settings):
        return _store_key(files.need_receipt(METHODS[settings.method].images_setting)) | start
    from stages.lpm.weights import locate_weights

    digest = sha256_file(locate_weights(files.weights_source, files.root))
    return _image_key(_image_spec(settings, files, digest)) | start


def _store_key(receipt: ExtractionReceipt) -> dict[str, Any]:
    return {"features": receipt.fingerprint, "shards": receipt.shards}


def _image_spec(settings: ResolvedSettings, files: StudyFiles, weights_sha256: str) -> FeatureSpec:
    """Return the preprocessing of images that pass through the LPM in training."""
    spec = feature_spec(settings, files.lpm, weights_sha256)
    if spec.normalisation == "lpm":
        return spec
    from stages.extract.normalisation import training_statistics
    from stages.extract.plan import with_channels

    return with_channels(spec, training_statistics(spec, files.manifest, files.data, files.root, files.cache_root))


def _image_key(spec: FeatureSpec) -> dict[str, Any]:
    chosen_filter = {} if spec.filter is None else {"filter": spec.filter}
    lpm = spec.lpm.model_dump(mode="json")
    rendering = {} if spec.rendering == DEFAULT_RENDERING else {"rendering": spec.rendering.model_dump(mode="json")}
    return {"lpm": lpm, "weights": spec.weights_sha256, "resize": spec.resize, **chosen_filter, **rendering}


@contextmanager
def open_arrays(files: StudyFiles, spec: FeatureSpec, names: frozenset[str]) -> Iterator[RowSource]:
    """Open the images of a study, or the store of its features, for the arrays that a trained model reads.

    Args:
        files: The study.
        spec: Features of the model.
        names: Arrays to be read. Images are opened if `image` is one of them.

    Raises:
        CacheIncompleteError: Nothing was extracted, or the store lacks shards.
        CacheMismatchError: The model was trained on other features than the extracted ones.
        FptError: As `stages.store.remote_rows.open_rows` and `image_rows`.
    """
    if "image" in names:
        yield image_rows(files, spec)
        return
    receipt = files.need_receipt()
    if differing := spec.differing(receipt.spec):
        raise CacheMismatchError(
            "The model was trained on other features than those that are extracted.",
            differing,
            "The features were extracted again after the model was trained, with other settings.",
            "Run `fpt train` again, or extract the features of the model: `fpt extract` with its settings.",
        )
    with closing(open_rows(files.cache_root, receipt, files.remote)) as store:
        yield store


def image_rows(files: StudyFiles, spec: FeatureSpec) -> RowSource:
    """Return the images of a study as a row source.

    Raises:
        DataError: If the folder of the images is missing.
    """
    # Imported late: training on cached features needs neither Pillow nor the code of the LPM.
    from stages.extract.image_rows import ImageRows
    from stages.prepare.class_folders import images_folder

    return ImageRows(files.manifest, images_folder(files.data, files.root), files.data, spec)


def load_weights(files: StudyFiles) -> LoadedLpm:
    """Load the frozen LPM of a study on the CPU."""
    from stages.lpm.loading import load_lpm

    return load_lpm(files.weights_source, files.lpm.image_size, files.root)
