"""Closed forms that read training rows only through sums."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from stages.methods.base import ClosedFormMethod, FitInputs, FitShape, RowModel, method_of
from stages.methods.fit_rows import check_rows_to_fit

Sums = Mapping[str, npt.NDArray[np.float64]]
"""Sums over rows, by name. Those of several sets of rows are added array by array."""


class SummedMethod(ClosedFormMethod):
    """A closed form that reads training rows only through sums, which several sites can add up."""

    @abstractmethod
    def sums(self, inputs: FitInputs) -> Sums:
        """Return the sums over the training rows; classes may be absent, and validation rows are not read.

        Raises:
            TrainingError: If a feature is not finite, or options do not fit the task.
        """

    @abstractmethod
    def fit_sums(self, sums: Sums, shape: FitShape) -> RowModel:
        """Fit the model to sums over all rows; a class without rows gets the smallest probability."""

    @abstractmethod
    def sums_size(self, shape: FitShape) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the sums, by name."""

    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Fit to the sums of the training rows."""
        check_rows_to_fit(inputs.train, inputs.val)
        return self.fit_sums(self.sums(inputs), inputs.shape), None


def summed_method(name: str) -> SummedMethod:
    """Return the implementation of a method that is fitted to sums.

    Raises:
        TypeError: If it is not.
    """
    method = method_of(name)
    if not isinstance(method, SummedMethod):
        raise TypeError(f"{name} is not fitted to sums")
    return method
