"""Batches of cached features, side images and labels, read from the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from schemas.settings import AugmentSettings
from stages.store.layout import CACHED, array_layouts
from stages.store.reader import StoreReader
from stages.train.cached import Cached

SideTransform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One step's input."""

    image: torch.Tensor
    """(B, 3, S, S) uint8, at the side network's size."""
    cached: Cached | None
    """Keys and values of all tapped layers; None where the method uses no features."""
    labels: torch.Tensor
    """(B,) int64."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        cached = None if self.cached is None else self.cached.to(device)
        image, labels = self.image.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(image, cached, labels)


def augmentation(settings: AugmentSettings, size: int) -> SideTransform:
    """The published augmentation of the side image: crop, flip, brightness and contrast."""
    steps: list[Any] = [
        v2.RandomResizedCrop(size, scale=settings.crop_scale, ratio=settings.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(settings.flip),
    ]
    if settings.brightness or settings.contrast:
        steps.append(v2.ColorJitter(brightness=settings.brightness, contrast=settings.contrast))
    composed: SideTransform = v2.Compose(steps)
    return composed


def to_size(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (..., 3, s, s) -> (..., 3, size, size), as evaluation and prediction see it."""
    if image.shape[-1] == size:
        return image
    resized: torch.Tensor = tv.resize(image, [size, size], antialias=True)
    return resized


class FeatureDataset(Dataset[Batch]):
    """Map-style data set over rows of the store that hands out whole batches.

    An index is (epoch, position): with the seed it determines the augmentation, so that a resumed run and any number
    of workers see the same images.
    """

    def __init__(
        self,
        store: StoreReader,
        ids: Sequence[str],
        labels: Sequence[int],
        size: int,
        augment: AugmentSettings | None = None,
        seed: int = 0,
        features: bool = True,
    ) -> None:
        """Hold the rows.

        Args:
            store: Where they are.
            ids: Image id of each position.
            labels: Class index of each position.
            size: Input of the side network, in pixels.
            augment: None: the un-augmented image.
            seed: Of the augmentation.
            features: Whether keys and values are read.
        """
        self._store, self._ids, self._labels, self._size, self._seed = store, tuple(ids), tuple(labels), size, seed
        stored = array_layouts(store.store.spec)
        self._names = (*(name for name in CACHED if features and name in stored), "side")
        self._augment = None if augment is None else augmentation(augment, size)
        self._buffers: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}}

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[tuple[int, int]]) -> Batch:
        """Read a batch. Outside a loader's worker its keys and values are valid until the next batch is read."""
        ids = [self._ids[position] for _, position in indices]
        # A worker's batch waits in a queue while the next one is read: there each batch needs its own memory.
        reuse = get_worker_info() is None
        if not reuse or (self._buffers and len(next(iter(self._buffers.values()))) < len(ids)):
            self._buffers = {}
        rows = self._store.read(ids, self._names, self._buffers or None)
        if reuse and not self._buffers:
            self._buffers = rows
        side = torch.from_numpy(rows["side"])
        if self._augment is None:
            image = to_size(side, self._size)
        else:
            image = torch.stack([self._augmented(side[row], *index) for row, index in enumerate(indices)])
        return Batch(
            image=image,
            cached=Cached.of(rows),
            labels=torch.tensor([self._labels[position] for _, position in indices]),
        )

    def _augmented(self, image: torch.Tensor, epoch: int, position: int) -> torch.Tensor:
        if self._augment is None:
            raise ValueError("this data set does not augment")
        seed = int(np.random.SeedSequence((self._seed, epoch, position)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._augment(image)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, position): shuffled by seed and epoch, or in order."""

    def __init__(self, length: int, batch_size: int, seed: int | None = None) -> None:
        """Order the positions.

        Args:
            length: Rows of the data set.
            batch_size: Rows per batch; the last batch may be smaller.
            seed: None: in order.
        """
        self._length, self._batch_size, self._seed = length, batch_size, seed
        self.epoch = 0
        """Set before each epoch."""

    def __len__(self) -> int:
        return -(-self._length // self._batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self._length)
        if self._seed is not None:
            np.random.default_rng((self._seed, self.epoch)).shuffle(order)
        for start in range(0, self._length, self._batch_size):
            yield [(self.epoch, int(position)) for position in order[start : start + self._batch_size]]


def batches(dataset: FeatureDataset, sampler: EpochSampler, workers: int = 0) -> DataLoader[Batch]:
    """A loader over whole batches; workers are separate processes that open the store themselves."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        # forkserver: torch's and the checksum library's threads do not survive a fork.
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=False,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
