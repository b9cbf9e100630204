"""Checkpoints of unfinished trainings: one file per run, whose digest is checked before it is parsed.

fpt checkpoint 1 <sha256 of the rest>\\n<JSON: key, epochs>\\n<safetensors: weights, best weights, optimiser state>
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from schemas.base import canonical_json
from schemas.errors import StorageError
from schemas.results import EpochLog
from stages.files import atomic_write, read_regular
from stages.methods.base import Network

HEAD = b"fpt checkpoint 1 "
"""First bytes; the number is the version of the layout, so that other versions are not parsed."""
_LENGTH = len(HEAD) + 64 + 1


@dataclass
class Fit:
    """State of a run, as saved in a checkpoint."""

    network: Network
    """Current weights."""
    optimizer: torch.optim.Optimizer
    """Inner optimiser, whose state has the past gradients of workers as well (`stages.train.extrapolation`)."""
    epochs: list[EpochLog] = field(default_factory=list)
    """Finished epochs."""
    best: int = 0
    """Number of the selected epoch, from 1; 0 before the first."""
    best_state: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights of that epoch, on the CPU."""


def save_checkpoint(state: Fit, path: Path, key: str) -> None:
    """Replace the checkpoint, atomically and durably in the event of a power failure.

    Args:
        state: State after at least one epoch.
        path: File; several processes may write it at once.
        key: Full key of the run, `run.run_key`.

    Raises:
        StorageError: If it cannot be written.
    """
    moments = {
        f"optimizer.{index}.{name}": value
        for index, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    tensors = {
        **{f"network.{name}": value for name, value in state.network.state_dict().items()},
        **{f"best.{name}": value for name, value in state.best_state.items()},
        **moments,
    }
    write_tensors(
        path, {"key": key, "best": state.best, "epochs": [log.model_dump(mode="json") for log in state.epochs]}, tensors
    )


def save_weights(network: nn.Module, path: Path, key: str) -> None:
    """Write the weights of one epoch, which `load_weights` reads.

    Raises:
        StorageError: If they cannot be written.
    """
    write_tensors(path, {"key": key}, network.state_dict())


def load_weights(network: nn.Module, path: Path, key: str) -> None:
    """Load the weights of one epoch.

    Raises:
        StorageError: If the file is missing, damaged, or of another run.
    """
    try:
        _, tensors = read_tensors(path, key)
        _check_shapes(tensors, network.state_dict())
    except UnusableError as error:
        problem = str(error)
    except FileNotFoundError:
        problem = "is missing"
    except ValueError:
        problem = "was written by another version"
    else:
        network.load_state_dict(dict(tensors))
        return
    raise StorageError(
        f"The checkpoint {path} {problem}.",
        "It was removed or damaged while the training needed it.",
        f"Remove the files in {path.parent}, then run `fpt train` again: training starts from the first epoch.",
    )


def load_checkpoint(state: Fit, path: Path, key: str) -> str | None:
    """Resume from the checkpoint of this run if it is intact; otherwise leave the state unchanged.

    Args:
        state: State of a new run; receives weights, optimiser state and finished epochs.
        path: File of the checkpoint.
        key: Full key of the run, `job.run_key`.

    Returns:
        Why an existing checkpoint cannot be resumed, or None if it was resumed or does not exist.
    """
    try:
        progress, tensors = read_tensors(path, key)
        epochs = [EpochLog.model_validate(log) for log in progress["epochs"]]
        network, best, moments = (below(f"{section}.", tensors) for section in ("network", "best", "optimizer"))
        _check_shapes(network, state.network.state_dict())
        _check_shapes(best, state.network.state_dict())
        state.optimizer.load_state_dict(
            {"state": _by_parameter(moments), "param_groups": state.optimizer.state_dict()["param_groups"]}
        )
    except FileNotFoundError:
        return None
    except UnusableError as error:
        return str(error)
    except (ValueError, KeyError, TypeError):
        return "was written by another version"
    state.network.load_state_dict(network)
    state.epochs, state.best, state.best_state = epochs, int(progress["best"]), best
    return None


class UnusableError(Exception):
    """Why a file cannot be used."""


def write_tensors(path: Path, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors and what belongs to them, atomically; `progress` has the `key` of the run.

    Raises:
        StorageError: If they cannot be written.
    """
    arrays = save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    payload = canonical_json(progress).encode() + b"\n" + arrays
    atomic_write(path, HEAD + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def read_tensors(path: Path, key: str) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """Read a file of `write_tensors`.

    Raises:
        FileNotFoundError: If it does not exist.
        UnusableError: If it cannot be read, is damaged, or belongs to another run or version.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableError(f"cannot be read ({error.strerror})") from None
    head, payload = data[:_LENGTH], data[_LENGTH:]
    if head != HEAD + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise UnusableError("is damaged")
    # The bytes are intact: what does not fit now is from another run or version.
    line, _, arrays = payload.partition(b"\n")
    try:
        progress, tensors = json.loads(line), load_tensors(arrays)
        other = progress["key"] != key
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise UnusableError("was written by another version") from None
    if other:
        raise UnusableError("belongs to another training")
    return progress, tensors


def below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _by_parameter(moments: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """Group optimiser states with keys such as `3.exp_avg` by the index of the parameter."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in moments.items():
        index, _, moment = name.partition(".")
        states.setdefault(int(index), {})[moment] = value
    return states


def _check_shapes(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    shapes = ({name: value.shape for name, value in side.items()} for side in (tensors, expected))
    if next(shapes) != next(shapes):
        raise ValueError("names or shapes of the tensors differ")
