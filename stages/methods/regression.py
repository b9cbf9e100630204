"""Logistic regressions that share the strength of their penalty: one of all classes, or one of each label."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.tasks import LEAST

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def log_loss(log_probabilities: Floats, labels: Labels, class_weights: Floats) -> float:
    """Weighted mean of -log p(label); plain where no label has weight."""
    losses, weight = -log_probabilities[np.arange(len(labels)), labels], class_weights[labels]
    return float(np.average(losses, weights=weight if weight.any() else None))


def label_log_loss(log_yes: Floats, log_no: Floats, labels: Labels, class_weights: Floats) -> float:
    """Mean over rows and labels of -log p of what is the case, the labels that are there weighted; all (n, C)."""
    return float(-(labels * class_weights * log_yes + (1 - labels) * log_no).mean())


class Softmax:
    """Multinomial logistic regression; of two classes the logit of the second alone."""

    def __init__(self, model: Any, weights: Floats) -> None:
        self._model, self._weights = model, weights

    def fit(self, x: Floats, y: Labels, c: float) -> None:
        """Fit to rows (n, F) of classes (n,); starts where the last fit ended."""
        _fit(self._model, x, y, self._weights[y], c)

    def loss(self, x: Floats, y: Labels) -> float:
        """Weighted log-loss of other rows."""
        return log_loss(_log_probabilities(self._model, x), y, self._weights)

    def coefficients(self) -> tuple[Floats, Floats]:
        """Weight (C, F) and bias (C,)."""
        weight, bias = self._model.coef_.copy(), self._model.intercept_.copy()
        if len(self._weights) == 2:
            # scikit-learn gives the logit of the second class alone; halves of it differ by it.
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return weight, bias


class OneVsRest:
    """A logistic regression of each label by itself."""

    def __init__(self, models: list[Any], weights: Floats) -> None:
        self._models, self._weights = models, weights

    def fit(self, x: Floats, y: Labels, c: float) -> None:
        """Fit to rows (n, F) with labels (n, C); starts where the last fit ended."""
        for model, there, weight in zip(self._models, y.T, self._weights, strict=True):
            _fit(model, x, there, np.where(there == 1, weight, 1.0), c)

    def loss(self, x: Floats, y: Labels) -> float:
        """Weighted log-loss of other rows, the mean over labels."""
        found = np.stack([_log_probabilities(model, x) for model in self._models], axis=1)
        # Of an impossible label that is not there, 0 times minus infinity would be no number.
        no, yes = np.maximum(found, np.log(LEAST)).transpose(2, 0, 1)
        return label_log_loss(yes, no, y, self._weights)

    def coefficients(self) -> tuple[Floats, Floats]:
        """Weight (C, F) and bias (C,)."""
        return (
            np.concatenate([model.coef_ for model in self._models]),
            np.concatenate([model.intercept_ for model in self._models]),
        )


def _log_probabilities(model: Any, x: Floats) -> Floats:
    """(n, classes); minus infinity is a fair verdict on weak penalties, no reason to warn."""
    with np.errstate(divide="ignore"):
        return np.asarray(model.predict_log_proba(x))


def _fit(model: Any, x: Floats, y: Labels, weights: Floats, c: float) -> None:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # The weakest penalties on separable rows have their optimum far away; validation judges where it stopped.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(C=c).fit(x, y, sample_weight=weights)
