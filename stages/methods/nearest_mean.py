"""Nearest class mean: the class whose training rows are nearest on average, by cosine.

logit_c = cos(x, mean of the rows of class c) / 0.07
"""

from __future__ import annotations

from typing import cast

import torch
from torch.nn import functional as F

from schemas.probe_specs import PooledSpec
from schemas.specs import MethodSpec
from stages.methods.base import ClosedFormMethod, Details, FitInputs, FitShape, RowModel
from stages.methods.fit_rows import check_rows_to_fit
from stages.tasks import positives

TEMPERATURE = 0.07
"""Temperature of the cosine similarity, as for k-NN."""


class NearestMean(RowModel):
    """Cosine similarity to the mean of each class; with several labels per image, minus that to the rows without it."""

    means: torch.Tensor
    """(classes, 2 D), unit length."""
    opposites: torch.Tensor
    """(classes, 2 D) means of the rows without each label, unit length; zero where classes exclude each other."""

    def __init__(self, spec: PooledSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("means", torch.zeros(spec.classes, spec.features))
        self.register_buffer("opposites", torch.zeros(spec.classes, spec.features))

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, 2 D) of `describe_rows` -> (B, classes) logits."""
        return F.normalize(rows, dim=1) @ (self.means - self.opposites).T / TEMPERATURE


class NearestMeanMethod(ClosedFormMethod):
    """Nearest class mean as a method."""

    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Average the normalised training rows of each class."""
        train = inputs.train
        check_rows_to_fit(train, inputs.val)
        rows = F.normalize(torch.from_numpy(train.x), dim=1)
        members = torch.from_numpy(positives(train.y, train.classes).T.astype("float32"))
        model = NearestMean(self.spec(inputs.shape))
        model.means.copy_(F.normalize(members @ rows, dim=1))
        if inputs.task == "multilabel":
            model.opposites.copy_(F.normalize((1 - members) @ rows, dim=1))
        return model.eval(), None

    def spec(self, shape: FitShape) -> PooledSpec:
        """Return the spec."""
        return PooledSpec(method="nearest-mean", classes=shape.classes, features=shape.width, task=shape.task)

    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec."""
        return NearestMean(cast("PooledSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return the size of the means."""
        return (("Class means", f"{spec.classes} of {cast('PooledSpec', spec).features} values"),)


METHOD = NearestMeanMethod()
