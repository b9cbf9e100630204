"""Adapted predictions of a stream of images: its order, its batches, and predictions of rows of a study."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from schemas.errors import EvaluationError
from schemas.settings import LpmSettings
from schemas.test_time import LEAST_BATCH, AdaptOptions
from stages.lpm.loading import LoadedLpm
from stages.lpm.matching import load_matching
from stages.store.memory_rows import RowSource
from stages.test_time.adapters import Adapter, open_adapter
from stages.test_time.collect import ensure_source, read_batch
from stages.test_time.targets import check_adaptable, runs_lpm
from stages.train.bundle import Bundle
from stages.train.inputs import StudyFiles, open_arrays

T = TypeVar("T")


@dataclass(frozen=True)
class AdaptContext:
    """What opening an adapter needs apart from the model."""

    bundle_dir: Path
    """Folder of the bundle."""
    root: Path
    """Folder that relative paths of the weights start at."""
    lpm: LpmSettings | None
    """Name and weights of the LPM; None: the hub."""
    files: StudyFiles | None
    """Study of the model; None: unknown."""


def shuffled(count: int, seed: int) -> list[int]:
    """Return the positions of a stream in a random order, that of a seed.

    Batches of images in the order of their files would often be of one class.
    """
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order


def in_batches(items: Iterable[T], size: int, least: int = LEAST_BATCH) -> Iterator[list[T]]:
    """Yield batches of a size; fewer than `least` left over join the last one. Fewer than that in all are one batch."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == size + least:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting) >= least + size:
        yield waiting[:size]
        waiting = waiting[size:]
    if waiting:
        yield waiting


def check_count(options: AdaptOptions, count: int) -> None:
    """Refuse fewer images than the statistics of a batch need.

    Raises:
        EvaluationError: Of foa and foa-shift.
    """
    if options.name != "vptta" and count < LEAST_BATCH:
        raise EvaluationError(
            f"{options.name} needs at least {LEAST_BATCH} images, and there are {count}.",
            "It compares mean and deviation of a batch with those of the training images.",
            "Give it more images at once, adapt by vptta, or predict without --adapt.",
        )


def open_for(bundle: Bundle, options: AdaptOptions, context: AdaptContext, loaded: LoadedLpm | None = None) -> Adapter:
    """Load what an adaptation of a bundle needs, and return its adapter.

    Args:
        bundle: Model.
        options: Kind of the adaptation, and seed.
        context: Where the LPM and the study are.
        loaded: The LPM, if it is in memory already.

    Raises:
        EvaluationError: The model cannot be adapted in this way.
        BundleError: Statistics of source images are missing.
        FptError: As loading the LPM.
    """
    check_adaptable(options.name, bundle.spec, bundle.network)
    features = bundle.spec.features
    frozen = None
    if bundle.network.needs_lpm or runs_lpm(options.name, bundle.spec):
        loaded = loaded or load_matching(features, context.lpm, context.root, bundle.device)
        if bundle.network.needs_lpm:
            bundle.network.use_lpm(loaded.model)
        else:
            frozen = loaded
    source = ensure_source(options.name, context.bundle_dir, bundle, frozen, context.files)
    return open_adapter(bundle, options, source, frozen)


def adapted_logits(
    bundle: Bundle, files: StudyFiles, bundle_dir: Path, ids: Sequence[str], options: AdaptOptions
) -> torch.Tensor:
    """Compute adapted logits of rows of a study, from cached features if the adaptation can do with them.

    Args:
        bundle: Model.
        files: Study, with the rows.
        bundle_dir: Folder of the bundle.
        ids: Image ids, each once.
        options: Kind of the adaptation, batch size and seed.

    Returns:
        (len(ids), C) float32 on the CPU.

    Raises:
        FptError: As `open_for`, `check_count` and reading the rows.
    """
    check_count(options, len(ids))
    adapter = open_for(bundle, options, AdaptContext(bundle_dir, files.root, files.weights_source, files))
    with open_arrays(files, bundle.spec.features, adapter.reads) as source:
        return stream_logits(adapter, bundle, source, ids, options)


def stream_logits(
    adapter: Adapter, bundle: Bundle, source: RowSource, ids: Sequence[str], options: AdaptOptions
) -> torch.Tensor:
    """Compute adapted logits (len(ids), C) of rows of a source that has what the adapter reads, each id once.

    Raises:
        EvaluationError: They are not finite.
    """
    logits = torch.empty(len(ids), len(bundle.spec.classes))
    for positions in in_batches(shuffled(len(ids), options.seed), options.batch):
        chosen = [ids[at] for at in positions]
        batch = read_batch(source, chosen, adapter.reads, bundle.spec.network.side_size)
        logits[positions] = adapter.step(batch)
    if not bool(torch.isfinite(logits).all()):
        raise EvaluationError(
            "The adapted outputs of the model are not finite.",
            "Its weights are damaged, or the images are very unlike those of the training.",
            "Predict without --adapt.",
        )
    return logits
