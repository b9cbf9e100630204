"""Evaluation of a model, shared by `fpt evaluate` and `fpt.evaluate`: on a split of the study, or on other images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from pipeline.loaded_model import lpm_of
from schemas.errors import ManifestError
from schemas.settings import OUTPUTS

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.manifest import Manifest, Split
    from schemas.results import BundleSpec, Metrics, Prediction
    from schemas.settings import Settings
    from schemas.test_time import Adapted, AdaptOptions
    from stages.predict.external import ExternalResult
    from stages.progress import ExternalProgress


def evaluate_split(
    study: Study, split: Split, model: Path | None, output: Path | None, adapt: AdaptOptions | None = None
) -> tuple[Metrics, Adapted | None, Path]:
    """Evaluate a model on one split of its study.

    Args:
        study: With manifest and features.
        split: Rows to evaluate.
        model: Folder of the model; None: that of the study.
        output: Folder of the results; None: `outputs/evaluation` of the study.
        adapt: Adaptation at test time, evaluated next to the model as it is; None: none.

    Returns:
        Metrics without adaptation, those without and with it, and the folder of the results.

    Raises:
        FptError: As `stages.evaluate.evaluator.evaluate` and `stages.evaluate.adapted.evaluate_adapted`.
    """
    from stages.device import set_up
    from stages.evaluate.evaluator import evaluate as run
    from stages.manifest import read_manifest

    bundle = study.outputs / "model" if model is None else model.absolute()
    folder = study.outputs / "evaluation" if output is None else output.absolute()
    files, device = study.files(read_manifest(study.manifest)), set_up(study.settings.compute)
    if adapt is not None:
        _check_adaptable(bundle, adapt)
    metrics = run(files, bundle, folder, split, device=device)
    _keep_settings(bundle, study.settings, folder)
    adapted = None
    if adapt is not None:
        from stages.evaluate.adapted import evaluate_adapted

        adapted = evaluate_adapted(files, bundle, folder, metrics, adapt, device)
    return metrics, adapted, folder


def _check_adaptable(bundle: Path, adapt: AdaptOptions) -> None:
    """Refuse a model that cannot be adapted, before it is evaluated."""
    from stages.test_time.targets import check_adaptable
    from stages.train.bundle import load_bundle

    loaded = load_bundle(bundle)
    check_adaptable(adapt.name, loaded.spec, loaded.network)


def predict_unlabelled(study: Study, model: Path | None) -> tuple[list[Prediction], tuple[str, ...]]:
    """Predict the images of a study that have no label, from cached features.

    Args:
        study: With manifest and features.
        model: Folder of the model; None: that of the study.

    Returns:
        A row per image, and the classes of the model.

    Raises:
        FptError: As `stages.predict.unlabelled.predict_unlabelled`.
    """
    from stages.device import set_up
    from stages.manifest import read_manifest
    from stages.predict.unlabelled import predict_unlabelled as run

    bundle = study.outputs / "model" if model is None else model.absolute()
    files, device = study.files(read_manifest(study.manifest)), set_up(study.settings.compute)
    rows, spec = run(files, bundle, device)
    return rows, spec.classes


@dataclass(frozen=True)
class LabelledImages:
    """Images outside of a study, with labels."""

    folder: Path
    """Folder of the images."""
    labels: Path | None = None
    """Table of the labels; None: a folder per class."""


def evaluate_images(
    params: Path,
    assignments: Sequence[str],
    images: LabelledImages,
    model: Path | None,
    output: Path | None,
    progress: ExternalProgress | None = None,
    adapt: AdaptOptions | None = None,
) -> tuple[ExternalResult, Path]:
    """Evaluate a model on labelled images outside of its study; a study is not needed.

    Args:
        params: Settings of the study; defaults where the file is missing.
        assignments: `key.path=value` overrides.
        images: Images and labels.
        model: Folder of the model; None: `outputs/model` next to `params`.
        output: Folder of the results; None: `outputs/external/NAME` next to `params`.
        progress: Callbacks.
        adapt: Adaptation at test time, evaluated next to the model as it is; None: none.

    Returns:
        The result, and its folder.

    Raises:
        FptError: As `stages.predict.external.evaluate_external`.
    """
    from pipeline.project import cache_root, private_folder, study_files
    from stages.train.bundle_spec import read_spec

    root = params.absolute().parent
    bundle = root / OUTPUTS / "model" if model is None else model.absolute()
    folder = root / OUTPUTS / "external" / images.folder.resolve().name if output is None else output.absolute()
    spec = read_spec(bundle)
    settings = _external_settings(params, assignments, spec, images)
    # Imported late, because they load torch: a missing model is an error at once.
    from stages.device import set_up
    from stages.extract.shard_task import batch_size
    from stages.predict.external import ExternalContext, evaluate_external

    device = set_up(settings.compute)
    result = evaluate_external(
        bundle,
        settings.data,
        folder,
        ExternalContext(
            root=root,
            lpm=lpm_of(spec, settings),
            cache_root=cache_root(root),
            study=_manifest_of(bundle, root),
            device=device,
            batch_size=batch_size(settings.compute, device),
            adapt=adapt,
            files=None if adapt is None else study_files(params, assignments),
            private=private_folder(root),
        ),
        progress,
    )
    _keep_settings(bundle, settings, folder)
    return result, folder


def _external_settings(params: Path, assignments: Sequence[str], spec: BundleSpec, images: LabelledImages) -> Settings:
    """Return the settings of the study, if any, for other images: task and classes are those of the model."""
    from pipeline.params import override, read_optional_params
    from pipeline.scaffold import labels_setting
    from schemas.parse import parse_settings

    base = read_optional_params(params)
    data = base.get("data")
    if isinstance(data, dict):
        # What only the study's own table has.
        own = {"split_column", "site_column", "test_sites", "keep_columns"}
        own |= set() if images.labels is not None else {"group_column"}
        base = {**base, "data": {key: value for key, value in data.items() if key not in own}}
    tree = override(base, assignments)
    data = tree.setdefault("data", {})
    if isinstance(data, dict):
        data["images"] = str(images.folder.absolute())
        data["labels"] = labels_setting(images.labels)
        data.setdefault("task", spec.task)
        data["classes"] = list(spec.classes)
    return parse_settings(tree, source=params.name)


def _manifest_of(bundle: Path, root: Path) -> Manifest | None:
    """Manifest of the study that a bundle lies in, else of the study in `root`."""
    from stages.manifest import read_manifest

    for folder in (*bundle.resolve().parents, root):
        path = folder / OUTPUTS / "manifest" / "manifest.parquet"
        if path.exists():
            try:
                return read_manifest(path)
            except ManifestError as error:
                say(f"{error.state} Images that the model was trained on cannot be detected.")
                return None
    say("The model is in no study: images that it was trained on cannot be detected.")
    return None


def _keep_settings(bundle: Path, settings: Settings, folder: Path) -> None:
    """Store the settings of the model with its evaluation; params.yaml may have changed since."""
    from pipeline.params import write_settings
    from stages.files import atomic_write, read_regular

    trained = bundle / "settings.yaml"
    if trained.exists():
        atomic_write(folder / "settings.yaml", read_regular(trained))
    else:
        write_settings(settings, folder)
