"""Gradient accumulation over micro-batches and over processes.

The gradient of a batch is the sum over its rows of the gradients of weighted losses, divided by the sum of the weights
of the complete batch. Micro-batches accumulate the numerator, so that the result differs from a single pass only by
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.losses import loss_weight
from stages.methods.base import Network
from stages.ranks import Ranks
from stages.train.parallel import sum_over_ranks

if TYPE_CHECKING:
    from stages.train.loop import Run


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that pass through the network together."""

    rows: slice
    """Position among the rows that this process read."""
    place: slice | None
    """Position in the complete batch, for which dropout is drawn; None: the micro-batch is the complete batch."""
    batch_rows: int
    """Rows of the complete batch of all processes."""
    usual: bool
    """Whether it has the number of rows that compiled blocks are specialised to."""
    worker: int = 0
    """Its number among the workers of all processes, from 0."""

    def prepare(self, networks: Sequence[Network]) -> None:
        """Make dropout draw the masks that these rows get in a pass of the complete batch."""
        for network in networks:
            network.set_micro_batch(self.place, self.batch_rows, again=self.rows.start > 0)


def split_batch(count: int, batch_rows: int, batch_size: int, accumulate: int, ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches of a batch, in order.

    Args:
        count: Rows that this process read.
        batch_rows: Rows of the batch of all processes.
        batch_size: Rows of a full batch of all processes.
        accumulate: Micro-batches per full batch.
        ranks: Position of this process.
    """
    full = ranks.rows(batch_size)
    full_rows = full.stop - full.start
    # Without accumulation, one micro-batch of any size; with it, at most the size of those of a full batch.
    size = max(1, -(-full_rows // accumulate)) if accumulate > 1 else max(1, full_rows, count)
    start = ranks.rows(batch_rows).start
    micro_batches = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        place = None if rows == slice(0, batch_rows) else slice(start + rows.start, start + rows.stop)
        micro_batches.append(MicroBatch(rows, place, batch_rows, rows.stop - rows.start == size))
    return micro_batches


def split_workers(batch_rows: int, batch_size: int, workers: int, ranks: Ranks) -> list[MicroBatch]:
    """Return the parts of a batch of the workers of this process, in order; without those that have no rows.

    Each worker has an equal share of the batch up to one row, whatever the number of processes.

    Args:
        batch_rows: Rows of the batch of all processes.
        batch_size: Rows of a full batch of all processes.
        workers: Workers of all processes, a multiple of the processes.
        ranks: Position of this process.
    """
    start = ranks.rows(batch_rows).start
    micro_batches = []
    for worker in range(workers)[ranks.rows(workers)]:
        place = Ranks(worker, workers).rows(batch_rows)
        if place.stop > place.start:
            rows = slice(place.start - start, place.stop - start)
            complete = place == slice(0, batch_rows)
            usual = place.stop - place.start == batch_size // workers
            micro_batches.append(MicroBatch(rows, None if complete else place, batch_rows, usual, worker))
    return micro_batches


def join_gradients(runs: Sequence[Run], losses: Sequence[torch.Tensor], labels: torch.Tensor, ranks: Ranks) -> None:
    """Turn summed losses and their gradients into those of the mean over the batch of all processes, in place.

    Args:
        runs: Runs with the gradients of this process.
        losses: Loss of each run, summed over the rows of this process; changed in place.
        labels: Labels of the rows of this process.
        ranks: Position of this process.
    """
    weights = [
        loss_weight(labels, run.recipe.task, run.recipe.class_weights).to(loss)
        for run, loss in zip(runs, losses, strict=True)
    ]
    gradients = [_gradients(run.trained, ranks) for run in runs]
    sum_over_ranks(
        [*(gradient for gradients_of_run in gradients for gradient in gradients_of_run), *losses, *weights], ranks
    )
    for gradients_of_run, loss, weight in zip(gradients, losses, weights, strict=True):
        for gradient in gradients_of_run:
            gradient.div_(weight)
        loss.div_(weight)


def _gradients(members: Sequence[nn.Module], ranks: Ranks) -> list[torch.Tensor]:
    """Return the gradients; with several processes those of all learnable parameters, since one may have had no rows.

    What is not learnable in this phase of the training gets none, so that weight decay does not move it.
    """
    parameters = [parameter for member in members for parameter in member.parameters()]
    if ranks.count > 1:
        for parameter in parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
