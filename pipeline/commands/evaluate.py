"""`fpt evaluate`: how good the model is on a split that it did not see."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, score, show_json, show_pairs, show_table
from pipeline.metric_names import MARKS, metric_name
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.tasks import METRICS
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.results import Metrics


class SplitName(StrEnum):
    """Rows to judge."""

    train = "train"
    val = "val"
    test = "test"


def evaluate(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model; else outputs/model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the results; else outputs/evaluation.", show_default=False),
    ] = None,
    split: Annotated[SplitName, typer.Option("--split", help="Rows to judge.")] = SplitName.test,
    as_json: AsJson = False,
) -> None:
    """Judge the model: metrics, a table of predictions, and a report."""
    from pipeline.params import write_settings
    from pipeline.project import open_study
    from stages.device import set_up
    from stages.evaluate.run import evaluate as run
    from stages.extract.receipt import read_extraction_receipt
    from stages.files import atomic_write
    from stages.manifest import read_manifest
    from stages.train.bundle import read_spec

    study = open_study(params, assignments or [])
    bundle = study.outputs / "model" if model is None else model.absolute()
    folder = study.outputs / "evaluation" if output is None else output.absolute()
    metrics = run(
        read_manifest(study.manifest),
        read_extraction_receipt(study.receipt),
        bundle,
        study.cache,
        folder,
        split.value,
        device=set_up(study.settings.compute),
        remote=study.remote,
    )
    # What was judged is the model, so its settings stand beside the judgement; params.yaml may have moved on.
    trained = bundle / "settings.yaml"
    if trained.exists():
        atomic_write(folder / "settings.yaml", trained.read_bytes())
    else:
        write_settings(study.settings, folder)
    if as_json:
        show_json(metrics.model_dump(mode="json"))
        return
    _show(metrics)
    if split.value in read_spec(bundle).learnt_from:
        say("The model has learnt from these images: this says how well it remembers them.")
    say(f"Report: {folder / 'report.html'}")


def _show(metrics: Metrics) -> None:
    intervals = {}
    if metrics.auc_interval is not None:
        intervals["auc"] = f"  (95%: {metrics.auc_interval[0]:.3f} to {metrics.auc_interval[1]:.3f})"
    show_pairs(
        f"{metrics.split}: {counted(metrics.images, 'image')} of {counted(metrics.groups, 'group')}",
        [
            (metric_name(field, metrics.task, start=True), score(getattr(metrics, field)) + intervals.get(field, ""))
            for field in METRICS[metrics.task]
        ],
    )
    classes = list(metrics.auc_per_class)
    rows = [
        [name, *(str(count) for count in counts), score(metrics.auc_per_class[name])]
        for name, counts in zip(classes, metrics.confusion, strict=True)
    ]
    if metrics.task == "multilabel":
        show_table("Images by label, at a probability of 0.5", ["label", *MARKS, "AUC"], rows)
    else:
        show_table("Labels (rows) and predictions (columns)", ["label", *classes, "AUC"], rows)
