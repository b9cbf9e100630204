"""Aggregate the runs of a sweep: means, standard deviations, and the best settings on validation data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from schemas.results import Comparison, Metrics
from schemas.sweeps import PairedDifference, RateFinding, RateTrial, Spread, SweptRun, SweptSettings


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of one or more values."""
    return Spread(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        values=tuple(values),
    )


def spread_known(values: Sequence[float | None]) -> Spread | None:
    """Like `spread`, but None if any value is undefined, since means over different runs are not comparable."""
    defined = [value for value in values if value is not None]
    return spread(defined) if defined and len(defined) == len(values) else None


def metric_values(metrics: Metrics) -> dict[str, float]:
    """Return the defined scalar metrics, by their field names in `Metrics`."""
    fields = {name: getattr(metrics, name) for name in Metrics.model_fields}
    return {name: value for name, value in fields.items() if isinstance(value, float)}


def gather(runs: Sequence[SweptRun]) -> SweptSettings:
    """Aggregate the metrics of some runs."""
    names = dict.fromkeys(name for run in runs for name in run.test)
    metrics = {name: spread_known([run.test.get(name) for run in runs]) for name in names}
    return SweptSettings(
        runs=len(runs),
        val_auc=spread_known([run.val_auc for run in runs]),
        val_loss=spread([run.val_loss for run in runs]),
        test={name: values for name, values in metrics.items() if values is not None},
    )


def grouped(runs: Iterable[SweptRun], key: Callable[[SweptRun], str]) -> dict[str, list[SweptRun]]:
    """Group runs by a key, in the order of first appearance."""
    groups: dict[str, list[SweptRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def by_axis(runs: Sequence[SweptRun]) -> dict[str, dict[str, SweptSettings]]:
    """Return axis -> value -> aggregated runs, for axes with several values."""
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
    """Return the settings with the highest mean validation AUC, then the lowest mean validation loss."""

    def merit(members: Sequence[SweptRun]) -> tuple[float, float]:
        total = gather(members)
        return (0.0 if total.val_auc is None else total.val_auc.mean, -total.val_loss.mean)

    groups = grouped(runs, lambda run: run.settings)
    return max(groups, key=lambda name: merit(groups[name]))


def chosen_test_auc(runs: Sequence[SweptRun]) -> Spread | None:
    """Return the test AUC with settings chosen by the validation images of the same split or fold; a value for each.

    Choosing the best settings on test images would be optimistic, and so would choosing by the validation images of
    other folds, which are test images here.
    """
    values: list[float | None] = []
    for members in grouped(runs, lambda run: run.part).values():
        best = best_settings(members)
        aucs = spread_known([run.test.get("auc") for run in members if run.settings == best])
        values.append(None if aucs is None else aucs.mean)
    return spread_known(values)


def method_differences(comparisons: Sequence[Comparison]) -> dict[str, dict[str, PairedDifference]]:
    """Return model -> metric -> difference to the first model, over splits.

    Args:
        comparisons: Comparisons of the same models, one per split.
    """
    differences: dict[str, dict[str, PairedDifference]] = {}
    for position, model in enumerate(comparisons[0].models[1:], start=1):
        each = [comparison.models[position].differences for comparison in comparisons]
        differences[model.name] = {
            metric: PairedDifference(
                difference=spread([one[metric].value for one in each]),
                interval=first.interval if len(each) == 1 else None,
            )
            for metric, first in each[0].items()
            if all(metric in one for one in each)
        }
    return differences


def find_rate(losses: Mapping[float, Sequence[float]], aucs: Mapping[float, Sequence[float | None]]) -> RateFinding:
    """Find the learning rate with the lowest smoothed validation loss.

    The mean of a few seeds is noisy, and neighbouring rates of a geometric grid behave similarly. So each mean is
    averaged with its neighbours, with weights 1/4, 1/2, 1/4, at the ends 2/3, 1/3.

    Args:
        losses: Rate -> validation loss of each seed.
        aucs: Rate -> validation AUC of each seed.
    """
    rates = sorted(losses)
    means = [statistics.fmean(losses[rate]) for rate in rates]
    trials = []
    for index, rate in enumerate(rates):
        neighbours = [at for at in (index - 1, index + 1) if 0 <= at < len(rates)]
        weighted = [(means[index], 2.0), *((means[at], 1.0) for at in neighbours)]
        trials.append(
            RateTrial(
                lr=rate,
                val_loss=spread(losses[rate]),
                val_auc=spread_known(aucs[rate]),
                smoothed_loss=sum(mean * weight for mean, weight in weighted) / sum(weight for _, weight in weighted),
            )
        )
    best = min(trials, key=lambda trial: trial.smoothed_loss)
    return RateFinding(lr=best.lr, at_edge=best.lr in (rates[0], rates[-1]), trials=tuple(trials))
