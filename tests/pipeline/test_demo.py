"""The demo outside of the repository: one command creates and runs its study."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from study_tools import Run

from pipeline.params import override
from pipeline.scaffold import initialise, write_study
from pipeline.template import DEMO
from schemas.parse import parse_settings

FPT = [sys.executable, "-m", "pipeline"]


@pytest.mark.dvc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_makes_and_runs_the_demo(tmp_path: Path, run: Run, weights: Path) -> None:
    changes = ["lpm.name=test_vit", "features.image_size=64", "train.epochs=1", "method=fpt+"]
    changes += ["train.side_image_size=32", "train.side_reduction=2"]
    study, settings = tmp_path / "mine", parse_settings(override(DEMO, changes))
    initialise(study, write_study(study, settings, demo=True))
    # Existing weights are kept, so a copy of small ones makes the download unnecessary.
    text = (study / "dvc.yaml").read_text()
    copied = text.replace("cmd: fpt demo data", f"cmd: mkdir weights && cp {weights} ${{lpm.weights}} && fpt demo data")
    (study / "dvc.yaml").write_text(copied)
    run(["git", "commit", "--quiet", "--all", "-m", "Start"], cwd=study)
    done = run([*FPT, "demo", "run", "mine"], cwd=tmp_path)
    assert "With cached features" in done.stdout and "Side network only, without features" in done.stdout
    assert run(["git", "status", "--short"], cwd=study).stdout == "?? dvc.lock\n", "data and weights are ignored"
    again = run([*FPT, "demo", "run", "mine"], cwd=tmp_path)
    assert "Running stage" not in again.stdout
    refused = run([*FPT, "demo", "run", "mine", "--set", "train.epochs=2"], cwd=tmp_path, code=2)
    assert "already a study" in refused.stderr


@pytest.mark.parametrize("words", [["demo", "data"], ["demo", "summary"]])
def test_outside_of_a_demo_the_command_that_makes_one_is_named(words: list[str], tmp_path: Path, run: Run) -> None:
    done = run([*FPT, *words], cwd=tmp_path, code=2)
    assert "`fpt demo run`" in done.stderr
    assert "make " not in done.stderr


def test_a_failed_pipeline_names_the_way_on(tmp_path: Path, run: Run) -> None:
    (tmp_path / "fpt-demo").mkdir()
    (tmp_path / "fpt-demo" / "params.yaml").write_text("")
    done = run([*FPT, "demo", "run"], cwd=tmp_path, code=2)
    assert "repeat `fpt demo run fpt-demo`" in done.stderr
