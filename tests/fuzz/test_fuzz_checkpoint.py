"""A damaged checkpoint resumes to the same model, or is reported and not used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from study import Study, make_study

from schemas.features import ExtractionReceipt
from schemas.results import EpochLog
from stages.methods.base import gradient_method
from stages.train.checkpoints import Fit, load_checkpoint, save_checkpoint
from stages.train.inputs import inputs_key
from stages.train.job import Watch, run_key
from stages.train.loop import make_optimizer
from stages.train.trainer import train

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "200"))


class Killed(BaseException):
    """Simulates a kill signal from inside."""


class Half:
    """A study whose training was killed after its first epoch, and the model of an uninterrupted one."""

    def __init__(self, root: Path) -> None:
        self.study: Study = make_study(root, per_class=5, train={"epochs": 2, "lr": 2e-3})
        self.receipt: ExtractionReceipt = self.study.extract()
        self.calm = self.train("calm")[0]

        def die(_position: int, _log: EpochLog) -> None:
            raise Killed

        with pytest.raises(Killed):
            self.train("killed", on_epoch=die)
        (self.path,) = (root / "checkpoints").iterdir()
        self.data = self.path.read_bytes()
        settings, files = self.study.settings, self.study.files(self.receipt)
        self.key = run_key(settings, self.study.manifest, inputs_key(settings, files))

    def train(self, output: str, **callbacks: Callable[[int, EpochLog], None]) -> tuple[bytes, list[str]]:
        notices: list[str] = []
        study = self.study
        watch = Watch(on_notice=notices.append, **callbacks)
        train(study.settings, study.files(self.receipt), study.root / output, study.root / "checkpoints", watch)
        return (study.root / output / "model.safetensors").read_bytes(), notices

    def fresh(self) -> Fit:
        method = gradient_method(self.study.settings.method)
        torch.manual_seed(0)
        network = method.build(method.spec(self.study.settings, self.study.lpm, 3))
        return Fit(network, make_optimizer(network, self.study.settings.train))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Half:
    return Half(tmp_path_factory.mktemp("half"))


def damaged(data: bytes, random: Random) -> bytes:
    kind = random.choice(["flip", "flip", "flip", "cut", "append", "swap", "zero", "head"])
    at = random.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "append":
        return data + random.randbytes(random.randrange(1, 50))
    if kind == "swap":
        other = random.randrange(len(data))
        low, high = sorted((at, other))
        return data[high:] + data[low:high] + data[:low]
    if kind == "zero":
        return data[:at] + bytes(len(data) - at)
    return random.randbytes(20) + data


def test_damage_is_found_before_anything_is_loaded(half: Half, tmp_path: Path) -> None:
    path, state = tmp_path / "x.ckpt", half.fresh()
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    for case in range(CASES):
        data = damaged(half.data, Random(SEED * 1_000_003 + case))
        if data == half.data:
            continue
        path.write_bytes(data)
        assert load_checkpoint(state, path, half.key) == "is damaged", case
    assert not state.epochs
    assert not state.optimizer.state_dict()["state"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.network.state_dict().items())
    assert load_checkpoint(state, half.path, half.key) is None
    assert len(state.epochs) == 1


@pytest.mark.parametrize("case", ["intact", *range(3)])
def test_training_ends_in_the_undisturbed_model(half: Half, case: int | str) -> None:
    data = half.data if case == "intact" else damaged(half.data, Random(SEED * 1_000_003 + int(case)))
    half.path.write_bytes(data)
    model, notices = half.train(f"after-{case}")
    assert model == half.calm
    assert len(notices) == (data != half.data)
    assert not half.path.exists()
    half.path.write_bytes(half.data)


def test_a_foreign_file_is_not_resumed(half: Half, tmp_path: Path) -> None:
    path, state = tmp_path / "x.ckpt", half.fresh()
    torch.save({"network": state.network.state_dict(), "epochs": []}, path)
    assert load_checkpoint(state, path, half.key) == "is damaged"
    path.write_bytes(half.data)
    assert load_checkpoint(state, path, "0" * 64) == "belongs to another training"
    path.unlink()
    path.mkdir()
    assert "cannot be read" in str(load_checkpoint(state, path, half.key))


def test_equal_trainings_may_write_at_once(half: Half, tmp_path: Path) -> None:
    """Each process writes, reads and finally removes the same file, like identical runs."""
    path, errors = tmp_path / "x.ckpt", []

    def work() -> None:
        try:
            state = half.fresh()
            assert load_checkpoint(state, half.path, half.key) is None
            for _ in range(30):
                save_checkpoint(state, path, half.key)
                assert load_checkpoint(state, path, half.key) is None
            path.unlink(missing_ok=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == []
