"""`fpt federate`: train at several sites; only weights or sums leave them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import duration, say, say_next, score, show_json, show_table, size
from pipeline.options import METHOD_NAMES, PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import SettingsError
from schemas.federated import FederatedResult, Partition, RoundLog
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study


def federate(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    method: Annotated[
        str | None, typer.Option("--method", help=f"What is trained: {METHOD_NAMES}.", show_default=False)
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option("--sites", min=1, help="Simulated sites; else those of data.site_column.", show_default=False),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option("--partition", metavar="RULE", help="iid or dirichlet:ALPHA, with --sites.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of the simulated sites.")] = 0,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", min=1, help="Averages; else train.epochs / local epochs.", show_default=False),
    ] = None,
    local_epochs: Annotated[int, typer.Option("--local-epochs", min=1, help="Epochs between two averages.")] = 1,
    mu: Annotated[float, typer.Option("--mu", min=0, help="Weight of the proximal term of FedProx; 0: FedAvg.")] = 0.0,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="Only print the bytes that a site sends, for every method.")
    ] = False,
    flower: Annotated[
        Path | None,
        typer.Option("--flower", help="Only write the folder that `flwr run` starts.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of model/; else outputs/federated.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a method at several sites in rounds, or fit it to sums of all sites in one round.

    Only weights or sums leave a site. A killed training resumes after its last round. See docs/federated.md.
    """
    from pipeline.federation import plan_rounds, run_federation
    from pipeline.project import open_study

    if flower is not None:
        _write_app(flower)
        return
    study = open_study(params, [*(assignments or []), *([f"method={method}"] if method else [])])
    if traffic:
        _show_traffic(study, as_json)
        return
    if sites is None and partition is not None:
        raise SettingsError("--partition deals images to simulated sites.", repair="Add their number: --sites 3")
    dealt = None if sites is None else Partition.parse(sites, partition or "iid", seed)
    plan = plan_rounds(study.settings, rounds, local_epochs, mu)
    folder = study.outputs / "federated" if output is None else output.absolute()
    result = run_federation(study, dealt, plan, folder, lambda log: _say_round(log, plan.rounds))
    if as_json:
        show_json({"model": str(folder / "model"), **result.model_dump(mode="json")})
        return
    _show(result, study)
    say(f"Model of round {result.best}: {folder / 'model'}")
    say_next(f"fpt evaluate --model {folder / 'model'} --output {folder / 'evaluation'}")


def _write_app(folder: Path) -> None:
    from pipeline.flower import write_app

    say(f"Folder for `flwr run`: {write_app(folder)}. Nodes, names and certificates: docs/federated.md.")


def _say_round(log: RoundLog, rounds: int) -> None:
    failed = "".join(f"; {name} left out: {reason}" for name, reason in log.failed.items())
    loss = "-" if log.val_loss is None else f"{log.val_loss:.4f}"
    say(
        f"Round {log.number:>{len(str(rounds))}}/{rounds}  {len(log.sites)} sites  val loss {loss}  "
        f"val accuracy {score(log.val_accuracy)}  {duration(log.seconds)}{failed}"
    )


def _show(result: FederatedResult, study: Study) -> None:
    from stages.manifest import read_manifest

    classes = read_manifest(study.manifest).classes
    show_table(
        "Sites",
        ["site", "training images", *classes, "validation images"],
        [[one.name, str(one.train), *map(str, one.counts), str(one.val)] for one in result.sites],
    )
    down, up = size(result.down_bytes), size(result.up_bytes)
    say(f"Each site received {down} and sent {up} per round, in {counted(len(result.rounds), 'round')}.")


def _show_traffic(study: Study, as_json: bool) -> None:
    from pipeline.commands.cost import count_classes, study_manifest
    from stages.federate.traffic import traffic_table

    classes = count_classes(study.settings, study_manifest(study.params))
    found = traffic_table(study.asked, study.lpm, classes)
    if as_json:
        show_json({"lpm": study.lpm.name, "traffic": [one.model_dump(mode="json") for one in found]})
        return
    show_table(
        f"What a site sends, {study.lpm.name}",
        ["method", "parameters", "bytes", "", "how often"],
        [[one.title, f"{one.learnable:,}", f"{one.bytes:,}", size(one.bytes), one.exchanges] for one in found],
    )
