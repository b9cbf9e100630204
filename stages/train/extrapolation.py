"""Extrapolation for large batches: every part of a batch has its gradient at an extrapolated point of its own.

A reading of EXTRAP-SGD (arXiv 2006.05720), extragradient "from the past": the K workers of a step, here the parts of a
batch, keep their last local gradients g_k, from 0, and

    w_k = w - eta_hat g_k          g_k <- grad f(w_k; B_k)          w <- inner step of mean_k g_k

so that a step costs one gradient, as without extrapolation. Gradients of parts are weighted as in the mean over the
batch; weight decay and clipping belong to the inner step only. eta_hat is `train.extrapolation.rate` times the learning
rate of the step: by default eta / K, the rate of a small batch. Symbols, this default, and that momentum enters the
inner step only are UNVERIFIED, as the paper's algorithm was not available. AdamW as the inner optimiser is ours. Its
steps are longer than eta times a gradient by orders of magnitude: `direction: preconditioned` takes

    w_k = w - eta_hat g_k / (sqrt(v_hat) + eps)          each number of the quotient at most 1

with AdamW's estimate v_hat of the squared gradient, which is ours as well.

The past gradients are in the state of the inner optimiser, hence in checkpoints, and gone where a phase of the training
starts without optimiser state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from stages.losses import loss_weight
from stages.ranks import Ranks
from stages.train.parallel import sum_over_ranks

if TYPE_CHECKING:
    from schemas.settings import TrainSettings
    from stages.train.loop import Run

_SMALLEST = 1e-30
"""In place of a weight of 0: the gradient of rows without weight is 0."""


def past_gradient(worker: int) -> str:
    """Return the name, in the state of an optimiser, of the last gradient of a worker, from 0."""
    return f"gradient_of_worker_{worker}"


class ExtrapolatedStep:
    """One step of an optimiser with workers.

    After `zero_grad` of the optimiser: `at` for each worker, `join`, clipping and step of the optimiser, `remember`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
        """Start a step.

        Args:
            optimizer: Inner optimiser with the learning rate of the step.
            settings: `extrapolation`.
        """
        self._optimizer, self._extrapolation = optimizer, settings.extrapolation
        self._parameters = [value for group in optimizer.param_groups for value in group["params"]]
        self._recent: dict[int, list[torch.Tensor | None]] = {}
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    @contextmanager
    def at(self, worker: int, weight: torch.Tensor | None) -> Iterator[None]:
        """Hold the parameters at the point of a worker, and take over the gradients that were added there.

        The parameters are restored exactly, also after an exception.

        Args:
            worker: Number of the worker, from 0.
            weight: What its gradients are divided by for their mean; None: they are means.
        """
        moved = self._move(worker)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in moved:
                    parameter.copy_(value)
        self._take(worker, weight)

    @torch.no_grad()
    def _move(self, worker: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Move the parameters to the point of a worker; return those that moved, with their values before."""
        moved = []
        for group in self._optimizer.param_groups:
            rate = group["lr"] * self._extrapolation.relative_rate
            for parameter in group["params"]:
                past = self._optimizer.state.get(parameter, {}).get(past_gradient(worker))
                if past is None or not parameter.requires_grad:
                    continue
                moved.append((parameter, parameter.clone()))
                parameter.sub_(self._direction(parameter, past, group), alpha=rate)
        return moved

    def _direction(self, parameter: torch.Tensor, past: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the direction of a past gradient."""
        if self._extrapolation.direction == "gradient":
            return past
        state, (_, beta) = self._optimizer.state[parameter], group["betas"]
        root: torch.Tensor = (state["exp_avg_sq"] / (1 - beta ** state["step"])).sqrt()
        # The estimate is that of clipped gradients: without a bound, one that was clipped a hundredfold would move each
        # number by a hundred steps.
        return (past / root.add_(group["eps"])).clamp_(-1.0, 1.0)

    @torch.no_grad()
    def _take(self, worker: int, weight: torch.Tensor | None) -> None:
        """Take the gradients off the parameters, as those of a worker and as terms of the sums."""
        divisor = None if weight is None else weight.clamp_min(_SMALLEST)
        recent: list[torch.Tensor | None] = []
        for position, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            recent.append(None if gradient is None else gradient.clone() if divisor is None else gradient / divisor)
            total = self._sums[position]
            if total is None:
                self._sums[position] = gradient
            elif gradient is not None:
                # As autograd adds to a gradient, so that without extrapolation the sum is that of micro-batches.
                total.add_(gradient)
            parameter.grad = None
        self._recent[worker] = recent

    def join(self) -> None:
        """Give the parameters the sums of the gradients of all workers."""
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            parameter.grad = total

    def remember(self) -> None:
        """Keep the gradients of the workers for the next step; after the optimiser's step, which begins its state."""
        for worker, gradients in self._recent.items():
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    self._optimizer.state[parameter][past_gradient(worker)] = gradient


class Extrapolation:
    """A step of several runs with workers; does nothing for runs without extrapolation."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Start a step.

        Args:
            runs: Runs that share their batches, and `train.optimizer`.
        """
        self._runs = [run for run in runs if run.recipe.settings.extrapolates]
        self._steps = [ExtrapolatedStep(run.state.optimizer, run.recipe.settings) for run in self._runs]

    @contextmanager
    def at(self, worker: int, labels: torch.Tensor, summed: bool) -> Iterator[None]:
        """Hold the parameters of all runs at the points of a worker.

        Args:
            worker: Number of the worker.
            labels: Labels of its rows.
            summed: Whether the losses are summed over the rows; else they are means.
        """
        with ExitStack() as stack:
            for run, step in zip(self._runs, self._steps, strict=True):
                recipe = run.recipe
                weight = loss_weight(labels, recipe.task, recipe.class_weights).to(recipe.device) if summed else None
                stack.enter_context(step.at(worker, weight))
            yield

    def join(self) -> None:
        """Give the parameters the sums of the gradients of all workers."""
        for step in self._steps:
            step.join()

    def remember(self) -> None:
        """Keep the gradients of the workers for the next step."""
        for step in self._steps:
            step.remember()


def begin_workers(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> None:
    """Give every parameter with an optimiser state a past gradient of 0 for each worker, if there are workers."""
    for parameter, state in optimizer.state.items() if settings.extrapolates else ():
        for worker in range(settings.extrapolation.workers):
            state.setdefault(past_gradient(worker), torch.zeros_like(parameter))


def gather_workers(run: Run, ranks: Ranks) -> None:
    """Give every process the last gradients of the workers of all processes, for a checkpoint.

    Raises:
        TrainingError: If another process has ended.
    """
    settings = run.recipe.settings
    if ranks.count == 1 or not settings.extrapolates:
        return
    mine = ranks.rows(settings.extrapolation.workers)
    for parameter, state in run.state.optimizer.state.items():
        for worker in range(settings.extrapolation.workers):
            name = past_gradient(worker)
            # Those of other processes may be here from a checkpoint.
            if name not in state or not mine.start <= worker < mine.stop:
                state[name] = torch.zeros_like(parameter)
        sum_over_ranks([state[past_gradient(worker)] for worker in range(settings.extrapolation.workers)], ranks)
