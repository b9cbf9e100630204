"""What training says while it runs: a line an epoch for people, metrics and plots for DVC."""

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
    """Call it with each epoch; DVCLive's files are in `folder` at the end.

    DVCLive clears its folder when it starts: it starts with the first epoch, so that a training that cannot start
    leaves the metrics of the last one. After a resume the earlier epochs come first, and the files are whole again.
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
        """Record which epoch the model is of, and what all epochs took."""
        if self._live is not None:
            self._live.summary["seconds"] = round(self._seconds, 3)
            self._live.summary["best"] = {"epoch": best.epoch} | ({} if best.val_auc is None else {"auc": best.val_auc})
            with storage_errors(self.folder):
                self._live.make_summary()


def _open_live(folder: Path) -> Any:
    from dvclive.live import Live
    from scmrepo.exceptions import SCMError

    class QuietLive(Live):
        """DVCLive in a repository without a commit: it asks for the revision of HEAD and stops where there is none."""

        def _init_dvc(self) -> None:
            with suppress(SCMError):
                super()._init_dvc()

    # The folder is an output of a stage: DVCLive must neither save experiments nor write stages.
    return QuietLive(dir=str(folder), save_dvc_exp=False, dvcyaml=False)
