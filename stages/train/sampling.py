"""Class-balanced sampling of training images.

In epoch e of E, a class c with n_c of the n images (C classes in total) has the sampling probability

    p_c(t) = (1 - t) / C + t n_c / n        balanced: t = 0;  decay: t = (e - 1) / (E - 1)

This is progressively-balanced sampling (Kang et al. 2020, arXiv 1910.09217) in reverse: from balanced to the natural
class frequencies. Images of a class are drawn without replacement until all have been drawn, so that an epoch with
natural frequencies reads each image once.
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
    """Return the sampler of the training images for resolved settings."""
    if settings.sampling == "natural":
        return EpochSampler(len(labels), settings.batch_size, seed, ranks)
    last = settings.epochs if settings.sampling == "decay" else None
    return ClassSampler(strata(labels, classes), settings.batch_size, seed, settings.epochs, last, ranks)


def strata(labels: Sequence[Target], classes: int) -> npt.NDArray[np.int64]:
    """Return the sampling stratum (n,) of each row.

    It is the class; with several labels per row the rarest of them, and for rows without labels an additional stratum.
    """
    array = np.asarray(labels, dtype=np.int64)
    if array.ndim == 1:
        return array
    has_label = positives(array, classes)
    label_counts = np.where(has_label, has_label.sum(axis=0), len(array) + 1)
    return np.where(has_label.any(axis=1), label_counts.argmin(axis=1), classes)


class ClassSampler(EpochSampler):
    """Batches in which classes have given probabilities; (seed, epoch) determine the batches."""

    def __init__(
        self,
        strata: npt.NDArray[np.int64],
        batch_size: int,
        seed: int,
        epochs: int,
        natural_at: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Group the positions by class.

        Args:
            strata: Class of each position, (n,); classes without positions are never drawn.
            batch_size: Rows per batch; the last batch may be smaller.
            seed: Random seed of the draws.
            epochs: Number of epochs of the training.
            natural_at: Epoch that uses the natural class frequencies, after a linear transition from balanced classes
                in epoch 1; None: balanced in every epoch.
            ranks: Position of this process among those that train together; it gets its rows of each batch.
        """
        super().__init__(len(strata), batch_size, seed, ranks)
        self._members = [np.flatnonzero(strata == name) for name in np.unique(strata)]
        self._entropy, self._epochs, self._natural_at = seed, epochs, natural_at

    def shares(self) -> npt.NDArray[np.float64]:
        """Return the sampling probability in this epoch of each class that occurs."""
        counts = np.asarray([len(rows) for rows in self._members], dtype=np.float64)
        t = 0.0 if not self._natural_at else (self.epoch - 1) / max(self._natural_at - 1, 1)
        return np.asarray((1 - t) / len(counts) + t * counts / counts.sum())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng((self._entropy, self.epoch, 1))
        draws = [
            # A repeated image gets a new view and augmentation: those of an epoch after the last one.
            (self.epoch + number // len(rows) * self._epochs, position)
            for rows, count in zip(self._members, self._counts(rng), strict=True)
            for number, position in enumerate(_draw_in_rounds(rows, count, rng))
        ]
        order = rng.permutation(len(draws))
        for start in range(0, len(order), self.batch_size):
            yield [draws[number] for number in self._rank_rows(order[start : start + self.batch_size])]

    def _counts(self, rng: np.random.Generator) -> list[int]:
        """Return the number of draws per class, n in total, by systematic sampling.

        Each is within one of its expected value, and unbiased.
        """
        n = sum(len(rows) for rows in self._members)
        edges = np.round(np.cumsum(self.shares()) * n, 9)
        edges[-1] = n
        points = np.searchsorted(edges, np.arange(n) + rng.random(), side="right")
        return [int(count) for count in np.bincount(points, minlength=len(edges))]


def _draw_in_rounds(rows: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> list[int]:
    """Draw `count` rows without replacement, starting over when all have been drawn."""
    rounds = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(rounds)[:count].tolist() if rounds else []
