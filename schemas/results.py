"""Results of stage two: the model bundle, metrics, and the cost report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from schemas.base import Contract
from schemas.features import FeatureSpec
from schemas.manifest import GroupUnit, Split
from schemas.methods import AnySpec, Method
from schemas.resolved import ResolvedTrain
from schemas.tasks import Task

BUNDLE_VERSION: Literal[2] = 2
"""Raised by hand when the layout of a bundle changes."""

PROBABILITY = "p_"
"""Prefix of a probability column in tables of predictions; no other column starts with it."""

ADAPTED = "adapted_"
"""Prefix of the columns of predictions with adaptation at test time."""


class StartSpec(Contract):
    """The model whose weights a training started from."""

    weights_sha256: str
    """Sha256 of its `model.safetensors`."""
    image_size: int
    """Its input of the LPM, in pixels."""
    fitted_images: str
    """Images that trained it or chose its epoch, and those of the models before it, as in `BundleSpec`."""


class BundleSpec(Contract):
    """`model.json`: with `model.safetensors` next to it, everything needed to predict.

    The file has one key more, `sha256`: the digest of the canonical JSON of all others. With `weights_sha256` among
    them it binds the weights as well.
    """

    bundle_version: Literal[2] = BUNDLE_VERSION
    """Layout."""
    classes: tuple[str, ...]
    """Label names in the order of the logits."""
    network: AnySpec
    """What is built around the weights."""
    features: FeatureSpec
    """The features that it was trained on: prediction computes the same."""
    train: ResolvedTrain
    """The recipe, resolved."""
    best_epoch: int
    """From 1; 1 for models without epochs."""
    val_auc: float | None
    """Validation AUC of the best epoch; null where the validation split lacks a class."""
    learnable: int
    """Parameters that were trained; 0 for k-NN."""
    weights_sha256: str
    """Sha256 of `model.safetensors`."""
    fitted_sha256: str | None = None
    """`stages.manifest.fitted_sha256` of the manifest; null in bundles written before it was recorded."""
    fitted_images: str | None = None
    """Training and validation images, by which a later training that starts from this model finds test images that are
    none: `stages.fitted_images.encode` of their ids; null in bundles written before they were recorded."""
    start: StartSpec | None = None
    """The model that training started from; null: from new weights."""

    @property
    def task(self) -> Task:
        """What its outputs mean."""
        return self.network.task

    @property
    def fitted_splits(self) -> tuple[Split, ...]:
        """Splits whose images trained it."""
        return self.network.fitted_splits


class EpochLog(Contract):
    """One epoch of training, as it is shown, logged and kept in the checkpoint; of models without epochs, the fit."""

    epoch: int
    """From 1."""
    train_loss: float
    """Mean over the training images, augmented and with dropout."""
    val_loss: float
    """Mean over the validation images; predictions of linear probes that are fitted to them, too, are out of fold."""
    val_auc: float | None
    """AUC on the validation images, which chooses the best epoch; null where the validation split lacks a class."""
    val_accuracy: float
    """Share of the validation images whose prediction is the label, or with several labels all of them."""
    lr: float | None
    """At the end of the epoch; null for models without epochs."""
    seconds: float
    """Training and validation."""


class TrainResult(Contract):
    """What `train` hands back."""

    best: EpochLog
    """The epoch whose weights are in the bundle."""
    epochs: tuple[EpochLog, ...]
    """All epochs; of the second training where side networks were added to a first one."""
    resumed_from: int
    """How many of them a checkpoint had already; 0 for a fresh run."""
    learnable: int
    """Parameters that were trained."""
    chosen: dict[str, float] = Field(default_factory=dict)
    """What the fit selected, by name: C of linear, k of knn, the largest ensemble weight of statistics, weights and
    held-out losses of fpt-x."""
    conclusion: str = ""
    """Sentences on what the networks of an ensemble add to its linear probes; empty without linear probes."""


class Metrics(Contract):
    """How good a model is on one split. Averages over classes are unweighted (macro). Null: not defined here.

    With several labels an image (multi-label), each label is a yes or no of its own, yes from a probability of 0.5.
    """

    warnings: tuple[str, ...] = ()
    """Why these numbers are no measure of new images, such as images that the model was trained on; absent where there
    is no reason."""
    split: Split
    """Which rows were evaluated."""
    rows_sha256: str | None = None
    """Digest of the evaluated rows (sorted content ids and labels): metrics with different digests come from different
    images or labels and do not compare. Null in files that were written before there was one."""
    images: int
    """Rows judged."""
    groups: int
    """Patients (or other groups) that they come from."""
    unit: GroupUnit | None = None
    """What the groups are; null where images stand for themselves, or it is not known."""
    auc: float | None
    """Area under the ROC curve: binary with two classes, macro one-vs-rest with more; multi-label: macro."""
    auc_interval: tuple[float, float] | None
    """95% confidence interval of `auc`: percentile bootstrap over whole groups."""
    accuracy: float
    """Share of rows whose prediction is the label; multi-label: all of them (exact match)."""
    balanced_accuracy: float
    """Mean recall of the classes that occur; multi-label: mean over labels of the recall of yes and of no."""
    f1: float
    """Macro F1, of the classes that occur as label or prediction."""
    cohen_kappa: float | None = None
    """Multiclass: Cohen's kappa, unweighted; null where labels and predictions are all of one class."""
    quadratic_kappa: float | None = None
    """Ordinal: Cohen's kappa with quadratic weights, in the order of the grades; null where labels and predictions are
    all of one grade."""
    brier: float
    """Mean squared error of the probability: with two classes of the second (0 to 1), with more summed (0 to 2);
    multi-label: mean over labels (0 to 1)."""
    calibration_error: float
    """Mean |confidence - accuracy| over ten bins of confidence, weighted by rows (ECE), 0 to 1; multi-label: of the
    probability of each label against how often it is there, mean over labels."""
    auc_per_class: dict[str, float | None]
    """One-vs-rest."""
    absent_classes: tuple[str, ...]
    """Classes without a row in this split: their AUC, and so the macro AUC, is null. Multi-label: also labels that
    every row has."""
    confusion: tuple[tuple[int, ...], ...]
    """Rows: label; columns: prediction; in the order of the classes. Multi-label: of each label its true negatives,
    false positives, false negatives and true positives."""
    task: Task = "multiclass"
    """Kind of the labels."""
    average_precision: float | None = None
    """Multi-label: area under the precision-recall curve, macro."""
    f1_micro: float | None = None
    """Multi-label: F1 over all pairs of row and label."""
    hamming: float | None = None
    """Multi-label: share of the pairs of row and label that are wrong."""

    @model_serializer(mode="wrap")
    def _of_its_task(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what other tasks have, so that no table of a study gets empty columns."""
        values: dict[str, Any] = handler(self)
        foreign = {"task", "quadratic_kappa"} if self.task == "multiclass" else {"cohen_kappa"}
        if self.task == "multilabel":
            foreign |= {"quadratic_kappa"}
        else:
            foreign |= {"average_precision", "f1_micro", "hamming"}
        if not self.warnings:
            foreign |= {"warnings"}
        return {name: value for name, value in values.items() if name not in foreign}


class EvaluatedModel(Contract):
    """The model that made a table of predictions, as recorded in it."""

    method: Method
    """Preset."""
    lpm: str
    """Name of the LPM."""
    learnable: int
    """Parameters that were trained."""
    weights_sha256: str
    """Sha256 of its `model.safetensors`."""


class Difference(Contract):
    """A metric of one model minus that of the first, on the same rows."""

    value: float
    """On all rows."""
    interval: tuple[float, float] | None
    """95% confidence interval: percentile bootstrap over whole groups, both models on the same draws; null where the
    metric is not defined in half of them."""


class ComparedModel(Contract):
    """One row of a comparison."""

    name: str
    """Folder, as it was given."""
    model: EvaluatedModel | None
    """Null if the predictions do not record it."""
    train_seconds: float | None
    """Time of its training; null if the folder of the training is not next to it."""
    metrics: Metrics
    """On the common rows."""
    differences: dict[str, Difference]
    """Metric -> difference to the first model; empty for the first, and without metrics that are not defined."""


class Comparison(Contract):
    """Several models on the same rows."""

    split: Split
    """Split of the rows."""
    images: int
    """Rows."""
    groups: int
    """Patients (or other groups) that they come from."""
    unit: GroupUnit | None = None
    """What the groups are; null where images stand for themselves, or it is not known."""
    models: tuple[ComparedModel, ...]
    """In the order in which they were given."""


class Prediction(Contract):
    """Prediction for one image: a class with probabilities, or the reason why it cannot be used."""

    path: str
    """As it was given."""
    predicted: str | None
    """The predicted class; with several labels an image, those of a probability of at least 0.5, joined by `|`, or
    an empty text; null where the image cannot be used."""
    probabilities: dict[str, float] | None
    """Class -> probability, in the order of the logits; null where the image cannot be used."""
    error: str | None
    """Why the image cannot be used; null where it can."""
    adapted_predicted: str | None = None
    """As `predicted`, with adaptation at test time; null without it."""
    adapted_probabilities: dict[str, float] | None = None
    """As `probabilities`, with adaptation at test time; null without it."""
