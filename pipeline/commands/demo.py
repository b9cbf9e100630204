"""`fpt demo`: images that the demo draws itself, and what came out."""

from __future__ import annotations

from pathlib import Path

import typer

from pipeline.console import say, score, show_pairs
from pipeline.options import PARAMS_FILE, Assignments, Params
from schemas.errors import ProjectError
from schemas.results import Metrics
from schemas.settings import OUTPUTS

demo = typer.Typer(help="The demo study at the root of the repository; `make demo` runs it.", no_args_is_help=True)


@demo.command()
def data(params: Params = PARAMS_FILE, assignments: Assignments = None) -> None:
    """Draw the images and fetch the weights that params.yaml names."""
    from pipeline.params import load_settings
    from pipeline.progress import ImageBar
    from stages.demo.images import make_demo_images
    from stages.demo.weights import fetch_demo_weights

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
            ("The same side network alone", score(_auc(without))),
        ],
    )
    say(f"Report: {with_features / 'report.html'}")


def _auc(folder: Path) -> float | None:
    path = folder / "metrics.json"
    try:
        return Metrics.model_validate_json(path.read_bytes()).auc
    except (OSError, ValueError):
        raise ProjectError(
            f"There are no metrics at {path}.", "The demo has not run to its end.", "Run `make demo`, or `dvc repro`."
        ) from None
