"""Linear probes of pooled outputs and token statistics: what they read, how penalty and weights are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from schemas.errors import TrainingError
from schemas.statistics import ProbeSource
from stages.methods import logistic_path
from stages.methods.base import FitInputs
from stages.methods.batch import Batch
from stages.methods.fit_rows import FitRows, describe_rows
from stages.methods.principal_axes import principal_axes
from stages.methods.statistics import StatisticsFit, StatisticsProbe, fit_statistics, select
from stages.threads import open_threads

WIDTH = 12


def sources_of(count: int, width: int = WIDTH) -> tuple[ProbeSource, ...]:
    """Sources of one span each, one after the other."""
    return tuple(ProbeSource(name=f"source {n}", spans=((n * width, (n + 1) * width),)) for n in range(count))


def test_rows_are_pooled_outputs_then_statistics() -> None:
    pooled = torch.randn(3, 2, 8)
    statistics = torch.randn(3, 20).half()
    labels = torch.zeros(3)
    assert torch.equal(describe_rows(Batch(labels, pooled=pooled)), pooled.flatten(1))
    assert torch.equal(describe_rows(Batch(labels, statistics=statistics)), statistics.float())
    both = describe_rows(Batch(labels, pooled=pooled, statistics=statistics))
    assert both.dtype == torch.float32
    assert torch.equal(both, torch.cat([pooled.flatten(1), statistics.float()], dim=1))
    with pytest.raises(ValueError, match="pooled or statistics"):
        describe_rows(Batch(labels))


def test_a_source_joins_its_spans_in_their_order() -> None:
    rows = torch.arange(20.0).reshape(2, 10)
    source = ProbeSource(name="two spans", spans=((6, 9), (1, 3)))
    assert source.width == 5
    assert select(rows, source).tolist() == [[6, 7, 8, 1, 2], [16, 17, 18, 11, 12]]


def made(n: int, seed: int, signal: float = 1.5, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Rows of three sources of three classes: noise, one with a signal, noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    x = rng.standard_normal((n, 3 * width)).astype(np.float32)
    x[:, width : width + 3] += signal * np.eye(3, dtype=np.float32)[labels]
    return x, labels


def one_each(n: int) -> list[str]:
    return [str(number) for number in range(n)]


def fit_to(
    train: tuple[Any, Any],
    val: tuple[Any, Any],
    groups: list[str] | None = None,
    classes: int = 3,
    weights: Any = None,
    sources: tuple[ProbeSource, ...] | None = None,
) -> tuple[StatisticsFit, torch.Tensor]:
    """Fit to rows and labels, each row of another patient unless groups are named."""
    known = one_each(len(train[1])) if groups is None else groups
    others = [f"val {number}" for number in range(len(val[1]))]
    rows = FitRows(*train, known, classes), FitRows(*val, others, classes)
    read = sources or sources_of(3, train[0].shape[1] // 3)
    return fit_statistics(FitInputs(train=rows[0], val=rows[1], sources=read, class_weights=weights))


def probe_of(fit: StatisticsFit, sources: tuple[ProbeSource, ...] | None = None) -> StatisticsProbe:
    classes, total = fit.weight.shape
    probe = StatisticsProbe(sources or sources_of(3, total // 3), classes)
    fit.copy_to(probe)
    return probe


def standardised(x: Any, of: Any) -> Any:
    """Rows of unit mean square length, as the penalties of `logistic_path` are defined."""
    return (x - of.mean(0)) / of.std(0) / np.sqrt(x.shape[1])


def one_penalty(monkeypatch: pytest.MonkeyPatch, c: float) -> None:
    monkeypatch.setattr(logistic_path, "STRENGTHS", (c,))


def test_a_source_with_a_signal_has_the_largest_share() -> None:
    x_test, y_test = made(300, 2)
    fit, _ = fit_to(made(90, 0), made(30, 1))
    assert float(fit.share.sum()) == pytest.approx(1.0)
    assert fit.share[1] > 0.9
    right = (probe_of(fit)(torch.from_numpy(x_test)).argmax(1).numpy() == y_test).mean()
    assert right > 0.6
    # Of sources without a signal none is preferred.
    blind, _ = fit_to(made(90, 0, signal=0.0), made(30, 1, signal=0.0))
    assert blind.share.max() < 0.6


@pytest.mark.parametrize("width", [12, 200], ids=["more rows", "more features"])
def test_each_source_has_its_logistic_regression(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one_penalty(monkeypatch, 0.3)
    (x, y), (x_val, y_val) = made(60, 0, width=width), made(20, 1, width=width)
    fit, _ = fit_to((x, y), (x_val, y_val))
    rows, labels = np.concatenate([x, x_val]), np.concatenate([y, y_val])
    probe = probe_of(fit)
    for source in range(3):
        # The probe of one source answers with its regression.
        probe.share.copy_(torch.eye(3)[source])
        part = slice(source * width, (source + 1) * width)
        z, z_val = (standardised(some[:, part], rows[:, part]) for some in (rows, x_val))
        model = LogisticRegression(C=0.3, tol=1e-8, max_iter=5000).fit(z, labels)
        found = probe(torch.from_numpy(x_val)).numpy()
        np.testing.assert_allclose(found, model.predict_log_proba(z_val), atol=1e-2)


def test_spans_may_overlap_and_leave_numbers_out() -> None:
    train, (x_val, y_val) = made(90, 0), made(30, 1)
    sources = (
        ProbeSource(name="signal", spans=((WIDTH, WIDTH + 3),)),
        ProbeSource(name="both", spans=((2 * WIDTH, 2 * WIDTH + 4), (WIDTH, WIDTH + 3))),
    )
    fit, _ = fit_to(train, (x_val, y_val), sources=sources)
    assert fit.weight.shape == (3, 3 + 7)
    assert fit.mean.shape == fit.scale.shape == (10,)
    assert torch.equal(fit.mean[:3], fit.mean[7:])
    changed = torch.from_numpy(x_val.copy())
    changed[:, :WIDTH] = 1e3
    changed[:, 2 * WIDTH + 4 :] = -1e3
    probe = probe_of(fit, sources)
    assert torch.equal(probe(changed), probe(torch.from_numpy(x_val)))


def test_validation_images_are_fitted_to_and_evaluated_by_fits_without_them() -> None:
    # Labels that nothing explains: a fit that saw them repeats them, no other fit can.
    rng = np.random.default_rng(3)
    train, val = ((rng.standard_normal((n, 600)).astype(np.float32), np.arange(n) % 3) for n in (60, 30))
    sources = sources_of(2, 300)
    fit, held_out = fit_to(train, val, sources=sources)
    assert held_out.shape == (30, 3)
    labels = torch.from_numpy(val[1])
    seen = probe_of(fit, sources)(torch.from_numpy(val[0]))
    assert (seen.argmax(1) == labels).float().mean() > 0.8
    assert (held_out.argmax(1) == labels).float().mean() < 0.6


def test_held_out_predictions_of_validation_images_are_those_of_the_other_folds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_penalty(monkeypatch, 0.3)
    (x, y), (x_val, y_val) = made(60, 0), made(20, 1)
    fit, held_out = fit_to((x, y), (x_val, y_val))
    x, y = np.concatenate([x, x_val]), np.concatenate([y, y_val])
    groups = [*one_each(60), *(f"val {number}" for number in range(20))]
    expected = np.zeros((80, 3))
    for fold in FitRows(x, y, groups, 3).folds():
        for source, share in enumerate(fit.share.tolist()):
            part = x[:, source * WIDTH : (source + 1) * WIDTH]
            z = standardised(part, part)
            model = LogisticRegression(C=0.3, tol=1e-8, max_iter=5000).fit(z[~fold], y[~fold])
            expected[fold] += share * model.predict_log_proba(z[fold])
    np.testing.assert_allclose(held_out.numpy(), expected[60:], atol=1e-2)


def test_images_of_a_patient_are_held_out_together() -> None:
    y = np.arange(60) % 3
    groups = [str(number // 4) for number in range(60)]
    folds = FitRows(np.zeros((60, 1), np.float32), y, groups, 3).folds()
    assert len(folds) == 5
    assert (np.sum(folds, axis=0) == 1).all()
    for fold in folds:
        held = {group for group, out in zip(groups, fold, strict=True) if out}
        assert not held & {group for group, out in zip(groups, fold, strict=True) if not out}


def test_where_a_class_has_one_patient_validation_images_are_the_only_fold() -> None:
    (x, y), (x_val, y_val) = made(90, 0), made(30, 1)
    groups = ["one" if label == 0 else str(number) for number, label in enumerate(y)]
    assert FitRows(x, y, groups, 3).folds() == []
    # A class whose only patient is in training is in no fold.
    others = y_val > 0
    fit, held_out = fit_to((x, y), (x_val[others], y_val[others]), groups)
    assert fit.share[1] > 0.5
    rows, labels = np.concatenate([x, x_val[others]]), np.concatenate([y, y_val[others]])
    torch.testing.assert_close(fit.mean, torch.from_numpy(rows.mean(0)), rtol=1e-4, atol=1e-5)
    folds = [np.arange(len(rows)) >= 90]
    expected = torch.zeros(len(held_out), 3)
    for source, share in zip(sources_of(3), fit.share, strict=True):
        part = select(torch.from_numpy(rows), source).numpy()
        path = logistic_path.fit_path(principal_axes(part), labels, np.ones(3), folds)
        expected += share * path.held_out[90:].log_softmax(dim=1)
    torch.testing.assert_close(held_out, expected, rtol=1e-4, atol=1e-4)


def test_with_several_labels_each_has_its_regression() -> None:
    rng = np.random.default_rng(0)
    y, y_val = (rng.integers(0, 2, (n, 2)) for n in (80, 40))
    x, x_val = (rng.standard_normal((len(part), 12)).astype(np.float32) for part in (y, y_val))
    x[:, :2] += 3 * y
    x_val[:, :2] += 3 * y_val
    sources = sources_of(2, 6)
    fit, held_out = fit_to((x, y), (x_val, y_val), classes=2, sources=sources)
    assert fit.share[0] > 0.9
    probe = StatisticsProbe(sources, 2, "multilabel")
    fit.copy_to(probe)
    assert ((probe(torch.from_numpy(x_val)).numpy() > 0) == y_val).mean() > 0.75
    assert ((held_out.numpy() > 0) == y_val).mean() > 0.75


def test_class_weights_shift_predictions() -> None:
    train, (x_val, y_val) = made(90, 0, signal=0.5), made(30, 1, signal=0.5)
    plain, weighted = (fit_to(train, (x_val, y_val), weights=w)[0] for w in (None, (5.0, 1.0, 1.0)))
    chosen = [(probe_of(fit)(torch.from_numpy(x_val)).argmax(1) == 0).sum() for fit in (plain, weighted)]
    assert chosen[1] > chosen[0]


def test_threads_change_nothing() -> None:
    train, val = (FitRows(*made(n, seed), [f"{seed} {k}" for k in range(n)], 3) for n, seed in ((60, 0), (20, 1)))
    fits = [fit_statistics(FitInputs(train=train, val=val, sources=sources_of(3)))]
    with open_threads(3, torch.device("cpu")) as threads:
        fits.append(fit_statistics(FitInputs(train=train, val=val, sources=sources_of(3), threads=threads)))
    for one, other in zip(fits[0][0], fits[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fits[0][1], fits[1][1], rtol=1e-5, atol=1e-5)


def test_rows_that_cannot_be_fitted_to_are_refused() -> None:
    (x, y), (x_val, y_val) = made(30, 0), made(9, 1)
    with pytest.raises(TrainingError, match="1 of 4 classes"):
        fit_to((x, y), (x_val, y_val), classes=4)
    with pytest.raises(TrainingError, match="no validation images"):
        fit_to((x, y), (x_val[:0], y_val[:0]))
    x[3, 25] = np.nan
    with pytest.raises(TrainingError, match="not finite"):
        fit_to((x, y), (x_val, y_val))


@pytest.mark.parametrize("count", [60, 240])
def test_ensemble_weights_sharpen_with_the_number_of_images(count: int) -> None:
    """Each share is proportional to exp(-n loss / 4), with the loss and the number n of held-out images."""
    (x, y), (x_val, y_val) = made(count, 0, 0.3), made(30, 1, 0.3)
    fit, _ = fit_to((x, y), (x_val, y_val))
    rows, labels = np.concatenate([x, x_val]), np.concatenate([y, y_val])
    folds = FitRows(rows, labels, [*one_each(count), *(f"val {number}" for number in range(30))], 3).folds()
    losses = [
        logistic_path.fit_path(
            principal_axes(select(torch.from_numpy(rows), source).numpy()), labels, np.ones(3), folds
        ).loss
        for source in sources_of(3)
    ]
    expected = torch.tensor(losses).mul(-(count + 30) / 4).softmax(dim=0)
    assert 0.01 < float(expected.max()) < 0.99, "one source with all of the weight would prove nothing"
    torch.testing.assert_close(fit.share, expected, rtol=1e-3, atol=1e-4)


def test_squared_and_logistic_losses_share_the_weight_of_a_source() -> None:
    """A source of both losses has both regressions, which compete for weight with all others."""
    train, (x_val, y_val) = made(90, 0), made(30, 1)
    plain = sources_of(3)
    both = (*plain, *(source.by_least_squares for source in plain))
    logistic, _ = fit_to(train, (x_val, y_val))
    fit, held_out = fit_to(train, (x_val, y_val), sources=both)
    total = logistic.weight.shape[1]
    torch.testing.assert_close(fit.weight[:, :total], logistic.weight)
    assert not torch.allclose(fit.weight[:, total:], logistic.weight, atol=0.05)
    assert fit.share[1] > 0.05 and fit.share[4] > 0.05, "both fits to the source with a signal count"
    assert float(fit.share[[0, 2, 3, 5]].sum()) < 0.1
    assert (held_out.argmax(1).numpy() == y_val).mean() > 0.5
    x_test, y_test = made(300, 2)
    assert (probe_of(fit, both)(torch.from_numpy(x_test)).argmax(1).numpy() == y_test).mean() > 0.6
