"""The unit of work of stage one: some images become one whole shard.

Decoding runs ahead in threads and writing behind in one, so that the LPM waits for neither. The same object serves a
single process, which hands it all tasks, and a worker of a cluster, which hands it one task after another from two
threads: while one holds the LPM, the other decodes or writes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import DeviceMemoryError, ImageError
from schemas.machine import ComputeSettings
from schemas.resolved import ResolvedSettings
from schemas.views import ViewRow
from stages.device import set_up
from stages.extract.features import FeatureBatch, Pixels, compute_features, to_pixels
from stages.extract.views import apply_view
from stages.files import sha256_file
from stages.images import decoded_image
from stages.lpm.loading import LoadedLpm, load_lpm
from stages.store.layout import Store
from stages.store.writer import claim_shard, write_shard

CPU_BATCH, ACCELERATOR_BATCH = 4, 32
"""What `compute.extract_batch_size: auto` means."""


def batch_size(compute: ComputeSettings, device: torch.device) -> int:
    """Images per forward pass of the LPM."""
    if compute.extract_batch_size != "auto":
        return compute.extract_batch_size
    return CPU_BATCH if device.type == "cpu" else ACCELERATOR_BATCH


@dataclass(frozen=True)
class ShardTask:
    """Images that become one shard."""

    number: int
    """Of the shard, if nobody else took it meanwhile; else the next free one is used."""
    images: tuple[tuple[str, str, str], ...]
    """(image id, path, view) of each row, at most as many as a shard has; an image is decoded once for views of it
    that are neighbours."""


@dataclass(frozen=True)
class ShardDone:
    """What became of a task."""

    rows: int
    """Rows that were written."""
    failures: tuple[tuple[str, str], ...]
    """(path, reason) of each image that cannot be used; it has no row."""


@dataclass
class _Computed:
    """Rows of a task that wait to be written."""

    number: int
    rows: list[ViewRow]
    arrays: dict[str, NDArray[Any]]
    seconds: float
    failures: list[tuple[str, str]]


class Extractor:
    """The LPM on its device, and where its features go. May be used from several threads."""

    def __init__(self, settings: ResolvedSettings, root: Path, store: Store) -> None:
        """Load the LPM.

        Args:
            settings: Resolved.
            root: Folder of `params.yaml`.
            store: That of the settings.

        Raises:
            WeightsError: If the weights are missing or belong to another model.
        """
        self._device = set_up(settings.compute)
        self._lpm: LoadedLpm = load_lpm(settings.lpm, settings.features.image_size, root)
        self._lpm.model.to(self._device)
        self._store, self._data = store, settings.data
        self._batch = batch_size(settings.compute, self._device)
        # On the CPU decoders compete with the LPM for the cores; beside an accelerator they are what it waits for.
        self._decoders = min(16, max(2, torch.get_num_threads())) if self._device.type != "cpu" else 2
        self._forwarding = threading.Lock()

    @property
    def batch_size(self) -> int:
        """Images per forward pass; less than was asked for once that did not fit the memory."""
        return self._batch

    def run(
        self, tasks: Iterable[ShardTask], tell: Callable[[int], None], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[ShardDone]:
        """Do tasks in their order; each is yielded when its shard has its receipt.

        Args:
            tasks: What to compute.
            tell: Called after each forward pass with the number of its images, each view counted.
            stop: Once it is true, the rows computed so far become a smaller shard, and no further task is begun.

        Raises:
            StorageError: If the disk is full or cannot be written; the shard at hand is removed.
            DeviceMemoryError: If not even one image fits the memory.
        """
        tasks = list(tasks)
        pending: Future[ShardDone] | None = None
        with ThreadPoolExecutor(self._decoders) as decoders, ThreadPoolExecutor(1) as writer:
            images = [image for task in tasks for image in task.images]
            decoded = self._decode(images, decoders)
            try:
                for task in tasks:
                    if stop():
                        break
                    with self._forwarding:
                        computed = self._compute(task, decoded, tell, stop)
                    # One shard at a time waits for the disk: memory stays bounded by two.
                    if pending is not None:
                        yield pending.result()
                    pending = writer.submit(self._write, computed)
                if pending is not None:
                    yield pending.result()
            finally:
                decoded.close()

    def _decode(
        self, images: Sequence[tuple[str, str, str]], pool: ThreadPoolExecutor
    ) -> Generator[Pixels | tuple[str, str], None, None]:
        """Pixels of each row in order, or (path, reason)."""
        queue: deque[tuple[str, int, Future[list[Pixels]]]] = deque()
        groups = itertools.groupby(images, lambda image: image[:2])
        waiting = ((*image, [view for *_, view in rows]) for image, rows in groups)
        ahead = 0
        try:
            while True:
                while ahead < 2 * self._batch and (image := next(waiting, None)) is not None:
                    queue.append((image[1], len(image[2]), pool.submit(self._load, *image)))
                    ahead += len(image[2])
                if not queue:
                    return
                path, count, future = queue.popleft()
                ahead -= count
                try:
                    yield from future.result()
                except ImageError as error:
                    yield from [(path, error.reason)] * count
                except FileNotFoundError:
                    yield from [(path, "the file is gone")] * count
        finally:
            for *_, future in queue:
                future.cancel()

    def _load(self, image_id: str, path: str, views: Sequence[str]) -> list[Pixels]:
        data = self._data
        with decoded_image(Path(path), max_pixels=data.max_pixels, min_side=data.min_side, checked=True) as image:
            if sha256_file(Path(path)) != image_id:
                raise ImageError(path, "its content changed since `fpt prepare`")
            return [to_pixels(apply_view(image, view), self._store.spec) for view in views]

    def _compute(
        self,
        task: ShardTask,
        decoded: Iterator[Pixels | tuple[str, str]],
        tell: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> _Computed:
        start = time.perf_counter()
        done = _Computed(task.number, [], {}, 0.0, [])
        batches: list[FeatureBatch] = []
        pixels: list[Pixels] = []
        for position, (image_id, _, view) in enumerate(task.images):
            if stop():
                # Decoded, but without features.
                del done.rows[len(done.rows) - len(pixels) :]
                break
            found = next(decoded)
            if isinstance(found, Pixels):
                done.rows.append(ViewRow(image_id, view))
                pixels.append(found)
            else:
                done.failures.append(found)
            if pixels and (len(pixels) >= self._batch or position + 1 == len(task.images)):
                batches += self._forward(pixels)
                tell(len(pixels))
                pixels = []
        if batches:
            done.arrays = {name: np.concatenate([b[name] for b in batches]) for name in batches[0].arrays}
        done.seconds = time.perf_counter() - start
        return done

    def _forward(self, pixels: Sequence[Pixels]) -> list[FeatureBatch]:
        """Features in as many forward passes as the memory needs."""
        try:
            return [compute_features(self._lpm, self._store.spec, pixels, self._device)]
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            message = str(error)
        # Out of the handler: its traceback would keep the failed pass alive.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pixels) == 1:
            raise DeviceMemoryError(
                f"One image of {self._store.spec.lpm.image_size} pixels does not fit the memory of {self._device}: "
                f"{message.splitlines()[0]}",
                "Another program holds the memory, or the LPM is too large for this device.",
                "Free the memory, lower features.image_size, or set compute.device to cpu.",
            )
        half = len(pixels) // 2
        self._batch = min(self._batch, half)
        return self._forward(pixels[:half]) + self._forward(pixels[half:])

    def _write(self, computed: _Computed) -> ShardDone:
        rows = computed.rows
        if rows:
            with claim_shard(self._store, computed.number) as shard:
                ids = [row.row_id for row in rows]
                write_shard(self._store, shard, ids, computed.arrays, computed.seconds, rows)
        return ShardDone(len(rows), tuple(dict.fromkeys(computed.failures)))


def _out_of_memory(error: RuntimeError) -> bool:
    # torch has a type of its own for accelerators, but none for the CPU's allocator.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def inline(
    settings: ResolvedSettings,
    root: Path,
    store: Store,
    tasks: Sequence[ShardTask],
    tell: Callable[[int], None],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[ShardDone]:
    """Do all tasks in this process; see `Extractor.run`."""
    return Extractor(settings, root, store).run(tasks, tell, stop)
