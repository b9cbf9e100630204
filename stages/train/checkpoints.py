"""Checkpoints of unfinished trainings: complete and of the same training, or not used.

One file: 8 bytes of magic, the sha256 of training key and payload (32 bytes), then the payload, a `torch.save` of plain
tensors and text. The digest is compared before anything of the payload is parsed. It covers the key, so that the
checkpoint of another training, whose tensors may have the same shapes, is refused as well.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from schemas.errors import TrainingError
from schemas.results import EpochLog
from stages.files import atomic_write

if TYPE_CHECKING:
    from stages.train.loop import Fit

MAGIC = b"fptckpt1"
HEADER_BYTES = len(MAGIC) + hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint file of one training."""

    path: Path
    """The file; equal trainings share it."""
    key: str
    """Digest of everything that determines the trained model."""

    @staticmethod
    def of(folder: Path, key: str) -> Checkpoint:
        """Return the checkpoint of a training in a folder."""
        return Checkpoint(folder / f"{key[:16]}.ckpt", key)

    def write(self, state: Fit) -> None:
        """Replace the file by the state after the last epoch, atomically and durably.

        Equal trainings that run at once may replace each other's file: whichever is read leads to the same model.

        Raises:
            StorageError: It cannot be written.
        """
        content: dict[str, Any] = {
            "network": state.network.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "epochs": [log.model_dump_json() for log in state.epochs],
            "best": state.best,
            "best_state": state.best_state,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
        atomic_write(self.path, MAGIC + self._digest(payload) + payload)

    def read(self, state: Fit) -> bool:
        """Restore the state if there is a checkpoint; return whether there was one.

        Raises:
            TrainingError: The file is damaged, or belongs to another training or version.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unusable(f"{error.strerror}.") from error
        payload = data[HEADER_BYTES:]
        if data[:HEADER_BYTES] != MAGIC + self._digest(payload):
            raise self._unusable("Its content changed after it was written, or it belongs to another training.")
        try:
            content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            epochs = [EpochLog.model_validate_json(text) for text in content["epochs"]]
            state.network.load_state_dict(content["network"])
            state.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError, ValidationError) as error:
            # The bytes are those that were written: another version of torch or of this program wrote them.
            raise self._unusable(f"{type(error).__name__}: {error}") from error
        state.epochs, state.best, state.best_state = epochs, content["best"], content["best_state"]
        return True

    def remove(self) -> None:
        """Delete the file; an equal training may have deleted it before."""
        self.path.unlink(missing_ok=True)

    def _digest(self, payload: bytes) -> bytes:
        digest = hashlib.sha256(self.key.encode())
        digest.update(payload)
        return digest.digest()

    def _unusable(self, cause: str) -> TrainingError:
        return TrainingError(
            f"The checkpoint {self.path} cannot be used.",
            cause,
            f"Delete it to train from the first epoch (rm {self.path}), then run the same command again.",
        )
