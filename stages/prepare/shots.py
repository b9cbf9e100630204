"""Draw few-shot samplings: K patients per class for training, and K others per class for validation.

Patients are clusters (`stages.groups`): images of one patient, and copies of an image, stay together. They are drawn
from the training and validation images of the study; its test images stay, and all other images are left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from schemas.errors import DataError
from schemas.manifest import Manifest, Split
from schemas.text import counted
from stages.groups import ALL_IMAGES, Cluster, manifest_clusters
from stages.prepare.error_text import listed

FEWER_SHOTS = "Use fewer shots (--shots), or add images to the training and validation splits."
_ATTEMPTS = 20
"""Orders to try before giving up, for patients of several classes, which leave a later class too few."""
_DRAWN: tuple[Split, Split] = ("train", "val")


def draw_shots(manifest: Manifest, shots: int, seed: int) -> Manifest:
    """Return the manifest of a few-shot sampling: K patients per class to train on, K to validate on, the test images.

    Classes are served from the rarest to the most frequent, in a random order of their patients, each of which goes to
    the split with fewer patients of the class. A patient of several classes counts for each of them, so that a frequent
    class may get more than K patients. The order depends on the seed and on the contents of the images, not on their
    names or order.

    Args:
        manifest: From `prepare`, with the splits of the study.
        shots: K, at least 1.
        seed: Seed of the draw.

    Raises:
        DataError: A class has fewer than 2 K patients outside of the test images, or patients of several classes allow
            no draw; names the classes.
    """
    clusters = _outside_test(manifest)
    patients = Counter(name for cluster in clusters for name in _classes(cluster))
    few = [f"{name!r}: {counted(patients[name], 'patient')}" for name in manifest.classes if patients[name] < 2 * shots]
    if few:
        raise DataError(
            f"{counted(len(few), 'class')} with too few patients for {counted(shots, 'shot')}: {2 * shots} per class "
            "are needed.",
            listed(few) + "\nHalf of them train, half validate; test images stay those of the study.",
            FEWER_SHOTS,
        )
    rarest_first = sorted(manifest.classes, key=lambda name: (patients[name], name))
    for attempt in range(_ATTEMPTS):
        split_of, lacking = _deal(clusters, rarest_first, shots, f"{seed}/{shots} shots/{attempt}")
        if not lacking:
            return _with_rows(manifest, split_of)
    raise DataError(
        f"No draw was found with {counted(shots, 'patient')} per class in both training and validation.",
        listed([f"too few other patients of {name!r}" for name in lacking])
        + "\nPatients of several classes were used up by rarer ones.",
        FEWER_SHOTS,
    )


def _outside_test(manifest: Manifest) -> list[Cluster]:
    """Return the clusters of training and validation images; those with an image in another split are left out."""
    split_of = {row.path: row.split for row in manifest.rows}
    return [
        cluster for cluster in manifest_clusters(manifest) if all(split_of[path] in _DRAWN for path in cluster.paths)
    ]


def _classes(cluster: Cluster) -> list[str]:
    return [name for name in cluster.counts if name != ALL_IMAGES]


def _deal(
    clusters: Sequence[Cluster], classes: Sequence[str], shots: int, salt: str
) -> tuple[dict[str, Split], list[str]]:
    """Draw the patients of each class in turn.

    Returns:
        Path -> split of the drawn images, and the classes that were left with too few patients.
    """
    queue = sorted(clusters, key=lambda cluster: hashlib.sha256(f"{salt}:{cluster.key}".encode()).hexdigest())
    drawn: dict[str, Split] = {}
    counts: dict[Split, Counter[str]] = {split: Counter() for split in _DRAWN}
    for name in classes:
        for cluster in queue:
            # The split with fewer patients of the class: rarer classes may have brought some to one of them.
            split = min(_DRAWN, key=lambda split: counts[split][name])
            if counts[split][name] >= shots:
                break
            if name in cluster.counts and cluster.key not in drawn:
                drawn[cluster.key] = split
                counts[split].update(_classes(cluster))
    lacking = [name for name in classes if any(counts[split][name] < shots for split in _DRAWN)]
    return {path: drawn[one.key] for one in clusters if one.key in drawn for path in one.paths}, lacking


def _with_rows(manifest: Manifest, split_of: dict[str, Split]) -> Manifest:
    """Return the manifest with the drawn images and the test images."""
    rows = tuple(
        row if row.split == "test" else row.model_copy(update={"split": split_of[row.path]})
        for row in manifest.rows
        if row.split == "test" or row.path in split_of
    )
    return manifest.model_copy(update={"rows": rows})
