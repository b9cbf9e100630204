"""`fpt bench` as a user types it: three kinds of methods in one table, resumed, planned, and with methods that fail."""

from __future__ import annotations

import asyncio
import csv
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
from command_line import Fpt
from sklearn.metrics import log_loss
from study import make_study

from pipeline import bench_runs
from pipeline.bench_plan import _together
from pipeline.cluster.bench_groups import check_worker
from pipeline.params import dump_settings
from schemas.cost import CostReport
from schemas.errors import ClusterError, TrainingError
from stages.evaluate.predictions import read_predictions
from stages.manifest import read_manifest
from stages.prepare.shots import draw_shots
from stages.scores import macro_auc
from stages.train.bundle_spec import read_spec

pytestmark = pytest.mark.timeout(600)

METHODS = ("--methods", "linear,ept-lse,fpt+")
"""A closed form, an adaptation that reads images, and side networks that read the store."""
SMALL = ("--shots", "2,all", "--samplings", "2", "--rates", "1e-3,2e-2")
TINY = ("--shots", "2", "--samplings", "1", "--rates", "1e-3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of 60 images of three classes."""
    study = make_study(tmp_path_factory.mktemp("bench"), per_class=20, train={"epochs": 2})
    raw = study.settings.model_copy(update={"train": study.settings.train.model_copy(update={"order_seed": "auto"})})
    (study.root / "params.yaml").write_text(dump_settings(raw))
    return study.root


@pytest.fixture(autouse=True)
def extracted(root: Path, fpt: Fpt) -> None:
    if not (root / "outputs/features").exists():
        fpt("extract", cwd=root)


def times(folder: Path, name: str = "model.safetensors") -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob(name)}


def bench(fpt: Fpt, root: Path, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fpt("bench", *words, "--json", cwd=root)[0])
    return found


def test_one_table_of_three_methods_by_hand(root: Path, fpt: Fpt) -> None:
    result = bench(fpt, root, *METHODS, *SMALL)
    folder = root / "outputs/bench"
    runs = folder / "runs"
    manifest = read_manifest(root / "outputs/manifest/manifest.parquet")
    tested = tuple(manifest.of("test"))
    assert {shots: list(rows) for shots, rows in result["shots"].items()} == {
        shots: ["linear", "ept-lse", "fpt+"] for shots in ("2", "all")
    }
    assert (result["reference"], result["left_out"], result["test_images"]) == ("linear", {}, len(tested))
    assert json.loads((folder / "bench.json").read_text()) == result

    # Validation chooses the rate in each sampling; what was not chosen is never tested.
    chosen: dict[str, list[Path]] = {"linear": [runs / f"shots-2/sampling-{n}/method=linear" for n in (0, 1)]}
    for method in ("ept-lse", "fpt+"):
        row = result["shots"]["2"][method]
        for number in (0, 1):
            place = {
                rate: runs / f"shots-2/sampling-{number}/method={method}_lr={rate}_seed=0" for rate in (0.001, 0.02)
            }
            losses = {rate: json.loads((one / "run.json").read_text())["val_loss"] for rate, one in place.items()}
            best = min(losses, key=lambda rate: losses[rate])
            assert row["rates"][str(number)] == best
            assert row["validation"][str(number)] == {f"{rate:g}": loss for rate, loss in losses.items()}
            assert {rate for rate, one in place.items() if (one / "evaluation").exists()} == {best}
            chosen.setdefault(method, []).append(place[best])

    # One cell after the other from the predictions.
    tables = {method: [read_predictions(one / "evaluation/predictions.parquet") for one in places]
              for method, places in chosen.items()}  # fmt: skip
    assert all(table.rows == tested for every in tables.values() for table in every)
    aucs = {method: [macro_auc(t.labels, t.probabilities) for t in every] for method, every in tables.items()}
    row = result["shots"]["2"]["ept-lse"]
    assert row["auc"]["values"] == aucs["ept-lse"]
    assert row["auc"]["mean"] == pytest.approx(np.mean(aucs["ept-lse"]))
    assert row["auc"]["std"] == pytest.approx(np.std(aucs["ept-lse"], ddof=1))
    paired = np.subtract(aucs["ept-lse"], aucs["linear"])
    assert row["difference"]["difference"]["values"] == pytest.approx(paired.tolist(), abs=1e-12)
    low, high = row["difference"]["interval"]
    assert low <= paired.mean() <= high
    assert result["shots"]["2"]["linear"]["difference"] is None
    expected = [log_loss(t.labels, t.probabilities / t.probabilities.sum(axis=1, keepdims=True), labels=range(3))
                for t in tables["ept-lse"]]  # fmt: skip
    assert row["test"]["log_loss"]["values"] == pytest.approx(expected, rel=1e-5)
    for name in ("balanced_accuracy", "calibration_error", "brier"):
        written = [json.loads((one / "evaluation/metrics.json").read_text())[name] for one in chosen["ept-lse"]]
        assert row["test"][name]["values"] == written


def test_costs_files_and_another_method(root: Path, fpt: Fpt) -> None:
    # The bench of the test above, which is there: nothing is trained again.
    result = bench(fpt, root, *METHODS, *SMALL)
    folder = root / "outputs/bench"
    runs = folder / "runs"
    row, first = result["shots"]["2"]["ept-lse"], result["shots"]["2"]["linear"]
    low, _ = row["difference"]["interval"]

    # Costs: those of `fpt cost` and of the bundles.
    cost = json.loads(fpt("cost", "--method", "ept-lse", "--json", cwd=root)[0])
    assert row["learnable"] == read_spec(folder / row["runs"][0]["folder"] / "model").learnable == cost["learnable"]
    assert row["tensor_mib"] == cost["train_tensor_mib"]
    assert row["ppe"] == pytest.approx(row["auc"]["mean"] * cost["ppe_factor"])
    assert row["pme"] == pytest.approx(row["auc"]["mean"] * cost["pme_factor"])
    assert (first["tensor_mib"], first["pme"]) == (None, None), "a closed form has no training step"
    assert all(run["seconds"] > 0 for one in (row, first) for run in one["runs"])
    assert result["before"]["effective_rank"] > 1
    assert (first["separation"], row["separation"]["silhouette"] is None) == (None, False)

    # The same numbers in the files.
    lines = list(csv.DictReader((folder / "bench.csv").open()))
    assert [(line["shots"], line["method"]) for line in lines[:3]] == [("2", m) for m in ("linear", "ept-lse", "fpt+")]
    assert float(lines[1]["auc"]) == row["auc"]["mean"]
    assert float(lines[1]["auc_difference_low"]) == low
    singles = list(csv.DictReader((folder / "runs.csv").open()))
    assert len(singles) == 12
    page = (folder / "bench.html").read_text()
    assert page.count("<svg") == 2
    assert f"{row['auc']['mean']:.3f}" in page and "EPT-lse" in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")

    # Another method trains only itself.
    before = times(runs) | times(runs, "predictions.parquet")
    out, err = fpt("bench", "--methods", "linear,ept-lse,fpt+,attentive", *SMALL, cwd=root)
    after = times(runs) | times(runs, "predictions.parquet")
    assert before.items() <= after.items()
    assert all("method=attentive" in path for path in after.keys() - before.keys())
    assert "linear, shots" not in err
    assert "2 patients per class" in out and "All training images" in out and "attentive" in out


def test_a_killed_bench_goes_on(root: Path, fpt: Fpt, environment: dict[str, str]) -> None:
    words = ["bench", "--methods", "linear,fpt+", *SMALL, "--output", "outputs/killed"]
    folder = root / "outputs/killed/runs"
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=root,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 400
        while len(list(folder.rglob("run.json"))) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    kept = times(folder, "run.json")
    models = {path: when for path, when in times(folder).items() if f"{Path(path).parent.parent}/run.json" in kept}
    assert 5 <= len(kept) < 12
    assert not (root / "outputs/killed/bench.json").exists()
    result = bench(fpt, root, *words[1:])
    assert models.items() <= times(folder).items()
    assert len(times(folder, "run.json")) == 12
    assert [len(row["runs"]) for rows in result["shots"].values() for row in rows.values()] == [2, 2, 2, 2]


def test_a_plan_trains_nothing_and_what_does_not_fit_is_left_out(root: Path, fpt: Fpt) -> None:
    words = [*METHODS, *TINY, "--output", "outputs/planned", "--memory", "0.003"]
    plan = bench(fpt, root, *words, "--plan")
    assert not list((root / "outputs/planned").rglob("run.json"))
    assert [row["method"] for row in plan["methods"]] == ["linear", "fpt+"]
    assert "0.00 GiB" in plan["left_out"]["ept-lse"]
    linear, side = plan["methods"]
    cost = json.loads(fpt("cost", "--method", "fpt+", "--json", cwd=root)[0])
    assert (side["learnable"], side["tensor_mib"]) == (cost["learnable"], cost["train_tensor_mib"])
    assert (linear["runs"], side["runs"], side["finished"]) == (1, 1, 0)
    assert linear["seconds"] > 0 and side["seconds"] > 0
    out, err = fpt("bench", *words, cwd=root)
    assert "ept-lse: A training step takes" in err
    assert "fpt+" in out and "ept-lse" not in out
    again = bench(fpt, root, *words, "--plan")
    assert [(row["finished"], row["seconds"], row["basis"]) for row in again["methods"]] == [(1, 0.0, "finished")] * 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--methods", "fpt++"], "fpt++"),
        (["--shots", "0"], "--shots"),
        (["--shots", "11"], "'grid': 16 patients"),
        (["--reference", "knn", "--methods", "linear"], "not among the methods"),
        (["--rates", "fast"], "--rates"),
        (["--cluster"], "cluster.kind"),
        (["--methods", "loff-ta"], "features.hidden"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(root: Path, fpt: Fpt, words: list[str], named: str) -> None:
    _, err = fpt("bench", *words, "--output", "outputs/none", cwd=root, code=2)
    assert named in err
    assert not (root / "outputs/none/runs").exists()


def test_runs_share_a_pass_as_far_as_they_fit() -> None:
    cost = CostReport.model_construct(train_tensor_mib=10.0, train_batch_mib=2.0)
    limits = {memory: _together(cost, memory * 2**20, 5) for memory in (10, 17, 26, 1000)}
    assert limits == {10: 1, 17: 1, 26: 3, 1000: 5}, "8 MiB a run, and the batch once"
    assert _together(cost, None, 5) == _together(None, 2**20, 5) == 5


def test_a_method_that_fails_does_not_stop_the_others(root: Path, fpt: Fpt, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--methods", "attentive,ept-lse,linear", *TINY, "--output", "outputs/failing"]
    # A module that cannot be imported, as without an optional package; an image that was damaged after `prepare`.
    monkeypatch.setitem(sys.modules, "stages.methods.attentive", None)
    manifest = read_manifest(root / "outputs/manifest/manifest.parquet")
    damaged = root / "images" / next(draw_shots(manifest, 2, 0).of("train")).path
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    try:
        out, err = fpt("bench", *words, cwd=root)
        assert "linear" in out and "ept-lse" not in out
        assert "attentive: ModuleNotFoundError" in err
        assert "ept-lse: shots-2/sampling-0" in err and damaged.name in err
        result = json.loads((root / "outputs/failing/bench.json").read_text())
        assert list(result["left_out"]) == ["attentive", "ept-lse"]
        assert result["reference"] == "ept-lse", "the first of the methods that were named, and could be planned"
        assert result["shots"]["2"]["linear"]["difference"] is None
        _, err = fpt("bench", "--methods", "ept-lse", *words[2:], cwd=root, code=2)
        assert "No method finished." in err and damaged.name in err
    finally:
        damaged.write_bytes(content)


def test_a_learning_rate_that_diverges_is_not_chosen(root: Path, fpt: Fpt, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = bench_runs.train_pass

    def diverging(study: Any, files: Any, jobs: Any) -> None:
        if any(job.settings.train.lr == 0.02 for job in jobs):
            raise TrainingError("The training loss of epoch 1 is nan.")
        usual(study, files, jobs)

    monkeypatch.setattr(bench_runs, "train_pass", diverging)
    words = ["--methods", "fpt+", "--shots", "2", "--samplings", "1", "--output", "outputs/diverging"]
    for _ in range(2):
        row = bench(fpt, root, *words, "--rates", "1e-3,2e-2")["shots"]["2"]["fpt+"]
        assert row["rates"] == {"0": 0.001}
        assert row["validation"]["0"]["0.02"] is None
    _, err = fpt("bench", *words, "--rates", "2e-2", cwd=root, code=2)
    assert "epoch 1 is nan" in err


@pytest.mark.slow
def test_workers_of_a_cluster_give_the_same_table(root: Path, fpt: Fpt) -> None:
    words = [*METHODS, *TINY]
    expected = bench(fpt, root, *words, "--output", "outputs/inline")
    cluster = ["--cluster", "--set", "cluster.kind=local", "--set", "cluster.workers=2"]
    found = bench(fpt, root, *words, "--output", "outputs/workers", *cluster)

    def comparable(result: dict[str, Any]) -> dict[str, Any]:
        for row in result["shots"]["2"].values():
            row["seconds"] = None
            for run in row["runs"]:
                run["seconds"] = None
        return {name: result[name] for name in ("shots", "before", "left_out", "reference")}

    assert comparable(found) == comparable(expected)
    # What every worker is asked before anything is submitted.
    assert asyncio.run(check_worker("cpu", [root])) is None
    unseen = asyncio.run(check_worker("cpu", [root, root / "elsewhere"]))
    assert isinstance(unseen, ClusterError) and "elsewhere" in unseen.state
