"""What the report says about each metric, by task, and about each mistake."""

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
    """A metric for people."""
    return NOT_DEFINED if value is None else f"{value:.{digits}f}"


def quoted(name: str) -> str:
    """A class name as the report writes it: in quotation marks, so that a class named 1 is no figure."""
    return f"“{name}”"


def metric_rows(metrics: Metrics) -> list[dict[str, str]]:
    """Name, value and meaning of every metric of the task, the one that counts most first."""
    several = metrics.task == "multilabel"
    rows = []
    for field in METRICS[metrics.task]:
        name, meaning = {**_NAMED, **(_OF_LABELS if several else {})}[field]
        rows.append({"name": name, "value": number(getattr(metrics, field)), "meaning": meaning(metrics)})
    return rows


def _accuracy(metrics: Metrics) -> str:
    counts = [sum(row) for row in metrics.confusion]
    name, constant = tuple(metrics.auc_per_class)[int(np.argmax(counts))], max(counts) / metrics.images
    answer = "predicted grade" if metrics.task == "ordinal" else "most probable class"
    return f"Share of images whose {answer} is the label. Always predicting {quoted(name)} gives {constant:.3f}."


def _brier(metrics: Metrics) -> str:
    classes = len(metrics.confusion)
    scale = "0 is best, 1 is worst" if classes == 2 else f"summed over {classes} classes, 0 is best, 2 is worst"
    return f"Mean squared error of the probabilities; {scale}."


def _always(text: str) -> Meaning:
    return lambda _: text


_NAMED: dict[str, tuple[str, Meaning]] = {
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
            "Cohen's kappa for ordered grades, a miss weighs as the square of its distance; 0 is chance, 1 is best."
        ),
    ),
    "brier": ("Brier score", _brier),
    "calibration_error": (
        "Calibration error",
        _always("Mean distance of confidence from accuracy over ten bins (ECE); 0 is best, 1 is worst."),
    ),
}
_OF_LABELS: dict[str, tuple[str, Meaning]] = {
    "auc": (
        "AUC",
        _always(
            "Probability that a random image with a label scores higher than a random one without it, mean over "
            "labels; 0.5 is guessing, 1 is best."
        ),
    ),
    "average_precision": (
        "Average precision",
        _always("Area under the precision-recall curve, mean over labels; guessing gives the share of the label."),
    ),
    "f1": ("Macro F1", _always("Harmonic mean of precision and recall at 0.5, mean over labels; 1 is best.")),
    "f1_micro": ("Micro F1", _always("The same of all pairs of image and label together: common labels count more.")),
    "accuracy": ("Exact match", _always("Share of images of which every label is right.")),
    "hamming": ("Hamming loss", _always("Share of the pairs of image and label that are wrong; 0 is best.")),
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
            "Distance of a label's probability from how often it is there, over ten bins (ECE), mean over labels; 0 is "
            "best, 1 is worst."
        ),
    ),
}


def sureness(predictions: Predictions) -> npt.NDArray[np.float64]:
    """(n,) confidence of each prediction; multi-label: of the most confident wrong label."""
    p = predictions.probabilities.astype(np.float64)
    if predictions.task != "multilabel":
        return np.asarray(p[np.arange(len(p)), p.argmax(axis=1)])
    return np.asarray(_wrong_by(predictions).max(axis=1))


def mistake(predictions: Predictions, row: int) -> dict[str, str]:
    """Describe a misclassified row: prediction, its probability, true label, and the true label's probability."""
    p, classes = predictions.probabilities[row], predictions.classes
    if predictions.task == "multilabel":
        worst = int(_wrong_by(predictions)[row].argmax())
        said, have = texts(predictions.predicted[row : row + 1], classes)[0], predictions.rows[row].label
        return {
            "predicted": _several(said),
            "probability": "",
            "label": _several(have),
            "of_label": f"{quoted(classes[worst])} at {p[worst]:.1%}",
        }
    guess, label = int(predictions.predicted[row]), int(predictions.labels[row])
    return {
        "predicted": quoted(classes[guess]),
        "probability": f"{p[guess]:.1%}",
        "label": quoted(classes[label]),
        "of_label": f"{p[label]:.1%}",
    }


def _several(label: str) -> str:
    return ", ".join(map(quoted, names_in(label, "multilabel"))) or "no label"


def _wrong_by(predictions: Predictions) -> npt.NDArray[np.float64]:
    """(n, C): distance of a probability from a label that it misses; 0 where it is right."""
    distance = np.abs(predictions.probabilities.astype(np.float64) - predictions.labels)
    return np.where(predictions.predicted != predictions.labels, distance, 0.0)
