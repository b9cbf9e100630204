import json
from pathlib import Path

import pytest

from pipeline.epoch_log import EpochLogger
from schemas.errors import StorageError
from schemas.results import EpochLog


def epoch(number: int, auc: float | None = 0.5) -> EpochLog:
    return EpochLog(
        epoch=number, train_loss=1.0 / number, val_loss=2.0, val_auc=auc, val_accuracy=0.5, lr=0.1, seconds=1.0
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "train"


def test_steps_are_epochs_and_the_best_one_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EpochLogger(folder, 10) as logger:
        logger(epoch(1))
        logger(epoch(2, auc=0.75))
        logger.finish(epoch(2, auc=0.75))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["best"]) == (2, {"epoch": 2, "auc": 0.75})
    lines = (folder / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["step", "1", "2"]
    err = capsys.readouterr().err
    assert "Epoch  1/10" in err
    assert "val AUC 0.750" in err
    assert not list(folder.parent.glob("dvc.yaml"))


def test_a_second_run_replaces_the_first(folder: Path) -> None:
    for epochs in (3, 1):
        with EpochLogger(folder, 3) as logger:
            for number in range(1, epochs + 1):
                logger(epoch(number))
    lines = (folder / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    assert len(lines) == 2


def test_a_second_training_of_one_run_replaces_the_curves_and_adds_its_time(folder: Path) -> None:
    with EpochLogger(folder, 3) as logger:
        for number in (1, 2, 3, 1, 2):
            logger(epoch(number))
        logger.finish(epoch(2))
    lines = (folder / "plots" / "metrics" / "train" / "loss.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["step", "1", "2"]
    assert json.loads((folder / "metrics.json").read_text())["seconds"] == 5.0


def test_an_area_that_is_not_defined_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EpochLogger(folder, 1) as logger:
        logger(epoch(1, auc=None))
        logger.finish(epoch(1, auc=None))
    assert "auc" not in (folder / "metrics.json").read_text()
    assert "val AUC -" in capsys.readouterr().err


def test_no_epoch_leaves_the_folder_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "metrics.json").write_text("{}")
    with EpochLogger(folder, 1) as logger:
        logger.finish(epoch(1))
    assert (folder / "metrics.json").read_text() == "{}"


def test_a_folder_that_cannot_be_written_is_a_storage_error(folder: Path) -> None:
    folder.write_text("a file in the way")
    with pytest.raises(StorageError), EpochLogger(folder / "train", 1) as logger:
        logger(epoch(1))
