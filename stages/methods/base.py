"""Interface of all methods: a network for the training loop or a closed-form fit, and a model of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from schemas.errors import BundleError
from schemas.features import LpmInfo
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.specs import HeldOut, MethodSpec
from schemas.statistics import ProbeSource
from schemas.tasks import Task
from stages.methods.batch import Batch
from stages.methods.fit_rows import FitRows, describe_rows
from stages.phases import Phase
from stages.threads import CALLING_THREAD, Threads

if TYPE_CHECKING:
    from stages.methods.statistics import StatisticsProbe

Details = Sequence[tuple[str, str]]
"""Rows (name, value) of a report."""


class Model(nn.Module):
    """A model for evaluation and prediction: maps a prepared batch to logits."""

    spec: MethodSpec

    has_head = False
    """Whether one vector per image, `head_inputs`, passes through a head, `head_logits`; it can be shifted at test
    time."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch."""
        raise NotImplementedError

    def maps(self, batch: Batch) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """Return maps that explain what is computed for the images of a prepared batch; none by default.

        Returns:
            By name, (B, blocks, gh, gw) each, a number per patch.
        """
        return {}

    def features(self, batch: Batch) -> torch.Tensor | None:  # noqa: ARG002
        """Compute the pooled output (B, D) of the adapted LPM from a prepared batch; None if it is not adapted."""
        return None

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Compute the vector (B, F) that the head reads, of a prepared batch; only with `has_head`."""
        raise NotImplementedError

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) from `head_inputs` (B, F); only with `has_head`."""
        raise NotImplementedError

    @property
    def saved_spec(self) -> MethodSpec:
        """Spec of the bundle: that of the model, with what training found."""
        return self.spec

    @property
    def needs_lpm(self) -> bool:
        """Whether `use_lpm` has to be called before the first forward pass."""
        return False

    def use_lpm(self, lpm: nn.Module) -> None:
        """Take over the frozen weights that the model needs from the LPM; does nothing by default."""


class Network(Model):
    """A model for the training loop: one member, or several that share a stream of batches."""

    standardises = False
    """Whether `standardise` has to be called before the first epoch."""

    kinds = 1
    """Number of experts in the ensemble: kinds of members, and linear probes."""

    def __init__(self) -> None:
        super().__init__()
        self.probe: StatisticsProbe | None = None
        """Linear probes, fitted in closed form before the first epoch; None: no probes."""

    @property
    def members(self) -> Sequence[nn.Module]:
        """Networks that are trained on the same batches, with separate gradients."""
        return (self,)

    def start_from(self, lpm: nn.Module) -> None:
        """Copy the initial weights from the LPM if the model adapts it; does nothing by default."""

    def continue_from(self, saved: MethodSpec, state: Mapping[str, torch.Tensor]) -> None:
        """Take over the trained parameters of a saved model of this method.

        Args:
            saved: Its spec, which differs from this one in `free_fields` only.
            state: Its weights.

        Raises:
            BundleError: If parameters are missing or have another shape.
            UnsupportedModelError: If parameters that belong to token positions cannot be resampled to another grid.
        """
        state = self.resampled(saved, state)
        own = {name: value for name, value in self.named_parameters() if value.requires_grad}
        names = self.continued(saved, own)
        if missing := [name for name in names if name not in state]:
            raise BundleError(
                f"The model lacks {len(missing)} of {len(names)} trained parameters, such as {missing[0]}.",
                "It was trained with other settings of the method.",
                "Train it with these settings, or train from new weights (train.start_from: null).",
            )
        shapes = {name: (tuple(own[name].shape), tuple(state[name].shape)) for name in names}
        if other := [(name, *shape) for name, shape in shapes.items() if shape[0] != shape[1]]:
            name, expected, found = other[0]
            raise BundleError(
                f"{len(other)} trained parameters of the model have another shape: {name} has {found} instead of "
                f"{expected}.",
                "They depend on settings that differ, such as features.image_size, and cannot be resampled.",
                "Train it with these settings, or train from new weights (train.start_from: null).",
            )
        with torch.no_grad():
            for name in names:
                own[name].copy_(state[name])

    def continued(self, saved: MethodSpec, names: Iterable[str]) -> Sequence[str]:  # noqa: ARG002
        """Return which of these parameters have a counterpart in a saved model; all by default."""
        return list(names)

    def resampled(self, saved: MethodSpec, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """Return the weights of a saved model, resampled to the image size of this one; unchanged by default."""
        return state

    def standardise(self, batches: Iterable[Batch]) -> None:
        """Take over mean and deviation of inputs from batches of all training images; does nothing by default."""

    @staticmethod
    def member_logits(members: Sequence[Any], batch: Batch, checkpointing: bool = False) -> torch.Tensor:
        """Compute logits (M, B, classes) of members of one or several networks of this class.

        Args:
            members: At least one member.
            batch: Prepared batch.
            checkpointing: Recompute activations in the backward pass instead of storing them.
        """
        raise NotImplementedError

    def join(self, logits: torch.Tensor, probe_logits: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Average `member_logits` (M, B, classes) to (B, classes)."""
        return logits[0]

    def experts(self, logits: torch.Tensor, probe_logits: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Return the terms of the average: (M, B, classes) -> (B, kinds, classes)."""
        return logits.transpose(0, 1)

    def calibrate(
        self,
        experts: torch.Tensor,
        labels: torch.Tensor,  # noqa: ARG002
        class_weights: torch.Tensor | None = None,  # noqa: ARG002
        groups: torch.Tensor | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """Calibrate on validation images: `experts` (n, kinds, classes) -> logits (n, classes)."""
        return experts[:, 0]

    @property
    def held_out(self) -> HeldOut | None:
        """What the members add to linear probes, as of the last calibration; None without linear probes."""
        return None

    def conclusion(self) -> str:
        """Return sentences on what the members add to linear probes; empty without linear probes."""
        return ""

    def chosen(self) -> Mapping[str, float]:
        """Return what the validation images selected, by name; empty by default."""
        return {}

    def reseed(self, *entropy: int) -> None:
        """Seed the random draws of training with these numbers; does nothing by default."""

    def phase(self, epoch: int, epochs: int) -> Phase:  # noqa: ARG002
        """Return the phase of an epoch, from 1, in a training of so many epochs; one for all of them by default."""
        return Phase(1, epochs)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set what learns in an epoch, from 1, of a training of so many epochs; does nothing by default.

        Called for every epoch in order, also for those before a resume.
        """

    def begin_phase(self, epoch: int, epochs: int) -> None:
        """Change weights before an epoch that begins a phase; does nothing by default."""

    def read_gradients(self) -> None:
        """Read the gradients of a batch before they are clipped and the weights updated; does nothing by default."""

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """Yield the modules that `train.compile` compiles; none by default."""
        return iter(())

    def set_micro_batch(self, rows: slice | None, batch_rows: int, again: bool) -> None:
        """Make random draws for these rows those of the complete batch; does nothing by default.

        Args:
            rows: Position of the rows in the complete batch; None: all of it.
            batch_rows: Rows of the complete batch.
            again: Whether an earlier micro-batch of the same batch was drawn for.
        """

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch."""
        return self.join(self.member_logits(self.members, batch))


class RowModel(Model):
    """A closed-form model: a function of the vectors of `describe_rows`."""

    has_head = True

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute logits (B, classes) of a prepared batch."""
        return self.row_logits(describe_rows(batch))

    def head_inputs(self, batch: Batch) -> torch.Tensor:
        """Return `describe_rows` of a prepared batch."""
        return describe_rows(batch)

    def head_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) from `describe_rows` (B, F)."""
        return self.row_logits(vectors)

    def row_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute logits (B, classes) from `describe_rows` (B, F)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FitShape:
    """What determines the shapes of a closed form: known before it is fitted."""

    method: str
    """Name of the method."""
    task: Task
    """Kind of the labels."""
    classes: int
    """C."""
    width: int
    """F, numbers of a row of `describe_rows`."""
    rows: int
    """Training rows."""
    sources: tuple[ProbeSource, ...]
    """What linear probes of an ensemble read."""


@dataclass(frozen=True)
class FitInputs:
    """Data and options of a closed-form fit."""

    train: FitRows
    """Training rows, with every class."""
    val: FitRows
    """Validation rows, at least one. Some methods are fitted to these as well."""
    task: Task = "multiclass"
    """Kind of the labels."""
    method: str = ""
    """Name of the method."""
    sources: tuple[ProbeSource, ...] = ()
    """Linear probes of an ensemble."""
    preference: float = 0.25
    """Weight per held-out image of a difference in log-loss between two of them, as in `Preset`."""
    class_weights: Sequence[float] | None = None
    """Loss weight of each class, (C,); None: all 1."""
    threads: Threads = CALLING_THREAD
    """Thread pool for independent fits."""

    @property
    def shape(self) -> FitShape:
        """Shape of the fit."""
        rows, width = self.train.x.shape
        return FitShape(self.method, self.task, self.train.classes, width, rows, self.sources)


class GradientMethod(ABC):
    """A method with epochs. Its module has one instance, `METHOD`."""

    @abstractmethod
    def spec(self, settings: ResolvedSettings, lpm: LpmInfo, classes: int) -> MethodSpec:
        """Return the network spec of resolved settings."""

    @abstractmethod
    def build(self, spec: MethodSpec) -> Network:
        """Build the network of a spec with its initial weights."""

    @abstractmethod
    def describe(self, spec: MethodSpec) -> Details:
        """Return the report's rows about this kind of network."""


class ClosedFormMethod(ABC):
    """A method that is fitted to all training rows at once. Its module has one instance, `METHOD`."""

    @abstractmethod
    def fit(self, inputs: FitInputs) -> tuple[RowModel, torch.Tensor | None]:
        """Fit the model.

        Returns:
            The model, and the out-of-fold logits (m, C) of the validation rows, or None if the model was not fitted to
            validation rows.

        Raises:
            TrainingError: If a class has no training rows, the validation split is empty, or a feature is not finite.
        """

    @abstractmethod
    def spec(self, shape: FitShape) -> MethodSpec:
        """Return the spec of a fit, with 0 in place of the hyperparameters that it selects."""

    @abstractmethod
    def build(self, spec: MethodSpec) -> RowModel:
        """Build the model of a spec without loading its weights."""

    @abstractmethod
    def describe(self, spec: MethodSpec) -> Details:
        """Return the report's rows about this kind of model."""

    def chosen(self, spec: MethodSpec) -> Mapping[str, float]:  # noqa: ARG002
        """Return the hyperparameters that the fit selected; empty by default."""
        return {}


def method_of(name: str) -> GradientMethod | ClosedFormMethod:
    """Return the implementation of a method of the registry."""
    row = METHODS[name]
    # Files of plugins are in no package: they are imported once, under a name of their own.
    module = import_module(f"stages.methods.{row.module}" if row.package else row.module)
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
    """Build the model of a spec without loading its weights."""
    return method_of(spec.method).build(spec)


def learnable_parameters(network: nn.Module) -> int:
    """Count the parameters that training changes, including the coefficients of linear probes."""
    by_gradient = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    probe = getattr(network, "probe", None)
    return by_gradient if probe is None else by_gradient + probe.weight.numel() + probe.bias.numel()
