"""Rows and labels for tests of linear fits, and what is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stages.methods.regression import LinearFit, label_log_loss, log_loss


def blobs(n: int, classes: int, features: int = 20, distance: float = 2.0, seed: int = 0) -> tuple[Any, Any]:
    """Gaussian clouds around corners, on scales that differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, features)) + distance * np.eye(classes, features)[y]
    return (x * np.logspace(-2, 2, features) + 5.0).astype(np.float32), y


def labelled(n: int, labels: int, features: int = 20, seed: int = 0) -> tuple[Any, Any]:
    """Rows with several labels, each with a direction of its own."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, labels)) < 0.4).astype(np.int64)
    x = rng.normal(size=(n, features))
    x[:, :labels] += 1.5 * y
    return x.astype(np.float32), y


def folds_of(n: int, count: int = 4) -> list[Any]:
    order = np.random.default_rng(5).permutation(n)
    return [np.isin(np.arange(n), order[start::count]) for start in range(count)]


def standardised(x: Any) -> Any:
    """(n, F): each column of mean 0 and deviation 1, divided by sqrt(F)."""
    wide = x.astype(np.float64)
    scale = wide.std(axis=0)
    # Rounding leaves constant columns a tiny deviation.
    scale[scale <= 1e-6 * np.abs(wide).max(axis=0)] = 1.0
    return (wide - wide.mean(axis=0)) / scale / np.sqrt(x.shape[1])


def centred(logits: Any, y: Any) -> Any:
    """Logits without the constant that all classes of a softmax may share."""
    return logits - logits.mean(axis=1, keepdims=True) if y.ndim == 1 else logits


def logits_of(fit: LinearFit, x: Any) -> Any:
    return (((torch.from_numpy(x) - fit.mean) / fit.scale) @ fit.weight.T + fit.bias).numpy()


def loss_of(logits: Any, y: Any, weights: Any) -> float:
    values = torch.from_numpy(np.asarray(logits, np.float64))
    if y.ndim == 1:
        return log_loss(values.log_softmax(dim=1).numpy(), y, weights)
    yes, no = (torch.nn.functional.logsigmoid(sign * values).numpy() for sign in (1, -1))
    return label_log_loss(yes, no, y, weights)


CASES = {
    "two classes": (*blobs(120, 2), np.ones(2)),
    "three classes": (*blobs(120, 3), np.ones(3)),
    "two weighted classes": (*blobs(120, 2), np.array([0.4, 3.0])),
    "three weighted classes": (*blobs(120, 3), np.array([0.5, 1.0, 4.0])),
    "more features than rows": (*blobs(60, 3, features=150), np.ones(3)),
    "labels": (*labelled(120, 3), np.ones(3)),
    "weighted labels": (*labelled(120, 3), np.array([0.5, 1.0, 4.0])),
}
"""Rows, labels, class weights."""
