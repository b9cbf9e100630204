"""Find images to which the LPM gives nearly the same features, by the cached pooled outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.data_check import Copies
from schemas.features import ExtractionReceipt
from stages.data_check.check import ReadData
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.near_duplicates import remainders, similar_rows
from stages.store.reader import StoreReader, open_store

# With DINOv2 ViT-S/14 at 224 pixels, pictures of one lesion or one chest under two names have 0.755 and more, different
# patients 0.733 at most (dust on one camera); before removal, different patients reach 0.995 (docs/lab-notes.md).
_SIMILAR = 0.75
"""Cosine of the features, after removal of what all images share."""
_FEW = 24
"""With fewer images it is not known what all of them share."""
_BATCH = 4096


def find_similar_features(read: ReadData, cache_root: Path, receipt: ExtractionReceipt) -> tuple[Copies, ...] | None:
    """Return all pairs of different contents with similar pooled outputs, the most similar first.

    Args:
        read: The data set; images without features are left out.
        cache_root: Folder of all stores.
        receipt: Of the extraction.

    Returns:
        The pairs, or None if the store has no pooled outputs or too few images have features.

    Raises:
        CacheIncompleteError: The store is gone.
        CacheCorruptError: Bytes changed since they were written.
        CacheMismatchError: The folder holds other features.
    """
    if not receipt.spec.pooled:
        return None
    first: dict[str, LabelledImage] = {}
    for item in read.every:
        first.setdefault(read.digests.ids[item.path], item)
    reader = open_store(cache_root, receipt)
    contents = sorted(first)
    ids = [one for one, row in zip(contents, reader.find(contents).tolist(), strict=True) if row >= 0]
    if len(ids) < _FEW:
        return None
    pairs, cosines = similar_rows(remainders(_vectors(reader, ids))[0], _SIMILAR)
    found, label_of = [], read.known_labels
    for (one, other), cosine in zip(pairs.tolist(), cosines.tolist(), strict=True):
        a, b = sorted((first[ids[one]], first[ids[other]]), key=lambda item: item.path)
        likeness = round(min(float(cosine), 1.0), 4)
        found.append(
            Copies(paths=(a.path, b.path), labels=(label_of.get(a.path), label_of.get(b.path)), similarity=likeness)
        )
    return tuple(sorted(found, key=lambda copies: (-copies.similarity, copies.paths)))


def _vectors(reader: StoreReader, ids: list[str]) -> npt.NDArray[np.float32]:
    """Return class token and mean of the patches of each image, of equal weight, with norm 1: (N, 2 D)."""
    parts = []
    for start in range(0, len(ids), _BATCH):
        pooled = reader.read(ids[start : start + _BATCH], ["pooled"])["pooled"].astype(np.float32)
        pooled /= np.maximum(np.linalg.norm(pooled, axis=2, keepdims=True), 1e-12) * np.sqrt(pooled.shape[1])
        parts.append(pooled.reshape(len(pooled), -1))
    return np.concatenate(parts)
