"""What the runs of a sweep say together: means, deviations, all values, and which settings validation prefers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from schemas.results import Comparison, Metrics
from schemas.sweeps import PairedDifference, RateFinding, RateTrial, Spread, SweptRun, SweptSettings


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        values=tuple(values),
    )


def spread_known(values: Sequence[float | None]) -> Spread | None:
    """The same; None where one is not defined: means over different runs would not compare."""
    known = [value for value in values if value is not None]
    return spread(known) if known and len(known) == len(values) else None


def metric_values(metrics: Metrics) -> dict[str, float]:
    """Those that are one number and defined, by their names in `Metrics`."""
    found = {name: getattr(metrics, name) for name in Metrics.model_fields}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def gather(runs: Sequence[SweptRun]) -> SweptSettings:
    """What some runs have in common."""
    names = dict.fromkeys(name for run in runs for name in run.test)
    metrics = {name: spread_known([run.test.get(name) for run in runs]) for name in names}
    return SweptSettings(
        runs=len(runs),
        val_auc=spread_known([run.val_auc for run in runs]),
        val_loss=spread([run.val_loss for run in runs]),
        test={name: found for name, found in metrics.items() if found is not None},
    )


def grouped(runs: Iterable[SweptRun], key: Callable[[SweptRun], str]) -> dict[str, list[SweptRun]]:
    """Runs by what they share, in the order of their first appearance."""
    groups: dict[str, list[SweptRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def by_axis(runs: Sequence[SweptRun]) -> dict[str, dict[str, SweptSettings]]:
    """Axis -> value -> its runs, of axes with several values."""
    axes = dict.fromkeys(key for run in runs for key in run.values)
    tables = {
        axis: grouped((run for run in runs if axis in run.values), lambda run, axis=axis: run.values[axis])  # type: ignore[misc]
        for axis in axes
    }
    return {
        axis: {value: gather(members) for value, members in groups.items()}
        for axis, groups in tables.items()
        if len(groups) > 1
    }


def best_settings(runs: Sequence[SweptRun]) -> str:
    """The settings with the highest mean validation AUC, of equals the lowest mean loss. The test has no say."""

    def merit(members: Sequence[SweptRun]) -> tuple[float, float]:
        found = gather(members)
        return (0.0 if found.val_auc is None else found.val_auc.mean, -found.val_loss.mean)

    groups = grouped(runs, lambda run: run.settings)
    return max(groups, key=lambda name: merit(groups[name]))


def chosen_test_auc(runs: Sequence[SweptRun]) -> Spread | None:
    """Test AUC where each split or fold chooses its settings by its own validation images; one value a part.

    The best of many on the test would be too good, and so would the choice by the validation images of other folds,
    which are test images here.
    """
    values: list[float | None] = []
    for members in grouped(runs, lambda run: run.part).values():
        best = best_settings(members)
        found = spread_known([run.test.get("auc") for run in members if run.settings == best])
        values.append(None if found is None else found.mean)
    return spread_known(values)


def method_differences(comparisons: Sequence[Comparison]) -> dict[str, dict[str, PairedDifference]]:
    """Model -> metric -> difference to the first model, over splits.

    Args:
        comparisons: Of the same models, one a split.
    """
    found: dict[str, dict[str, PairedDifference]] = {}
    for position, model in enumerate(comparisons[0].models[1:], start=1):
        each = [comparison.models[position].differences for comparison in comparisons]
        found[model.name] = {
            metric: PairedDifference(
                difference=spread([one[metric].value for one in each]),
                interval=first.interval if len(each) == 1 else None,
            )
            for metric, first in each[0].items()
            if all(metric in one for one in each)
        }
    return found


def find_rate(losses: Mapping[float, Sequence[float]], aucs: Mapping[float, Sequence[float | None]]) -> RateFinding:
    """The learning rate with the lowest smoothed validation loss.

    Neighbours of a geometric grid behave alike, and a handful of seeds is noisy: each mean is averaged with its
    neighbours', 1/4, 1/2, 1/4, at the ends 2/3, 1/3.

    Args:
        losses: Rate -> validation loss of each seed.
        aucs: Rate -> validation AUC of each seed.
    """
    rates = sorted(losses)
    means = [statistics.fmean(losses[rate]) for rate in rates]
    trials = []
    for place, rate in enumerate(rates):
        near = [(means[place], 2.0), *((means[at], 1.0) for at in (place - 1, place + 1) if 0 <= at < len(rates))]
        trials.append(
            RateTrial(
                lr=rate,
                val_loss=spread(losses[rate]),
                val_auc=spread_known(aucs[rate]),
                smoothed_loss=sum(mean * weight for mean, weight in near) / sum(weight for _, weight in near),
            )
        )
    best = min(trials, key=lambda trial: trial.smoothed_loss)
    return RateFinding(lr=best.lr, at_edge=best.lr in (rates[0], rates[-1]), trials=tuple(trials))
