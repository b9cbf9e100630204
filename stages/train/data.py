"""Batches of a method's inputs from a row source: a store, memory, or images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from schemas.settings import AugmentSettings
from schemas.specs import Inputs
from stages.methods.batch import IMAGE, Batch, array_names
from stages.pixels import Transform, augmentation, to_size
from stages.ranks import ALONE, Ranks
from stages.shared import SharedArrays
from stages.store.memory_rows import RowSource
from stages.train.targets import Target

PIXELS = ("side", IMAGE)
"""Names of the arrays of pixels."""

IN_BATCH = "batch:"
"""Prefix, in shared memory, of the names of pixel arrays that have the size they have in a batch."""

PREFETCH = 2
"""Batches that a worker prepares ahead."""


@dataclass(frozen=True)
class Reading:
    """Inputs that a data set reads per image, and their augmentation."""

    inputs: Inputs
    """Inputs of the method."""
    side_size: int = 0
    """Input of the side network, in pixels; 0 without small images."""
    augment: AugmentSettings | None = None
    """None: un-augmented images."""
    seed: int = 0
    """Seed of the augmentation and of the views."""


@dataclass(frozen=True)
class Ticket:
    """Message of a worker about a batch that it wrote to shared memory."""

    slot: int
    """Number of the slot of shared memory."""
    labels: list[Target]
    """Labels of the rows."""


class FeatureDataset(Dataset[Batch]):
    """Map-style data set over rows of a source that returns complete batches.

    An index is (epoch, position), which with the seed determines view and augmentation, so that images depend neither
    on the number of workers nor on whether a run was resumed.
    """

    def __init__(
        self,
        source: RowSource,
        ids: Sequence[str],
        labels: Sequence[Target],
        reading: Reading,
        views: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Locate the rows.

        Args:
            source: Source of the rows.
            ids: Image id of each position.
            labels: Class index of each position; with several labels per image, zeros and ones.
            reading: Inputs and augmentation.
            views: Row ids of the views of each position, one of which is drawn per epoch, so that features and side
                image have the same geometry. None: the images themselves.

        Raises:
            CacheIncompleteError: If an image has no row.
        """
        self._source, self._labels, self._reading = source, tuple(labels), reading
        choices = [(row,) for row in ids] if views is None else views
        self._ids = tuple(row for rows in choices for row in rows)
        self._first = np.cumsum([0, *map(len, choices)])
        names = array_names(reading.inputs)
        self._names = tuple(name for name in source.layouts if name in names)
        self._sizes = {name: self._size(name) for name in PIXELS if name in self._names}
        self._augment = {
            name: augmentation(reading.augment, size) for name, size in self._sizes.items() if reading.augment
        }
        self._rows = source.locate(self._ids)
        self._buffers: dict[str, NDArray[Any]] = {}
        self._slots: tuple[SharedArrays, ...] = ()
        self._read = 0

    def _size(self, name: str) -> int:
        """Return the side of the images of a pixel array in a batch, in pixels."""
        return self._reading.side_size if name == "side" else int(self._source.layouts[name].shape[-1])

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Sequence[Target]:
        """Target of each position."""
        return self._labels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}, "_read": 0}

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        """Read a batch of one row."""
        return self.__getitems__([index])

    def share(self, workers: int, batch_size: int) -> tuple[SharedArrays, ...]:
        """Allocate the memory that a loader's workers write their batches to.

        Each worker has one slot more than batches that it prepares ahead: it starts its next batch when an earlier one
        is returned, and by then the batch before that is no longer in use.

        Args:
            workers: Workers of the loader.
            batch_size: Maximum number of rows in a batch.
        """
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, size in self._sizes.items():
            shapes[IN_BATCH + name] = ((batch_size, 3, size, size), "uint8")
        for name in self._names:
            layout = self._source.layouts[name]
            shapes[name] = ((batch_size, *layout.shape), layout.dtype)
        self._slots = tuple(SharedArrays(shapes) for _ in range(workers * (PREFETCH + 1)))
        return self._slots

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> Batch:
        """Read a batch. Its keys and values are valid until the next batch is read."""
        if not indices:
            return Batch(torch.empty(0, dtype=torch.int64))
        if self._buffers and len(next(iter(self._buffers.values()))) < len(indices):
            self._buffers = {}
        batch, rows = self._fill(indices, self._buffers)
        self._buffers = self._buffers or rows
        return batch

    def write_slot(self, indices: Sequence[tuple[int, int]], worker: int) -> Ticket:
        """Read a batch into the next slot of a loader's worker."""
        slot = worker * (PREFETCH + 1) + self._read % (PREFETCH + 1)
        self._read += 1
        if not indices:
            return Ticket(slot, [])
        shared = self._slots[slot].arrays
        batch, _ = self._fill(indices, shared)
        for name, pixels in (("side", batch.side), (IMAGE, batch.image)):
            if isinstance(pixels, torch.Tensor):
                shared[IN_BATCH + name][: len(indices)] = pixels.numpy()
        return Ticket(slot, batch.labels.tolist())

    def _fill(
        self, indices: Sequence[tuple[int, int]], out: dict[str, NDArray[Any]]
    ) -> tuple[Batch, dict[str, NDArray[Any]]]:
        drawn = [self._drawn(epoch, position) for epoch, position in indices]
        ids = [self._ids[row] for row in drawn]
        rows = self._source.read_rows(self._rows[drawn], ids, self._names, out or None)
        pixels = {name: self._pixels(name, torch.from_numpy(rows[name]), indices) for name in self._sizes}
        labels = torch.tensor([self._labels[position] for _, position in indices])
        return Batch.of(rows, labels, pixels.get("side"), pixels.get(IMAGE)), rows

    def _pixels(self, name: str, stored: torch.Tensor, indices: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return images at their size in a batch, augmented or not."""
        augment = self._augment.get(name)
        if augment is None:
            return to_size(stored, self._sizes[name])
        with torch.random.fork_rng(devices=[]):
            return torch.stack([self._augmented(augment, stored[row], *index) for row, index in enumerate(indices)])

    def _drawn(self, epoch: int, position: int) -> int:
        """Return the index of the row drawn for this position in this epoch."""
        first, end = self._first[position : position + 2].tolist()
        if end - first == 1:
            return int(first)
        return int(first) + (self._random(epoch, position)[1] * int(end - first) >> 32)

    def _random(self, epoch: int, position: int) -> tuple[int, int]:
        """Return 32 random bits for the augmentation, and 32 for the view."""
        augment, view = np.random.SeedSequence((self._reading.seed, epoch, position)).generate_state(2).tolist()
        return augment, view

    def _augmented(self, augment: Transform, image: torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        # Seed only the CPU generator: nothing is drawn on a GPU here, and `torch.manual_seed` would seed that as well.
        torch.default_generator.manual_seed(self._random(epoch, position)[0])
        return augment(image)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, position): shuffled by seed and epoch, or in order."""

    def __init__(self, length: int, batch_size: int, seed: int | None = None, ranks: Ranks = ALONE) -> None:
        """Order the positions.

        Args:
            length: Rows of the data set.
            batch_size: Rows per batch; the last batch may be smaller.
            seed: Random seed of the order; None: in order.
            ranks: Position of this process among those that train together; it gets its rows of each batch, possibly
                zero.
        """
        self._length, self.batch_size, self._seed, self._ranks = length, batch_size, seed, ranks
        self.epoch = 0
        """Set before each epoch."""

    def __len__(self) -> int:
        return -(-self._length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self._length)
        if self._seed is not None:
            np.random.default_rng((self._seed, self.epoch)).shuffle(order)
        for start in range(0, self._length, self.batch_size):
            batch = self._rank_rows(order[start : start + self.batch_size])
            yield [(self.epoch, int(position)) for position in batch]

    def _rank_rows(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of a batch that this process reads."""
        return batch[self._ranks.rows(len(batch))]

    def batch_rows(self, number: int) -> int:
        """Return the rows of a batch, counted from 0, of all processes together."""
        return min(self.batch_size, self._length - number * self.batch_size)


class _InWorker(Dataset[Any]):
    """The data set in a worker process: reads into shared memory and returns tickets."""

    def __init__(self, data: FeatureDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: tuple[int, int]) -> Ticket:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> Ticket:
        worker = get_worker_info()
        return self._data.write_slot(indices, 0 if worker is None else worker.id)


class BatchLoader:
    """Batches of an epoch, in the order of a sampler; iterate once per epoch. A batch is valid until the next one."""

    def __init__(
        self, data: FeatureDataset, sampler: EpochSampler, workers: int = 0, start: str = "forkserver"
    ) -> None:
        """Configure the loader; workers start with the first iteration.

        Args:
            data: Data set to read.
            sampler: Order and size of the batches.
            workers: Worker processes, which live as long as this loader; 0: read in this process.
            start: Start method of the workers: forkserver, spawn, or fork.
        """
        self._slots = data.share(workers, sampler.batch_size) if workers else ()
        self._loader: DataLoader[Any] = DataLoader(
            _InWorker(data) if workers else data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_identity,
            # Fork is not the default, because threads of torch and zarr do not survive it.
            multiprocessing_context=start if workers else None,
            persistent_workers=bool(workers),
            # A separate generator: a loader draws from the global one in each epoch, but with persistent workers only
            # in the first, so that dropout would depend on the number of workers.
            generator=torch.Generator(),
            prefetch_factor=PREFETCH if workers else None,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for item in self._loader:
            yield self._open(item) if isinstance(item, Ticket) else item

    def _open(self, ticket: Ticket) -> Batch:
        arrays, count = self._slots[ticket.slot].arrays, len(ticket.labels)
        rows = {name: array[:count] for name, array in arrays.items()}
        pixels = {name: torch.from_numpy(rows[IN_BATCH + name]) for name in PIXELS if IN_BATCH + name in rows}
        return Batch.of(rows, torch.tensor(ticket.labels), pixels.get("side"), pixels.get(IMAGE))


def batches(dataset: FeatureDataset, sampler: EpochSampler, workers: int = 0) -> BatchLoader:
    """Return a loader of complete batches; workers are separate processes that open the store themselves."""
    return BatchLoader(dataset, sampler, workers)


def _identity(batch: Any) -> Any:
    return batch
