"""`fpt demo`: images that the demo draws itself, and what came out."""

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

demo = typer.Typer(help="A small study of images that the demo draws itself: `fpt demo run`.", no_args_is_help=True)


@demo.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Folder of the demo study; made where it does not exist.")] = FOLDER,
    assignments: Assignments = None,
) -> None:
    """Make the demo study, run its pipeline, and print the test AUC. Some minutes; a second call resumes."""
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
            f"{folder} is a study already.",
            [("--set", "only for a new one")],
            f"Edit {folder / PARAMS}, or choose another folder.",
        )
    # The stages of `dvc.yaml` call `fpt`, which must be the one of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"], cwd=folder, env={**os.environ, "PATH": path}, check=False
    )
    if done.returncode:
        raise ProjectError(
            f"The pipeline of the demo in {folder} failed.",
            "Its messages are above.",
            f"Fix that, and repeat `fpt demo run {shlex.quote(str(folder))}`: finished stages are kept.",
        )
    summary(folder / PARAMS)


@demo.command()
def data(params: Params = PARAMS_FILE, assignments: Assignments = None) -> None:
    """Draw the images and fetch the weights that params.yaml names."""
    from pipeline.params import load_settings
    from pipeline.progress import ImageBar
    from stages.demo.images import make_demo_images
    from stages.demo.weights import fetch_demo_weights

    if params == PARAMS_FILE and not params.exists():
        raise ProjectError(
            f"There is no {PARAMS} here.",
            "This verb is the first stage of the demo study.",
            "Run `fpt demo run`: it makes that study, and runs all of it.",
        )
    settings, root = load_settings(params, assignments or []), params.absolute().parent
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
            ("With the cached features", score(_auc(with_features))),
            ("Only the side network, without features", score(_auc(without))),
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
            "The demo has not run to its end, or this is not its folder.",
            f"Run `dvc repro` in the folder of the demo study; `fpt demo run` makes one in {FOLDER}.",
        ) from None
