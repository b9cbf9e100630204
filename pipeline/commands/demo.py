"""`fpt demo`: a small study of synthetic images."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.console import say, score, show_pairs
from pipeline.options import PARAMS_FILE, Assignments, Params
from pipeline.params import PARAMS
from schemas.errors import ProjectError, SettingsError
from schemas.results import Metrics
from schemas.settings import OUTPUTS
from stages.files import read_regular

FOLDER = Path("fpt-demo")

demo = typer.Typer(help="Run a small study of synthetic images: `fpt demo run`.", no_args_is_help=True)


@demo.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Folder of the demo study, created if missing.")] = FOLDER,
    assignments: Assignments = None,
) -> None:
    """Create the demo study, run its pipeline, and print the test AUC. Takes some minutes; a second call resumes."""
    from pipeline.params import override
    from pipeline.scaffold import initialise, undone_on_failure, write_study
    from pipeline.template import DEMO
    from schemas.parse import parse_settings

    if not (folder / PARAMS).exists():
        settings = parse_settings(override(DEMO, assignments or []), source="The demo's settings")
        with undone_on_failure(folder):
            initialise(folder, write_study(folder, settings, demo=True))
    elif assignments:
        raise SettingsError(
            f"{folder} is already a study.",
            [("--set", "only possible for a new one")],
            f"Edit {folder / PARAMS}, or choose another folder.",
        )
    # The stages of `dvc.yaml` call `fpt`, which has to be the one of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=folder, env={**os.environ, "PATH": path}, check=False
    )
    if done.returncode:
        raise ProjectError(
            f"The pipeline of the demo in {folder} failed.",
            "Its messages are above.",
            f"Fix the problem and repeat `fpt demo run {shlex.quote(str(folder))}`: finished stages are kept.",
        )
    summary(folder / PARAMS)


@demo.command()
def data(params: Params = PARAMS_FILE, assignments: Assignments = None) -> None:
    """Draw the images, and download the weights, at the paths in params.yaml."""
    from pipeline.params import load_settings
    from pipeline.progress import ImageBar

    if params == PARAMS_FILE and not params.exists():
        raise ProjectError(
            f"There is no {PARAMS} here.",
            "This verb is the first stage of the demo study.",
            "Run `fpt demo run`, which creates the study and runs all stages.",
        )
    settings, root = load_settings(params, assignments or []), params.absolute().parent
    # Imported late, because it loads torch: a folder without a study is an error at once.
    from stages.demo.images import make_demo_images
    from stages.demo.weights import fetch_demo_weights

    images, weights = root / settings.data.images, root / settings.lpm.weights
    with ImageBar("Drawing images") as bar:
        make_demo_images(images, progress=bar)
    say(f"Images: {images}")
    say(f"Weights: {weights}, from {fetch_demo_weights(weights)}")


@demo.command()
def summary(params: Params = PARAMS_FILE) -> None:
    """Print the test AUC with and without the cached features."""
    outputs = params.absolute().parent / OUTPUTS
    with_features, without = outputs / "evaluation", outputs / "baseline" / "evaluation"
    show_pairs(
        "Test AUC",
        [
            ("With cached features", score(_auc(with_features))),
            ("Side network only, without features", score(_auc(without))),
        ],
    )
    say(f"Report: {with_features / 'report.html'}")


def _auc(folder: Path) -> float | None:
    path = folder / "metrics.json"
    try:
        return Metrics.model_validate_json(read_regular(path)).auc
    except (OSError, ValueError):
        raise ProjectError(
            f"There are no metrics at {path}.",
            "The demo has not finished, or this is not its folder.",
            f"Run `dvc repro` in the folder of the demo study; `fpt demo run` creates one in {FOLDER}.",
        ) from None
