"""A checkpoint that was changed, cut, extended or exchanged is never resumed.

FPT_FUZZ_CASES and FPT_FUZZ_SEED run more mutants, or others.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from study import Study, make_study

from schemas.errors import TrainingError
from schemas.results import EpochLog, SideNetworkSpec
from schemas.settings import TrainSettings
from stages.train.checkpoints import HEADER_BYTES, MAGIC, Checkpoint
from stages.train.loop import Fit, make_optimizer
from stages.train.network import build_network
from stages.train.run import train

CASES = int(os.environ.get("FPT_FUZZ_CASES", "400"))
SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
LOG = EpochLog(epoch=1, train_loss=1.0, val_loss=1.0, val_auc=0.5, val_accuracy=0.5, lr=1e-3, seconds=1.0)


def make_state(seed: int = 0) -> Fit:
    torch.manual_seed(seed)
    spec = SideNetworkSpec(
        method="fpt+",
        classes=2,
        layers=1,
        lpm_width=8,
        heads=2,
        width=4,
        image_size=16,
        prompts=2,
        dropout=0.5,
    )
    network = build_network(spec)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Fit(network, make_optimizer(network, TrainSettings()), [LOG], 1, weights)


def written(path: Path, key: str, seed: int = 0) -> Checkpoint:
    checkpoint = Checkpoint(path, key)
    checkpoint.write(make_state(seed))
    return checkpoint


def mutant(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit, cut the end, repeat or insert bytes."""
    kind, place = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data + data[place:]
    return data[:place] + rng.randbytes(1 + rng.randrange(8)) + data[place:]


def test_a_checkpoint_is_restored_as_it_was_written(tmp_path: Path) -> None:
    checkpoint, state = written(tmp_path / "a.ckpt", "key", seed=0), make_state(seed=1)
    assert checkpoint.read(state)
    for name, tensor in make_state(seed=0).network.state_dict().items():
        assert torch.equal(state.network.state_dict()[name], tensor)
    assert state.epochs == [LOG]
    assert not Checkpoint(tmp_path / "none.ckpt", "key").read(state)


def test_no_mutant_is_resumed(tmp_path: Path) -> None:
    checkpoint, rng = written(tmp_path / "a.ckpt", "key"), random.Random(SEED)
    data, state = checkpoint.path.read_bytes(), make_state()
    for _ in range(CASES):
        checkpoint.path.write_bytes(mutant(data, rng))
        with pytest.raises(TrainingError, match="rm "):
            checkpoint.read(state)
    checkpoint.path.write_bytes(data)
    assert checkpoint.read(state)


def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    ours, theirs = written(tmp_path / "a.ckpt", "ours"), written(tmp_path / "b.ckpt", "theirs", seed=1)
    ours.path.write_bytes(theirs.path.read_bytes())
    with pytest.raises(TrainingError, match="another training"):
        ours.read(make_state())


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    """Also where an attacker makes the digest right: `weights_only` refuses it."""
    checkpoint = written(tmp_path / "a.ckpt", "key")
    trace = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(trace),)

    torch.save({"network": Evil()}, tmp_path / "evil.pt")
    payload = (tmp_path / "evil.pt").read_bytes()
    checkpoint.path.write_bytes(MAGIC + checkpoint._digest(payload) + payload)
    with pytest.raises(TrainingError):
        checkpoint.read(make_state())
    assert not trace.exists()
    assert len(MAGIC) < HEADER_BYTES


def test_equal_trainings_may_write_and_remove_one_file_at_once(tmp_path: Path) -> None:
    """Half of them write while the others read and remove: what is read is complete."""

    def work(number: int) -> int:
        checkpoint, state, found = Checkpoint(tmp_path / "a.ckpt", "key"), make_state(), 0
        for _ in range(25):
            if number % 2:
                found += checkpoint.read(state)
                checkpoint.remove()
            else:
                checkpoint.write(state)
        return found

    written(tmp_path / "a.ckpt", "key")
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(work, range(4)))
    assert sum(counts) > 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".ckpt"] == []


def test_training_with_a_damaged_checkpoint_stops_and_starts_anew_without_it(tmp_path: Path) -> None:
    study = make_study(tmp_path, train={"epochs": 3})
    receipt = study.extract()

    def run(output: str, stop_after: int | None = None) -> int:
        def on_epoch(log: EpochLog) -> None:
            if log.epoch == stop_after:
                raise InterruptedError

        return train(
            study.settings, study.lpm, study.manifest, receipt, study.cache, tmp_path / output,
            tmp_path / "checkpoints", on_epoch=on_epoch,
        ).resumed_from  # fmt: skip

    run("calm")
    with pytest.raises(InterruptedError):
        run("damaged", stop_after=2)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 4
    checkpoint.write_bytes(data)
    with pytest.raises(TrainingError, match=str(checkpoint)):
        run("damaged")
    assert not (tmp_path / "damaged").exists()
    checkpoint.unlink()
    assert run("damaged") == 0
    assert weights(study, "damaged") == weights(study, "calm")


def weights(study: Study, output: str) -> bytes:
    return (study.root / output / "model.safetensors").read_bytes()
