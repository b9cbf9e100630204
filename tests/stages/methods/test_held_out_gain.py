"""The comparison of linear probes with and without networks."""

from __future__ import annotations

import pytest
import torch

from stages.losses import plain_loss, row_losses
from stages.methods.held_out_gain import FOLDS, group_folds, paired_losses


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_the_weighted_mean_of_the_rows_is_the_loss(task: str, weights: torch.Tensor | None) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 3, generator=g)
    labels = torch.arange(11) % 3 if task == "multiclass" else torch.randint(0, 2, (11, 3), generator=g)
    losses, of_rows = row_losses(logits, labels, task, weights)  # type: ignore[arg-type]
    expected = plain_loss(logits, labels, task, weights)  # type: ignore[arg-type]
    torch.testing.assert_close((losses * of_rows).sum() / of_rows.sum(), expected)


def test_every_row_is_in_one_fold_with_its_patient() -> None:
    groups = torch.tensor([7, 7, 3, 9, 9, 9, 1, 4, 5, 5, 6])
    folds = group_folds(groups)
    assert len(folds) == FOLDS
    assert torch.stack(folds).sum(dim=0).tolist() == [1] * len(groups)
    for fold in folds:
        assert fold.any()
        assert not set(groups[fold].tolist()) & set(groups[~fold].tolist())
    assert [fold.tolist() for fold in group_folds(torch.tensor([2, 2]))] == [[True, True]]


def test_the_standard_error_is_that_of_a_mean_over_patients() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 30, 2, generator=g, dtype=torch.float64)
    labels = torch.arange(30) % 2
    losses = [torch.nn.functional.cross_entropy(one, labels, reduction="none") for one in (first, second)]
    without, averaged, error = paired_losses(first, second, labels, torch.arange(30)).tolist()
    assert [without, averaged] == pytest.approx([float(one.mean()) for one in losses])
    assert error == pytest.approx(float((losses[0] - losses[1]).std() / 30**0.5))
    # A second copy of every image is no more evidence if it is of the same patient.
    twice = [torch.cat([one, one]) for one in (first, second, labels)]
    patients = torch.arange(30).repeat(2)
    assert paired_losses(*twice, patients)[2] == pytest.approx(error)  # type: ignore[misc]
    assert paired_losses(*twice, torch.arange(60))[2] < 0.8 * error  # type: ignore[misc]
    assert paired_losses(first, second, labels, torch.zeros(30))[2].isnan()


def test_classes_count_as_their_weights() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    labels, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 3.0])
    found = paired_losses(logits, 2 * logits, labels, torch.arange(4), "multiclass", weights)
    assert float(found[0]) == pytest.approx(float(plain_loss(logits, labels, "multiclass", weights)))
    losses = [torch.nn.functional.cross_entropy(one, labels, reduction="none") for one in (logits, 2 * logits)]
    residuals = weights[labels] * (losses[0] - losses[1] - float(found[0] - found[1]))
    assert float(found[2]) == pytest.approx(float((4 / 3 * (residuals**2).sum()).sqrt() / 8))
