"""However patients, copies, near-duplicates and given splits are arranged: no leak, and the same splits again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import SPLITS, Manifest, ManifestRow, Split
from stages.data_check.check import ReadData
from stages.data_check.repair import plan_repair
from stages.prepare.dataset_listing import Listing
from stages.prepare.folds import draw_folds
from stages.prepare.image_digests import Digests
from stages.prepare.image_record import ImageRecord
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.leaks import check_leaks, find_leaks
from stages.prepare.split_assignment import assign_splits
from stages.prepare.split_history import KnownSplits

CLASSES = ("a", "b")
FEW = settings(max_examples=25, deadline=None)


def record(scene: int, version: int) -> ImageRecord:
    """A version of a scene: another file, nearly the same picture."""
    pixels = np.random.default_rng(scene).integers(20, 235, 256) + np.random.default_rng([scene, version]).integers(
        0, 9, 256
    )
    content = hashlib.sha256(f"{scene}/{version}".encode()).hexdigest()
    return ImageRecord(content, pixels.astype(np.uint8).tobytes(), 64, 64, 1000)


@st.composite
def data_sets(draw: st.DrawFn, splits: bool) -> tuple[list[LabelledImage], Digests]:
    """Images of few scenes in few versions, of few patients; and eight independent images of each class."""
    split = st.none() | st.sampled_from(SPLITS) if splits else st.none()
    group = st.none() | st.integers(0, 8)
    rows = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), group, split), max_size=30))
    items, records = [], {}
    for number, (scene, version, patient, given_split) in enumerate(rows):
        path = f"{number:02}.png"
        items.append(LabelledImage(path, CLASSES[scene % 2], None if patient is None else f"p{patient}", given_split))
        records[path] = record(scene, version)
    for number in range(16):
        path = f"own{number:02}.png"
        given_split = SPLITS[number // 2 % 3] if splits else None
        items.append(LabelledImage(path, CLASSES[number % 2], None, given_split))
        records[path] = record(100 + number, 0)
    return items, Digests(records, {})


def assign(items: Sequence[LabelledImage], digests: Digests, seed: int = 0) -> dict[str, Split]:
    data = DataSettings(seed=seed)
    return assign_splits(items, digests.ids, CLASSES, data, KnownSplits(), "patients", digests.near)


def leaks(items: Sequence[LabelledImage], digests: Digests, split_of: dict[str, Split]) -> list[str]:
    placed = [replace(item, split=split_of[item.path]) for item in items]
    return [str(leak) for leak in find_leaks(placed, digests.ids, digests.near)]


@FEW
@given(study=data_sets(splits=False), seed=st.integers(0, 3), order=st.randoms())
def test_drawn_splits(study: tuple[list[LabelledImage], Digests], seed: int, order: object) -> None:
    items, digests = study
    split_of = assign(items, digests, seed)
    assert leaks(items, digests, split_of) == []
    shuffled = list(items)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    again = Digests({item.path: digests.records[item.path] for item in shuffled}, {})
    assert assign(shuffled, again, seed) == split_of


@FEW
@given(study=data_sets(splits=False))
def test_folds_of_the_manifest(study: tuple[list[LabelledImage], Digests]) -> None:
    items, digests = study
    split_of, near = assign(items, digests), digests.near.key_of
    rows = tuple(
        ManifestRow(
            id=digests.ids[item.path],
            path=item.path,
            label=item.label,
            group=item.group or item.path,
            split=split_of[item.path],
            near=near.get(item.path),
        )
        for item in sorted(items, key=lambda item: item.path)
    )
    for fold in draw_folds(Manifest(classes=CLASSES, rows=rows), 3, 0.3, 0):
        assert leaks(items, digests, {row.path: row.split for row in fold.rows}) == []


@FEW
@given(study=data_sets(splits=True))
def test_given_splits_are_refused_or_have_no_leak(study: tuple[list[LabelledImage], Digests]) -> None:
    items, digests = study
    try:
        split_of = assign(items, digests)
    except DataError as error:
        assert "leak" in str(error)
        return
    assert leaks(items, digests, split_of) == []
    assert all(item.split in (None, split_of[item.path]) for item in items)


@FEW
@given(study=data_sets(splits=True))
def test_a_repaired_table_has_no_leak_and_all_test_images(study: tuple[list[LabelledImage], Digests]) -> None:
    items, digests = study
    data = DataSettings(labels="labels.csv")
    plan = plan_repair(ReadData(data, Listing(Path("images"), items, "patient"), digests))
    gone = {image.path for image in plan.dropped}
    left = [item for item in items if item.path not in gone]
    assert plan.rows == len(left)
    assert all(item.split in ("train", "val") for item in items if item.path in gone)
    rest = Digests({item.path: digests.records[item.path] for item in left}, {})
    assert check_leaks(left, rest.ids, rest.near) == {}
    assert leaks(left, rest, assign(left, rest)) == []
    again = plan_repair(ReadData(data, Listing(Path("images"), left, "patient"), rest))
    assert again.dropped == ()
