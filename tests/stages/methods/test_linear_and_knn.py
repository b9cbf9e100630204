"""Probes on pooled outputs: what is fitted, and by what its hyperparameter is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from schemas.errors import TrainingError
from stages.methods.batch import Batch
from stages.methods.fit_rows import FitRows
from stages.methods.knn import NEIGHBOURS, KnnProbe, fit_knn
from stages.methods.linear import fit_linear_probe
from stages.methods.regression import PATIENCE, STRENGTHS, LinearFit, log_loss, scale_of


def blobs(n: int, classes: int, features: int = 12, distance: float = 3.0, seed: int = 0) -> tuple[Any, Any]:
    """Gaussian clouds around corners, on scales that differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.normal(size=(n, features)) + distance * np.eye(classes, features)[y]
    return x * np.logspace(-3, 3, features) + 5.0, y


def rows(x: Any, y: Any, classes: int, groups: Any = None) -> FitRows:
    """Rows of a patient each, unless groups are named."""
    names = [str(group) for group in (range(len(y)) if groups is None else groups)]
    return FitRows(np.asarray(x, np.float32), np.asarray(y, np.int64), names, classes)


def logits(fit: LinearFit, x: Any) -> torch.Tensor:
    return (torch.from_numpy(x).float() - fit.mean) / fit.scale @ fit.weight.T + fit.bias


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_the_logistic_regression_of_standardised_rows(classes: int) -> None:
    x, y = blobs(90, classes)
    x_val, y_val = blobs(30, classes, seed=1)
    fit = fit_linear_probe(rows(x, y, classes), rows(x_val, y_val, classes))
    assert fit.weight.shape == (classes, 12)
    np.testing.assert_allclose(fit.mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.scale, x.std(axis=0), rtol=1e-5)
    direct = LogisticRegression(C=fit.c, max_iter=5000, tol=1e-8).fit((x - x.mean(axis=0)) / x.std(axis=0), y)
    expected = direct.predict_proba((x_val - x.mean(axis=0)) / x.std(axis=0))
    found = logits(fit, x_val).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (found.argmax(axis=1) == y_val).mean() > 0.85


def linear_losses(x: Any, y: Any, pairs: Any) -> dict[float, float]:
    """Held-out log-loss of every C, each solved from the start."""
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    tried = {}
    for c in STRENGTHS:
        total = 0.0
        for seen, held in pairs:
            model = LogisticRegression(C=c, max_iter=2000, tol=1e-5).fit(x[seen], y[seen])
            total += held.sum() * log_loss(model.predict_log_proba(x[held]), y[held], np.ones(2))
        tried[c] = total
    return tried


def test_folds_by_patient_choose_the_penalty() -> None:
    """Images of a patient look alike: with folds by image, weaker penalties would seem better."""
    base, labels = blobs(40, 2, features=30, distance=1.2)
    rng = np.random.default_rng(2)
    x = np.repeat(base / base.std(axis=0), 2, axis=0)
    x = (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32).astype(np.float64)
    y, patients = np.repeat(labels, 2), np.repeat(np.arange(40), 2)
    train = rows(x, y, 2, patients)
    folds = train.folds()
    assert len(folds) == 5
    assert np.sum(folds, axis=0).tolist() == [1] * len(y)
    for fold in folds:
        assert not set(patients[fold]) & set(patients[~fold])
    tried = linear_losses(x, y, [(~fold, fold) for fold in folds])
    chosen = fit_linear_probe(train, rows(x[:2], y[:2], 2)).c
    assert chosen == min(tried, key=tried.__getitem__)
    assert fit_linear_probe(rows(x, y, 2), rows(x[:2], y[:2], 2)).c > chosen


def test_validation_images_choose_nothing() -> None:
    """On few validation images the lowest loss can be that of the strongest penalty, which answers one class."""
    x, y = blobs(120, 2, features=40, distance=1.2)
    x_val, y_val = blobs(34, 2, features=40, distance=1.2, seed=1)
    honest, reversed_labels = rows(x_val, y_val, 2), rows(x_val, 1 - y_val, 2)
    first, second = (fit_linear_probe(rows(x, y, 2), val) for val in (honest, reversed_labels))
    assert first.c == second.c > 1e-4
    assert torch.equal(first.weight, second.weight)
    assert (logits(first, x_val).argmax(dim=1).numpy() == y_val).mean() > 0.7
    assert fit_knn(rows(x, y, 2), honest).spec == fit_knn(rows(x, y, 2), reversed_labels).spec


def test_validation_chooses_where_a_class_has_one_patient() -> None:
    # Forty noisy features of twelve rows: unpenalised, any labels are learnt by heart.
    x, y = blobs(12, 2, features=40, distance=0.3)
    noise, noise_labels = blobs(200, 2, features=40, distance=0.0, seed=1)
    train, others = rows(x, y, 2, y), rows(noise, noise_labels, 2)
    assert not train.folds()
    weak, strong = fit_linear_probe(train, rows(x, y, 2)).c, fit_linear_probe(train, others).c
    assert strong < weak
    every = np.concatenate([(x - x.mean(axis=0)) / x.std(axis=0), (noise - x.mean(axis=0)) / x.std(axis=0)])
    tried = {}
    for c in STRENGTHS:
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-6).fit(every[:12], y)
        tried[c] = log_loss(model.predict_log_proba(every[12:]), noise_labels, np.ones(2))
    assert strong == min(tried, key=tried.__getitem__)


def test_a_loss_that_rises_before_it_falls_does_not_end_the_search() -> None:
    """Of these thirty rows the held-out loss rises for more than four candidates after the strongest penalty."""
    rng = np.random.default_rng(107)
    y = np.arange(30) % 2
    x = rng.normal(size=(30, 40))
    x[:, 0] += 3 * y
    train = rows(x, y, 2)
    tried = linear_losses(x.astype(np.float32).astype(np.float64), y, [(~fold, fold) for fold in train.folds()])
    losses = [tried[c] for c in STRENGTHS]
    assert min(losses[1 : 1 + PATIENCE]) > losses[0]
    assert fit_linear_probe(train, rows(x[:2], y[:2], 2)).c == min(tried, key=tried.__getitem__) > 1e-2


def test_constant_features_are_harmless() -> None:
    x, y = blobs(40, 2)
    x[:, 0] = 7.0
    fit = fit_linear_probe(rows(x, y, 2), rows(x, y, 2))
    assert fit.scale[0] == 1.0
    assert torch.isfinite(logits(fit, x)).all()


def test_deviations_up_to_rounding_are_those_of_constants() -> None:
    mean = np.array([0.0, 0.0, 1e3, 1e3, -1e3, 5.0])
    deviation = np.array([0.0, 2e-7, 5e-5, 2e-4, 5e-5, 3.0])
    np.testing.assert_array_equal(scale_of(mean, deviation), [1.0, 2e-7, 1.0, 2e-4, 1.0, 3.0])
    np.testing.assert_array_equal(scale_of(mean, deviation, 1e-6), [1.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    assert deviation[0] == 0.0, "the deviations themselves are not changed"


def test_class_weights_move_the_border() -> None:
    x, y = blobs(200, 2, distance=0.5)
    plain, weighted = (fit_linear_probe(rows(x, y, 2), rows(x, y, 2), w) for w in (None, (1.0, 9.0)))
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
    for fit in (fit_linear_probe, fit_knn):
        with pytest.raises(TrainingError):
            fit(rows(x, y, 2), rows(x_val, y_val, 2))


def directions(n: int, classes: int, noise: float, seed: int = 0) -> tuple[Any, Any]:
    """Classes differ in direction alone: lengths are drawn over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = np.eye(classes, 8)[y] + noise * rng.normal(size=(n, 8))
    return (x * 10 ** rng.uniform(-1, 1, (n, 1))).astype(np.float32), y.astype(np.int64)


def shares(probe: KnnProbe, x: Any) -> Any:
    batch = Batch(torch.zeros(len(x)), pooled=torch.from_numpy(x).view(len(x), 2, -1))
    return probe(batch).exp().numpy()


def test_neighbours_are_those_of_the_highest_cosine_and_vote() -> None:
    x, y = directions(60, 3, noise=0.3)
    x_val, y_val = directions(40, 3, noise=0.3, seed=1)
    probe = fit_knn(rows(x, y, 3), rows(x_val, y_val, 3))
    k = probe.spec.neighbours
    found = shares(probe, x_val)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for row, expected in zip(x_val, found, strict=True):
        cosine = unit @ (row / np.linalg.norm(row))
        nearest = np.argsort(-cosine)[:k]
        votes = np.exp(cosine[nearest] / 0.07)
        counts = np.bincount(y[nearest], k * votes / votes.sum(), 3) + np.bincount(y) / 60
        np.testing.assert_allclose(expected, counts / (k + 1), rtol=1e-3)
    assert (found.argmax(axis=1) == y_val).mean() > 0.9


def test_folds_choose_k() -> None:
    x, y = directions(60, 2, noise=0.05)
    y[np.random.default_rng(0).permutation(60)[:20]] ^= 1
    train = rows(x, y, 2)
    noisy = fit_knn(train, rows(x[:4], y[:4], 2))
    # A third of the labels is wrong: one neighbour is wrong as often, many outvote them.
    assert noisy.spec.neighbours >= 5
    held = directions(40, 2, noise=0.05, seed=2)
    assert (shares(noisy, held[0]).argmax(axis=1) == held[1]).mean() > 0.8
    losses: dict[int, float] = {}
    for fold in train.folds():
        state = {"rows": noisy.rows[~fold], "labels": noisy.labels[~fold], "class_weights": torch.ones(2)}
        for k in (k for k in NEIGHBOURS if k <= 48):
            other = KnnProbe(noisy.spec.model_copy(update={"neighbours": k, "rows": 48}))
            other.load_state_dict(state)
            losses[k] = losses.get(k, 0.0) - np.log(shares(other, x[fold])[np.arange(12), y[fold]]).sum()
    assert noisy.spec.neighbours == min(losses, key=losses.__getitem__)


def test_validation_chooses_k_where_a_class_has_one_patient() -> None:
    x, y = directions(60, 2, noise=0.05)
    wrong = y.copy()
    wrong[np.random.default_rng(0).permutation(60)[:20]] ^= 1
    train, others = rows(x, wrong, 2, wrong), directions(40, 2, noise=0.05, seed=1)
    assert fit_knn(train, rows(x, wrong, 2)).spec.neighbours == 1
    assert fit_knn(train, rows(*others, 2)).spec.neighbours >= 10


def test_class_weights_count_in_votes() -> None:
    x, y = directions(60, 2, noise=1.5)
    plain, weighted = (fit_knn(rows(x, y, 2), rows(x, y, 2), w) for w in (None, (0.0, 1.0)))
    assert (shares(plain, x).argmax(axis=1) == 0).sum() > 0
    assert (shares(weighted, x).argmax(axis=1) == 0).sum() == 0
