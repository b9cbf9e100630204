"""Texts of the report: a description of each metric by task, and of each misclassified row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from schemas.results import Metrics
from schemas.tasks import METRICS, names_in
from stages.evaluate.predictions import Predictions
from stages.tasks import texts

NOT_DEFINED = "not defined"

Meaning = Callable[[Metrics], str]


def number(value: float | None, digits: int = 3) -> str:
    """Format a metric."""
    return NOT_DEFINED if value is None else f"{value:.{digits}f}"


def quoted(name: str) -> str:
    """Put a class name in quotation marks, so that a class named 1 does not look like a number."""
    return f"“{name}”"


def metric_rows(metrics: Metrics) -> list[dict[str, str]]:
    """Return name, value and meaning of every metric of the task, in order of importance."""
    several = metrics.task == "multilabel"
    rows = []
    for field in METRICS[metrics.task]:
        name, meaning = {**_SINGLE_LABEL, **(_MULTILABEL if several else {})}[field]
        rows.append({"name": name, "value": number(getattr(metrics, field)), "meaning": meaning(metrics)})
    return rows


def _accuracy(metrics: Metrics) -> str:
    counts = [sum(row) for row in metrics.confusion]
    name, constant = tuple(metrics.auc_per_class)[int(np.argmax(counts))], max(counts) / metrics.images
    prediction = "predicted grade" if metrics.task == "ordinal" else "most probable class"
    return f"Share of images whose {prediction} is the label. Always predicting {quoted(name)} gives {constant:.3f}."


def _brier(metrics: Metrics) -> str:
    classes = len(metrics.confusion)
    scale = "0 is best, 1 is worst" if classes == 2 else f"summed over {classes} classes, 0 is best, 2 is worst"
    return f"Mean squared error of the probabilities; {scale}."


def _always(text: str) -> Meaning:
    return lambda _: text


_SINGLE_LABEL: dict[str, tuple[str, Meaning]] = {
    "auc": (
        "AUC",
        _always(
            "Probability that a random image of a class scores higher than a random image of another class; 0.5 is "
            "guessing, 1 is best."
        ),
    ),
    "accuracy": ("Accuracy", _accuracy),
    "balanced_accuracy": (
        "Balanced accuracy",
        lambda metrics: f"Mean recall of the classes; guessing gives {1 / len(metrics.confusion):.3f}.",
    ),
    "f1": ("Macro F1", _always("Harmonic mean of precision and recall, mean over classes; 1 is best.")),
    "cohen_kappa": (
        "Cohen's kappa",
        _always("Agreement beyond chance, unweighted: every confusion of two classes counts the same; 1 is best."),
    ),
    "quadratic_kappa": (
        "Quadratic kappa",
        _always(
            "Cohen's kappa for ordered grades, errors are weighted by their squared distance; 0 is chance, 1 is best."
        ),
    ),
    "brier": ("Brier score", _brier),
    "calibration_error": (
        "Calibration error",
        _always("Mean distance between confidence and accuracy over ten bins (ECE); 0 is best, 1 is worst."),
    ),
}
_MULTILABEL: dict[str, tuple[str, Meaning]] = {
    "auc": (
        "AUC",
        _always(
            "Probability that a random image with a label scores higher than a random one without it, mean over "
            "labels; 0.5 is guessing, 1 is best."
        ),
    ),
    "average_precision": (
        "Average precision",
        _always("Area under the precision-recall curve, mean over labels; guessing gives the frequency of the label."),
    ),
    "f1": ("Macro F1", _always("Harmonic mean of precision and recall at 0.5, mean over labels; 1 is best.")),
    "f1_micro": ("Micro F1", _always("F1 over all pairs of image and label, so that frequent labels count more.")),
    "accuracy": ("Exact match", _always("Share of images for which every label is right.")),
    "hamming": ("Hamming loss", _always("Share of wrong pairs of image and label; 0 is best.")),
    "balanced_accuracy": (
        "Balanced accuracy",
        _always("Mean recall of images with and without a label, mean over labels; guessing gives 0.5."),
    ),
    "brier": (
        "Brier score",
        _always("Mean squared error of the probabilities, mean over labels; 0 is best, 1 is worst."),
    ),
    "calibration_error": (
        "Calibration error",
        _always(
            "Distance between probability and frequency of a label over ten bins (ECE), mean over labels; 0 is best, "
            "1 is worst."
        ),
    ),
}


def sureness(predictions: Predictions) -> npt.NDArray[np.float64]:
    """Return the (n,) confidence of each prediction; multi-label: of the most confident wrong label."""
    p = predictions.probabilities.astype(np.float64)
    if predictions.task != "multilabel":
        return np.asarray(p[np.arange(len(p)), p.argmax(axis=1)])
    return np.asarray(_error_margin(predictions).max(axis=1))


def mistake(predictions: Predictions, row: int) -> dict[str, str]:
    """Describe a misclassified row: prediction, its probability, true label, and the true label's probability."""
    p, classes = predictions.probabilities[row], predictions.classes
    if predictions.task == "multilabel":
        worst = int(_error_margin(predictions)[row].argmax())
        predicted, actual = texts(predictions.predicted[row : row + 1], classes)[0], predictions.rows[row].label
        return {
            "predicted": _quoted_labels(predicted),
            "probability": "",
            "label": _quoted_labels(actual),
            "of_label": f"{quoted(classes[worst])} at {p[worst]:.1%}",
        }
    guess, label = int(predictions.predicted[row]), int(predictions.labels[row])
    return {
        "predicted": quoted(classes[guess]),
        "probability": f"{p[guess]:.1%}",
        "label": quoted(classes[label]),
        "of_label": f"{p[label]:.1%}",
    }


def _quoted_labels(label: str) -> str:
    return ", ".join(map(quoted, names_in(label, "multilabel"))) or "no label"


def _error_margin(predictions: Predictions) -> npt.NDArray[np.float64]:
    """Return the (n, C) distance of each probability from the label if the prediction is wrong, else 0."""
    distance = np.abs(predictions.probabilities.astype(np.float64) - predictions.labels)
    return np.where(predictions.predicted != predictions.labels, distance, 0.0)
