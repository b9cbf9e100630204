"""Losses: the known ones where nothing else is asked, the stated formulas where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from torch.nn import functional as F

from schemas.parse import parse_settings
from schemas.settings import TrainSettings
from stages.losses import class_loss, kappa_loss, label_loss, plain_loss, training_loss


def recipe(**keys: Any) -> TrainSettings:
    return parse_settings({"train": keys}).train


def drawn(seed: int, n: int = 16, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=g)
    flags = torch.randint(0, 2, (n, classes), generator=g)
    return 2 * torch.randn(n, classes, generator=g), labels, flags


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.5])])
def test_the_default_is_cross_entropy_to_the_bit(weights: torch.Tensor | None) -> None:
    logits, labels, _ = drawn(0)
    expected = F.cross_entropy(logits, labels, weight=weights)
    assert torch.equal(training_loss(logits, labels, recipe(), "multiclass", weights), expected)
    assert torch.equal(plain_loss(logits, labels, "multiclass", weights), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.5])])
def test_focal_is_cross_entropy_where_gamma_vanishes(weights: torch.Tensor | None, smoothing: float) -> None:
    for seed in range(5):
        logits, labels, flags = drawn(seed)
        plain = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
        target = flags * (1 - smoothing) + smoothing / 2
        binary = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights)
        for gamma in (0.0, 1e-9):
            torch.testing.assert_close(class_loss(logits, labels, weights, gamma, smoothing), plain)
            torch.testing.assert_close(label_loss(logits, flags, weights, gamma, smoothing), binary)


def test_focal_is_the_published_formula() -> None:
    logits, labels, flags = drawn(1)
    settings = recipe(loss="focal", focal_gamma=1.5)
    p = logits.double().softmax(dim=1)[torch.arange(len(labels)), labels]
    expected = (-((1 - p) ** 1.5) * p.log()).mean()
    torch.testing.assert_close(training_loss(logits, labels, settings).double(), expected, rtol=1e-5, atol=1e-6)
    q = logits.double().sigmoid()
    p = torch.where(flags == 1, q, 1 - q)
    expected = (-((1 - p) ** 1.5) * p.log()).mean()
    found = training_loss(logits, flags, settings, "multilabel")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_focal_has_a_slope_where_everything_is_right() -> None:
    logits = torch.tensor([[40.0, 0.0, -40.0]], requires_grad=True)
    class_loss(logits, torch.tensor([0]), gamma=0.5).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    guesses=st.lists(st.integers(0, 4), min_size=40, max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_of_sure_predictions_it_is_the_quadratic_kappa(labels: list[int], guesses: list[int]) -> None:
    y, guess = np.array(labels), np.array(guesses[: len(labels)])
    if len(np.union1d(y, guess)) < 2:
        return
    kappa = cohen_kappa_score(y, guess, labels=range(5), weights="quadratic")
    logits = 60.0 * F.one_hot(torch.from_numpy(guess), 5).float()
    found = 1.0 - float(kappa_loss(logits, torch.from_numpy(y)).exp())
    assert found == pytest.approx(kappa, abs=1e-4)


def test_the_kappa_term_pulls_towards_the_grade() -> None:
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    near, far = (5.0 * F.one_hot(torch.tensor(guess), 4).float() for guess in ([0, 1, 2, 2, 3, 0], [0, 1, 2, 0, 3, 0]))
    assert kappa_loss(near, labels) < kappa_loss(far, labels)
    logits = torch.zeros(6, 4, requires_grad=True)
    for _ in range(200):
        (slope,) = torch.autograd.grad(kappa_loss(logits, labels), logits)
        logits = (logits - slope).detach().requires_grad_()
    assert (logits.argmax(dim=1) == labels).all()
    one_grade = torch.zeros(3, 4)
    one_grade[:, 2] = 60.0
    assert float(kappa_loss(one_grade, torch.tensor([2, 2, 2]))) == pytest.approx(0.0, abs=1e-4)


def test_the_kappa_term_is_added_with_its_weight() -> None:
    logits, labels, _ = drawn(2)
    plain, kappa = F.cross_entropy(logits, labels), kappa_loss(logits, labels)
    for weight in (0.0, 0.5, 2.0):
        found = training_loss(logits, labels, recipe(kappa_weight=weight), "ordinal")
        torch.testing.assert_close(found, plain + weight * kappa)
    assert torch.equal(training_loss(logits, labels, recipe(kappa_weight=2.0)), plain), "only of ordinal"
