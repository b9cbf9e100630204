"""Predict images with adaptation at test time, next to the predictions without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from schemas.errors import ImageError
from schemas.test_time import LEAST_BATCH, AdaptOptions
from stages.extract.features import Pixels
from stages.methods.batch import IMAGE
from stages.predict.classifier import Classifier, checked_probabilities, pixel_arrays
from stages.progress import Progress
from stages.test_time.adapters import Adapter
from stages.test_time.collect import as_batch
from stages.test_time.stream import AdaptContext, check_count, in_batches, open_for, shuffled
from stages.train.infer import feature_logits

Both = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""(C,) probabilities without and with adaptation."""


def adapted_probabilities(
    classifier: Classifier,
    images: Sequence[Path | Image.Image],
    options: AdaptOptions,
    context: AdaptContext,
    batch_size: int,
    progress: Progress | None = None,
) -> list[Both | ImageError]:
    """Compute probabilities of each file or image in memory without and with adaptation, in the order of `images`.

    Images are taken in a random order, that of the seed.

    Args:
        classifier: Model with the LPM that it needs.
        images: Files, or images in memory.
        options: Kind of the adaptation, batch size and seed.
        context: Where the bundle, the LPM and the study are.
        batch_size: Images of a pass of the LPM that computes features.
        progress: Called with (images done, images).

    Raises:
        EvaluationError: The model cannot be adapted in this way, too few images can be used, or outputs are not finite.
        BundleError: Statistics of source images are missing.
    """
    check_count(options, len(images))
    adapter = open_for(classifier.bundle, options, context, classifier.lpm)
    found: dict[int, Both | ImageError] = {}

    def readable() -> Iterator[tuple[int, Pixels]]:
        for at in shuffled(len(images), options.seed):
            pixels = classifier.pixels(images[at])
            if isinstance(pixels, ImageError):
                found[at] = pixels
            else:
                yield at, pixels

    for batch in in_batches(readable(), options.batch):
        if len(batch) < LEAST_BATCH:
            check_count(options, len(batch))
        pixels = [one for _, one in batch]
        plain, adapted = _both(classifier, adapter, pixels, batch_size)
        found |= {at: (plain[row], adapted[row]) for row, (at, _) in enumerate(batch)}
        if progress is not None:
            progress(len(found), len(images))
    return [found[at] for at in range(len(images))]


def _both(classifier: Classifier, adapter: Adapter, pixels: Sequence[Pixels], batch_size: int) -> Both:
    """Return probabilities (B, C) without and with adaptation; features are computed once for both."""
    bundle, task = classifier.bundle, classifier.bundle.spec.task
    chunks = [classifier.arrays(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    if IMAGE in adapter.reads and IMAGE not in arrays:
        arrays |= pixel_arrays(pixels, frozenset({"image"}))
    plain = checked_probabilities(feature_logits(bundle, arrays), task)
    batch = as_batch(arrays, adapter.reads, bundle.spec.network.side_size)
    return plain, checked_probabilities(adapter.step(batch), task)
