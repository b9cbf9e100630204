"""Draw other splits of a manifest: repeated splits, or the folds of a cross-validation.

The images and their features do not change. As in the first split (`stages.prepare.stratified_split`), groups and
copies stay together and classes keep their shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from schemas.errors import DataError
from schemas.manifest import Manifest, Split
from schemas.text import counted
from stages.groups import Cluster, manifest_clusters
from stages.prepare.error_text import listed
from stages.prepare.stratified_split import deal, draw_splits

FEWER_FOLDS = "Use fewer folds (--folds), or repeated splits instead (--splits)."


def draw_again(manifest: Manifest, val_share: float, test_share: float, seed: int) -> Manifest:
    """Draw new splits of the same images; the seed of `prepare` reproduces its splits.

    Args:
        manifest: From `prepare`.
        val_share: Target share of images for validation.
        test_share: Target share of images for the test.
        seed: Seed of the draw.

    Raises:
        DataError: A class cannot be in all three splits.
    """
    return _with_splits(manifest, draw_splits(manifest_clusters(manifest), val_share, test_share, seed))


def draw_folds(manifest: Manifest, folds: int, val_share: float, seed: int) -> list[Manifest]:
    """Return K manifests for a cross-validation: every image is in the test split of exactly one of them.

    The images outside the test fold are divided into training and validation.

    Args:
        manifest: From `prepare`; its splits are ignored.
        folds: K, at least 2.
        val_share: Validation share of the images outside the test fold.
        seed: Seed of the folds and of the validation images in each.

    Raises:
        DataError: A class is too rare to be in the train, val and test split of every fold.
    """
    clusters = manifest_clusters(manifest)
    _check_enough(clusters, folds)
    names = [str(number + 1) for number in range(folds)]
    fold_of = deal(clusters, {f"fold {name}": 1.0 / folds for name in names}, f"{seed}/folds", FEWER_FOLDS)
    drawn = []
    for name in names:
        rest = [cluster for cluster in clusters if fold_of[cluster.paths[0]] != f"fold {name}"]
        shares = {"train": 1.0 - val_share, "val": val_share}
        split_of: dict[str, Split] = dict.fromkeys(fold_of, "test")
        for path, split in deal(rest, shares, f"{seed}/fold {name}", FEWER_FOLDS).items():
            split_of[path] = "val" if split == "val" else "train"
        drawn.append(_with_splits(manifest, split_of))
    return drawn


def draw_validation(manifest: Manifest, val_share: float, seed: int) -> Manifest:
    """Draw the validation images again; the test images stay.

    Args:
        manifest: From `prepare`.
        val_share: Validation share of the images outside the test split.
        seed: Seed of the draw.

    Raises:
        DataError: A class cannot be in both training and validation.
    """
    tested = {row.path for row in manifest.of("test")}
    rest = [cluster for cluster in manifest_clusters(manifest) if tested.isdisjoint(cluster.paths)]
    split_of: dict[str, Split] = {row.path: row.split for row in manifest.rows}
    repair = "Use a single sampling (--samplings 1), or add images."
    for path, split in deal(rest, {"train": 1.0 - val_share, "val": val_share}, f"{seed}/validation", repair).items():
        split_of[path] = "val" if split == "val" else "train"
    return _with_splits(manifest, split_of)


def all_to_train(manifest: Manifest) -> Manifest:
    """Return the manifest with every image in train, to extract augmented views that serve any split."""
    return _with_splits(manifest, {row.path: "train" for row in manifest.rows})


def _with_splits(manifest: Manifest, split_of: Mapping[str, Split]) -> Manifest:
    rows = tuple(row.model_copy(update={"split": split_of[row.path]}) for row in manifest.rows)
    return manifest.model_copy(update={"rows": rows})


def _check_enough(clusters: list[Cluster], folds: int) -> None:
    """Refuse classes with too few groups to be in the train, val and test split of every fold."""
    # The empty label is the column of all images.
    groups = Counter(label for cluster in clusters for label in cluster.counts if label)
    need = max(folds, 4 if folds == 2 else 3)
    few = [f"{label!r}: {counted(number, 'group')}" for label, number in sorted(groups.items()) if number < need]
    if few:
        raise DataError(
            f"{counted(len(few), 'class')} with too few groups: {folds} folds need at least {need} per class.",
            listed(few) + "\nImages of one patient (or other group) and copies of an image stay in one fold.",
            FEWER_FOLDS,
        )
