"""k nearest neighbours by the LPM's pooled outputs, k tuned in folds of the training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from schemas.probe_specs import KnnSpec
from schemas.specs import MethodSpec
from schemas.tasks import Task
from stages.methods.base import ClosedFormMethod, Details, FitInputs, FitShape, RowModel
from stages.methods.fit_rows import FitRows, check_rows_to_fit, held_out
from stages.methods.regression import label_log_loss, log_loss

NEIGHBOURS: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
"""Candidates of k."""
TEMPERATURE = 0.07
"""Temperature of the cosine similarity in the votes of neighbours."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


class KnnProbe(RowModel):
    """Votes of the training rows of highest cosine similarity.

    Each of the k nearest rows votes for its label with exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978), the
    votes scaled to k in all. One more vote is shared among the classes as they occur in training: a class without a
    neighbour is improbable, not impossible. With several labels an image, a row votes yes or no for each.
    """

    spec: KnnSpec
    has_head = False
    rows: torch.Tensor
    labels: torch.Tensor
    class_weights: torch.Tensor

    def __init__(self, spec: KnnSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("rows", torch.zeros(spec.rows, spec.features))
        shape = (spec.rows, spec.classes) if spec.task == "multilabel" else (spec.rows,)
        self.register_buffer("labels", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("class_weights", torch.ones(spec.classes))

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, 2 D) of `describe_rows` -> (B, classes) logarithms of the shares of the votes; of labels log-odds."""
        return self.vote(*self.nearest(rows))

    def nearest(self, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 2 D) -> cosine similarity and index (B, k) of the nearest rows, the nearest first."""
        values, rows = (F.normalize(sources, dim=1) @ self.rows.T).topk(self.spec.neighbours, dim=1)
        return values, rows

    def vote(self, similarity: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, k) of `nearest` -> (B, classes)."""
        k = similarity.shape[1]
        votes = k * torch.softmax(similarity / TEMPERATURE, dim=1)
        several = self.spec.task == "multilabel"
        labels = (self.labels if several else F.one_hot(self.labels, self.spec.classes)).to(votes.dtype)
        counts = (votes[:, :, None] * labels[rows]).sum(dim=1) + labels.mean(dim=0)
        weighted = counts * self.class_weights
        if several:
            against = k + 1 - counts
            return torch.log(weighted.clamp_min(1e-12)) - torch.log(against.clamp_min(1e-12))
        # A class of weight 0 has a share of 0, whose logarithm the losses could not average.
        return torch.log((weighted / weighted.sum(dim=1, keepdim=True)).clamp_min(1e-12))


def fit_knn(
    train: FitRows, val: FitRows, class_weights: Sequence[float] | None = None, task: Task = "multiclass"
) -> KnnProbe:
    """A k-NN of the training rows, with the k of the lowest out-of-fold log-loss among them.

    Folds, arguments and errors are those of `fit_linear_probe`.
    """
    check_rows_to_fit(train, val)
    weights = torch.ones(train.classes) if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
    pairs = held_out(train, val)
    fewest = min(len(seen.y) for seen, _ in pairs)
    candidates = [k for k in NEIGHBOURS if k <= fewest]
    losses = np.zeros(len(candidates))
    for seen, judged in pairs:
        model = _knn(seen, candidates[-1], weights, task)
        values, rows = model.nearest(torch.from_numpy(judged.x))
        for position, k in enumerate(candidates):
            logits = model.vote(values[:, :k], rows[:, :k]).double()
            losses[position] += len(judged.y) * _knn_loss(logits, judged.y, weights.double().numpy(), task)
    return _knn(train, candidates[int(losses.argmin())], weights, task)


def _knn(rows: FitRows, k: int, weights: torch.Tensor, task: Task) -> KnnProbe:
    x = F.normalize(torch.from_numpy(rows.x), dim=1)
    spec = KnnSpec(classes=rows.classes, features=x.shape[1], rows=len(x), neighbours=k, task=task)
    model = KnnProbe(spec)
    model.load_state_dict({"rows": x, "labels": torch.from_numpy(rows.y), "class_weights": weights})
    return model.eval()


def _knn_loss(logits: torch.Tensor, labels: Labels, weights: Floats, task: Task) -> float:
    if task == "multilabel":
        return label_log_loss(F.logsigmoid(logits).numpy(), F.logsigmoid(-logits).numpy(), labels, weights)
    return log_loss(logits.numpy(), labels, weights)


class KnnMethod(ClosedFormMethod):
    """k nearest neighbours as a method."""

    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Keep the training rows, and choose k.

        Each training row finds itself, so that the training loss of a k-NN is no measure of anything.
        """
        return fit_knn(inputs.train, inputs.val, inputs.class_weights, inputs.task), None

    def spec(self, shape: FitShape) -> KnnSpec:
        """Return the spec without k."""
        return KnnSpec(classes=shape.classes, features=shape.width, rows=shape.rows, neighbours=0, task=shape.task)

    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec."""
        return KnnProbe(cast("KnnSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return k."""
        knn = cast("KnnSpec", spec)
        return (("Neighbours", f"{knn.neighbours} of {knn.rows:,} rows"),)

    def chosen(self, spec: MethodSpec) -> Mapping[str, float]:
        """Return k."""
        return {"k": cast("KnnSpec", spec).neighbours}


METHOD = KnnMethod()
