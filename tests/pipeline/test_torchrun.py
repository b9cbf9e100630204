"""Several processes started by torchrun train the model that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from study import Study, blind_fit, make_study

from pipeline import cli
from pipeline.params import dump_settings
from schemas.results import EpochLog, TrainResult
from stages.train import gradient
from stages.train.job import Watch
from stages.train.trainer import train

KILLED = """
import os, sys, threading, time
from pathlib import Path
from pipeline.cli import main

def die():
    while not list(Path(".fpt/checkpoints").glob("*.ckpt")):
        time.sleep(0.01)
    os._exit(9)

if os.environ["RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
main(sys.argv[1:])
"""
"""`fpt`, but its second process is gone once the first epoch is done."""

OTHER = """
import os, sys
from pipeline.cli import main

main([*sys.argv[1:], "--set", f"train.lr=1e-{3 + int(os.environ['RANK'])}"])
"""
"""`fpt`, but each process has a learning rate of its own."""


BLIND = """
import sys
from pipeline.cli import main
from stages.train import gradient
from study import blind_fit

gradient.fit_statistics = blind_fit
main(sys.argv[1:])
"""
"""`fpt` with linear probes that see nothing, so that side networks are added to a first one."""


@pytest.fixture
def two(tmp_path: Path) -> Study:
    """A study whose last batch is a single image: the first of two processes has none of it."""
    study = make_study(tmp_path)
    rows = len(list(study.manifest.of("train")))
    size = next(size for size in range(4, rows) if rows % size == 1)
    study = make_study(
        tmp_path, method="fpt-x", features={"dtype": "int8", "shard_size": 4, "side_image_size": 40, "image_size": 64},
        train={
            "side_image_size": 32, "side_reduction": 4, "epochs": 3, "batch_size": size, "members": 2,
            "class_weights": "balanced", "lr": 2e-3,
        },
    )  # fmt: skip
    study.extract()
    (study.root / "params.yaml").write_text(dump_settings(study.settings))
    return study


def torchrun(study: Study, words: Sequence[str], script: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-m", "pipeline"]
    if script:
        path = study.root / "script.py"
        path.write_text(script)
        start = [str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "FPT_CACHE_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["FPT_CACHE_DIR"] = str(study.cache)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *start, *words],
        cwd=study.root, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def single(
    study: Study, name: str, checkpoints: str = "checkpoints", **callbacks: Any
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    files = study.files(study.extract())
    result = train(study.settings, files, study.root / name, study.root / checkpoints, Watch(**callbacks))
    return result, load((study.root / name / "model.safetensors").read_bytes())


def epochs(study: Study, count: int, checkpoints: str) -> list[EpochLog]:
    """The first ones of a training by one process."""
    found: list[EpochLog] = []

    class Enough(BaseException):
        pass

    def note(_: int, log: EpochLog) -> None:
        found.append(log)
        if len(found) == count:
            raise Enough

    with pytest.raises(Enough):
        single(study, "few", checkpoints=checkpoints, on_epoch=note)
    return found


def assert_same(study: Study, found: TrainResult, model: Path) -> None:
    alone, expected = single(study, "alone")
    for mine, other in zip(alone.epochs, found.epochs, strict=True):
        assert other.train_loss == pytest.approx(mine.train_loss, abs=1e-5)
        assert other.val_loss == pytest.approx(mine.val_loss, abs=1e-5)
        assert other.val_auc == mine.val_auc
    for name, value in load((model / "model.safetensors").read_bytes()).items():
        # The bias of keys shifts all scores of a query alike: its gradient is rounding alone, which AdamW makes large.
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(two: Study) -> None:
    done = torchrun(two, ["train", "--json", "--output", "outputs/both"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one report, not two
    model = Path(report.pop("model"))
    assert_same(two, TrainResult.model_validate(report), model)
    assert done.stderr.count("Epoch 3/3") == 1
    metrics = json.loads((two.root / "outputs/both/train/metrics.json").read_bytes())
    assert metrics["best"]["epoch"] == 3
    assert not list((two.root / ".fpt/checkpoints").iterdir())


@pytest.mark.slow
def test_two_processes_add_the_same_networks(two: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    two.settings = two.changed(train={"members": 3, "adaptive_members": True})
    (two.root / "params.yaml").write_text(dump_settings(two.settings))
    done = torchrun(two, ["train", "--json", "--output", "outputs/both"], BLIND)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Epoch 3/3") == 2
    report = json.loads(done.stdout)
    model = Path(report.pop("model"))
    assert "3 side networks of at most 3, because the first one helped" in report["conclusion"]
    monkeypatch.setattr(gradient, "fit_statistics", blind_fit)
    two.settings = two.changed(train={"members": 3, "adaptive_members": False})
    assert_same(two, TrainResult.model_validate(report), model)
    assert not list((two.root / ".fpt/checkpoints").iterdir())


@pytest.mark.slow
def test_the_death_of_one_process_ends_all_and_one_may_go_on_alone(two: Study) -> None:
    two.settings = two.changed(train={"epochs": 300})
    (two.root / "params.yaml").write_text(dump_settings(two.settings))
    died = torchrun(two, ["train"], KILLED)
    assert died.returncode != 0
    assert "exitcode  : 9" in died.stderr
    assert not (two.root / "outputs/model/model.json").exists()
    (checkpoint,) = (two.root / ".fpt/checkpoints").glob("*.ckpt")
    progress = json.loads(checkpoint.read_bytes().split(b"\n")[1])
    done = [EpochLog.model_validate(log) for log in progress["epochs"]]
    again, undisturbed = (epochs(two, len(done) + 1, folder) for folder in (".fpt/checkpoints", "others"))
    assert again[:-1] == done
    for mine, other in zip(undisturbed, again, strict=True):
        assert other.val_loss == pytest.approx(mine.val_loss, abs=1e-4)


@pytest.mark.slow
def test_workers_of_two_processes_go_on_in_one(tmp_path: Path) -> None:
    """With extrapolation, checkpoints have the past gradients of the workers of all processes."""
    train_keys = {"batch_size": 6, "epochs": 300, "optimizer": "extrap-sgd", "lr": 0.02, "class_weights": "balanced"}
    study = make_study(tmp_path, train={**train_keys, "extrapolation": {"workers": 2, "rate": 3.0}})
    study.extract()
    (study.root / "params.yaml").write_text(dump_settings(study.settings))
    died = torchrun(study, ["train"], KILLED)
    assert "exitcode  : 9" in died.stderr
    (checkpoint,) = (study.root / ".fpt/checkpoints").glob("*.ckpt")
    done = len(json.loads(checkpoint.read_bytes().split(b"\n")[1])["epochs"])
    continued, undisturbed = (epochs(study, done + 2, folder) for folder in (".fpt/checkpoints", "others"))
    for mine, other in zip(undisturbed, continued, strict=True):
        assert other.train_loss == pytest.approx(mine.train_loss, abs=1e-4)
        assert other.val_loss == pytest.approx(mine.val_loss, abs=1e-4)


@pytest.mark.slow
def test_processes_that_would_train_different_models_are_refused(two: Study) -> None:
    done = torchrun(two, ["train"], OTHER)
    assert done.returncode != 0
    assert done.stderr.count("The 2 processes would not train the same model.") == 2
    assert "Traceback" not in done.stderr.partition("ChildFailedError")[0].partition("E1")[0]
    assert not (two.root / "outputs/model").exists()


def test_other_verbs_want_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare"])
    assert stopped.value.code == 2
    assert "without torchrun" in capsys.readouterr().err
