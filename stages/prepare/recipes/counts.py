"""Count the images of a data set, and compare with the published counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from schemas.recipes import Recipe
from schemas.tasks import Task, names_in
from stages.prepare.labelled_image import LabelledImage

Counts = Mapping[tuple[str, str], int]
"""(split or "", label or "" for all images) -> images."""


def count_images(images: Iterable[LabelledImage], task: Task) -> Counts:
    """Count images per split and label, and all images of a split under the label ""."""
    counts: Counter[tuple[str, str]] = Counter()
    for image in images:
        for label in ("", *names_in(image.label, task)):
            counts[image.split or "", label] += 1
    return counts


def differences(recipe: Recipe, counts: Counts) -> list[str]:
    """Return a line for each verified published count that differs from the found one."""
    lines = []
    for published in recipe.published:
        place = f" in {published.split}" if published.split else ""
        for label, expected in {"": published.images, **published.labels}.items():
            found = sum(
                number for (split, name), number in counts.items() if name == label and published.split in (None, split)
            )
            if found != expected:
                what = f"images of {label!r}" if label else "images"
                lines.append(f"differs from the published: {found:,} {what}{place} instead of {expected:,}")
    return lines
