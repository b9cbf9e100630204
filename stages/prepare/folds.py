"""Other splits of a manifest: drawn anew, or the folds of a cross-validation. The images and their features stay.

Groups and copies stay together and classes keep their shares, as in the first split (`stages.prepare.split`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from schemas.errors import DataError
from schemas.manifest import Manifest, Split
from schemas.text import counted
from stages.groups import Cluster, manifest_clusters
from stages.prepare.listing import listed
from stages.prepare.split import deal, draw_splits

FEWER = "Take fewer folds (--folds), or repeated splits instead (--splits)."


def draw_again(manifest: Manifest, val_share: float, test_share: float, seed: int) -> Manifest:
    """The same images in other splits; with the seed of `prepare`, its own splits.

    Args:
        manifest: From `prepare`.
        val_share: Wanted share of images for validation.
        test_share: Wanted share of images for the test.
        seed: Of the split.

    Raises:
        DataError: A class cannot be in all three splits.
    """
    return _with_splits(manifest, draw_splits(manifest_clusters(manifest), val_share, test_share, seed))


def draw_folds(manifest: Manifest, folds: int, val_share: float, seed: int) -> list[Manifest]:
    """K manifests: every image is tested in exactly one, and the rest of each is dealt to training and validation.

    Args:
        manifest: From `prepare`; its own splits do not count.
        folds: K, at least 2.
        val_share: Share of the images outside the test fold for choosing the epoch and the best run.
        seed: Of the folds, and of the validation images in each.

    Raises:
        DataError: A class cannot be in the test images of every fold and among those that are left.
    """
    clusters = manifest_clusters(manifest)
    _check_enough(clusters, folds)
    names = [str(number + 1) for number in range(folds)]
    fold_of = deal(clusters, {f"fold {name}": 1.0 / folds for name in names}, f"{seed}/folds", FEWER)
    drawn = []
    for name in names:
        rest = [cluster for cluster in clusters if fold_of[cluster.paths[0]] != f"fold {name}"]
        shares = {"train": 1.0 - val_share, "val": val_share}
        split_of: dict[str, Split] = dict.fromkeys(fold_of, "test")
        for path, split in deal(rest, shares, f"{seed}/fold {name}", FEWER).items():
            split_of[path] = "val" if split == "val" else "train"
        drawn.append(_with_splits(manifest, split_of))
    return drawn


def all_to_train(manifest: Manifest) -> Manifest:
    """Every image in the training split: what an extraction needs whose views serve any split."""
    return _with_splits(manifest, {row.path: "train" for row in manifest.rows})


def _with_splits(manifest: Manifest, split_of: Mapping[str, Split]) -> Manifest:
    rows = tuple(row.model_copy(update={"split": split_of[row.path]}) for row in manifest.rows)
    return manifest.model_copy(update={"rows": rows})


def _check_enough(clusters: list[Cluster], folds: int) -> None:
    """A class is tested in every fold, and learned and validated in every fold from what is left."""
    # The column of all images has no name.
    groups = Counter(label for cluster in clusters for label in cluster.counts if label)
    need = max(folds, 4 if folds == 2 else 3)
    few = [f"{label!r}: {counted(number, 'group')}" for label, number in sorted(groups.items()) if number < need]
    if few:
        raise DataError(
            f"{counted(len(few), 'class')} with too few groups for {folds} folds, which need {need} each.",
            listed(few) + "\nImages of one patient (or other group) and copies of an image stay in one fold.",
            FEWER,
        )
