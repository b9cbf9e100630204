"""Linear probe: logistic regression on the LPM's pooled outputs, tuned in folds of the training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from schemas.probe_specs import LinearSpec
from schemas.specs import MethodSpec
from stages.methods.base import ClosedFormMethod, Details, FitInputs, FitShape, RowModel
from stages.methods.fit_rows import FitRows, check_rows_to_fit
from stages.methods.regression import LinearFit, fit_regression


def fit_linear_probe(train: FitRows, val: FitRows, class_weights: Sequence[float] | None = None) -> LinearFit:
    """Logistic regression of the training rows, with the C of the lowest out-of-fold log-loss among them.

    Every training row is held out once, in up to five folds by patient; the final fit is to all training rows. Where
    a class has one patient there are no folds, and the validation rows choose. With several labels an image it is one
    regression of each label, with one C for all.

    The loss, not the AUC, chooses: of some dozen images the AUC takes few values and jumps between them. Some dozen
    validation images would make the choice a matter of luck as well.

    Args:
        train: Every class occurs.
        val: At least one row.
        class_weights: (C,) weight of each class in both losses, of several labels that of yes; None: all 1.

    Raises:
        TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
    """
    check_rows_to_fit(train, val)
    weights = np.ones(train.classes) if class_weights is None else np.asarray(class_weights, np.float64)
    folds = train.folds()
    held = val.at(np.full(len(val.y), not folds))
    # Products of a few hundred rows are too small to be split among cores: on a busy machine 92 s instead of 1 s.
    with threadpool_limits(1):
        return fit_regression(train.x, train.y, held.x, held.y, weights, folds)


class LinearProbe(nn.Module):
    """Logistic regression on the LPM's pooled outputs. Fitted, not trained: no gradient reaches it."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        for name, shape in {"weight": (classes, width), "bias": (classes,), "mean": (width,)}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """(B, 2 D) -> logits (B, classes)."""
        return (pooled - self.mean) / self.scale @ self.weight.T + self.bias


class LinearModel(RowModel):
    """A linear probe of the pooled outputs."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self.probe = LinearProbe(spec.features, spec.classes)

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, 2 D) of `describe_rows` -> (B, classes) logits."""
        logits: torch.Tensor = self.probe(rows)
        return logits


class LinearMethod(ClosedFormMethod):
    """The linear probe as a method."""

    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Fit to the training rows."""
        fit = fit_linear_probe(inputs.train, inputs.val, inputs.class_weights)
        model = LinearModel(self.spec(inputs.shape).model_copy(update={"c": fit.c}))
        model.probe.load_state_dict({name: getattr(fit, name) for name in ("weight", "bias", "mean", "scale")})
        return model.eval(), None

    def spec(self, shape: FitShape) -> LinearSpec:
        """Return the spec without its penalty."""
        return LinearSpec(classes=shape.classes, features=shape.width, c=0.0, task=shape.task)

    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec."""
        return LinearModel(cast("LinearSpec", spec))

    def describe(self, spec: MethodSpec) -> Details:
        """Return the penalty."""
        return (("C of the logistic regression", f"{cast('LinearSpec', spec).c:g}"),)

    def chosen(self, spec: MethodSpec) -> Mapping[str, float]:
        """Return the penalty."""
        return {"C": cast("LinearSpec", spec).c}


METHOD = LinearMethod()
