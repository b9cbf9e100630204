"""Compare recipes by cross-validation on several data sets, finely enough to see a difference of 0.005 in AUC.

    python benchmarks/accuracy.py DATA... --recipe statistics --recipe linear --work DIR
    python benchmarks/accuracy.py DATA... --recipe fpt-x --recipes FILE.yaml --work DIR --repeats 2 --json result.json

DATA are folders with `images/` and `labels.csv` (columns path, label, patient). A file of recipes maps names to
`{method: fpt+, set: [train.lr=1e-3], features: [ratio=0.4], seeds: 3}`; all but `method` may be left out.

Features are extracted once per distinct settings, into a cache below DIR. Every image is tested once per repeat; folds
are drawn by patient and are the same for all recipes. Finished runs are files below DIR: with the same settings, split,
seed and features they are read, not trained again, so that a killed bench continues.

Prints a table per data set, and the difference of each recipe to the reference, averaged over data sets, with a 95%
interval by bootstrap over patients. docs/accuracy-bench.md explains how to read it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_metrics import OTHERS, Floats, Tested, library_metrics, mean_auc, other_metrics
from accuracy_runs import DataSet, Prepared, Run, finish, open_data, plan_folds, prepare_recipe, read_recipes

from pipeline.console import print_error, say, show, show_table
from pipeline.project import CACHE_VARIABLE
from schemas.errors import EvaluationError, FptError, SettingsError
from schemas.settings import FeatureSettings, LpmSettings
from stages.evaluate.bootstrap import group_draws, percentile_interval

TOLERANCE = 0.005
"""Largest loss of mean AUC on a single data set with which a recipe may be adopted."""
RULE = f"adopt: the 95% interval of the pooled difference lies above zero, and no data set loses more than {TOLERANCE}."
INTERVAL = "95% interval"
BATCHES = 2
"""Calls of `group_draws`, each of 1000 bootstrap samples."""


@dataclass(frozen=True)
class Outcome:
    """A recipe on a data set."""

    folds: tuple[Tested, ...]
    """Folds of all repeats."""
    figures: dict[str, Any]
    """Everything in the table, as in the JSON file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="folder with images/ and labels.csv")
    parser.add_argument("--recipes", type=Path, metavar="FILE.yaml", help="recipes by name")
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME", help="built-in recipe; repeatable")
    parser.add_argument("--reference", metavar="NAME", help="recipe to compare with; default: the first one")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the cache and of the runs")
    parser.add_argument("--splits", type=int, default=5, help="folds of a cross-validation")
    parser.add_argument("--repeats", type=int, default=1, help="cross-validations, each with other folds")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of the LPM; default: the hub")
    parser.add_argument("--lpm", default=LpmSettings().name, metavar="NAME", help="name of the LPM")
    parser.add_argument("--image-size", type=int, default=FeatureSettings().image_size, help="input of the LPM")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here, too")
    options = parser.parse_args(arguments)
    try:
        result = bench(options)
    except FptError as error:
        print_error(str(error))
        raise SystemExit(1) from None
    report(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Run every recipe on every data set, and compare them."""
    recipes = read_recipes(options.recipes, options.recipe)
    reference = options.reference or next(iter(recipes))
    names = [folder.absolute().name for folder in options.data]
    if reference not in recipes:
        raise SettingsError(f"The reference {reference} is no recipe.", repair=f"Use {', '.join(recipes)}.")
    if options.splits < 2 or options.repeats < 1:
        raise SettingsError("A cross-validation needs at least two folds and one repeat.")
    if len(set(names)) < len(names):
        raise SettingsError("Two folders of data have the same name, which names their results.")
    # One cache for all data sets and recipes, whatever cache the user has.
    os.environ[CACHE_VARIABLE] = str((options.work / "cache").absolute())
    weights = {} if options.weights is None else {"weights": str(options.weights.absolute())}
    work, lpm = options.work.absolute(), {"name": options.lpm, **weights}
    prepared: dict[str, dict[str, Prepared]] = {}
    for folder in options.data:
        data: DataSet = open_data(folder.absolute(), work, lpm, options.image_size)
        # All features first: a recipe that cannot run is found before anything is trained.
        prepared[data.name] = {name: prepare_recipe(recipe, data) for name, recipe in recipes.items()}
    outcomes: dict[str, dict[str, Outcome]] = {}
    trained = read = 0
    for data_name, ready in prepared.items():
        outcomes[data_name] = {}
        for name, one in ready.items():
            runs, new = run_recipe(f"{data_name}, {name}", one, options.splits, options.repeats)
            trained, read = trained + new, read + len(runs) - new
            outcomes[data_name][name] = summarise(runs, one.bytes_per_image)
    return {
        "reference": reference,
        "rule": RULE,
        "trained": trained,
        "read": read,
        "data": {data: {name: one.figures for name, one in of.items()} for data, of in outcomes.items()},
        "differences": compare(outcomes, reference),
    }


def run_recipe(title: str, prepared: Prepared, splits: int, repeats: int) -> tuple[list[Run], int]:
    """Train or read all runs of a recipe; return them with the number of trained ones."""
    runs: list[Run] = []
    trained = 0
    for fold in plan_folds(prepared, splits, repeats):
        finished, new = finish(prepared, fold)
        runs += finished
        trained += new
        if new:
            took = statistics.mean(run.seconds for run in finished)
            say(f"{title}: fold {fold.number + 1} of {splits}, repeat {fold.repeat + 1} of {repeats}, {took:.1f} s")
    return runs, trained


def average_seeds(runs: Sequence[Run]) -> tuple[Tested, ...]:
    """Return the folds of some runs, with the probabilities averaged over seeds."""
    folds: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        folds.setdefault((run.repeat, run.fold), []).append(run)
    tested = []
    for seeds in folds.values():
        first = seeds[0]
        labels = np.array([first.classes.index(label) for label in first.labels], dtype=np.int64)
        mean = np.mean([run.probabilities for run in seeds], axis=0)
        tested.append(Tested(first.classes, first.rows, labels, first.patients, mean, first.repeat))
    return tuple(tested)


def plain_auc(folds: Sequence[Tested]) -> float:
    """Return the mean AUC of some folds."""
    return float(mean_auc(folds, [np.ones((len(fold.rows), 1)) for fold in folds])[0])


def summarise(runs: Sequence[Run], bytes_per_image: float) -> Outcome:
    """Compute the figures of a recipe on a data set.

    The AUC is the mean over folds, because models of different folds are not calibrated to each other. The other
    metrics need more images than a fold has: they are computed over all images of a repeat, and averaged over repeats.
    """
    folds = average_seeds(runs)
    seeds = sorted({run.seed for run in runs})
    figures = {
        "auc": plain_auc(folds),
        "auc_of_seeds": [plain_auc(average_seeds([run for run in runs if run.seed == seed])) for seed in seeds],
        "auc_of_folds": [plain_auc([fold]) for fold in folds],
        **library_metrics(folds),
        # Another process can slow some of them down.
        "seconds": statistics.median(run.seconds for run in runs),
        "bytes_per_image": bytes_per_image,
    }
    return Outcome(folds, figures)


def bootstrap(recipes: Mapping[str, Outcome], seed: int) -> dict[str, dict[str, Floats]]:
    """Return the mean AUC over folds and the other metrics of each recipe under the same bootstrap samples of patients.

    Args:
        recipes: Outcomes on one data set.
        seed: Seed of the samples; every data set needs its own, or their samples would be correlated.
    """
    first = next(iter(recipes.values()))
    patients = sorted({patient for fold in first.folds for patient in fold.patients})
    place = {patient: number for number, patient in enumerate(patients)}
    rows = [np.array([place[patient] for patient in fold.patients]) for fold in first.folds]
    for name, outcome in recipes.items():
        if [fold.rows for fold in outcome.folds] != [fold.rows for fold in first.folds]:
            raise EvaluationError(f"{name} was tested on other folds than {next(iter(recipes))}.")
    batches: dict[str, list[dict[str, Floats]]] = {name: [] for name in recipes}
    seeds = range(BATCHES * seed, BATCHES * (seed + 1))
    for drawn in itertools.chain.from_iterable(group_draws(patients, seed=each) for each in seeds):
        weights = [drawn[at] for at in rows]
        for name, outcome in recipes.items():
            metrics = {"auc": mean_auc(outcome.folds, weights), **other_metrics(outcome.folds, weights)}
            batches[name].append(metrics)
    return {
        name: {metric: np.concatenate([*(one[metric] for one in batch), np.zeros(0)]) for metric in ("auc", *OTHERS)}
        for name, batch in batches.items()
    }


def compare(outcomes: Mapping[str, Mapping[str, Outcome]], reference: str) -> dict[str, dict[str, Any]]:
    """Return the differences of each recipe to the reference: per data set, and their mean with its interval.

    Those of the AUC decide whether it is adopted; those of the other metrics are below `others`.
    """
    samples = [bootstrap(of, seed) for seed, of in enumerate(outcomes.values())]

    def difference(name: str, metric: str) -> dict[str, Any]:
        by_set = {data: of[name].figures[metric] - of[reference].figures[metric] for data, of in outcomes.items()}
        drawn = [sample[name][metric] - sample[reference][metric] for sample in samples]
        return {
            "by_set": by_set,
            "interval_by_set": {data: percentile_interval(one) for data, one in zip(outcomes, drawn, strict=True)},
            "mean": statistics.mean(by_set.values()),
            "interval": percentile_interval(np.mean(drawn, axis=0)),
        }

    compared = {}
    for name in samples[0]:
        if name == reference:
            continue
        auc = difference(name, "auc")
        adopt = auc["interval"] is not None and auc["interval"][0] > 0 and min(auc["by_set"].values()) >= -TOLERANCE
        others = {metric: difference(name, metric) for metric in OTHERS}
        compared[name] = {**auc, "adopt": adopt, "others": others}
    return compared


def report(result: Mapping[str, Any]) -> None:
    """Print a table per data set, and the table of differences with its rule."""
    show(f"{result['trained']} runs were trained, {result['read']} were read.")
    heads = ("recipe", "AUC", "sd of seeds", *OTHERS.values(), "s per run", "bytes per image")
    for data, recipes in result["data"].items():
        show_table(data, heads, [[name, *cells(one)] for name, one in recipes.items()])
    if not result["differences"]:
        return
    reference, sets = result["reference"], tuple(result["data"])
    differences = result["differences"].items()
    others = [
        [name, title, *difference_cells(one["others"][metric])]
        for name, one in differences
        for metric, title in OTHERS.items()
    ]
    show_table(f"Other metrics minus those of {reference}", ("recipe", "metric", *sets, "pooled", INTERVAL), others)
    rows = [[name, *difference_cells(one), "adopt" if one["adopt"] else "-"] for name, one in differences]
    show_table(f"AUC minus that of {reference}", ("recipe", *sets, "pooled", INTERVAL, "verdict"), rows)
    show(result["rule"])


def difference_cells(difference: Mapping[str, Any]) -> list[str]:
    """Format a difference: of each data set, their mean and its interval."""
    interval = difference["interval"]
    values = [f"{value:+.4f}" for value in (*difference["by_set"].values(), difference["mean"])]
    return [*values, "-" if interval is None else " to ".join(f"{end:+.4f}" for end in interval)]


def cells(figures: Mapping[str, Any]) -> list[str]:
    """Format the figures of a recipe."""
    seeds = figures["auc_of_seeds"]
    return [
        f"{figures['auc']:.4f}",
        f"{statistics.stdev(seeds):.4f}" if len(seeds) > 1 else "-",
        *(f"{figures[name]:.4f}" for name in OTHERS),
        f"{figures['seconds']:.1f}",
        f"{figures['bytes_per_image']:,.0f}",
    ]


if __name__ == "__main__":
    main()
