"""Ridge regressions of every penalty and fold: against scikit-learn's, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import CASES, centred, folds_of, logits_of, loss_of, standardised
from sklearn.linear_model import Ridge

from stages.methods.least_squares import PENALTIES, SHARPNESS, fit_least_squares
from stages.methods.principal_axes import principal_axes
from stages.methods.regression import LinearFit


def fit(x: Any, y: Any, weights: Any, folds: Any) -> LinearFit:
    return fit_least_squares(principal_axes(x), y, weights, folds)


def reference(z: Any, y: Any, seen: Any, penalty: float, weights: Any) -> Any:
    """Predictions (n, C) less a half, of all rows, by scikit-learn's ridge regressions of the rows seen."""
    targets = (y[:, None] == np.arange(len(weights))) if y.ndim == 1 else y
    columns = []
    for label, target in enumerate(targets.T.astype(np.float64)):
        rows = weights[y] if y.ndim == 1 else np.where(target > 0, weights[label], 1.0)
        columns.append(Ridge(penalty).fit(z[seen], target[seen], sample_weight=rows[seen]).predict(z) - 0.5)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("case", CASES)
def test_the_fit_is_that_of_scikit_learn_with_the_lowest_held_out_loss(case: str) -> None:
    x, y, weights = CASES[case]
    z, folds = standardised(x), folds_of(len(y))
    found = fit(x, y, weights, folds)
    losses = {}
    for penalty in PENALTIES:
        held_out = np.zeros((len(y), len(weights)))
        for fold in folds:
            held_out[fold] = reference(z, y, ~fold, penalty, weights)[fold]
        for sharpness in SHARPNESS:
            losses[penalty, sharpness] = loss_of(sharpness * held_out, y, weights)
    best = min(losses, key=losses.__getitem__)
    assert found.loss == pytest.approx(losses[best], abs=1e-4)
    assert found.loss == pytest.approx(loss_of(found.held_out.numpy(), y, weights), abs=1e-4)
    assert 1.0 / found.c == pytest.approx(best[0])
    expected = best[1] * reference(z, y, np.ones(len(y), bool), best[0], weights)
    np.testing.assert_allclose(centred(logits_of(found, x), y), centred(expected, y), atol=1e-3)


def test_rows_in_no_fold_have_no_held_out_logits() -> None:
    x, y, weights = CASES["three classes"]
    folds = folds_of(len(y))[:2]
    found = fit(x, y, weights, folds)
    in_a_fold = np.any(folds, axis=0)
    assert bool(found.held_out[~in_a_fold].isnan().all())
    assert found.loss == pytest.approx(loss_of(found.held_out[in_a_fold].numpy(), y[in_a_fold], weights), abs=1e-4)


def test_rows_that_do_not_vary_give_the_frequencies_of_the_classes() -> None:
    x, y = np.full((40, 4), 7.0, np.float32), np.repeat([0, 1, 2, 2], 10)
    found = fit(x, y, np.ones(3), folds_of(40))
    assert bool(torch.isfinite(found.weight).all())
    chances = torch.from_numpy(logits_of(found, x[:1])).softmax(dim=1)[0]
    np.testing.assert_allclose(chances, [0.25, 0.25, 0.5], atol=0.15)
