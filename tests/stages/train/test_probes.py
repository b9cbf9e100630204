"""Probes on pooled outputs: what is fitted, and by what it is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from schemas.errors import TrainingError
from stages.train import probes
from stages.train.probes import fit_linear_probe, log_loss


def blobs(n: int, classes: int, features: int = 12, distance: float = 3.0, seed: int = 0) -> tuple[Any, Any]:
    """Gaussian clouds around corners, on scales that differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, features)) + distance * np.eye(classes, features)[y]
    return x * np.logspace(-3, 3, features) + 5.0, y


def logits(fit: probes.LinearFit, x: Any) -> torch.Tensor:
    return (torch.from_numpy(x).float() - fit.mean) / fit.scale @ fit.weight.T + fit.bias


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_the_logistic_regression_of_standardised_rows(classes: int) -> None:
    x, y = blobs(90, classes)
    x_val, y_val = blobs(30, classes, seed=1)
    fit = fit_linear_probe(x, y, x_val, y_val, classes)
    assert fit.weight.shape == (classes, 12)
    np.testing.assert_allclose(fit.mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.scale, x.std(axis=0), rtol=1e-5)
    direct = LogisticRegression(C=fit.c, max_iter=5000, tol=1e-8).fit((x - x.mean(axis=0)) / x.std(axis=0), y)
    expected = direct.predict_proba((x_val - x.mean(axis=0)) / x.std(axis=0))
    found = logits(fit, x_val).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (found.argmax(axis=1) == y_val).mean() > 0.85


def test_validation_chooses_the_penalty() -> None:
    # Forty noisy features of twelve rows: unpenalised, any labels are learnt by heart.
    x, y = blobs(12, 2, features=40, distance=0.3)
    noise, noise_labels = blobs(200, 2, features=40, distance=0.0, seed=1)
    weak = fit_linear_probe(x, y, x, y, 2).c
    strong = fit_linear_probe(x, y, noise, noise_labels, 2).c
    assert strong < weak
    tried = {}
    for c in probes.STRENGTHS:
        standard = (x - x.mean(axis=0)) / x.std(axis=0)
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(standard, y)
        found = model.predict_log_proba((noise - x.mean(axis=0)) / x.std(axis=0))
        tried[c] = log_loss(found, noise_labels, np.ones(2))
    assert strong == min(tried, key=tried.__getitem__)


def test_constant_features_are_harmless() -> None:
    x, y = blobs(40, 2)
    x[:, 0] = 7.0
    fit = fit_linear_probe(x, y, x, y, 2)
    assert fit.scale[0] == 1.0
    assert torch.isfinite(logits(fit, x)).all()


def test_class_weights_move_the_border() -> None:
    x, y = blobs(200, 2, distance=0.5)
    plain, weighted = (fit_linear_probe(x, y, x, y, 2, class_weights=w) for w in (None, (1.0, 9.0)))
    assert (logits(weighted, x).argmax(dim=1) == 1).sum() > (logits(plain, x).argmax(dim=1) == 1).sum() + 20


@pytest.mark.parametrize("case", ["absent class", "no validation", "not finite"])
def test_what_cannot_be_fitted_is_refused(case: str) -> None:
    x, y = blobs(20, 2)
    x_val, y_val = x.copy(), y
    if case == "absent class":
        y = np.zeros(20, dtype=int)
    elif case == "no validation":
        x_val, y_val = x[:0], y[:0]
    else:
        x_val[3, 2] = np.nan
    with pytest.raises(TrainingError):
        fit_linear_probe(x, y, x_val, y_val, 2)
