"""The unit of work of stage one: some images become one complete shard.

Threads decode ahead, another one writes finished shards, so that the LPM waits for neither. The same object serves a
single process, which passes all tasks at once, and a worker of a cluster, which passes one task after another from two
threads: while one uses the LPM, the other decodes or writes.
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
"""Values of `compute.extract_batch_size: auto`."""


def batch_size(compute: ComputeSettings, device: torch.device) -> int:
    """Return the number of images per forward pass of the LPM."""
    if compute.extract_batch_size != "auto":
        return compute.extract_batch_size
    return CPU_BATCH if device.type == "cpu" else ACCELERATOR_BATCH


@dataclass(frozen=True)
class ShardTask:
    """Images that become one shard."""

    number: int
    """Number of the shard, unless another writer claims it first; then the next free number is used."""
    images: tuple[tuple[str, str, str], ...]
    """(image id, path, view) of each row, at most as many as a shard has; an image is decoded once for views of it
    that are neighbours."""


@dataclass(frozen=True)
class ShardDone:
    """Result of a task."""

    rows: int
    """Rows that were written."""
    failures: tuple[tuple[str, str], ...]
    """(path, reason) of each image that cannot be used, and has no row."""


@dataclass
class _Computed:
    """Rows of a task, to be written."""

    number: int
    rows: list[ViewRow]
    arrays: dict[str, NDArray[Any]]
    seconds: float
    failures: list[tuple[str, str]]


class Extractor:
    """The LPM on its device, and the store of its features. May be used from several threads."""

    def __init__(self, settings: ResolvedSettings, root: Path, store: Store) -> None:
        """Load the LPM.

        Args:
            settings: Resolved.
            root: Folder of `params.yaml`.
            store: Store of these settings.

        Raises:
            WeightsError: If the weights are missing or belong to another model.
        """
        self._device = set_up(settings.compute)
        features = settings.features
        self._lpm: LoadedLpm = load_lpm(settings.lpm, features.image_size, root, features.with_tokens)
        self._lpm.model.to(self._device)
        self._store, self._data = store, settings.data
        self._batch = batch_size(settings.compute, self._device)
        # On the CPU decoders compete with the LPM for the cores; an accelerator waits for them.
        self._decoders = min(16, max(2, torch.get_num_threads())) if self._device.type != "cpu" else 2
        self._forwarding = threading.Lock()

    @property
    def batch_size(self) -> int:
        """Images per forward pass; reduced from the setting once a batch did not fit the memory."""
        return self._batch

    def run(
        self, tasks: Iterable[ShardTask], on_rows: Callable[[int], None], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[ShardDone]:
        """Run tasks in their order; yield each when its shard has its receipt.

        Args:
            tasks: Rows to compute.
            on_rows: Called after each forward pass with the number of its rows.
            stop: Once it returns true, the rows computed so far become a smaller shard, and no further task starts.

        Raises:
            StorageError: If the disk is full or cannot be written; the unfinished shard is removed.
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
                        computed = self._compute(task, decoded, on_rows, stop)
                    # At most one shard waits for the disk: memory is bounded by two.
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
        """Yield the pixels of each row in order, or (path, reason)."""
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
        data, rendering = self._data, self._store.spec.rendering
        with decoded_image(
            Path(path), max_pixels=data.max_pixels, min_side=data.min_side, checked=True, rendering=rendering
        ) as image:
            if sha256_file(Path(path)) != image_id:
                raise ImageError(path, "its content changed since `fpt prepare`")
            return [to_pixels(apply_view(image, view), self._store.spec) for view in views]

    def _compute(
        self,
        task: ShardTask,
        decoded: Iterator[Pixels | tuple[str, str]],
        on_rows: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> _Computed:
        """Compute the rows of a task from decoded images."""
        start = time.perf_counter()
        computed = _Computed(task.number, [], {}, 0.0, [])
        batches: list[FeatureBatch] = []
        pixels: list[Pixels] = []
        for position, (image_id, _, view) in enumerate(task.images):
            if stop():
                # Drop rows that are decoded, but have no features.
                del computed.rows[len(computed.rows) - len(pixels) :]
                break
            result = next(decoded)
            if isinstance(result, Pixels):
                computed.rows.append(ViewRow(image_id, view))
                pixels.append(result)
            else:
                computed.failures.append(result)
            if pixels and (len(pixels) >= self._batch or position + 1 == len(task.images)):
                batches += self._forward(pixels)
                on_rows(len(pixels))
                pixels = []
        if batches:
            computed.arrays = {name: np.concatenate([b[name] for b in batches]) for name in batches[0].arrays}
        computed.seconds = time.perf_counter() - start
        return computed

    def _forward(self, pixels: Sequence[Pixels]) -> list[FeatureBatch]:
        """Compute features, in several forward passes if the batch does not fit the memory."""
        try:
            return [compute_features(self._lpm, self._store.spec, pixels, self._device)]
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            message = str(error)
        # Outside the handler, whose traceback would keep the tensors of the failed pass alive.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pixels) == 1:
            raise DeviceMemoryError(
                f"One image of {self._store.spec.lpm.image_size} pixels does not fit the memory of {self._device}: "
                f"{message.splitlines()[0]}",
                "Another program uses the memory, or the LPM is too large for this device.",
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
    # torch has an exception for accelerators, but not for the CPU's allocator.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def inline(
    settings: ResolvedSettings,
    root: Path,
    store: Store,
    tasks: Sequence[ShardTask],
    on_rows: Callable[[int], None],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[ShardDone]:
    """Run all tasks in this process; see `Extractor.run`."""
    return Extractor(settings, root, store).run(tasks, on_rows, stop)
