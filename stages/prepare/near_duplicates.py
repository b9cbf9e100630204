"""Find images that are nearly the same picture: scaled, compressed again, brightened, or slightly cropped.

Thumbnails of 16 x 16 grey pixels are normalised to mean 0 and norm 1. Images of one kind (chest X-rays, fundus
photographs) resemble each other, so what they share is removed first: the directions of largest variance of all
thumbnails. What is left distinguishes one patient from another, and two images whose remainders correlate are copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 16
"""Side of a thumbnail, in pixels."""

# Measured on chest X-rays, dermoscopy and two sets of fundus photographs (docs/lab-notes.md): copies at a third of the
# size with JPEG quality 40, or with other brightness and contrast, correlate by 0.91 and more, most by more than 0.95;
# images of different patients by 0.89 at most, and by up to 0.997 as long as what all images share is not removed.
_SIMILAR = 0.93
"""Correlation of the remainders of near-duplicates."""
_SIMILAR_AS_SEEN = 0.95
"""Correlation of their thumbnails, below which no remainder counts."""
_EQUAL = 0.9995
"""Correlation of thumbnails that suffices for images without a remainder, such as frames of one video."""
_EQUAL_OF_FEW = 0.9985
"""The same for data sets too small to know what their images share."""
_FEW = 24
_PER_DIRECTION, _MAX_DIRECTIONS = 12, 9
"""Images per removed direction, and the most directions."""
_NO_REMAINDER = 0.103
"""Remainders shorter than this may consist of noise. For longer ones, `_EQUAL` implies `_SIMILAR`."""
_MIN_DEVIATION = 3.0
"""Standard deviation of a thumbnail, in grey levels, below which it is blank and like no other."""

_BLOCK = 1024
"""Rows of a product, which stays in the cache of a CPU."""
_SCREENED = 64
"""Dimensions of the first, cheap product."""

Floats = npt.NDArray[np.float32]


class NearPair(NamedTuple):
    """Two images that are nearly the same."""

    one: str
    other: str
    similarity: float
    """Correlation of the thumbnails, after removal of what the images of the data set share."""


@dataclass(frozen=True)
class NearDuplicates:
    """All near-duplicates of a data set; byte-identical files are not among them."""

    pairs: tuple[NearPair, ...] = ()
    """Sorted by path; of byte-identical files, only the first path is in a pair."""
    key_of: Mapping[str, str] = field(default_factory=dict)
    """Path -> key of its set of near-duplicates (smallest content id), for images that have any."""


NO_NEAR = NearDuplicates()


def thumbnail(image: Image.Image) -> bytes:
    """Return the grey values of an image, averaged to `SIDE` x `SIDE` pixels in row order."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("L").tobytes()


def is_blank(small: bytes) -> bool:
    """Whether an image with this thumbnail has nearly one grey value."""
    return float(np.frombuffer(small, np.uint8).std()) < _MIN_DEVIATION


def find_near_duplicates(ids: Mapping[str, str], thumbnails: Mapping[str, bytes]) -> NearDuplicates:
    """Compare all images of different content, pair by pair.

    Args:
        ids: Path -> content id.
        thumbnails: Path -> its `thumbnail`.
    """
    paths_of: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ids):
        paths_of[ids[path]].append(path)
    contents = sorted(paths_of)
    pixels = np.frombuffer(b"".join(thumbnails[paths_of[one][0]] for one in contents), dtype=np.uint8)
    rows, similarity = near_rows(pixels.reshape(len(contents), SIDE * SIDE))
    if not len(rows):
        return NearDuplicates()
    pairs = []
    for (one, other), value in zip(rows.tolist(), similarity.tolist(), strict=True):
        first, second = sorted((paths_of[contents[one]][0], paths_of[contents[other]][0]))
        pairs.append(NearPair(first, second, value))
    keys = _set_keys(rows, contents)
    key_of = {path: key for content, key in keys.items() for path in paths_of[content]}
    return NearDuplicates(tuple(sorted(pairs)), key_of)


def _set_keys(rows: npt.NDArray[np.int64], contents: list[str]) -> dict[str, str]:
    """Return content -> smallest content of its connected component, for the contents in pairs."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(rows)), (rows[:, 0], rows[:, 1])), shape=(len(contents), len(contents)))
    component = connected_components(edges, directed=False)[1]
    # The contents are sorted: the first of a component is its smallest.
    first: dict[int, str] = {}
    for row in np.unique(rows).tolist():
        first.setdefault(int(component[row]), contents[row])
    return {contents[row]: first[int(component[row])] for row in np.unique(rows).tolist()}


def near_rows(pixels: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the pairs of rows (P, 2) that are near-duplicates, and their similarity (P,).

    Args:
        pixels: Thumbnails (N, S * S). Memory is about 3 kB per row, and time grows with N squared.
    """
    values = pixels.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(values, axis=1)
    rows = np.flatnonzero(norms >= _MIN_DEVIATION * np.sqrt(pixels.shape[1]))
    seen: Floats = (values[rows] / norms[rows, None]).astype(np.float32)
    del values
    if len(rows) < _FEW:
        pairs, similarity = similar_rows(seen, _EQUAL_OF_FEW)
        return rows[pairs], similarity
    remainder, lengths = remainders(seen)
    pairs, similarity = similar_rows(remainder, _SIMILAR)
    alike = np.einsum("ij,ij->i", seen[pairs[:, 0]], seen[pairs[:, 1]]) >= _SIMILAR_AS_SEEN
    alike &= lengths[pairs].min(axis=1) >= _NO_REMAINDER / np.sqrt(2)
    short = np.flatnonzero(lengths < _NO_REMAINDER)
    equal, equality = similar_rows(seen[short], _EQUAL)
    both = np.concatenate([rows[pairs[alike]], rows[short[equal]]])
    unique, first = np.unique(both, axis=0, return_index=True)
    return unique, np.concatenate([similarity[alike], equality])[first]


def remainders(vectors: Floats) -> tuple[Floats, Floats]:
    """Remove the directions that all vectors share; return the rest of each, with norm 1, and its norm before that.

    Args:
        vectors: (N, D), each with norm 1.
    """
    shared = _directions(vectors, min(_MAX_DIRECTIONS, len(vectors) // _PER_DIRECTION))
    rest: Floats = np.asarray(vectors - (vectors @ shared) @ shared.T, np.float32)
    lengths = np.linalg.norm(rest, axis=1)
    rest /= np.maximum(lengths, 1e-6)[:, None]
    return rest, lengths


def similar_rows(vectors: Floats, threshold: float) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return all pairs (P, 2) of unit vectors (N, D) whose dot product reaches a threshold, and these products (P,).

    Exact: a product in few dimensions plus the product of the remaining lengths is an upper bound (Cauchy-Schwarz), by
    which most pairs are excluded. The first row of a pair is the smaller one.
    """
    screen = vectors
    if vectors.shape[1] > _SCREENED < len(vectors):
        few = vectors @ _directions(vectors, _SCREENED)
        rest = np.sqrt(np.maximum(1.0 - np.square(few).sum(axis=1, keepdims=True), 0.0))
        screen = np.concatenate([few, rest], axis=1)
    found: list[npt.NDArray[np.int64]] = [np.zeros((0, 2), np.int64)]
    products: list[Floats] = [np.zeros(0, np.float32)]
    for start in range(0, len(vectors), _BLOCK):
        for other in range(start, len(vectors), _BLOCK):
            # A little lower, because the bound is rounded.
            close = screen[start : start + _BLOCK] @ screen[other : other + _BLOCK].T >= threshold - 1e-4
            if not close.any():
                continue
            pairs = np.argwhere(close) + np.array((start, other))
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            exact = _products(vectors, pairs)
            found.append(pairs[exact >= threshold])
            products.append(exact[exact >= threshold])
    return np.concatenate(found), np.concatenate(products)


def _products(vectors: Floats, pairs: npt.NDArray[np.int64]) -> Floats:
    parts = [
        np.einsum("ij,ij->i", vectors[some[:, 0]], vectors[some[:, 1]])
        for some in np.array_split(pairs, len(pairs) // 65_536 + 1)
    ]
    return np.concatenate(parts).astype(np.float32)


def _directions(vectors: Floats, number: int) -> Floats:
    """Return the orthonormal directions (D, number) of largest mean square."""
    return np.linalg.eigh((vectors.T @ vectors).astype(np.float64))[1][:, ::-1][:, :number].astype(np.float32)
