"""`fpt sweep`: every combination in one pass, finished runs kept, all judged alone and together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from study import make_study

from pipeline.cli import main
from pipeline.params import dump_settings
from stages.evaluate.metrics import macro_auc
from stages.evaluate.predictions import read_predictions


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = make_study(tmp_path_factory.mktemp("sweep"), train={"epochs": 2})
    raw = study.settings.model_copy(update={"train": study.settings.train.model_copy(update={"order_seed": "auto"})})
    (study.root / "params.yaml").write_text(dump_settings(raw))
    return study.root


def test_all_combinations_are_trained_judged_and_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.delenv("FPT_CACHE_DIR", raising=False)
    assert run("extract") == 0
    capsys.readouterr()
    assert run("sweep", "lr=2e-3,5e-4", "train.seed=0,1", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    names = ["lr=2e-3_seed=0", "lr=2e-3_seed=1", "lr=5e-4_seed=0", "lr=5e-4_seed=1"]
    assert list(summary["runs"]) == [*names, "all, averaged"]
    aucs = [summary["runs"][name]["auc"] for name in names]
    assert summary["auc_mean"] == pytest.approx(np.mean(aucs))
    assert summary["auc_std"] == pytest.approx(np.std(aucs, ddof=1))
    tables = [read_predictions(root / "outputs/sweep" / name / "evaluation/predictions.parquet") for name in names]
    pool = np.exp(np.mean([np.log(table.probabilities) for table in tables], axis=0))
    pool /= pool.sum(axis=1, keepdims=True)
    assert summary["runs"]["all, averaged"]["auc"] == pytest.approx(macro_auc(tables[0].labels, pool))
    # The AUC knows ranks alone; this one also knows how sure the average is.
    brier = ((pool - np.eye(3)[tables[0].labels]) ** 2).sum(axis=1).mean()
    assert summary["runs"]["all, averaged"]["brier"] == pytest.approx(brier, abs=1e-5)
    for name in names:
        assert (root / "outputs/sweep" / name / "train/metrics.json").is_file()
        assert "order_seed: 0" in (root / "outputs/sweep" / name / "model/settings.yaml").read_text()

    # Another value trains itself alone; the others keep their bytes and times.
    kept = root / "outputs/sweep" / names[0] / "model/model.safetensors"
    before = kept.stat().st_mtime_ns
    assert run("sweep", "lr=2e-3,1e-3", "seed=0") == 0
    said = capsys.readouterr()
    assert "1 runs were trained, 1 were there" in said.out + said.err
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("axis", "named"), [("lr", "key=value"), ("batch_size=4,8", "train.batch_size"), ("lrr=1,2", "lrr")]
)
def test_mistakes_are_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], axis: str, named: str
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.delenv("FPT_CACHE_DIR", raising=False)
    assert run("extract") == 0
    assert run("sweep", axis) == 2
    assert named in capsys.readouterr().err
