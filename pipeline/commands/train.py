"""`fpt train`: stage two, any method of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, say_next, score, show_json, size
from pipeline.metric_tables import show_metrics
from pipeline.options import METHOD_NAMES, PARAMS_FILE, AsJson, Assignments, Params
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.cost import StoreMemory
    from schemas.results import Metrics


def train(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"What is trained: {METHOD_NAMES}.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of model/ and train/; else the study's outputs.", show_default=False),
    ] = None,
    then_evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Then evaluate the model on the test split, as fpt evaluate does.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a method on the cached features, or an adaptation of the LPM on them or on the images.

    A killed run resumes after its last epoch.

    On several GPUs: torchrun --nproc-per-node=2 -m fpt train.
    """
    from pipeline.api import train as run
    from pipeline.project import open_study, remind_to_watch
    from stages.ranks import Ranks

    study = open_study(params, [*(assignments or []), *([f"method={method}"] if method else [])])
    if (start := study.settings.train.start_from) is not None and Ranks.of().first:
        remind_to_watch(study, "train.start_from", start)
    result = run(study, output=output, on_memory=None if as_json else _say_memory)
    if not Ranks.of().first:
        return
    model = (study.outputs if output is None else output.absolute()) / "model"
    if as_json:
        metrics = {"metrics": _evaluate(study, output)[0].model_dump(mode="json")} if then_evaluate else {}
        show_json({"model": str(model), **result.model_dump(mode="json"), **metrics})
        return
    if result.resumed_from:
        say(f"Epochs 1 to {result.resumed_from} are from the run that was interrupted.")
    chosen = ", ".join(f"{name} = {value:g}" for name, value in result.chosen.items())
    epoch = f"epoch {result.best.epoch}" if len(result.epochs) > 1 else ""
    best = "; ".join(filter(None, (epoch, chosen))) or "epoch 1"
    say(f"Best: {best}, validation AUC {score(result.best.val_auc)}. Model: {model}")
    if result.conclusion:
        say(result.conclusion)
    if then_evaluate:
        found, folder = _evaluate(study, output)
        show_metrics(found)
        say(f"Report: {folder / 'report.html'}")
        return
    to = "" if output is None else f" --model {output / 'model'} --output {output / 'evaluation'}"
    say_next(f"fpt evaluate{to}")


def _evaluate(study: Study, output: Path | None) -> tuple[Metrics, Path]:
    """Evaluate the trained model on the test split: in this process torch and the features are there already."""
    from pipeline.evaluation import evaluate_split

    folders = (None, None) if output is None else (output / "model", output / "evaluation")
    metrics, _, folder = evaluate_split(study, "test", *folders)
    return metrics, folder


def _say_memory(memory: StoreMemory) -> None:
    need, budget = f"{counted(memory.rows, 'row')} of inputs: {size(memory.needed)}", size(memory.budget)
    place, source = ("the disk", "") if memory.remote is None else ("the network", f" from {memory.remote}")
    if memory.held:
        say(f"{need}{source}, held in memory (store.memory_budget allows {budget}): {place} is read once.")
        return
    say(f"{need}, read from {memory.remote or place} in every epoch (store.memory_budget allows {budget}).")
    if memory.remote is not None:
        say("A copy on the disk is read faster: `fpt cache pull`.")
