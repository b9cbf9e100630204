"""Data parallel training: each process reads its share of every batch, and all sum their gradients.

Gradients are small here (megabytes), so that one sum of one flat buffer a step is all the traffic there is. A process
draws the dropout of the whole batch and uses its share: any number of processes trains the model that one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed, nn

from schemas.errors import PlatformError, TrainingError
from stages.ranks import ALONE, Ranks

TIMEOUT = timedelta(minutes=30)
"""After which a process gives up waiting for the others: the first may be filling its memory from a slow store."""


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[Ranks]:
    """Connect the processes; nothing happens where there is one.

    Args:
        ranks: Place of this process.
        device: Of the settings. Each process of a machine takes a GPU of its own, which becomes the current one.

    Raises:
        PlatformError: If torch cannot connect them, or there are more processes than GPUs.
    """
    if ranks.count == 1:
        yield ALONE
        return
    if not distributed.is_available():
        raise PlatformError(
            f"torch {torch.__version__} has no torch.distributed, which several processes need.",
            "This build of torch lacks it.",
            "Install a regular build of torch, or start one process.",
        )
    if device.type == "mps" or (device.type == "cuda" and ranks.local_count > torch.cuda.device_count()):
        gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        raise PlatformError(
            f"{ranks.local_count} processes were started on a machine with {gpus} GPU{'s' if gpus != 1 else ''}.",
            repair=f"Start torchrun with --nproc-per-node={gpus}, or set compute.device to cpu.",
        )
    if device.type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield ranks
    # Not after an error: it could wait for messages of the others, who learn of the end from the closed connections.
    distributed.destroy_process_group()


def sum_over_ranks(tensors: Sequence[torch.Tensor], ranks: Ranks) -> None:
    """Replace tensors of one type and device by their sums over all processes, in one message.

    Raises:
        TrainingError: If another process has ended.
    """
    if ranks.count == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _together(ranks):
        distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):  # type: ignore[no-untyped-call]
        tensor.copy_(total.view_as(tensor))


def gather_rows(rows: torch.Tensor, positions: Sequence[int], count: int, ranks: Ranks) -> torch.Tensor:
    """Rows of all processes in one tensor, (count, ...).

    Args:
        rows: Rows of this process, (len(positions), ...); all processes have the same further axes.
        positions: Where they belong.
        count: Rows of all processes together.
        ranks: Place of this process.
    """
    if ranks.count == 1:
        return rows
    gathered = rows.new_zeros(count, *rows.shape[1:])
    gathered[torch.tensor(positions, dtype=torch.int64, device=rows.device)] = rows
    sum_over_ranks([gathered], ranks)
    return gathered


def begin_alike(networks: Sequence[nn.Module], states: Sequence[tuple[str, int]], ranks: Ranks) -> None:
    """Give all processes the first one's weights, and refuse processes that are about to do different things.

    Args:
        networks: One a run.
        states: Of each run, what it trains and how many of its epochs are done.
        ranks: Place of this process.

    Raises:
        TrainingError: If the processes do not have the same settings, features or checkpoints.
    """
    if ranks.count == 1:
        return
    found: list[Sequence[tuple[str, int]] | None] = [None] * ranks.count
    with _together(ranks):
        distributed.all_gather_object(found, list(states))
    if any(other != found[0] for other in found):
        raise TrainingError(
            f"The {ranks.count} processes are not about to train the same.",
            "Their settings, features or unfinished trainings differ: they do not see the same folders.",
            "Put the study and its cache where all machines see them.",
        )
    with _together(ranks), torch.no_grad():
        for network in networks:
            for tensor in network.state_dict().values():
                distributed.broadcast(tensor, src=0)


@contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"Process {ranks.rank} of {ranks.count} lost another one: {str(error).splitlines()[0]}",
            "That one failed or was killed; what it said stands near this message.",
            "Mend what it says and start again: training goes on after the last finished epoch.",
        ) from error
