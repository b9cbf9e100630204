"""Which images an epoch reads where classes are rare: class by class, in stated shares.

In epoch e of E a class c of n_c images (n in all, C classes) has the share

    p_c(t) = (1 - t) / C + t n_c / n        balanced: t = 0;  decay: t = (e - 1) / (E - 1)

of the n draws: progressively-balanced sampling (Kang et al. 2020, arXiv 1910.09217) run backwards, first balanced, at
the end as the classes occur. Within a class no image is drawn twice before all were drawn once; so an epoch
with natural shares reads each image once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from schemas.settings import TrainSettings
from stages.ranks import ALONE, Ranks
from stages.tasks import positives
from stages.train.data import EpochSampler
from stages.train.targets import Target


def make_sampler(
    settings: TrainSettings, labels: Sequence[Target], classes: int, seed: int, ranks: Ranks = ALONE
) -> EpochSampler:
    """The order of the training images, of resolved settings."""
    if settings.sampling == "natural":
        return EpochSampler(len(labels), settings.batch_size, seed, ranks)
    last = settings.epochs if settings.sampling == "decay" else None
    return ClassSampler(strata(labels, classes), settings.batch_size, seed, settings.epochs, last, ranks)


def strata(labels: Sequence[Target], classes: int) -> npt.NDArray[np.int64]:
    """(n,): what a row is drawn as. Its class; with several labels the rarest of them, without any a class more."""
    array = np.asarray(labels, dtype=np.int64)
    if array.ndim == 1:
        return array
    there = positives(array, classes)
    rarity = np.where(there, there.sum(axis=0), len(array) + 1)
    return np.where(there.any(axis=1), rarity.argmin(axis=1), classes)


class ClassSampler(EpochSampler):
    """Batches with stated shares of the classes; (seed, epoch) determine them."""

    def __init__(
        self,
        strata: npt.NDArray[np.int64],
        batch_size: int,
        seed: int,
        epochs: int,
        natural_at: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Sort the positions by class.

        Args:
            strata: (n,) class of each position; classes without a position get no share.
            batch_size: Rows per batch; the last batch may be smaller.
            seed: Of the draws.
            epochs: Of the whole training.
            natural_at: Epoch from which shares are those of the rows, having been balanced in epoch 1; None: balanced
                throughout.
            ranks: Of several processes this one gets its rows of each batch.
        """
        super().__init__(len(strata), batch_size, seed, ranks)
        self._members = [np.flatnonzero(strata == name) for name in np.unique(strata)]
        self._entropy, self._epochs, self._natural_at = seed, epochs, natural_at

    def shares(self) -> npt.NDArray[np.float64]:
        """Of each class that occurs, in this epoch."""
        own = np.asarray([len(rows) for rows in self._members], dtype=np.float64)
        t = 0.0 if not self._natural_at else (self.epoch - 1) / max(self._natural_at - 1, 1)
        return np.asarray((1 - t) / len(own) + t * own / own.sum())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng((self._entropy, self.epoch, 1))
        draws = [
            # A repeat is another view and another augmentation: that of an epoch that never comes.
            (self.epoch + number // len(rows) * self._epochs, position)
            for rows, count in zip(self._members, self._counts(rng), strict=True)
            for number, position in enumerate(_in_turns(rows, count, rng))
        ]
        order = rng.permutation(len(draws))
        for start in range(0, len(order), self.batch_size):
            yield [draws[number] for number in self._own(order[start : start + self.batch_size])]

    def _counts(self, rng: np.random.Generator) -> list[int]:
        """Systematic sampling: n draws in all, of each class its share to within one, and on average exactly."""
        n = sum(len(rows) for rows in self._members)
        edges = np.round(np.cumsum(self.shares()) * n, 9)
        edges[-1] = n
        points = np.searchsorted(edges, np.arange(n) + rng.random(), side="right")
        return [int(count) for count in np.bincount(points, minlength=len(edges))]


def _in_turns(rows: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the rows, none again before all were there."""
    turns = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(turns)[:count].tolist() if turns else []
