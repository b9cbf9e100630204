"""A step in parts: micro-batches of one process, shares of several processes, and their sum.

The gradient of a batch is the sum over its rows of weighted losses' gradients, divided by the sum of the weights of
the whole batch. Parts add up the former, so that only rounding tells them from a batch in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from stages.losses import loss_weight
from stages.methods.fusion import PromptDropout
from stages.ranks import Ranks
from stages.train.parallel import add_up

if TYPE_CHECKING:
    from stages.train.loop import Run


@dataclass(frozen=True)
class Part:
    """Some rows of a batch that pass through the network at once."""

    rows: slice
    """Among the rows that this process read."""
    place: slice | None
    """Among the rows of the whole batch, of which dropout is drawn; None: these are all."""
    whole: int
    """Rows of the whole batch."""
    usual: bool
    """Whether it has as many rows as most."""

    def prepare(self, networks: Sequence[nn.Module]) -> None:
        """Let dropout draw for these rows what it would for the whole batch."""
        for network in networks:
            for module in network.modules():
                if isinstance(module, PromptDropout):
                    module.draw_part(self.place, self.whole, again=self.rows.start > 0)


def split_batch(count: int, whole: int, batch_size: int, accumulate: int, ranks: Ranks) -> list[Part]:
    """Parts of a batch, in order.

    Args:
        count: Rows that this process read.
        whole: Rows of the batch of all processes.
        batch_size: Rows of a full batch of all processes.
        accumulate: Parts of a full batch.
        ranks: Place of this process.
    """
    own = ranks.rows(batch_size)
    # In one part whatever there is, in more than one no part is larger than those of a full batch.
    size = max(1, -(-(own.stop - own.start) // accumulate)) if accumulate > 1 else max(1, own.stop - own.start, count)
    start = ranks.rows(whole).start
    parts = []
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        place = None if rows == slice(0, whole) else slice(start + rows.start, start + rows.stop)
        parts.append(Part(rows, place, whole, rows.stop - rows.start == size))
    return parts


def join_parts(runs: Sequence[Run], losses: Sequence[torch.Tensor], labels: torch.Tensor, ranks: Ranks) -> None:
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
    add_up([*(gradient for of_run in gradients for gradient in of_run), *losses, *weights], ranks)
    for of_run, loss, weight in zip(gradients, losses, weights, strict=True):
        for gradient in of_run:
            gradient.div_(weight)
        loss.div_(weight)


def _gradients(network: nn.Module, ranks: Ranks) -> list[torch.Tensor]:
    """Those that there are; of several processes all, since one may have had no row."""
    if ranks.count > 1:
        for parameter in network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
