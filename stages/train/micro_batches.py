"""Gradient accumulation: micro-batches of one process, shares of several processes, and their sum.

The gradient of a batch is the sum over its rows of weighted losses' gradients, divided by the sum of the weights of
the complete batch. Micro-batches accumulate the former, so that the result differs from a single pass only by rounding.
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
    """Rows of a batch that pass through the network at once."""

    rows: slice
    """Among the rows that this process read."""
    place: slice | None
    """Among the rows of the complete batch, for which dropout is drawn; None: these are all."""
    batch_rows: int
    """Rows of the complete batch of all processes."""
    usual: bool
    """Whether it has as many rows as most."""

    def prepare(self, networks: Sequence[Network]) -> None:
        """Let dropout draw for these rows what it would for the complete batch."""
        for network in networks:
            network.set_micro_batch(self.place, self.batch_rows, again=self.rows.start > 0)


def split_batch(count: int, batch_rows: int, batch_size: int, accumulate: int, ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches of a batch, in order.

    Args:
        count: Rows that this process read.
        batch_rows: Rows of the batch of all processes.
        batch_size: Rows of a full batch of all processes.
        accumulate: Micro-batches of a full batch.
        ranks: Place of this process.
    """
    own = ranks.rows(batch_size)
    # Without accumulation one micro-batch whatever its size; with it none is larger than those of a full batch.
    size = max(1, -(-(own.stop - own.start) // accumulate)) if accumulate > 1 else max(1, own.stop - own.start, count)
    start = ranks.rows(batch_rows).start
    micro_batches = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        place = None if rows == slice(0, batch_rows) else slice(start + rows.start, start + rows.stop)
        micro_batches.append(MicroBatch(rows, place, batch_rows, rows.stop - rows.start == size))
    return micro_batches


def join_gradients(runs: Sequence[Run], losses: Sequence[torch.Tensor], labels: torch.Tensor, ranks: Ranks) -> None:
    """Make the gradients of summed losses those of the batch's mean loss, and the losses themselves such means.

    Args:
        runs: With the gradients of this process.
        losses: Of each run, the sum over the rows of this process; changed in place.
        labels: Of the rows of this process.
        ranks: Place of this process.
    """
    weights = [
        loss_weight(labels, run.recipe.task, run.recipe.class_weights).to(loss)
        for run, loss in zip(runs, losses, strict=True)
    ]
    gradients = [_gradients(run.network, ranks) for run in runs]
    sum_over_ranks(
        [*(gradient for gradients_of_run in gradients for gradient in gradients_of_run), *losses, *weights], ranks
    )
    for gradients_of_run, loss, weight in zip(gradients, losses, weights, strict=True):
        for gradient in gradients_of_run:
            gradient.div_(weight)
        loss.div_(weight)


def _gradients(network: nn.Module, ranks: Ranks) -> list[torch.Tensor]:
    """Return the gradients; with several processes of all parameters, since one process may have had no row."""
    if ranks.count > 1:
        for parameter in network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
