"""`fpt sweep`: many trainings in one pass over the cached features."""

from __future__ import annotations

import itertools
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.console import say, score, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.project import Study
    from schemas.features import ExtractionReceipt
    from schemas.manifest import Manifest
    from schemas.results import EpochLog, Metrics
    from schemas.settings import Settings


def sweep(
    axes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE...",
            help="Values of a train setting, such as lr=2e-4,5e-4,1e-3 or seed=0,1,2; several axes are all combined.",
            show_default=False,
        ),
    ],
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the runs; else outputs/sweep.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train every combination in one pass over the cached features, judge each, and all of them together.

    Finished runs of the same sweep are kept: a sweep that was killed, or that gets another value, does only the rest.
    """
    from pipeline.project import open_study
    from stages.extract.receipt import read_extraction_receipt
    from stages.files import atomic_write
    from stages.manifest import read_manifest
    from stages.train.run import run_key

    study = open_study(params, assignments or [])
    manifest, receipt = read_manifest(study.manifest), read_extraction_receipt(study.receipt)
    folder = study.outputs / "sweep" if output is None else output.absolute()
    variants = {
        name: _variant(study, params, [*(assignments or []), *combination]) for name, combination in _product(axes)
    }
    keys = {name: run_key(settings, manifest, receipt) for name, settings in variants.items()}
    waiting = {name: settings for name, settings in variants.items() if not _finished(folder / name, keys[name])}
    if waiting:
        _train(study, manifest, receipt, waiting, folder)
        for name in waiting:
            atomic_write(folder / name / "run.json", json.dumps({"run": keys[name]}).encode())
    judged = {name: _judge(study, manifest, receipt, folder / name) for name in variants}
    judged |= {"all, averaged": _judge_together([folder / name for name in variants])} if len(variants) > 1 else {}
    summary = _summary(judged, variants)
    atomic_write(folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    if as_json:
        show_json(summary)
        return
    show_table(
        f"{len(waiting)} runs were trained, {len(variants) - len(waiting)} were there",
        ["run", "test AUC", "accuracy", "balanced accuracy"],
        [
            [name, score(metrics.auc), score(metrics.accuracy), score(metrics.balanced_accuracy)]
            for name, metrics in judged.items()
        ],
    )
    if summary["auc_mean"] is not None:
        say(f"Test AUC of the runs: mean {summary['auc_mean']:.4f}, standard deviation {summary['auc_std']:.4f}.")
    say(f"Each run has its model/ and evaluation/ in {folder}; compare them with `fpt compare`.")


def _product(axes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Name and assignments of every combination."""
    problems, choices = [], []
    for axis in axes:
        key, separator, values = axis.partition("=")
        key = key.strip().removeprefix("train.")
        texts = [text.strip() for text in values.split(",") if text.strip()]
        if not separator or not key or not texts:
            problems.append((axis, "must be key=value,value, such as lr=2e-4,5e-4"))
        choices.append([(key, text) for text in dict.fromkeys(texts)])
    if problems:
        raise SettingsError("A sweep cannot be read.", problems)
    return [
        ("_".join(f"{key}={text}" for key, text in combination), [f"train.{key}={text}" for key, text in combination])
        for combination in itertools.product(*choices)
    ]


def _variant(study: Study, params: Path, assignments: Sequence[str]) -> Settings:
    """Resolved settings of one combination; all have the order of images of the study."""
    from pipeline.params import load_settings
    from schemas.resolve import resolve

    shared = [
        f"train.order_seed={study.settings.train.order_seed}",
        f"features.precision={study.settings.features.precision}",
    ]
    return resolve(load_settings(params, [*assignments, *shared]), study.lpm)


def _finished(folder: Path, key: str) -> bool:
    try:
        return bool(json.loads((folder / "run.json").read_bytes()) == {"run": key})
    except (OSError, ValueError):
        return False


def _train(
    study: Study, manifest: Manifest, receipt: ExtractionReceipt, variants: Mapping[str, Settings], folder: Path
) -> None:
    from pipeline.live import EpochLogger
    from pipeline.params import write_settings
    from stages.train.run import train_together

    names, epochs = list(variants), study.settings.train.epochs
    with ExitStack() as stack:
        loggers = [
            stack.enter_context(EpochLogger(folder / name / "train", epochs, title=f"{name}  ")) for name in names
        ]

        def follow(position: int, log: EpochLog) -> None:
            loggers[position](log)

        results = train_together(
            list(variants.values()),
            study.lpm,
            manifest,
            receipt,
            study.cache,
            [folder / name / "model" for name in names],
            study.checkpoints,
            follow,
            remote=study.remote,
        )
        for logger, result in zip(loggers, results, strict=True):
            logger.finish(result.best)
    for name, settings in variants.items():
        write_settings(settings, folder / name / "model")


def _judge(study: Study, manifest: Manifest, receipt: ExtractionReceipt, folder: Path) -> Metrics:
    from stages.device import set_up
    from stages.evaluate.run import evaluate

    return evaluate(
        manifest,
        receipt,
        folder / "model",
        study.cache,
        folder / "evaluation",
        device=set_up(study.settings.compute),
        remote=study.remote,
    )


def _judge_together(folders: Sequence[Path]) -> Metrics:
    from stages.evaluate.ensemble import judge_together

    return judge_together([folder / "evaluation" for folder in folders])


def _summary(judged: Mapping[str, Metrics], variants: Mapping[str, Settings]) -> dict[str, Any]:
    values = [metrics.auc for name, metrics in judged.items() if name in variants and metrics.auc is not None]
    return {
        "auc_mean": statistics.mean(values) if values else None,
        "auc_std": (statistics.stdev(values) if len(values) > 1 else 0.0) if values else None,
        "runs": {name: metrics.model_dump(mode="json") for name, metrics in judged.items()},
    }
