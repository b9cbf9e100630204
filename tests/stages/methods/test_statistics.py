"""Linear probes of the pooled outputs and of the statistics of cached tokens: what they read, how chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantised import numpy, spec
from sklearn.linear_model import LogisticRegression

from schemas.errors import TrainingError
from stages.methods import regression
from stages.methods.base import FitInputs
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fit_rows import FitRows, describe_rows
from stages.methods.statistics import StatisticsFit, StatisticsProbe, fit_statistics
from stages.store.quantise import dequantise, encode

SHAPE = (2, 2, 9, 6)
"""Layers, heads, tokens, width of a head, as in `spec`."""


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_sources_are_the_moments_of_what_is_stored(dtype: str) -> None:
    g = torch.Generator().manual_seed(0)
    # Six images: a chunk and a part of one. Channels far from zero must keep their deviation.
    keys, values = (torch.randn(6, *SHAPE, generator=g) + 30.0 * torch.randn(SHAPE[-1], generator=g) for _ in range(2))
    of = spec(dtype)
    arrays = numpy(encode(keys, values, of))
    pooled = torch.randn(6, 2, of.lpm.width, generator=g)
    found = describe_rows(Batch(torch.zeros(6), tokens=CachedTokens.of(arrays), pooled=pooled))
    layers, width = SHAPE[0], of.lpm.width
    assert found.shape == (6, 1 + 2 * layers, 2 * width)
    assert torch.equal(found[:, 0], pooled.flatten(1))
    wide = [part.astype(np.float64) for part in dequantise(arrays, of)]
    for layer in range(layers):
        for part in (0, 1):
            tokens = wide[part][:, layer]
            mean, deviation = (tokens.mean(2).reshape(6, width), tokens.std(2).reshape(6, width))
            source = found[:, 1 + 2 * layer + part].numpy()
            np.testing.assert_allclose(source[:, :width], mean, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(source[:, width:], deviation, rtol=2e-3, atol=1e-4)


def test_without_cached_tokens_there_are_the_pooled_outputs() -> None:
    pooled = torch.randn(3, 2, 8)
    assert torch.equal(describe_rows(Batch(torch.zeros(3), pooled=pooled)), pooled.reshape(3, 1, 16))


def made(n: int, seed: int, told: float = 1.5, width: int = 12) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Three sources of three classes: noise, one that tells, noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    x = rng.standard_normal((n, 3, width)).astype(np.float32)
    x[:, 1, :3] += told * np.eye(3, dtype=np.float32)[labels]
    return x, labels


def alone(n: int) -> list[str]:
    return [str(number) for number in range(n)]


def fit_to(
    train: tuple[Any, Any], val: tuple[Any, Any], groups: list[str] | None = None, classes: int = 3, weights: Any = None
) -> tuple[StatisticsFit, torch.Tensor]:
    """Fit to rows and labels; no two are of one patient unless it is said."""
    known = alone(len(train[1])) if groups is None else groups
    others = [f"val {number}" for number in range(len(val[1]))]
    rows = FitRows(*train, known, classes), FitRows(*val, others, classes)
    return fit_statistics(FitInputs(train=rows[0], val=rows[1], class_weights=weights))


def probe_of(fit: StatisticsFit) -> StatisticsProbe:
    sources, classes, width = fit.weight.shape
    probe = StatisticsProbe(sources, width, classes)
    fit.copy_to(probe)
    return probe


def test_what_tells_more_has_the_larger_share() -> None:
    x_test, y_test = made(300, 2)
    fit, _ = fit_to(made(90, 0), made(30, 1))
    assert float(fit.share.sum()) == pytest.approx(1.0)
    assert fit.share[1] > 0.9
    right = (probe_of(fit)(torch.from_numpy(x_test)).argmax(1).numpy() == y_test).mean()
    assert right > 0.6
    # Of sources that say equally little none is preferred.
    blind, _ = fit_to(made(90, 0, told=0.0), made(30, 1, told=0.0))
    assert blind.share.max() < 0.6


@pytest.mark.parametrize("width", [12, 200], ids=["more rows", "more features"])
def test_each_is_a_logistic_regression(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "STRENGTHS", (0.01,))
    (x, y), (x_val, y_val) = made(60, 0, width=width), made(20, 1, width=width)
    fit, _ = fit_to((x, y), (x_val, y_val))
    x, y = np.concatenate([x, x_val]), np.concatenate([y, y_val])
    mean, scale = x[:, 1].mean(0), x[:, 1].std(0)
    model = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit((x[:, 1] - mean) / scale, y)
    expected = model.decision_function((x_val[:, 1] - mean) / scale)
    found = (x_val[:, 1] - fit.mean[1].numpy()) / fit.scale[1].numpy() @ fit.weight[1].numpy().T + fit.bias[1].numpy()
    # What all classes share is free.
    centred = [logits - logits.mean(1, keepdims=True) for logits in (found, expected)]
    np.testing.assert_allclose(*centred, atol=1e-3)


def test_validation_images_are_fitted_to_and_judged_by_what_did_not_see_them() -> None:
    # Labels that nothing explains: whoever saw them says them, whoever did not cannot.
    rng = np.random.default_rng(3)
    train, val = ((rng.standard_normal((n, 2, 300)).astype(np.float32), np.arange(n) % 3) for n in (60, 30))
    fit, said = fit_to(train, val)
    assert said.shape == (30, 3)
    labels = torch.from_numpy(val[1])
    seen = probe_of(fit)(torch.from_numpy(val[0]))
    assert (seen.argmax(1) == labels).float().mean() > 0.8
    assert (said.argmax(1) == labels).float().mean() < 0.6


def test_what_is_said_of_a_validation_image_is_the_regression_of_the_other_folds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regression, "STRENGTHS", (0.01,))
    monkeypatch.setattr(regression, "ROUGH", 1e-8)
    (x, y), (x_val, y_val) = made(60, 0), made(20, 1)
    fit, said = fit_to((x, y), (x_val, y_val))
    x, y = np.concatenate([x, x_val]), np.concatenate([y, y_val])
    groups = [*alone(60), *(f"val {number}" for number in range(20))]
    expected = np.zeros((80, 3))
    for fold in FitRows(x, y, groups, 3).folds():
        for source, share in enumerate(fit.share.tolist()):
            z = (x[:, source] - x[:, source].mean(0)) / x[:, source].std(0)
            model = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit(z[~fold], y[~fold])
            expected[fold] += share * model.predict_log_proba(z[fold])
    np.testing.assert_allclose(said.numpy(), expected[60:], atol=1e-3)


def test_patients_are_held_out_whole() -> None:
    y = np.arange(60) % 3
    groups = [str(number // 4) for number in range(60)]
    folds = FitRows(np.zeros((60, 1, 1), np.float32), y, groups, 3).folds()
    assert len(folds) == 5
    assert (np.sum(folds, axis=0) == 1).all()
    for fold in folds:
        held = {group for group, out in zip(groups, fold, strict=True) if out}
        assert not held & {group for group, out in zip(groups, fold, strict=True) if not out}


def test_a_class_of_one_patient_leaves_the_validation_images_to_judge() -> None:
    (x, y), (x_val, y_val) = made(90, 0), made(30, 1)
    groups = ["one" if label == 0 else str(number) for number, label in enumerate(y)]
    assert FitRows(x, y, groups, 3).folds() == []
    # A class whose only patient is in training is in no fold; its regressions see the training images alone.
    others = y_val > 0
    fit, said = fit_to((x, y), (x_val[others], y_val[others]), groups)
    assert fit.share[1] > 0.9
    torch.testing.assert_close(fit.mean, torch.from_numpy(x.mean(0)))
    torch.testing.assert_close(said, probe_of(fit)(torch.from_numpy(x_val[others])), rtol=1e-4, atol=1e-4)


def test_of_several_labels_each_has_its_regression() -> None:
    rng = np.random.default_rng(0)
    y, y_val = (rng.integers(0, 2, (n, 2)) for n in (80, 40))
    x, x_val = (rng.standard_normal((len(part), 2, 6)).astype(np.float32) for part in (y, y_val))
    x[:, 0, :2] += 3 * y
    x_val[:, 0, :2] += 3 * y_val
    fit, _ = fit_to((x, y), (x_val, y_val), classes=2)
    assert fit.share[0] > 0.9
    probe = StatisticsProbe(2, 6, 2, "multilabel")
    fit.copy_to(probe)
    assert ((probe(torch.from_numpy(x_val)).numpy() > 0) == y_val).mean() > 0.75


def test_classes_can_weigh_more() -> None:
    train, (x_val, y_val) = made(90, 0, told=0.5), made(30, 1, told=0.5)
    plain, weighted = (fit_to(train, (x_val, y_val), weights=w)[0] for w in (None, (5.0, 1.0, 1.0)))
    chosen = [(probe_of(fit)(torch.from_numpy(x_val)).argmax(1) == 0).sum() for fit in (plain, weighted)]
    assert chosen[1] > chosen[0]


def test_what_cannot_be_fitted_is_refused() -> None:
    (x, y), (x_val, y_val) = made(30, 0), made(9, 1)
    with pytest.raises(TrainingError, match="1 of 4 classes"):
        fit_to((x, y), (x_val, y_val), classes=4)
    with pytest.raises(TrainingError, match="no validation images"):
        fit_to((x, y), (x_val[:0], y_val[:0]))
    x[3, 2, 1] = np.nan
    with pytest.raises(TrainingError, match="not finite"):
        fit_to((x, y), (x_val, y_val))
