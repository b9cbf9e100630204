"""`report.html`: one file for people, with figures and thumbnails inside it, readable on a screen and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support

from schemas.features import FeatureSpec
from schemas.federated import FederatedResult
from schemas.manifest import SPLITS, Manifest, Split
from schemas.methods import METHODS, model_inputs
from schemas.resolved import ResolvedTrain
from schemas.results import BundleSpec, Metrics
from schemas.specs import Inputs
from schemas.text import images_of
from stages.evaluate.curves import roc_curves
from stages.evaluate.federated import federated_text
from stages.evaluate.figures import draw_curves, draw_reliability, draw_roc, group_curves, read_training_curves
from stages.evaluate.pages import page_template
from stages.evaluate.pictures import map_figures, thumbnail_uri
from stages.evaluate.predictions import Predictions
from stages.evaluate.reliability import Reliability, reliability
from stages.evaluate.wording import metric_rows, mistake, number, quoted, sureness
from stages.methods.base import method_of
from stages.tasks import hits

MISTAKES = 12
"""Mistakes that the report shows."""

ROC_CURVES = 8
"""One-vs-rest curves that one figure can still show."""


def confident_mistakes(predictions: Predictions, limit: int = MISTAKES) -> list[int]:
    """Positions of the misclassified rows, the most confident first; ties in the order of their paths."""
    wrong, sure = np.flatnonzero(~hits(predictions.labels, predictions.predicted)), sureness(predictions)
    return sorted(wrong.tolist(), key=lambda row: (-float(sure[row]), predictions.rows[row].path))[:limit]


def render_report(
    metrics: Metrics,
    predictions: Predictions,
    manifest: Manifest,
    spec: BundleSpec,
    *,
    thumbnails: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    maps: Mapping[str, npt.NDArray[np.float32]] | None = None,
    train_dir: Path | None = None,
    federated: FederatedResult | None = None,
) -> str:
    """The report as one HTML text without a script and without a reference to another file.

    Args:
        metrics: Of these predictions.
        predictions: The evaluated rows.
        manifest: All rows of the study, for the table of the data set; of external images these images.
        spec: Of the evaluated bundle.
        thumbnails: Image id -> (3, S, S) uint8, for mistakes and maps; those without one are shown as text.
        maps: What the model shows of the rows `mapped_rows`, (rows, blocks, gh, gw) by name.
        train_dir: DVCLive's folder of the training run; None or a folder without metrics: no training curves.
        federated: Of a model of federated training.
    """
    labels, probabilities = predictions.labels, predictions.probabilities.astype(np.float64)
    classes = predictions.classes
    roc, calibration = roc_curves(labels, probabilities, classes), reliability(labels, probabilities)
    template = page_template(files("stages.evaluate").joinpath("report.html.j2").read_text(encoding="utf-8"))
    mistakes = confident_mistakes(predictions)
    total = int((~hits(labels, predictions.predicted)).sum())
    several = predictions.task == "multilabel"
    splits: tuple[Split, ...] = ("external",) if metrics.split == "external" else SPLITS
    return template.render(
        title=f"{METHODS[spec.network.method].title} on {spec.features.lpm.name}",
        evaluated=_evaluated(metrics),
        external=metrics.split == "external",
        metrics=metrics,
        classes=classes,
        table=metric_rows(metrics),
        several=several,
        per_class=_per_class(metrics, predictions),
        roc_figure=draw_roc(roc, metrics.auc_per_class, metrics.auc, ROC_CURVES) if roc.classes else None,
        roc_alt=_roc_alt(metrics),
        roc_note=_roc_note(metrics),
        reliability_figure=draw_reliability(
            calibration, "Share that has the label" if several else "Share that is right"
        ),
        reliability_alt=_reliability_alt(calibration, "pairs of image and label" if several else "images"),
        mistakes=[_mistake(predictions, row, thumbnails or {}) for row in mistakes],
        mistakes_note=_mistakes_note(len(mistakes), total, several),
        reliability_note=_reliability_note(several),
        maps=map_figures(maps or {}, predictions, thumbnails or {}),
        training=_training(train_dir, spec.best_epoch),
        splits=splits,
        data=_data(manifest, splits),
        recipe=_recipe(spec, federated),
    )


def _mistakes_note(shown: int, total: int, several: bool) -> str:
    order = (
        "predicted labels, then the true ones and the most confident error."
        if several
        else "predicted class and its probability, then the true class and its probability."
    )
    return f"{shown} of {total} misclassified images, the most confident first: {order}"


def _reliability_note(several: bool) -> str:
    if several:
        return (
            "For every image and label: predicted probability against observed frequency. At the foot, the number of "
            "pairs of image and label in each dot. Below the diagonal: over-confident."
        )
    return (
        "Confidence is the highest probability of an image. At the foot, the number of images in each dot. Below the "
        "diagonal: over-confident."
    )


def _evaluated(metrics: Metrics) -> str:
    where = "images outside of the study" if metrics.split == "external" else f"the {metrics.split} split"
    counts = images_of(metrics.images, metrics.groups, metrics.unit)
    return f"Evaluated on {where}: {counts}, {len(metrics.confusion)} classes."


def _per_class(metrics: Metrics, predictions: Predictions) -> list[dict[str, str]]:
    indices = list(range(len(predictions.classes)))
    precision, recall, _, support = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=indices, zero_division=np.nan
    )
    return [
        {
            "name": quoted(name),
            "images": f"{int(support[index]):,}",
            "auc": number(metrics.auc_per_class[name]),
            "recall": number(None if np.isnan(recall[index]) else float(recall[index])),
            "precision": number(None if np.isnan(precision[index]) else float(precision[index])),
        }
        for index, name in zip(indices, predictions.classes, strict=True)
    ]


def _reliability_alt(curve: Reliability, what: str) -> str:
    return "Reliability curve: " + "; ".join(
        f"{rows} {what} of mean confidence {confidence:.2f} are right in {share:.0%}"
        for confidence, share, rows in zip(curve.confidence, curve.accuracy, curve.rows, strict=True)
    )


def _roc_alt(metrics: Metrics) -> str:
    aucs = ", ".join(f"{quoted(name)} {number(value)}" for name, value in metrics.auc_per_class.items())
    return f"ROC curves. Area under the curve, one-vs-rest: {aucs}"


def _roc_note(metrics: Metrics) -> str:
    names = list(metrics.auc_per_class)
    if len(names) == 2 and metrics.task != "multilabel":
        return f"Class {quoted(names[1])} against class {quoted(names[0])}; the figure in the legend is the AUC."
    shown = f"The {ROC_CURVES} classes with the lowest AUC. " if len(names) > ROC_CURVES else ""
    what = (
        "Images with each label against those without"
        if metrics.task == "multilabel"
        else "Each class against all others"
    )
    return f"{shown}{what}; figures in the legend are AUCs."


def _mistake(
    predictions: Predictions, row: int, thumbnails: Mapping[str, npt.NDArray[np.uint8]]
) -> dict[str, str | None]:
    item = predictions.rows[row]
    pixels = thumbnails.get(item.id)
    image = None if pixels is None else thumbnail_uri(pixels)
    return {"path": item.path, "image": image, **mistake(predictions, row)}


def _training(train_dir: Path | None, best_epoch: int) -> list[dict[str, str]]:
    if train_dir is None:
        return []
    figures = []
    for title, group in group_curves(read_training_curves(train_dir)):
        last = ", ".join(f"{name} {points[-1, 1]:.3f}" for name, points in group.items())
        alt = f"{title} by epoch. Last values: {last}. The weights of epoch {best_epoch} are kept."
        figures.append({"svg": draw_curves(group, best_epoch, title), "alt": alt})
    return figures


def _data(manifest: Manifest, splits: Sequence[Split]) -> list[dict[str, Any]]:
    counts = {name: dict.fromkeys(splits, 0) for name in manifest.classes}
    for row in manifest.rows:
        for name in manifest.names(row):
            counts[name][row.split] += 1
    columns = {quoted(name): list(by_split.values()) for name, by_split in counts.items()}
    whole = "all images" if manifest.task == "multilabel" else "all classes"
    columns[whole] = [sum(row.split == split for row in manifest.rows) for split in splits]
    return [{"name": name, "counts": column} for name, column in columns.items()]


def _recipe(spec: BundleSpec, federated: FederatedResult | None) -> Sequence[tuple[str, str]]:
    features, lpm, inputs = spec.features, spec.features.lpm, model_inputs(spec.network)
    tokens = "" if lpm.map_widths else f", {lpm.tokens:,} tokens"
    use = "fine-tuned" if METHODS[spec.network.method].adapts_lpm else "frozen"
    return (
        ("Method", METHODS[spec.network.method].title),
        ("LPM", f"{lpm.name}, {use}: {lpm.architecture}"),
        ("LPM weights, sha256", features.weights_sha256),
        ("Input of the LPM", f"{lpm.image_size} x {lpm.image_size} pixels{tokens}"),
        *_features(features, inputs),
        ("Learnable parameters", f"{spec.learnable:,}"),
        *_model(spec),
        *(() if federated is None else (("Federated", federated_text(federated)),)),
        ("Task", spec.task),
        ("Class weights", str(spec.train.class_weights)),
        ("Model, sha256", spec.weights_sha256),
    )


def _features(features: FeatureSpec, inputs: Inputs) -> Sequence[tuple[str, str]]:
    """The cached features that the model reads; none where it reads images."""
    rows: list[tuple[str, str]] = []
    # A store without cached tokens has statistics of all tokens only.
    if features.layers and inputs & {"tokens", "statistics"}:
        rows += [
            ("Tapped blocks, from 0", ", ".join(str(layer) for layer in features.layers)),
            ("Kept tokens", f"{features.kept} per head and block, {features.importance.replace('_', ' ')} importance"),
        ]
    if inputs & {"tokens", "statistics", "hidden"}:
        rows.append(("Type of the features", features.dtype))
    return rows if "image" in inputs else [*rows, ("Feature fingerprint", features.fingerprint)]


def _loss(spec: BundleSpec) -> str:
    train = spec.train
    parts = [f"focal, gamma {train.focal_gamma:g}" if train.loss == "focal" else "cross-entropy"]
    parts += [f"smoothing {train.label_smoothing:g}"] if train.label_smoothing else []
    parts += [f"{train.kappa_weight:g} of a quadratic-kappa term"] if spec.task == "ordinal" else []
    return ", ".join(parts)


def _start(spec: BundleSpec) -> Sequence[tuple[str, str]]:
    if spec.start is None:
        return ()
    size, weights = spec.start.image_size, spec.start.weights_sha256[:12]
    return (("Training started from", f"a model at {size} x {size} pixels, weights {weights}"),)


def _optimizer(train: ResolvedTrain) -> str:
    adam = train.optimizer.endswith("adamw")
    name = "AdamW" if adam else f"SGD with momentum {train.momentum:g}"
    if train.extrapolates:
        extrapolation = train.extrapolation
        direction = "gradient" if extrapolation.direction == "gradient" else "preconditioned gradient"
        name += f", {extrapolation.workers} workers, each at {extrapolation.rate:g} rates times its last {direction}"
    return f"{name}, learning rate {train.lr:g} to zero by a cosine, weight decay {train.weight_decay:g}"


def _model(spec: BundleSpec) -> Sequence[tuple[str, str]]:
    """What only this kind of model has."""
    network, train, augment = spec.network, spec.train, spec.train.augment
    details = method_of(network.method).describe(network)
    if METHODS[network.method].closed_form:
        return (*details, ("Validation AUC", number(spec.val_auc)))
    loop = (
        *_start(spec),
        ("Optimiser", _optimizer(train)),
        (
            "Training",
            f"{train.epochs} epochs, batches of {train.batch_size}, gradient norm at most {train.clip_norm:g}",
        ),
        ("Kept epoch", f"{spec.best_epoch}, validation AUC {number(spec.val_auc)}"),
        ("Loss", _loss(spec)),
        ("Sampling of the images", train.sampling),
        ("Seed", str(train.seed)),
    )
    if not model_inputs(network) & {"side", "image"}:
        return (*details, *loop)
    crops = f"crops of {augment.crop_scale[0]:g} to {augment.crop_scale[1]:g} of the area"
    jitter = f"brightness {augment.brightness:g}, contrast {augment.contrast:g}"
    return (*details, *loop, ("Augmentation", f"flip {augment.flip:g}, {jitter}, {crops}"))
