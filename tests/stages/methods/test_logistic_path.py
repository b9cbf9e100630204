"""All penalties and folds in one descent: against scikit-learn's solver, one regression at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import CASES, centred, folds_of, labelled, logits_of, loss_of, standardised
from sklearn.linear_model import LogisticRegression

from stages.methods import logistic_path, principal_axes
from stages.methods.logistic_path import STRENGTHS
from stages.methods.regression import LinearFit

CLOSE = 1e-2
"""Difference of two logits that changes no probability by more than a quarter of a percent."""


def reference(z: Any, y: Any, seen: Any, c: float, weights: Any) -> Any:
    """Logits (n, C) of all rows by scikit-learn's regressions of the rows seen."""
    if y.ndim == 2:
        columns = []
        for label in range(y.shape[1]):
            per_class = {0: 1.0, 1: float(weights[label])}
            model = LogisticRegression(C=c, tol=1e-9, max_iter=20_000, class_weight=per_class)
            columns.append(model.fit(z[seen], y[seen, label]).decision_function(z))
        return np.stack(columns, axis=1)
    per_class = {number: float(weight) for number, weight in enumerate(weights)}
    # A softmax of two classes has the weights w / 2 and -w / 2, half the squared length of the w of scikit-learn.
    two = len(weights) == 2
    model = LogisticRegression(C=2 * c if two else c, tol=1e-9, max_iter=20_000, class_weight=per_class)
    found = model.fit(z[seen], y[seen]).decision_function(z)
    return np.stack([-found / 2, found / 2], axis=1) if two else found


def fit_path(x: Any, y: Any, weights: Any, folds: Any) -> LinearFit:
    return logistic_path.fit_path(principal_axes.principal_axes(x), y, weights, folds)


LOSSES = {STRENGTHS[0]: CLOSE, 0.1: CLOSE, 1.0: CLOSE, 10.0: 2 * CLOSE, STRENGTHS[-1]: 15 * CLOSE}
"""Penalty -> tolerance: `TOLERANCE` ends the descent before the weakest penalties reach their optimum."""


def assert_near(found: Any, expected: Any, y: Any, loss: float, name: str) -> None:
    """To `loss`, of logits beyond 1 to that share of the largest."""
    found, expected = centred(found, y), centred(expected, y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=loss * max(1.0, np.abs(expected).max()), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_each_penalty_has_the_optimum_of_scikit_learn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also out of fold, and for the penalties that are not chosen."""
    x, y, weights = CASES[case]
    z, folds = standardised(x), folds_of(len(y))
    everything = np.ones(len(y), bool)
    for c, loss in LOSSES.items():
        monkeypatch.setattr(logistic_path, "STRENGTHS", (c,))
        fit = fit_path(x, y, weights, folds)
        assert fit.c == c
        assert_near(logits_of(fit, x), reference(z, y, everything, c, weights), y, loss, f"C = {c}")
        held_out = np.zeros((len(y), len(weights)))
        for fold in folds:
            held_out[fold] = reference(z, y, ~fold, c, weights)[fold]
        assert_near(fit.held_out.numpy(), held_out, y, loss, f"out of fold, C = {c}")


@pytest.mark.parametrize("case", CASES)
def test_the_chosen_penalty_has_the_lowest_held_out_loss(case: str) -> None:
    x, y, weights = CASES[case]
    z, folds = standardised(x), folds_of(len(y))
    fit = fit_path(x, y, weights, folds)
    losses = {}
    for c in STRENGTHS:
        held_out = np.zeros((len(y), len(weights)))
        for fold in folds:
            held_out[fold] = reference(z, y, ~fold, c, weights)[fold]
        losses[c] = loss_of(held_out, y, weights)
    best = min(losses, key=losses.__getitem__)
    assert losses[fit.c] == pytest.approx(losses[best], abs=2e-3)
    assert STRENGTHS[0] < fit.c < STRENGTHS[-1]
    assert fit.loss == pytest.approx(losses[fit.c], abs=2e-3)
    assert fit.loss == pytest.approx(loss_of(fit.held_out.numpy(), y, weights), abs=1e-4)
    # All penalties in one descent, and one of them only: the same fit.
    np.testing.assert_allclose(
        centred(logits_of(fit, x), y),
        centred(reference(z, y, np.ones(len(y), bool), fit.c, weights), y),
        atol=CLOSE,
    )


def test_rough_regressions_choose_the_penalty_of_converged_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # The labels follow from axes of little variance, which a descent learns last.
    generator = np.random.default_rng(0)
    latent = generator.normal(size=(120, 100))
    x = ((latent / np.arange(1, 101)) @ generator.normal(size=(100, 300))).astype(np.float32)
    y = (latent[:, 5:25] @ generator.normal(size=(20, 3)) + generator.gumbel(size=(120, 3))).argmax(axis=1)
    rough = fit_path(x, y, np.ones(3), folds_of(120))
    monkeypatch.setattr(logistic_path, "ROUGH", logistic_path.TOLERANCE)
    exact = fit_path(x, y, np.ones(3), folds_of(120))
    assert rough.c == exact.c
    assert abs(rough.loss - exact.loss) < 1e-4


def test_mean_and_scale_are_those_of_all_rows() -> None:
    x, y, weights = CASES["three classes"]
    fit = fit_path(x, y, weights, folds_of(len(y)))
    np.testing.assert_allclose(fit.mean, x.astype(np.float64).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.scale, x.astype(np.float64).std(axis=0), rtol=1e-4)
    assert (fit.weight.shape, fit.bias.shape) == ((3, 20), (3,))
    assert {tensor.dtype for tensor in (fit.weight, fit.bias, fit.mean, fit.scale, fit.held_out)} == {torch.float32}


def test_rows_in_no_fold_have_no_held_out_logits() -> None:
    x, y, weights = CASES["three classes"]
    folds = folds_of(len(y))[:2]
    fit = fit_path(x, y, weights, folds)
    in_a_fold = np.any(folds, axis=0)
    assert not in_a_fold.all()
    assert bool(fit.held_out[~in_a_fold].isnan().all())
    assert bool(fit.held_out[in_a_fold].isfinite().all())
    assert fit.loss == pytest.approx(loss_of(fit.held_out[in_a_fold].numpy(), y[in_a_fold], weights), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 7.0, -3e4])
def test_constant_columns_change_nothing_but_the_penalty(value: float) -> None:
    x, y, weights = CASES["three classes"]
    wider = np.concatenate([x, np.full((len(x), 5), value, np.float32)], axis=1)
    fit = fit_path(wider, y, weights, folds_of(len(y)))
    assert torch.equal(fit.scale[20:], torch.ones(5))
    # Constant columns have no coordinate in the principal axes, up to rounding.
    assert float(fit.weight[:, 20:].abs().max()) < 1e-5
    expected = reference(standardised(wider), y, np.ones(len(y), bool), fit.c, weights)
    np.testing.assert_allclose(centred(logits_of(fit, wider), y), centred(expected, y), atol=CLOSE)
    only = fit_path(np.full((30, 4), value, np.float32), np.arange(30) % 3, weights, folds_of(30))
    assert bool(torch.isfinite(only.weight).all())
    np.testing.assert_allclose(torch.from_numpy(logits_of(only, wider[:30, 20:24])).softmax(1), 1 / 3, atol=0.01)


def low_rank(n: int, features: int, rank: int) -> tuple[Any, Any]:
    """Rows in which `rank` directions hold nearly everything, with sizes that fall as those of real features do."""
    rng = np.random.default_rng(1)
    y = np.arange(n) % 3
    scores = rng.normal(size=(n, rank)) / np.arange(1, rank + 1) ** 0.5
    scores[:, :3] += 1.5 * np.eye(3)[y]
    x = scores @ rng.normal(size=(rank, features)) + 0.01 * rng.normal(size=(n, features))
    return x.astype(np.float32), y


def test_fewer_axes_are_close_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), weights = low_rank(150, 300, 20), np.ones(3)
    folds = folds_of(150)
    full = fit_path(x, y, weights, folds)
    monkeypatch.setattr(principal_axes, "RANK", 20)
    turned = principal_axes.principal_axes(x)
    assert (turned.axes[0].shape[0], turned.axes[-1].shape[1], turned.z.shape) == (300, 20, (150, 20))
    short = fit_path(x, y, weights, folds)
    assert short.loss == pytest.approx(full.loss, abs=0.02)
    difference = np.abs(centred(logits_of(short, x), y) - centred(logits_of(full, x), y))
    assert difference.mean() < 0.1 * np.abs(centred(logits_of(full, x), y)).mean()
    # With a single axis the classes can no longer be told apart: the limit has an effect.
    monkeypatch.setattr(principal_axes, "RANK", 1)
    assert fit_path(x, y, weights, folds).loss > full.loss + 0.1


def test_the_randomised_decomposition_is_close_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), weights = low_rank(150, 300, 20), np.ones(3)
    folds = folds_of(150)
    monkeypatch.setattr(principal_axes, "RANK", 20)
    exact = fit_path(x, y, weights, folds)
    monkeypatch.setattr(principal_axes, "EXACT", 50)
    monkeypatch.setattr(np.linalg, "svd", _small_only(np.linalg.svd, 100))
    randomised = fit_path(x, y, weights, folds)
    again = fit_path(x, y, weights, folds)
    assert all(torch.equal(one, other) for one, other in zip(randomised[:4], again[:4], strict=True))
    assert randomised.c == exact.c
    assert randomised.loss == pytest.approx(exact.loss, abs=5e-3)
    np.testing.assert_allclose(centred(logits_of(randomised, x), y), centred(logits_of(exact, x), y), atol=0.05)


def _small_only(svd: Any, most: int) -> Any:
    """`numpy.linalg.svd` that refuses large matrices, so that the exact decomposition cannot pass unnoticed."""

    def checked(matrix: Any, *args: Any, **keywords: Any) -> Any:
        assert min(matrix.shape) <= most
        return svd(matrix, *args, **keywords)

    return checked


def test_a_class_of_weight_zero_does_not_break_the_steps() -> None:
    x, y, _ = CASES["three classes"]
    fit = fit_path(x, y, np.array([1.0, 1.0, 0.0]), folds_of(len(y)))
    found = logits_of(fit, x)
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) != 2).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_labels_that_all_or_no_rows_have_are_finite(share: float) -> None:
    x, y = labelled(60, 2)
    y[:, 1] = share
    fit = fit_path(x, y, np.ones(2), folds_of(60))
    found = logits_of(fit, x)
    assert np.isfinite(found).all()
    assert ((found[:, 1] > 0) == bool(share)).all()
