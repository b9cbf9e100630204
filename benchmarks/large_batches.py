"""Train with batches of 16, 64 and 256 at equal epochs, with and without extrapolation, and print one table.

    python benchmarks/large_batches.py DATA... --work DIR --lpm vit_small_patch14_dinov2.lvd142m --weights FILE

DATA are folders with `images/` and `labels.csv` (columns path, label, patient). Features are extracted once, splits are
the first folds of a cross-validation by patient, and finished runs are files below DIR, which are not trained again.

Learning rates follow the batch: with its square root for AdamW, in proportion for SGD. With extrapolation a batch is
divided among workers of 16 images, each at an extrapolated point of its own (docs/large-batches.md). The column
"difference" is the AUC minus that of the inner optimiser, paired by split and seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accuracy_runs import Prepared, Recipe, Run, finish, open_data, plan_folds, prepare_recipe
from sklearn.metrics import log_loss

from pipeline.console import print_error, say, show_table
from pipeline.project import CACHE_VARIABLE
from schemas.errors import FptError
from stages.scores import macro_auc

SMALL = 16
"""Batch of the base learning rates, and images per worker."""
FOLDS = 3
"""Folds of the cross-validation that gives the splits."""


@dataclass(frozen=True)
class Trained:
    """An optimiser with its base learning rate and how that grows with the batch."""

    optimizer: str
    """As `train.optimizer`."""
    rate: float
    """Learning rate at `SMALL`."""
    exponent: float
    """Power of the batch with which the rate grows."""
    settings: tuple[str, ...] = ()
    """Further overrides."""

    def recipe(self, method: str, batch: int, epochs: int, seeds: int) -> Recipe:
        """Return the recipe of a batch size."""
        rate = self.rate * (batch / SMALL) ** self.exponent
        sets = (
            f"train.optimizer={self.optimizer}",
            f"train.lr={rate:.12g}",
            f"train.batch_size={batch}",
            f"train.epochs={epochs}",
            f"train.extrapolation.workers={batch // SMALL}",
            *self.settings,
        )
        return Recipe(method=method, set=sets, seeds=seeds)


DIRECTION = "train.extrapolation.direction=preconditioned"
SGD = ("train.weight_decay=1e-4",)
TRAINED = {
    "adamw": Trained("adamw", 1e-3, 0.5),
    "extrap-adamw": Trained("extrap-adamw", 1e-3, 0.5),
    "extrap-adamw-preconditioned": Trained("extrap-adamw", 1e-3, 0.5, (DIRECTION,)),
    "sgd": Trained("sgd", 0.02, 1.0, SGD),
    "extrap-sgd": Trained("extrap-sgd", 0.02, 1.0, SGD),
}
"""Optimisers by the name in the table."""


def runs_of(prepared: Prepared, splits: int) -> Iterator[Run]:
    """Yield the runs of a recipe on the first splits; trains those that are not finished."""
    for fold in itertools.islice(plan_folds(prepared, FOLDS, 1), splits):
        yield from finish(prepared, fold)[0]


def scores(run: Run) -> tuple[float, float]:
    """Return AUC and log-loss of a run on the test images."""
    labels, p = np.array([run.classes.index(label) for label in run.labels]), np.array(run.probabilities)
    auc = macro_auc(labels, p)
    if auc is None:
        raise ValueError("a class has no test images")
    return auc, float(log_loss(labels, p, labels=range(len(run.classes))))


def spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation (n - 1)."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def main() -> None:
    """Train what is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lpm", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--weights", default="hub")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--method", default="fpt+")
    parser.add_argument("--optimizers", default=",".join(TRAINED))
    parser.add_argument("--batches", default="16,64,256")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault(CACHE_VARIABLE, str(options.work.absolute() / "cache"))
    chosen = {name: TRAINED[name] for name in options.optimizers.split(",")}
    try:
        for folder in options.data:
            _measure(folder, chosen, options)
    except FptError as error:
        print_error(str(error))
        raise SystemExit(2) from None


def _measure(folder: Path, chosen: dict[str, Trained], options: argparse.Namespace) -> None:
    """Print the table of a data set."""
    lpm = {"name": options.lpm, "weights": options.weights}
    data, rows = open_data(folder, options.work, lpm, options.image_size), []
    plain: dict[tuple[int, str], Sequence[float]] = {}
    for batch in map(int, options.batches.split(",")):
        for name, one in chosen.items():
            recipe = one.recipe(options.method, batch, options.epochs, options.seeds)
            runs = list(runs_of(prepare_recipe(recipe, data), options.splits))
            aucs, losses = zip(*map(scores, runs), strict=True)
            rate = one.rate * (batch / SMALL) ** one.exponent
            plain.setdefault((batch, one.optimizer), aucs)
            inner = plain.get((batch, one.optimizer.removeprefix("extrap-")), aucs)
            gains = [auc - other for auc, other in zip(aucs, inner, strict=True)]
            gain = "" if inner is aucs else spread(gains)
            rows.append([str(batch), name, f"{rate:.3g}", spread(aucs), gain, spread(losses)])
            say(f"{data.name}: {', '.join(rows[-1])}")
    title = f"{data.name}: {options.method}, {options.epochs} epochs, {options.splits} splits x {options.seeds} seeds"
    show_table(title, ["batch", "optimiser", "rate", "test AUC", "difference", "log loss"], rows)


if __name__ == "__main__":
    main()
