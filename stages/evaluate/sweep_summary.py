"""The summary of a sweep: numbers of single runs, of runs averaged, and of methods against each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from schemas.results import Comparison
from schemas.sweeps import METHOD_AXIS, Spread, SweepSummary, SweptRun
from stages.evaluate.compare import compare
from stages.evaluate.ensemble import pool
from stages.evaluate.sweep_statistics import (
    best_settings,
    by_axis,
    chosen_test_auc,
    gather,
    grouped,
    method_differences,
    spread_known,
)

ALL = "all"
"""Folder of the average of all runs."""

Judged = Sequence[tuple[SweptRun, Path]]
"""Runs, and their folders from `evaluate`."""


def summarise(judged: Judged, output: Path, cross_validated: bool) -> tuple[SweepSummary, list[Comparison]]:
    """Everything that a sweep says.

    Args:
        judged: All runs; of each split or fold the same settings and seeds.
        output: Folder for the predictions of averaged runs: a folder each, of repeated splits below that of the split.
        cross_validated: Whether the parts are folds: then they are also judged as one table of all images. Test images
            of repeated splits overlap and cannot be.

    Returns:
        The summary, and where methods were swept their comparison in each split (one over all folds), each method by
        the settings that validation prefers.

    Raises:
        EvaluationError: Predictions are missing, damaged, or of other rows than those of their part.
        StorageError: The output cannot be written.
    """
    runs = [run for run, _ in judged]
    parts = list(dict.fromkeys(run.part for run in runs))
    units = {"": parts} if cross_validated else {part: [part] for part in parts}

    def averaged(members: Judged, name: str) -> Spread | None:
        found = [pool(_by_part(members, unit), output / key / name) for key, unit in units.items()]
        return spread_known([metrics.auc for metrics in found])

    settings = {}
    for name in dict.fromkeys(run.settings for run in runs):
        members = [(run, folder) for run, folder in judged if run.settings == name]
        settings[name] = gather([run for run, _ in members]).model_copy(
            update={
                "averaged_auc": averaged(members, name),
                "pooled_auc": _pooled(members, parts) if cross_validated else None,
            }
        )
    comparisons = _compare_methods(runs, [output / key for key in units])
    summary = SweepSummary(
        best=best_settings(runs),
        chosen_test_auc=chosen_test_auc(runs),
        settings=settings,
        axes=by_axis(runs),
        all=gather(runs).model_copy(update={"averaged_auc": averaged(judged, ALL)}),
        differences=method_differences(comparisons) if comparisons else {},
        runs={run.name: run for run in runs},
    )
    return summary, comparisons


def _by_part(members: Judged, parts: Sequence[str]) -> list[list[Path]]:
    return [[folder for run, folder in members if run.part == part] for part in parts]


def _pooled(members: Judged, parts: Sequence[str]) -> Spread | None:
    """AUC of each seed by itself, over the predictions of all folds."""
    seeds = list(dict.fromkeys(tuple(run.values.items()) for run, _ in members))
    own = [[(run, folder) for run, folder in members if tuple(run.values.items()) == seed] for seed in seeds]
    return spread_known([pool(_by_part(one, parts)).auc for one in own])


def _compare_methods(runs: Sequence[SweptRun], places: Sequence[Path]) -> list[Comparison]:
    methods = grouped((run for run in runs if METHOD_AXIS in run.values), lambda run: run.values[METHOD_AXIS])
    if len(methods) < 2:
        return []
    best = [best_settings(members) for members in methods.values()]
    comparisons = []
    for place in places:
        found = compare([place / name for name in best])
        models = (model.model_copy(update={"name": name}) for model, name in zip(found.models, best, strict=True))
        comparisons.append(found.model_copy(update={"models": tuple(models)}))
    return comparisons
