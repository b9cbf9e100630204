"""A trained model in memory: predict images from files, arrays and PIL images, as often as needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from pipeline.console import quiet, say
from pipeline.params import PARAMS, as_assignments, override, read_params
from pipeline.plugins import load_plugins
from schemas.errors import DataError, FptError, ProjectError, UnreadableImagesError
from schemas.parse import parse_settings
from schemas.results import ADAPTED, PROBABILITY, BundleSpec, Prediction
from schemas.settings import LpmSettings, Settings
from schemas.text import counted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from PIL.Image import Image

    from pipeline.project import Study
    from schemas.tasks import Task
    from schemas.test_time import AdaptOptions
    from stages.predict.classifier import Classifier
    from stages.progress import Progress

ImageLike: TypeAlias = "str | os.PathLike[str] | npt.NDArray[np.uint8] | Image"
"""A file, folder, pattern, list or table as for `fpt predict`; an array of shape (H, W, 3) or (H, W); a PIL image."""


@dataclass(frozen=True)
class Predictions(Sequence[Prediction]):
    """Predictions of images, in the order in which the images were given: a sequence of rows, and a table."""

    rows: tuple[Prediction, ...]
    """One per image."""
    classes: tuple[str, ...]
    """Class names of the model, in the order of the probabilities."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> Predictions: ...
    def __getitem__(self, index: int | slice) -> Prediction | Predictions:
        return Predictions(self.rows[index], self.classes) if isinstance(index, slice) else self.rows[index]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.rows)

    def __str__(self) -> str:
        from stages.predict import predictions_csv

        return predictions_csv(self.rows, "\t").removesuffix("\n")

    def __repr__(self) -> str:
        return f"<{counted(len(self), 'prediction')}>\n{self}"

    @property
    def predicted(self) -> list[str | None]:
        """Predicted class per image; with several labels per image joined by `|`; None for an unusable image."""
        return [row.predicted for row in self.rows]

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """(n, C) probabilities in the order of `classes`; a row of NaN for an unusable image."""
        import numpy as np

        missing = dict.fromkeys(self.classes, float("nan"))
        table = [[(row.probabilities or missing)[name] for name in self.classes] for row in self.rows]
        return np.array(table, dtype=np.float64).reshape(len(self.rows), len(self.classes))

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of each image that cannot be used."""
        return [(row.path, row.error) for row in self.rows if row.error is not None]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return columns of the table that `fpt predict` writes: path, predicted, p_<class>, error."""
        probabilities = self.probabilities
        adapted: dict[str, list[Any]] = {}
        if any(row.adapted_probabilities is not None for row in self.rows):
            adapted[f"{ADAPTED}predicted"] = [row.adapted_predicted for row in self.rows]
            for name in self.classes:
                own = [(row.adapted_probabilities or {}).get(name, float("nan")) for row in self.rows]
                adapted[f"{ADAPTED}{PROBABILITY}{name}"] = own
        return {
            "path": [row.path for row in self.rows],
            "predicted": self.predicted,
            **{f"{PROBABILITY}{name}": probabilities[:, at].tolist() for at, name in enumerate(self.classes)},
            **adapted,
            "error": [row.error for row in self.rows],
        }

    def to_pandas(self) -> pd.DataFrame:
        """Return the columns of `to_dict` as a data frame.

        Raises:
            ImportError: pandas is not installed; fpt does not need it.
        """
        import pandas as pd

        return pd.DataFrame(self.to_dict())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the table as .csv, .tsv, .parquet or .xlsx, by the suffix.

        Raises:
            SettingsError: The suffix is of no format.
            StorageError: The file cannot be written.
        """
        from stages.predict import write_predictions_table

        write_predictions_table(self.rows, Path(path))


class Model:
    """A trained model with the LPM that it needs, both loaded once; made by `fpt.load`."""

    def __init__(self, classifier: Classifier, settings: Settings, root: Path, folder: Path) -> None:
        """Keep what a prediction needs.

        Args:
            classifier: Bundle and LPM on their device.
            settings: Column of paths in tables, batch size.
            root: Folder that relative paths of tables start at.
            folder: Folder of the model.
        """
        self._classifier, self._settings, self._root, self._folder = classifier, settings, root, folder

    def __repr__(self) -> str:
        spec = self.spec
        return f"<fpt.Model {spec.network.method} on {spec.features.lpm.name}: {', '.join(spec.classes)}>"

    @property
    def spec(self) -> BundleSpec:
        """Everything about the model except its weights."""
        return self._classifier.bundle.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities."""
        return self.spec.classes

    @property
    def task(self) -> Task:
        """Kind of the labels: multiclass, multilabel or ordinal."""
        return self.spec.task

    @quiet
    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        on_error: Literal["raise", "keep"] = "raise",
        progress: Progress | None = None,
        adapt: str | None = None,
        adapt_batch: int = 64,
        adapt_seed: int = 2020,
    ) -> Predictions:
        """Predict the class of each image.

        Args:
            images: One image or several, of any kind and mixed. Paths may be files, folders, patterns, lists
                (`@list.txt`) or tables with paths, as for `fpt predict`. Arrays are uint8, (H, W, 3) in RGB order or
                (H, W) grey; (N, H, W, 3) is a batch.
            on_error: What to do with images that cannot be used: "raise" an error that lists all of them, or "keep" a
                row with the reason.
            progress: Called after each batch with (done, total) images.
            adapt: Adaptation at test time, "foa", "foa-shift" or "vptta": predictions with it are added as
                `adapted_predicted` and `adapted_probabilities` of each row. None: no adaptation.
            adapt_batch: Images of a batch of foa and foa-shift.
            adapt_seed: Seed of the order of the images, and of the search of foa.

        Raises:
            DataError: A folder or pattern has no images, or an array is not an image.
            UnreadableImagesError: Images cannot be used, with `on_error="raise"`.
            EvaluationError: The outputs of the model are not finite.
        """
        from pipeline.adapt_options import adapt_options

        options = adapt_options(adapt, adapt_batch, adapt_seed)
        names, sources = self._sources(images)
        predictions = self._predict(names, sources, progress, options)
        if on_error == "raise" and predictions.failures:
            raise UnreadableImagesError(
                predictions.failures, 'Leave them out, or pass on_error="keep" for rows with the reason.'
            )
        return predictions

    def predict_files(
        self, files: Sequence[Path], progress: Progress | None = None, adapt: AdaptOptions | None = None
    ) -> Predictions:
        """Predict files, each of them as it is named; those that cannot be used get a row with the reason."""
        return self._predict([str(file) for file in files], files, progress, adapt)

    def _predict(
        self,
        names: Sequence[str],
        sources: Sequence[Path | Image],
        progress: Progress | None,
        adapt: AdaptOptions | None,
    ) -> Predictions:
        from stages.extract.shard_task import batch_size
        from stages.predict.classifier import as_row

        size = batch_size(self._settings.compute, self._classifier.device)
        if adapt is not None:
            return self._adapted(names, sources, progress, adapt, size)
        found = self._classifier.probabilities(sources, size, progress)
        return Predictions(
            tuple(as_row(name, p, self.spec) for name, p in zip(names, found, strict=True)), self.classes
        )

    def _adapted(
        self,
        names: Sequence[str],
        sources: Sequence[Path | Image],
        progress: Progress | None,
        adapt: AdaptOptions,
        size: int,
    ) -> Predictions:
        from pipeline.project import study_files
        from schemas.errors import ImageError
        from stages.predict.adapted import adapted_probabilities
        from stages.predict.classifier import as_row
        from stages.test_time.stream import AdaptContext

        lpm = lpm_of(self.spec, self._settings)
        weights = [] if lpm.weights == "hub" else [f"lpm.weights={lpm.weights}"]
        place = AdaptContext(self._folder, self._root, lpm, study_files(self._root / PARAMS, weights))
        found = adapted_probabilities(self._classifier, sources, adapt, place, size, progress)
        rows = []
        for name, one in zip(names, found, strict=True):
            plain, adapted = (one, None) if isinstance(one, ImageError) else one
            rows.append(as_row(name, plain, self.spec, adapted))
        return Predictions(tuple(rows), self.classes)

    def _sources(self, images: ImageLike | Iterable[ImageLike]) -> tuple[list[str], list[Path | Image]]:
        """Name and source of every image; images in memory are named by their position."""
        from PIL import Image

        from stages.predict.inputs import find_images

        names: list[str] = []
        sources: list[Path | Image.Image] = []
        for position, image in enumerate(_listed(images)):
            if isinstance(image, str | os.PathLike):
                inputs = find_images([os.fspath(image)], self._settings.data, self._root)
                for note in inputs.notes:
                    say(note)
                names += [str(path) for path in inputs.images]
                sources += inputs.images
            else:
                name = f"images[{position}]"
                names.append(name)
                sources.append(image if isinstance(image, Image.Image) else _from_array(image, name))
        return names, sources


@quiet
def load(
    model: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> Model:
    """Load a trained model and the LPM that it needs.

    Args:
        model: Folder of the model, such as `my-study/outputs/model`.
        weights: File of the LPM's weights, or "hub"; None: as in training (`settings.yaml` in the folder). A relative
            path in that file starts at the study that contains the model.
        device: "auto", "cpu", "cuda" or "mps".
        batch_size: Images per forward pass; None: by the device.

    Raises:
        BundleError: The model is missing or damaged.
        WeightsError: The weights are missing, or are not those of the training.
        CacheMismatchError: The LPM has another shape or preprocessing than in training.
        SettingsError: The device is not available.
    """
    load_plugins()
    folder = Path(model).expanduser()
    root = next((place for place in folder.absolute().parents if (place / PARAMS).is_file()), folder.absolute())
    changes = {"compute": {"device": device, "extract_batch_size": "auto" if batch_size is None else batch_size}}
    if weights is not None:
        changes["lpm"] = {"weights": _named(weights)}
    settings = parse_settings(override(_trained_with(folder), as_assignments(changes)), source="fpt.load")
    return load_with(folder, settings, root)


def load_study_model(study: Study) -> Model:
    """Load the model of a study, with the settings of the study."""
    return load_with(study.outputs / "model", study.settings, study.root)


def load_with(folder: Path, settings: Settings, root: Path) -> Model:
    """Load a model by settings: weights of the LPM, device, batch size, limits of an image's size."""
    from stages.train.bundle_spec import read_spec

    # Before torch is imported: a missing model is an error at once.
    read_spec(folder)
    from stages.device import set_up
    from stages.predict.classifier import check_task, load_classifier
    from stages.train.bundle import load_bundle

    bundle = load_bundle(folder, set_up(settings.compute))
    check_task(bundle.spec, settings.data)
    classifier = load_classifier(bundle, lpm_of(bundle.spec, settings), root, settings.data)
    return Model(classifier, settings, root, folder.absolute())


def lpm_of(spec: BundleSpec, settings: Settings) -> LpmSettings:
    """The LPM that a bundle needs, with its weights where the settings have them.

    The bundle has its name, of a `local-dir:` only the content: there the settings name the folder.
    """
    name = spec.features.lpm.name
    return settings.lpm if name.startswith("local-dir:") else LpmSettings(name=name, weights=settings.lpm.weights)


def _trained_with(folder: Path) -> dict[str, Any]:
    """Settings stored with a model, without those of the training machine; empty if they are missing or invalid."""
    path = folder / "settings.yaml"
    try:
        raw = {key: value for key, value in read_params(path).items() if key not in ("compute", "cluster", "store")}
        parse_settings(raw)
    except ProjectError:
        return {}
    except FptError as error:
        say(f"{path} is not used: {error.state}")
        return {}
    return raw


def _named(weights: str | os.PathLike[str]) -> str:
    return "hub" if weights == "hub" else str(Path(weights).expanduser().absolute())


def _listed(images: ImageLike | Iterable[ImageLike]) -> list[Any]:
    from PIL import Image

    single = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) in (2, 3)
    return [images] if single else list(images)  # type: ignore[arg-type]


def _from_array(array: Any, name: str) -> Image:
    import numpy as np
    from PIL import Image

    if not isinstance(array, np.ndarray):
        raise DataError(
            f"{name} is of type {type(array).__name__}.",
            "Images are paths, numpy arrays or PIL images.",
            "Convert it, such as with numpy.asarray.",
        )
    grey, colour = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (grey or colour) or not array.size:
        raise DataError(
            f"{name} is an array of {array.dtype} with the shape {array.shape}.",
            "Arrays are uint8, (H, W, 3) in RGB order or (H, W) grey.",
            "Scale and convert it, or save it as PNG or TIFF, of which 16-bit grey is read as well.",
        )
    return Image.fromarray(np.ascontiguousarray(array))
