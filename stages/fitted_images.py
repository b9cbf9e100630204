"""Images that trained a model, as a bundle records them: a short digest of each image id."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

SIZE = 6
"""Bytes per image: 1,000 images meet none of 100,000 others by chance, but for one case in three million."""


def encode(ids: Iterable[str]) -> str:
    """Return the sorted digests of image ids as base64, 8 characters per image."""
    return _text({_digest(image_id) for image_id in ids})


def union(*texts: str) -> str:
    """Return the images of several texts of `encode`."""
    return _text(set().union(*map(_digests, texts)))


def count_fitted(text: str, ids: Iterable[str]) -> int:
    """Return how many of these image ids are among the images of a text of `encode`.

    Raises:
        ValueError: If it is no such text.
    """
    known = _digests(text)
    return sum(_digest(image_id) in known for image_id in ids)


def _digest(image_id: str) -> bytes:
    return hashlib.sha256(image_id.encode()).digest()[:SIZE]


def _digests(text: str) -> set[bytes]:
    data = base64.b64decode(text, validate=True)
    if len(data) % SIZE:
        raise ValueError("is no list of image digests")
    return {data[start : start + SIZE] for start in range(0, len(data), SIZE)}


def _text(digests: set[bytes]) -> str:
    return base64.b64encode(b"".join(sorted(digests))).decode()
