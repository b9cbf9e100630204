"""`fpt train`: stage two, a side network or a baseline on the cached features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, say_next, score, show_json, size
from pipeline.options import METHODS, PARAMS_FILE, AsJson, Assignments, Params
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.cost import StoreMemory


def train(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"Preset or baseline: {METHODS}.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of model/ and train/; else the study's outputs.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on the cached features. Opens no original image and no LPM; a killed run resumes after its last epoch.

    On several GPUs: torchrun --nproc-per-node=2 -m fpt train.
    """
    from pipeline.epoch_log import EpochLogger
    from pipeline.params import write_settings
    from pipeline.project import open_study
    from pipeline.sweep_jobs import note_use
    from stages.device import set_up
    from stages.manifest import read_manifest
    from stages.ranks import Ranks
    from stages.store.extraction_receipt import read_extraction_receipt
    from stages.train.closed_form import FITTED
    from stages.train.parallel import process_group
    from stages.train.trainer import train as run

    study = open_study(params, [*(assignments or []), *([f"method={method}"] if method else [])])
    manifest, receipt = read_manifest(study.manifest), read_extraction_receipt(study.receipt)
    here = Ranks.of()
    if here.first:
        note_use(study, receipt)
    folder = study.outputs if output is None else output.absolute()
    model = folder / "model"
    epochs = 1 if study.settings.method in FITTED else study.settings.train.epochs
    with EpochLogger(folder / "train", epochs) as logger, process_group(here, set_up(study.settings.compute)) as ranks:
        result = run(
            study.settings, study.lpm, manifest, receipt, study.cache, model, study.checkpoints,
            logger if ranks.first else None, on_memory=None if as_json else _say_memory, remote=study.remote,
            ranks=ranks, on_notice=say,
        )  # fmt: skip
        if not ranks.first:
            return
        logger.finish(result.best)
    write_settings(study.settings, model)
    if as_json:
        show_json({"model": str(model), **result.model_dump(mode="json")})
        return
    if result.resumed_from:
        say(f"Epochs 1 to {result.resumed_from} are from the run that was interrupted.")
    best = ", ".join(f"{name} = {value:g}" for name, value in result.chosen.items()) or f"epoch {result.best.epoch}"
    say(f"Best: {best}, validation AUC {score(result.best.val_auc)}. Model: {model}")
    to = "" if output is None else f" --model {output / 'model'} --output {output / 'evaluation'}"
    say_next(f"fpt evaluate{to}")


def _say_memory(memory: StoreMemory) -> None:
    need, budget = f"{counted(memory.rows, 'row')} of features: {size(memory.needed)}", size(memory.budget)
    place, source = ("the disk", "") if memory.remote is None else ("the network", f" from {memory.remote}")
    if memory.held:
        say(f"{need}{source}, held in memory (store.memory_budget allows {budget}): {place} is read once.")
        return
    say(f"{need}, read from {memory.remote or place} in every epoch (store.memory_budget allows {budget}).")
    if memory.remote is not None:
        say("A copy on the disk is read faster: `fpt cache pull`.")
