"""Log the progress of training: a line per epoch on the terminal, metrics and plots for DVC."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.console import duration, say, score
from stages.files import storage_errors

if TYPE_CHECKING:
    from schemas.results import EpochLog


class EpochLogger:
    """Logger to be called with each epoch; writes the files of DVCLive to `folder`.

    DVCLive clears its folder when it starts. So it starts with the first epoch, and a training that fails to start does
    not delete the metrics of the previous one. After a resume, the earlier epochs are logged first, so that the files
    are complete.
    """

    def __init__(self, folder: Path, epochs: int, title: str = "") -> None:
        self.folder, self.epochs, self.title = folder, epochs, title
        self._live: Any = None
        self._seconds = 0.0

    def __enter__(self) -> EpochLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.end()

    def __call__(self, log: EpochLog) -> None:
        """Show and record one epoch.

        Raises:
            StorageError: The folder cannot be written.
        """
        values = {
            "train/loss": log.train_loss,
            "val/loss": log.val_loss,
            "val/accuracy": log.val_accuracy,
            "val/auc": log.val_auc,
            "lr": log.lr,
        }
        self._seconds += log.seconds
        with storage_errors(self.folder):
            if self._live is not None and log.epoch == 1:
                # Side networks are added to a first one: the curves are those of the model.
                self._live.end()
                self._live = None
            if self._live is None:
                self._live = _open_live(self.folder)
            self._live.step = log.epoch
            for name, value in values.items():
                if value is not None:
                    self._live.log_metric(name, value)
            self._live.make_summary()
        say(
            f"{self.title}Epoch {log.epoch:>{len(str(self.epochs))}}/{self.epochs}  loss {log.train_loss:.4f}  "
            f"val loss {log.val_loss:.4f}  val AUC {score(log.val_auc)}  val accuracy {score(log.val_accuracy)}  "
            f"{duration(log.seconds)}"
        )

    def finish(self, best: EpochLog) -> None:
        """Record the selected epoch and the total time."""
        if self._live is not None:
            self._live.summary["seconds"] = round(self._seconds, 3)
            self._live.summary["best"] = {"epoch": best.epoch} | ({} if best.val_auc is None else {"auc": best.val_auc})
            with storage_errors(self.folder):
                self._live.make_summary()


def _open_live(folder: Path) -> Any:
    from dvclive.live import Live
    from scmrepo.exceptions import SCMError

    class QuietLive(Live):
        """DVCLive that also works in a repository without commits, where looking up HEAD raises an error."""

        def _init_dvc(self) -> None:
            with suppress(SCMError):
                super()._init_dvc()

    # The folder is the output of a stage, so DVCLive must neither save experiments nor write stages.
    return QuietLive(dir=str(folder), save_dvc_exp=False, dvcyaml=False)
