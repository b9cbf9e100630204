"""Summarise a sweep: metrics of single runs, of ensembles of runs, and differences between methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from schemas.results import Comparison
from schemas.sweeps import METHOD_AXIS, Spread, SweepSummary, SweptRun
from stages.evaluate.compare import compare
from stages.evaluate.ensemble import score_pooled
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
"""Folder of the ensemble of all runs."""

EvaluatedRuns = Sequence[tuple[SweptRun, Path]]
"""Runs, with their output folders of `evaluate`."""


def summarise(evaluated: EvaluatedRuns, output: Path, cross_validated: bool) -> tuple[SweepSummary, list[Comparison]]:
    """Summarise all runs of a sweep.

    Args:
        evaluated: All runs, with the same settings and seeds in each split or fold.
        output: Folder for the predictions of ensembles, one folder each; with repeated splits in a folder per split.
        cross_validated: Whether the splits are folds. Folds are also scored as one table of all images, which is
            impossible for repeated splits, whose test images overlap.

    Returns:
        The summary, and if several methods were swept a comparison of methods for each split (one over all folds),
        with the settings of each method that are best on validation data.

    Raises:
        EvaluationError: Predictions are missing, damaged, or of other rows than those of their split.
        StorageError: The output cannot be written.
    """
    runs = [run for run, _ in evaluated]
    splits = list(dict.fromkeys(run.part for run in runs))
    splits_by_folder = {"": splits} if cross_validated else {split: [split] for split in splits}

    def ensemble_auc(members: EvaluatedRuns, name: str) -> Spread | None:
        metrics = [
            score_pooled(_by_split(members, pooled), output / folder / name)
            for folder, pooled in splits_by_folder.items()
        ]
        return spread_known([one.auc for one in metrics])

    settings = {}
    for name in dict.fromkeys(run.settings for run in runs):
        members = [(run, folder) for run, folder in evaluated if run.settings == name]
        settings[name] = gather([run for run, _ in members]).model_copy(
            update={
                "averaged_auc": ensemble_auc(members, name),
                "pooled_auc": _pooled_auc(members, splits) if cross_validated else None,
            }
        )
    comparisons = _compare_methods(runs, [output / folder for folder in splits_by_folder])
    summary = SweepSummary(
        best=best_settings(runs),
        chosen_test_auc=chosen_test_auc(runs),
        settings=settings,
        axes=by_axis(runs),
        all=gather(runs).model_copy(update={"averaged_auc": ensemble_auc(evaluated, ALL)}),
        differences=method_differences(comparisons) if comparisons else {},
        runs={run.name: run for run in runs},
    )
    return summary, comparisons


def _by_split(members: EvaluatedRuns, splits: Sequence[str]) -> list[list[Path]]:
    return [[folder for run, folder in members if run.part == split] for split in splits]


def _pooled_auc(members: EvaluatedRuns, folds: Sequence[str]) -> Spread | None:
    """Compute the AUC of each seed, pooled over the predictions of all folds."""
    seeds = list(dict.fromkeys(tuple(run.values.items()) for run, _ in members))
    runs_of = [[(run, folder) for run, folder in members if tuple(run.values.items()) == seed] for seed in seeds]
    return spread_known([score_pooled(_by_split(runs, folds)).auc for runs in runs_of])


def _compare_methods(runs: Sequence[SweptRun], folders: Sequence[Path]) -> list[Comparison]:
    methods = grouped((run for run in runs if METHOD_AXIS in run.values), lambda run: run.values[METHOD_AXIS])
    if len(methods) < 2:
        return []
    best = [best_settings(members) for members in methods.values()]
    comparisons = []
    for folder in folders:
        comparison = compare([folder / name for name in best])
        models = (model.model_copy(update={"name": name}) for model, name in zip(comparison.models, best, strict=True))
        comparisons.append(comparison.model_copy(update={"models": tuple(models)}))
    return comparisons
