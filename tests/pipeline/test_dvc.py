"""The pipeline under the real `dvc` command: what a change re-runs, and what it never computes again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from study_tools import Run, draw_images

pytestmark = [pytest.mark.dvc, pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
STAGES = ["prepare", "extract", "train", "evaluate"]


def ran(output: str) -> list[str]:
    """The stages that DVC ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def change(study: Path, section: str, key: str, value: object) -> None:
    """Edit `params.yaml` as a user would."""
    tree = yaml.safe_load((study / "params.yaml").read_text())
    tree[section][key] = value
    (study / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def receipts(study: Path) -> dict[str, int]:
    """Shard receipts of a study's cache, with the time of their last change: rewriting one would show."""
    # os.walk passes over folders that disappear meanwhile, such as that of a store before it has its name.
    return {
        name: (Path(folder) / name).stat().st_mtime_ns
        for folder, _, names in os.walk(study / ".fpt" / "cache")
        for name in names
        if Path(folder).name == "receipts" and name.endswith(".json")
    }


@pytest.mark.parametrize(("key", "value"), [("window", "percentile"), ("frame", 0)])
def test_window_and_frame_change_what_prepare_reads(study: Path, run: Run, key: str, value: object) -> None:
    """Thumbnails for near-duplicates, warnings and unusable images depend on them; training on the features."""
    change(study, "features", key, value)
    assert ran(run(["dvc", "repro", "--dry"], cwd=study).stdout) == ["prepare", "extract"]


def test_the_whole_pipeline_leaves_what_it_promises(finished: Path, run: Run) -> None:
    study = finished / "study"
    files = {str(path.relative_to(study / "outputs")) for path in (study / "outputs").rglob("*") if path.is_file()}
    assert files >= {
        "manifest/manifest.parquet",
        "manifest/settings.yaml",
        "features/receipt.json",
        "features/settings.yaml",
        "model/model.safetensors",
        "model/model.json",
        "model/settings.yaml",
        "train/metrics.json",
        "train/plots/metrics/val/loss.tsv",
        "evaluation/predictions.parquet",
        "evaluation/metrics.json",
        "evaluation/report.html",
        "evaluation/settings.yaml",
    }
    settings = yaml.safe_load((study / "outputs" / "model" / "settings.yaml").read_text())
    assert "auto" not in [*settings["features"].values(), *settings["train"].values()]
    assert run(["git", "status", "--short"], cwd=study).stdout == ""
    tracked = json.loads(run(["dvc", "ls", "--json", "--dvc-only", "--recursive", "."], cwd=study).stdout)
    assert not any(".fpt" in entry["path"] for entry in tracked)


def test_a_second_repro_runs_nothing(study: Path, run: Run) -> None:
    done = run(["dvc", "repro"], cwd=study)
    assert ran(done.stdout) == []
    assert "up to date" in done.stdout


def test_a_change_of_training_trains_and_judges_again(study: Path, run: Run) -> None:
    before = receipts(study)
    change(study, "train", "lr", 0.01)
    done = run(["dvc", "repro"], cwd=study)
    assert ran(done.stdout) == ["train", "evaluate"]
    assert receipts(study) == before
    difference = json.loads(run(["dvc", "metrics", "diff", "--json"], cwd=study).stdout)
    assert "lr" in difference["outputs/train/metrics.json"]
    run(["dvc", "plots", "show", "--json"], cwd=study)


def test_a_change_of_this_machine_runs_nothing(study: Path, run: Run) -> None:
    change(study, "compute", "extract_batch_size", 1)
    assert ran(run(["dvc", "repro"], cwd=study).stdout) == []


def test_a_new_image_is_all_that_is_computed(study: Path, finished: Path, tmp_path: Path, run: Run) -> None:
    images = Path(shutil.copytree(finished / "images", tmp_path / "images"))
    draw_images(images, per_class=1, seed=1, prefix="new")
    (images / "dark" / "new000.png").unlink()
    change(study, "data", "images", str(images))
    before = receipts(study)
    done = run(["dvc", "repro"], cwd=study)
    assert ran(done.stdout) == STAGES
    assert "41 images: 40 were in the cache, computed 1 " in done.stderr
    after = receipts(study)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_a_killed_extraction_loses_at_most_one_shard(
    tmp_path: Path, run: Run, settings: list[str], environment: dict[str, str]
) -> None:
    count, shard = 100, 2
    draw_images(tmp_path / "images", per_class=count // 2)
    words = [f"--set={assignment}" for assignment in [*settings, f"features.shard_size={shard}"]]
    run(["fpt", "init", "study", "--images", "images", *words], cwd=tmp_path)
    study = tmp_path / "study"
    run(["dvc", "repro", "prepare"], cwd=study)
    with subprocess.Popen(
        ["dvc", "repro"], cwd=study, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    ) as repro:
        deadline = time.monotonic() + 240
        while len(receipts(study)) < 3 and time.monotonic() < deadline and repro.poll() is None:
            time.sleep(0.005)
        os.killpg(repro.pid, signal.SIGKILL)
    kept = receipts(study)
    assert 3 <= len(kept) < count // shard
    assert not (study / "outputs" / "features" / "receipt.json").exists()
    done = run(["dvc", "repro"], cwd=study)
    cached = shard * len(kept)
    assert f"{count} images: {cached} were in the cache, computed {count - cached} " in done.stderr
    assert kept.items() <= receipts(study).items()


@pytest.mark.parametrize("where", [[], ["--temp"]])
def test_an_experiment_reuses_the_features_and_its_table_is_readable(
    study: Path, run: Run, environment: dict[str, str], where: list[str]
) -> None:
    before = receipts(study)
    # A shard size is no part of the fingerprint, but DVC runs extract again for it: nothing may be computed.
    words = ["dvc", "exp", "run", *where, "--name", "try", "-S", "train.lr=0.002", "-S", "features.shard_size=8"]
    done = run(words, cwd=study)
    assert ran(done.stdout) == ["extract", "train", "evaluate"]
    assert "40 images: 40 were in the cache, computed 0." in done.stderr
    assert receipts(study) == before
    assert not list((study / ".dvc" / "tmp").rglob("features.zarr"))
    command = next(line for line in (REPOSITORY / "README.md").read_text().splitlines() if "dvc exp show" in line)
    assert f"# {command}" in (study / "dvc.yaml").read_text()
    narrow = {**environment, "COLUMNS": "120"}
    shown = subprocess.run(
        ["sh", "-c", f"{command} --no-pager"], cwd=study, env=narrow, capture_output=True, text=True, check=True
    ).stdout
    assert max(map(len, shown.splitlines())) <= 120 and "…" not in shown, shown
    for word in ("Experiment", "method", "train.lr", "val.auc", "auc", "accuracy", "0.002"):
        assert word in shown


def test_an_experiment_in_a_study_below_the_repository(tmp_path: Path, finished: Path, run: Run) -> None:
    run(["git", "init", "--quiet"], cwd=tmp_path)
    run(["dvc", "init", "--quiet"], cwd=tmp_path)
    study = tmp_path / "studies" / "one"
    shutil.copytree(
        finished / "study", study, ignore=shutil.ignore_patterns(".git", ".dvc", ".fpt", "outputs", "dvc.lock")
    )
    run(["git", "add", "--all"], cwd=tmp_path)
    run(["git", "commit", "--quiet", "-m", "Start"], cwd=tmp_path)
    done = run(["dvc", "exp", "run", "--temp", "--name", "first"], cwd=study)
    assert "computed 40 " in done.stderr
    assert len(receipts(study)) == 10
    done = run(["dvc", "exp", "run", "--temp", "--name", "second", "-S", "train.lr=0.002"], cwd=study)
    assert "computed" not in done.stderr.replace("computed 0.", "")
    assert len(receipts(study)) == 10


def test_the_queue_tries_learning_rates_without_the_lpm(study: Path, run: Run) -> None:
    before = receipts(study)
    script = REPOSITORY / "benchmarks" / "exp_queue.py"
    done = run([sys.executable, script, study, "--rates", "0.002,0.004"], cwd=study)
    assert "No stage before train ran" in done.stdout
    for line, rate in zip(done.stdout.splitlines()[1:3], ("0.002", "0.004"), strict=True):
        assert line.split()[0] == rate
        assert line.endswith("train, evaluate")
    assert receipts(study) == before
    shown = json.loads(run(["dvc", "exp", "show", "--json"], cwd=study).stdout)
    assert all(rate in json.dumps(shown) for rate in ("0.002", "0.004"))


def test_a_sweep_is_a_stage_that_keeps_its_finished_runs(study: Path, run: Run) -> None:
    text = (REPOSITORY / "docs" / "sweeps.md").read_text()
    stage = text.split("```yaml\n")[1].split("```")[0]
    pipeline = (study / "dvc.yaml").read_text() + stage
    (study / "dvc.yaml").write_text(pipeline)
    done = run(["dvc", "repro", "sweep"], cwd=study)
    assert ran(done.stdout) == ["sweep"]
    assert "12 runs were trained, 0 were there" in done.stderr
    assert ran(run(["dvc", "repro", "sweep"], cwd=study).stdout) == []
    shown = json.loads(run(["dvc", "metrics", "show", "--json"], cwd=study).stdout)
    metrics = shown[""]["data"]["outputs/sweep/summary.json"]["data"]
    written = json.loads((study / "outputs" / "sweep" / "summary.json").read_text())
    assert metrics["axes"]["lr"]["5e-4"]["test"]["auc"]["mean"] == written["axes"]["lr"]["5e-4"]["test"]["auc"]["mean"]
    assert len(written["chosen_test_auc"]["values"]) == 3
    (study / "dvc.yaml").write_text(pipeline.replace("lr=5e-4,1e-3 ", "lr=5e-4,1e-3,2e-3 "))
    done = run(["dvc", "repro", "sweep"], cwd=study)
    assert "6 runs were trained, 12 were there" in done.stderr
    assert run(["dvc", "status", "sweep"], cwd=study).stdout.strip().endswith("up to date.")


def test_a_deleted_store_is_noticed_and_mended_by_one_command(study: Path, run: Run) -> None:
    shutil.rmtree(study / ".fpt" / "cache")
    change(study, "train", "lr", 0.01)
    done = run(["dvc", "repro"], cwd=study, code=255)
    assert "is gone" in done.stderr
    assert "fpt extract" in done.stderr
    assert "Traceback" not in done.stderr
    assert ran(done.stdout) == ["train"]
    run(["fpt", "extract"], cwd=study)
    done = run(["dvc", "repro"], cwd=study)
    assert ran(done.stdout)[-2:] == ["train", "evaluate"]


def test_a_shared_cache_serves_another_study(
    study: Path, finished: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    shared = {**environment, "FPT_CACHE_DIR": str(finished / "study" / ".fpt" / "cache")}
    shutil.rmtree(study / ".fpt")
    done = subprocess.run(
        ["fpt", "extract", "--json"], cwd=study, env=shared, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["computed"] == 0
    assert not (study / ".fpt").exists()
