"""Data-parallel training: each process reads its rows of every batch, and gradients are summed over all processes.

Gradients are small (megabytes), so that one all-reduce of a flat buffer per step is sufficient. Each process draws the
dropout masks of the complete batch and uses its rows of them: the model does not depend on the number of processes.
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
"""Time limit for waiting for other processes. It is long, because one may be loading features from a slow store."""


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[Ranks]:
    """Connect the processes; a single process needs no connection.

    Args:
        ranks: Position of this process.
        device: Device of the settings. Each process of a machine gets its own GPU, which becomes the current device.

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
    # Not after an error: it could wait for messages of other processes, which end when the connection closes.
    distributed.destroy_process_group()


def sum_over_ranks(tensors: Sequence[torch.Tensor], ranks: Ranks) -> None:
    """Replace tensors of one type and device by their sums over all processes, with a single all-reduce.

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
    """Gather the rows of all processes in one tensor, (count, ...).

    Args:
        rows: Rows of this process, (len(positions), ...); the other axes are equal in all processes.
        positions: Indices of these rows in the result.
        count: Rows of all processes together.
        ranks: Position of this process.
    """
    if ranks.count == 1:
        return rows
    gathered = rows.new_zeros(count, *rows.shape[1:])
    gathered[torch.tensor(positions, dtype=torch.int64, device=rows.device)] = rows
    sum_over_ranks([gathered], ranks)
    return gathered


def begin_alike(networks: Sequence[nn.Module], states: Sequence[tuple[str, int]], ranks: Ranks) -> None:
    """Check that all processes train the same runs, and copy the weights of rank 0 to the others.

    Args:
        networks: Network of each run.
        states: Key and number of finished epochs of each run.
        ranks: Position of this process.

    Raises:
        TrainingError: If the processes do not have the same settings, features or checkpoints.
    """
    if ranks.count == 1:
        return
    rank_states: list[Sequence[tuple[str, int]] | None] = [None] * ranks.count
    with _together(ranks):
        distributed.all_gather_object(rank_states, list(states))
    if any(other != rank_states[0] for other in rank_states):
        raise TrainingError(
            f"The {ranks.count} processes would not train the same model.",
            "Their settings, features or checkpoints differ, because they do not read the same folders.",
            "Put the study and its cache on storage that all machines share.",
        )
    copy_from_first(networks, ranks)


def copy_from_first(networks: Sequence[nn.Module], ranks: Ranks) -> None:
    """Copy the weights of rank 0 to the other processes.

    Raises:
        TrainingError: If another process has ended.
    """
    if ranks.count == 1:
        return
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
            "That process failed or was killed; its error is printed nearby.",
            "Fix it and restart; training resumes after the last finished epoch.",
        ) from error
