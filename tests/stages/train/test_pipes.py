"""A named pipe in the place of a file of a run: refused or passed over, never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from schemas.errors import BundleError
from stages.evaluate.compare import _train_seconds
from stages.evaluate.figures import read_training_curves
from stages.train.bundle import load_bundle
from stages.train.bundle_spec import SPEC, read_spec
from stages.train.checkpoints import Fit, load_checkpoint


def test_a_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SPEC)
    with pytest.raises(BundleError, match="Not a regular file"):
        read_spec(tmp_path)
    with pytest.raises(BundleError, match="Not a regular file"):
        load_bundle(tmp_path)


def test_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    network = nn.Linear(1, 1)
    state = Fit(network, torch.optim.AdamW(network.parameters()))
    assert load_checkpoint(state, tmp_path / "pipe", "key") == "cannot be read (Not a regular file)"


def test_the_curves_of_a_training(tmp_path: Path) -> None:
    folder = tmp_path / "plots" / "metrics"
    folder.mkdir(parents=True)
    (folder / "lr.tsv").write_bytes(b"step\tlr\n1\t0.5\n\xff\xfe\t\x00\n2\t0.25\n")
    assert read_training_curves(tmp_path)["lr"].tolist() == [[1, 0.5], [2, 0.25]]
    os.mkfifo(folder / "loss.tsv")
    with pytest.raises(OSError, match="Not a regular file"):
        read_training_curves(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"seconds": null}', '{"seconds": [1]}', "[" * 100_000])
def test_the_time_of_a_training_that_cannot_be_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("stages.evaluate.compare.read_spec", lambda _: None)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.json").write_text(text)
    assert _train_seconds(tmp_path / "evaluation", None) is None
