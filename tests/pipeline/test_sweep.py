"""`fpt sweep` and `fpt lr-find`: one pass for many runs, finished runs kept, judged alone and together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import Fpt
from study import make_study

from pipeline.params import dump_settings
from stages.evaluate.predictions import read_predictions
from stages.manifest import read_manifest
from stages.prepare.folds import draw_again
from stages.scores import macro_auc

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = make_study(tmp_path_factory.mktemp("sweep"), train={"epochs": 2})
    raw = study.settings.model_copy(update={"train": study.settings.train.model_copy(update={"order_seed": "auto"})})
    (study.root / "params.yaml").write_text(dump_settings(raw))
    return study.root


@pytest.fixture(autouse=True)
def extracted(root: Path, fpt: Fpt) -> None:
    fpt("extract", cwd=root)


def times(folder: Path, name: str = "model.safetensors") -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(name)}


def sweep(fpt: Fpt, root: Path, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fpt("sweep", *words, "--json", cwd=root)[0])
    return found


def test_all_combinations_are_trained_judged_and_kept(root: Path, fpt: Fpt) -> None:
    summary = sweep(fpt, root, "lr=2e-3,5e-4", "train.seed=0,1")
    names = ["lr=2e-3_seed=0", "lr=2e-3_seed=1", "lr=5e-4_seed=0", "lr=5e-4_seed=1"]
    assert list(summary["runs"]) == names
    runs = root / "outputs/sweep/runs"
    for name in names:
        metrics = json.loads((runs / name / "evaluation/metrics.json").read_text())
        bundle = json.loads((runs / name / "model/model.json").read_text())
        assert summary["runs"][name]["test"]["auc"] == metrics["auc"]
        assert summary["runs"][name]["val_auc"] == bundle["val_auc"]
        assert (runs / name / "train/metrics.json").is_file()
        assert "order_seed: 0" in (runs / name / "model/settings.yaml").read_text()
    aucs = [summary["runs"][name]["test"]["auc"] for name in names]
    assert summary["all"]["test"]["auc"]["values"] == aucs
    assert summary["all"]["test"]["auc"]["mean"] == pytest.approx(np.mean(aucs))
    assert summary["all"]["test"]["auc"]["std"] == pytest.approx(np.std(aucs, ddof=1))
    assert summary["axes"]["lr"]["5e-4"]["test"]["auc"]["values"] == aucs[2:]
    assert summary["axes"]["seed"]["1"]["test"]["auc"]["values"] == aucs[1::2]
    means = {lr: summary["axes"]["lr"][lr]["val_auc"]["mean"] for lr in ("2e-3", "5e-4")}
    losses = {lr: summary["axes"]["lr"][lr]["val_loss"]["mean"] for lr in means}
    assert summary["best"] == "lr=" + max(means, key=lambda lr: (means[lr], -losses[lr]))

    tables = [read_predictions(runs / name / "evaluation/predictions.parquet") for name in names]
    pool = np.exp(np.mean([np.log(table.probabilities) for table in tables], axis=0))
    pool /= pool.sum(axis=1, keepdims=True)
    assert summary["all"]["averaged_auc"]["values"] == pytest.approx([macro_auc(tables[0].labels, pool)])
    # The AUC knows ranks alone; this one also knows how sure the average is.
    brier = ((pool - np.eye(3)[tables[0].labels]) ** 2).sum(axis=1).mean()
    together = json.loads((root / "outputs/sweep/averaged/all/metrics.json").read_text())
    assert together["brier"] == pytest.approx(brier, abs=1e-5)

    # Another value trains itself alone; the others keep their bytes and times, and are not judged again.
    before = times(runs) | times(runs, "predictions.parquet")
    out, err = fpt("sweep", "lr=2e-3,1e-3", "seed=0", cwd=root)
    assert "1 run was trained, 1 were there" in err
    assert "Best by validation: lr=" in err
    assert all(word in out for word in ("lr=1e-3_seed=0", "validation AUC", "ensemble"))
    assert before.items() <= (times(runs) | times(runs, "predictions.parquet")).items()


def test_what_cannot_share_batches_gets_a_pass_of_its_own(root: Path, fpt: Fpt) -> None:
    _, err = fpt("sweep", "batch_size=4,8", "lr=2e-3,1e-3", "--output", "outputs/batches", cwd=root)
    assert "Pass 2 of 2: fpt+, 2 runs" in err
    assert "4 runs were trained" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["lr"], "key=value"),
        (["lrr=1,2"], "lrr"),
        (["prompts=4,0"], "train.prompts"),
        (["lr=1e-4..1e-2"], "--random"),
        ([], "nothing to sweep"),
        (["--folds", "2", "--splits", "2"], "two ways"),
        (["--folds", "12"], "too few groups"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(root: Path, fpt: Fpt, words: list[str], named: str) -> None:
    _, err = fpt("sweep", *words, "--output", "outputs/none", cwd=root, code=2)
    assert named in err
    assert not (root / "outputs/none").exists()


def test_random_draws_are_recorded_and_go_on(root: Path, fpt: Fpt) -> None:
    words = ["lr=1e-4..1e-2", "dropout=0.1,0.3", "--output", "outputs/random"]
    few = sweep(fpt, root, *words, "--random", 2)
    more = sweep(fpt, root, *words, "--random", 3)
    assert len(few["runs"]) == 2
    assert list(more["runs"])[:2] == list(few["runs"])
    assert len(more["runs"]) == 3
    for name, run in more["runs"].items():
        settings = yaml.safe_load((root / "outputs/random/runs" / name / "model/settings.yaml").read_text())["train"]
        assert settings["lr"] == float(run["values"]["lr"])
        assert settings["dropout"] == float(run["values"]["dropout"])


def test_an_evaluation_of_other_images_is_not_put_beside_the_others(root: Path, fpt: Fpt) -> None:
    before = sweep(fpt, root, "seed=0,1", "--output", "outputs/reused")["runs"]
    run = "outputs/reused/runs/seed=1"
    fpt("evaluate", "--model", f"{run}/model", "--output", f"{run}/evaluation", "--split", "val", cwd=root)
    assert sweep(fpt, root, "seed=0,1", "--output", "outputs/reused")["runs"] == before
    assert json.loads((root / run / "evaluation/metrics.json").read_text())["split"] == "test"


def test_seeds_on_several_splits_are_one_command(root: Path, fpt: Fpt) -> None:
    summary = sweep(fpt, root, "seed=0,1", "--splits", 2, "--output", "outputs/splits")
    assert [run["part"] for run in summary["runs"].values()] == ["split-0", "split-0", "split-1", "split-1"]
    manifest = read_manifest(root / "outputs/manifest/manifest.parquet")
    for seed in (0, 1):
        drawn = draw_again(manifest, 0.2, 0.2, seed)
        judged = read_predictions(root / f"outputs/splits/runs/split-{seed}/seed=1/evaluation/predictions.parquet")
        assert judged.rows == tuple(drawn.of("test"))
        settings = yaml.safe_load((root / f"outputs/splits/runs/split-{seed}/seed=1/model/settings.yaml").read_text())
        assert settings["data"]["seed"] == seed
    assert len(summary["settings"]["as-set"]["averaged_auc"]["values"]) == 2
    assert len(summary["chosen_test_auc"]["values"]) == 2
    # The study's own split is the first of them.
    alone = sweep(fpt, root, "seed=0,1", "--output", "outputs/alone")
    assert [run["test"] for run in alone["runs"].values()] == [run["test"] for run in summary["runs"].values()][:2]


def test_methods_are_cross_validated_on_the_same_folds_and_compared(root: Path, fpt: Fpt) -> None:
    words = ["method=fpt+,linear,attentive", "lr=2e-3,1e-3", "--folds", 3]
    summary = sweep(fpt, root, *words, "--output", "outputs/folds")
    names = ["method=fpt+_lr=2e-3", "method=fpt+_lr=1e-3", "method=linear", "method=attentive_lr=2e-3"]
    assert list(summary["settings"]) == [*names, "method=attentive_lr=1e-3"], "a probe has no learning rate"
    assert all(row["runs"] == 3 for row in summary["settings"].values())
    runs = root / "outputs/folds/runs"
    tables = [read_predictions(runs / f"fold-{n}-of-3/method=linear/evaluation/predictions.parquet") for n in (1, 2, 3)]
    every = read_manifest(root / "outputs/manifest/manifest.parquet")
    assert sorted(row.path for table in tables for row in table.rows) == [row.path for row in every.rows]
    pooled = macro_auc(np.concatenate([t.labels for t in tables]), np.concatenate([t.probabilities for t in tables]))
    assert summary["settings"]["method=linear"]["pooled_auc"]["values"] == pytest.approx([pooled])
    best = {
        method: max(
            (name for name in summary["settings"] if f"method={method}" in name),
            key=lambda name: (
                summary["settings"][name]["val_auc"]["mean"],
                -summary["settings"][name]["val_loss"]["mean"],
            ),
        )
        for method in ("fpt+", "linear", "attentive")
    }
    assert list(summary["differences"]) == [best["linear"], best["attentive"]]
    difference = summary["differences"]["method=linear"]["auc"]
    reference = summary["settings"][best["fpt+"]]["averaged_auc"]["values"][0]
    assert difference["difference"]["values"] == pytest.approx([pooled - reference])
    assert difference["interval"][0] <= difference["difference"]["mean"] <= difference["interval"][1]
    out, _ = fpt("sweep", *words, "--output", "outputs/folds", cwd=root)
    assert f"Difference to {best['fpt+']}" in out
    assert "pooled over folds" in out


def test_a_killed_cross_validation_goes_on(root: Path, fpt: Fpt, environment: dict[str, str]) -> None:
    words = ["sweep", "lr=2e-3,1e-3", "--folds", "4", "--output", "outputs/killed"]
    folder = root / "outputs/killed/runs"
    with subprocess.Popen(
        [Path(sys.executable).parent / "fpt", *words],
        cwd=root,
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 240
        while len(list(folder.rglob("run.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    kept = times(folder, "run.json")
    models = {path: when for path, when in times(folder).items() if f"{Path(path).parent.parent}/run.json" in kept}
    assert 3 <= len(kept) < 8
    _, err = fpt(*words, cwd=root)
    assert f"{8 - len(kept)} runs were trained, {len(kept)} were there" in err
    assert models.items() <= times(folder).items()
    killed = json.loads((root / "outputs/killed/summary.json").read_text())
    whole = sweep(fpt, root, *words[1:4], "--output", "outputs/whole")
    assert list(killed["runs"]) == list(whole["runs"])
    for name, run in whole["runs"].items():
        # A run that went on without its neighbours multiplies smaller matrices, which round otherwise.
        assert killed["runs"][name]["val_loss"] == pytest.approx(run["val_loss"], rel=1e-4)


def test_views_of_every_image_are_asked_for_where_folds_need_them(root: Path, fpt: Fpt) -> None:
    views = ["--set", "features.views=[identity,hflip]"]
    fpt("extract", *views, cwd=root)
    words = ["lr=1e-3", "--folds", "2", "--output", "outputs/views"]
    _, err = fpt("sweep", *words, *views, cwd=root, code=2)
    assert "fpt extract --all-views" in err
    assert not (root / "outputs/views").exists()
    plan = json.loads(fpt("extract", *views, "--all-views", "--plan", "--json", cwd=root)[0])
    assert plan["rows"] == 2 * plan["images"]
    fpt("extract", *views, "--all-views", cwd=root)
    assert len(sweep(fpt, root, *words, *views)["runs"]) == 2


def test_a_sweep_registers_the_study(root: Path, fpt: Fpt) -> None:
    (store,) = (root / ".fpt/cache").iterdir()
    for note in (store / "used-by").iterdir():
        note.unlink()
    sweep(fpt, root, "lr=1e-3", "--output", "outputs/registered")
    (note,) = (store / "used-by").iterdir()
    assert json.loads(note.read_text())["study"] == str(root)


def test_a_learning_rate_is_found_without_the_test_images(root: Path, fpt: Fpt) -> None:
    words = ["lr-find", "--from", "1e-5", "--to", "1e-2", "--count", "4", "--seeds", "2"]
    found = json.loads(fpt(*words, "--json", cwd=root)[0])
    assert [trial["lr"] for trial in found["trials"]] == [1e-5, 1e-4, 1e-3, 1e-2]
    assert all(len(trial["val_loss"]["values"]) == 2 for trial in found["trials"])
    smoothed = {trial["lr"]: trial["smoothed_loss"] for trial in found["trials"]}
    assert found["lr"] == min(smoothed, key=lambda lr: smoothed[lr])
    folder = root / "outputs/lr-find"
    for trial in found["trials"]:
        for seed, loss in enumerate(trial["val_loss"]["values"]):
            (place,) = (path for path in (folder / "runs").iterdir() if path.name.endswith(f"_seed={seed}")
                        and float(path.name.split("_")[0].removeprefix("lr=")) == trial["lr"])  # fmt: skip
            log = (place / "train/plots/metrics/val/loss.tsv").read_text().splitlines()[1:]
            best = json.loads((place / "model/model.json").read_text())["best_epoch"]
            assert float(log[best - 1].split("\t")[1]) == pytest.approx(loss)
    assert not list(folder.rglob("predictions.parquet"))
    before = times(folder)
    out, err = fpt(*words, cwd=root)
    assert times(folder) == before
    assert "<- lowest" in out
    assert f"train.lr={found['lr']:g}" in err
    assert ("may lie beyond" in err) == (found["lr"] in (1e-5, 1e-2))


def test_a_probe_has_no_learning_rate_to_find(root: Path, fpt: Fpt) -> None:
    _, err = fpt("lr-find", "--set", "method=linear", cwd=root, code=2)
    assert "no learning rate" in err
