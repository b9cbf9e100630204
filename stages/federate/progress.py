"""The checkpoint of a federated training: one file, replaced after every round."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from schemas.federated import RoundLog
from stages.federate.weights import State
from stages.train.checkpoints import UnusableError, below, read_tensors, write_tensors


@dataclass
class Progress:
    """Finished rounds and weights."""

    state: State
    """Averaged weights."""
    rounds: list[RoundLog] = field(default_factory=list)
    """Finished rounds."""
    best: int = 0
    """Selected round, from 1; 0 before the first."""
    best_state: State = field(default_factory=dict)
    """Weights of that round."""

    def add(self, log: RoundLog, state: State, keep: str, rounds: int) -> None:
        """Append a round, and select it if `train.keep` does.

        The log-loss on the validation images selects, since sites can add it up, unlike the AUC.

        Args:
            log: The round.
            state: Averaged weights after it.
            keep: `train.keep`.
            rounds: Planned rounds.
        """
        self.state = state
        before = next((one.val_loss for one in self.rounds if one.number == self.best), None)
        self.rounds.append(log)
        second_half = keep == "late" and self.best <= rounds // 2 < log.number
        last = keep == "last" or before is None or log.val_loss is None
        if last or second_half or (before is not None and log.val_loss is not None and log.val_loss < before):
            self.best, self.best_state = log.number, {name: value.clone() for name, value in state.items()}


def save_progress(progress: Progress, path: Path, key: str) -> None:
    """Replace the checkpoint, atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    tensors = {
        **{f"state.{name}": value for name, value in progress.state.items()},
        **{f"best.{name}": value for name, value in progress.best_state.items()},
    }
    rounds = [log.model_dump(mode="json") for log in progress.rounds]
    write_tensors(path, {"key": key, "best": progress.best, "rounds": rounds}, tensors)


def load_progress(path: Path, key: str, names: frozenset[str]) -> tuple[Progress | None, str]:
    """Read the checkpoint of a training.

    Args:
        path: Its file.
        key: Identifies the training.
        names: Names of the weights that travel.

    Returns:
        The progress, or None and why an existing file cannot be used; an empty text if there is none.
    """
    try:
        found, tensors = read_tensors(path, key)
        progress = Progress(
            state=below("state.", tensors),
            rounds=[RoundLog.model_validate(log) for log in found["rounds"]],
            best=int(found["best"]),
            best_state=below("best.", tensors),
        )
    except FileNotFoundError:
        return None, ""
    except UnusableError as error:
        return None, str(error)
    except (ValueError, KeyError, TypeError):
        return None, "was written by another version"
    if set(progress.state) != names or set(progress.best_state) != names:
        return None, "was written by another version"
    return progress, ""
