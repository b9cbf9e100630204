"""What every method provides: a network for the training loop, or a fit in closed form; and a model of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from schemas.features import LpmInfo
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.specs import MethodSpec
from schemas.tasks import Task
from stages.methods.batch import Batch
from stages.methods.fit_rows import FitRows, describe_rows
from stages.threads import CALLING_THREAD, Threads

if TYPE_CHECKING:
    from stages.methods.statistics import StatisticsProbe

Details = Sequence[tuple[str, str]]
"""(name, value) lines of a report."""


class Model(nn.Module):
    """What is evaluated and predicts: a module from a prepared batch to logits."""

    spec: MethodSpec

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch."""
        raise NotImplementedError

    def use_lpm(self, lpm: nn.Module) -> None:
        """Take the frozen weights that the model needs besides its trained ones from the LPM; by default none."""


class Network(Model):
    """What the training loop trains: one member, or several that share a stream of batches."""

    kinds = 1
    """Experts that are averaged: kinds of members, and linear probes."""
    probe: StatisticsProbe | None = None
    """Linear probes that are fitted in closed form before the first epoch."""

    @property
    def members(self) -> Sequence[nn.Module]:
        """Networks that learn from the same batches, each with a gradient of its own."""
        return (self,)

    def start_from(self, lpm: nn.Module) -> None:
        """Take the initial weights from the LPM, where the model is an adaptation of it; by default none."""

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (M, B, classes) of members of one or several networks of this class.

        Args:
            members: At least one.
            batch: Prepared.
            checkpointing: Compute activations again in the backward pass rather than keep them.
        """
        raise NotImplementedError

    def join(self, logits: torch.Tensor, probe_logits: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Average (M, B, classes) of `member_logits` to (B, classes)."""
        return logits[0]

    def experts(self, logits: torch.Tensor, probe_logits: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Return what the average is made of: (M, B, classes) -> (B, kinds, classes)."""
        return logits.transpose(0, 1)

    def calibrate(
        self,
        experts: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002
        class_weights: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """Fit what is fitted on validation images: (n, kinds, classes) of `experts` -> logits (n, classes)."""
        return experts[:, 0]

    def reseed(self, *entropy: int) -> None:
        """Draw whatever is random in training from here on as these numbers determine; by default nothing is."""

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """Yield the modules that `train.compile` compiles; by default none."""
        return iter(())

    def set_micro_batch(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Let random draws for some rows be those of the complete batch; by default nothing is drawn.

        Args:
            rows: Of the batch; None: all.
            batch_rows: Rows of the complete batch.
            again: Whether an earlier micro-batch of the same batch has drawn.
        """

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch."""
        return self.join(self.member_logits(self.members, batch))


class RowModel(Model):
    """A model fitted in closed form: a function of described rows."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch."""
        return self.row_logits(describe_rows(batch))

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, S, 2 D) of `describe_rows` -> (B, classes) logits."""
        raise NotImplementedError


@dataclass(frozen=True)
class FitInputs:
    """What a closed form is fitted to."""

    train: FitRows
    """Every class occurs."""
    val: FitRows
    """At least one row. Only some methods fit to them, too."""
    task: Task = "multiclass"
    """What the labels mean."""
    layers: tuple[int, ...] = ()
    """Tapped blocks of the features."""
    class_weights: Sequence[float] | None = None
    """(C,) weight of each class in the losses; None: all 1."""
    threads: Threads = CALLING_THREAD
    """Shared by independent fits."""


class GradientMethod(ABC):
    """A method with epochs. Its module holds one instance, `METHOD`."""

    @abstractmethod
    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> MethodSpec:
        """Return the spec of the network that resolved settings describe."""

    @abstractmethod
    def build(self, spec: MethodSpec) -> Network:
        """Build the network of a spec with its initial weights."""

    @abstractmethod
    def describe(self, spec: MethodSpec) -> Details:
        """Return what only this kind of network has, for the report."""


class ClosedFormMethod(ABC):
    """A method that is fitted to all training rows at once. Its module holds one instance, `METHOD`."""

    @abstractmethod
    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Fit.

        Returns:
            The model, and (m, C) logits of the validation rows by models that were not fitted to them; None: the model
            was not fitted to them.

        Raises:
            TrainingError: If a class has no training rows, there are no validation rows, or a feature is not finite.
        """

    @abstractmethod
    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec, its weights still to be loaded."""

    @abstractmethod
    def describe(self, spec: MethodSpec) -> Details:
        """Return what only this kind of model has, for the report."""

    def chosen(self, spec: MethodSpec) -> Mapping[str, float]:  # noqa: ARG002
        """Return the hyperparameters that the fit chose; by default there are no such."""
        return {}


def method_of(name: str) -> GradientMethod | ClosedFormMethod:
    """Return the implementation of a method of the registry."""
    module = import_module(f"stages.methods.{METHODS[name].module}")
    return cast("GradientMethod | ClosedFormMethod", module.METHOD)


def gradient_method(name: str) -> GradientMethod:
    """Return the implementation of a method that is trained by gradient.

    Raises:
        TypeError: If it is fitted in closed form.
    """
    method = method_of(name)
    if not isinstance(method, GradientMethod):
        raise TypeError(f"{name} is not trained by gradient")
    return method


def closed_form_method(name: str) -> ClosedFormMethod:
    """Return the implementation of a method that is fitted in closed form.

    Raises:
        TypeError: If it is trained by gradient.
    """
    method = method_of(name)
    if not isinstance(method, ClosedFormMethod):
        raise TypeError(f"{name} is not fitted in closed form")
    return method


def build_model(spec: MethodSpec) -> Model:
    """Build a model of this spec, its weights still to be loaded."""
    return method_of(spec.method).build(spec)


def learnable_parameters(network: nn.Module) -> int:
    """Count the parameters that training changes, the coefficients of linear probes included."""
    learned = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    probe = getattr(network, "probe", None)
    return learned if probe is None else learned + probe.weight.numel() + probe.bias.numel()
