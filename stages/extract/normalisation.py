"""Mean and standard deviation of the training images, for `features.normalisation: dataset`.

Both come from a histogram of the pixels, so that neither the order of the images nor the number of threads changes a
digit. They are rounded to 4 decimals before they enter the fingerprint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.base import digest
from schemas.data_settings import DataSettings
from schemas.errors import DataError, FptError, ImageError, UnreadableImagesError
from schemas.features import ChannelStatistics, FeatureSpec
from schemas.manifest import Manifest
from schemas.rendering import DEFAULT_RENDERING
from stages.extract.resize import without_padding
from stages.files import atomic_write, read_small, sha256_file
from stages.images import decoded_image
from stages.progress import Progress

FOLDER = "normalisation"
"""Folder of the cache root with one file per set of training images."""
DECIMALS = 4
"""Decimals of mean and standard deviation."""

_AHEAD = 256
"""Images handed to the threads at a time: bounds the wait after Ctrl-C."""
_LARGEST_FILE = 2**16
"""Bytes of a file of statistics; a larger one is ignored."""

Triple = tuple[float, float, float]
Histogram = NDArray[np.int64]
"""(3, 256): number of pixels per channel (RGB) and value."""


def known_statistics(spec: FeatureSpec, manifest: Manifest, cache_root: Path) -> ChannelStatistics | None:
    """Return the statistics that an earlier extraction left in the cache root, or None.

    Args:
        spec: Gives size, resize rule and filter; its mean and standard deviation are ignored.
        manifest: Gives the training images.
        cache_root: Folder of all stores.
    """
    identity = _identity(spec, manifest)
    try:
        content = read_small(_file(identity, cache_root), _LARGEST_FILE)
        statistics = ChannelStatistics.model_validate_json(content)
    except (OSError, FptError, ValidationError):
        return None
    measured = statistics.model_dump(exclude={"mean", "std"}, exclude_none=True)
    return statistics if measured == identity else None


def training_statistics(
    spec: FeatureSpec,
    manifest: Manifest,
    data: DataSettings,
    root: Path,
    cache_root: Path,
    progress: Progress | None = None,
) -> ChannelStatistics:
    """Return the statistics of the training images; compute them if no earlier extraction did.

    Args:
        spec: Gives size, resize rule and filter; its mean and standard deviation are ignored.
        manifest: Gives the training images.
        data: Folder of the images, and limits of an image's size.
        root: Folder that a relative `data.images` starts at.
        cache_root: Folder of all stores; it keeps the result.
        progress: Called with (done, total) images.

    Raises:
        UnreadableImagesError: If images vanished or changed since `prepare`.
        DataError: If all pixels of a channel have the same value.
        StorageError: If the result cannot be written.
    """
    known = known_statistics(spec, manifest, cache_root)
    if known is not None:
        return known
    folder = (root / data.images).resolve()
    images = {row.id: folder / row.path for row in manifest.of("train")}
    mean, std = moments(_total_histogram(list(images.items()), spec, data, progress))
    identity = _identity(spec, manifest)
    statistics = ChannelStatistics(**identity, mean=mean, std=std)
    write_statistics(statistics, _file(identity, cache_root))
    return statistics


def write_statistics(statistics: ChannelStatistics, path: Path) -> None:
    """Write statistics as JSON, completely or not at all."""
    atomic_write(path, (statistics.model_dump_json(indent=1) + "\n").encode())


def moments(histogram: Histogram) -> tuple[Triple, Triple]:
    """Compute mean and standard deviation per channel, of pixels in [0, 1].

    Raises:
        DataError: If all pixels of a channel have the same value.
    """
    means, deviations = [], []
    for counts in histogram.tolist():
        # Integers of any size: exact, so that every machine rounds to the same decimals.
        pixels = sum(counts)
        total = sum(count * value for value, count in enumerate(counts))
        squares = sum(count * value**2 for value, count in enumerate(counts))
        means.append(round(total / (255 * pixels), DECIMALS))
        deviations.append(round(math.sqrt((pixels * squares - total**2) / (255 * pixels) ** 2), DECIMALS))
    if min(deviations) <= 0:
        raise DataError(
            "The training images have no contrast: the standard deviation of a channel is 0.",
            "All its pixels have the same value.",
            "Check the images, or set features.normalisation to lpm.",
        )
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def pixel_histogram(path: Path, image_id: str, spec: FeatureSpec, data: DataSettings) -> Histogram:
    """Count the pixel values of one image at the LPM's input size, without padding.

    Raises:
        ImageError: If the file does not have this content, or cannot be decoded.
    """
    try:
        with decoded_image(
            path, max_pixels=data.max_pixels, min_side=data.min_side, checked=True, rendering=spec.rendering
        ) as image:
            if sha256_file(path) != image_id:
                raise ImageError(str(path), "its content changed since `fpt prepare`")
            pixels = without_padding(image, spec)
    except FileNotFoundError:
        raise ImageError(str(path), "the file is gone") from None
    if pixels.ndim == 2:
        return np.tile(np.bincount(pixels.ravel(), minlength=256), (3, 1))
    return np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])


def _total_histogram(
    images: Sequence[tuple[str, Path]], spec: FeatureSpec, data: DataSettings, progress: Progress | None
) -> Histogram:
    """Add the histograms of all images, given as (id, path)."""
    total = np.zeros((3, 256), np.int64)
    failures: list[tuple[str, str]] = []
    done = 0

    def histogram(image: tuple[str, Path]) -> Histogram | ImageError:
        try:
            return pixel_histogram(image[1], image[0], spec, data)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), _AHEAD):
            for result in pool.map(histogram, images[start : start + _AHEAD]):
                if isinstance(result, ImageError):
                    failures.append((result.path, result.reason))
                else:
                    total += result
                done += 1
                if progress is not None:
                    progress(done, len(images))
    if failures:
        raise UnreadableImagesError(failures, "Run `fpt prepare` again, then `fpt extract`.")
    return total


def _identity(spec: FeatureSpec, manifest: Manifest) -> dict[str, Any]:
    """Fields of `ChannelStatistics` that identify what was measured."""
    ids = sorted({row.id for row in manifest.of("train")})
    return {
        "images_sha256": digest(ids),
        "images": len(ids),
        "image_size": spec.lpm.image_size,
        "resize": spec.resize,
        "filter": spec.resize_filter,
        **({} if spec.rendering == DEFAULT_RENDERING else {"rendering": spec.rendering.model_dump()}),
    }


def _file(identity: dict[str, Any], cache_root: Path) -> Path:
    return cache_root / FOLDER / f"{digest(identity)[:16]}.json"
