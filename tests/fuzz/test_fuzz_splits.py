"""No arrangement of patients, copies, additions and removals yields a leak, and known images keep their split.

One hour: FPT_FUZZ_CASES=1000000 FPT_FUZZ_SEED=1 python -m pytest tests/fuzz/test_fuzz_splits.py --timeout=0
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import SPLITS, Manifest, ManifestRow, Split
from stages.groups import find_clusters
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.split_assignment import assign_splits
from stages.prepare.split_history import KnownSplits

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "0"))
DATA = DataSettings()


def content(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


class World:
    """A changing study: images with a content, a class that depends on it, and optionally a patient and a split."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.next = 0
        self.patients = rng.choice([0, 6, 30])
        self.named = rng.choice([0.0, 0.0, 0.3])
        self.items: dict[str, LabelledImage] = {}
        self.ids: dict[str, str] = {}
        self.add(rng.randint(12, 60))

    def add(self, count: int) -> None:
        for _ in range(count):
            path = f"{self.next:04}.png"
            number = self.rng.randrange(self.next) if self.next and self.rng.random() < 0.08 else self.next
            group = f"p{self.rng.randrange(self.patients)}" if self.patients and self.rng.random() < 0.8 else None
            split = self.rng.choice(SPLITS) if self.rng.random() < self.named else None
            self.ids[path] = content(number)
            self.items[path] = LabelledImage(path, "abc"[number % (2 + self.patients % 4 // 2)], group, split)
            self.next += 1

    def change(self) -> None:
        kind = self.rng.randrange(5)
        if kind == 0:
            self.add(self.rng.randint(1, 5))
        elif kind == 1:
            for path in self.rng.sample(sorted(self.items), self.rng.randint(1, max(1, len(self.items) // 5))):
                del self.items[path]
        elif kind == 2:  # another table with other patients
            for path, item in self.items.items():
                if self.rng.random() < 0.2:
                    self.items[path] = LabelledImage(path, item.label, f"p{self.rng.randrange(40)}", item.split)
        elif kind == 3:  # one more image
            self.add(1)
        else:  # a new table without splits
            self.items = {path: LabelledImage(path, item.label, item.group) for path, item in self.items.items()}

    def assign(self, known: KnownSplits) -> dict[str, Split]:
        items = list(self.items.values())
        self.rng.shuffle(items)
        return assign_splits(items, self.ids, sorted({item.label for item in items}), DATA, known)


def check(world: World, split_of: dict[str, Split], known: KnownSplits) -> bool:
    """Return whether every known image kept its split; fail for leaks and unnecessary moves."""
    items = list(world.items.values())
    assert split_of.keys() == world.items.keys()
    assert {(item.label, split_of[item.path]) for item in items} == {
        (label, split) for label in {item.label for item in items} for split in SPLITS
    }
    for item in items:
        assert item.split is None or split_of[item.path] in (item.split, "val" if item.split == "train" else item.split)
    moved = 0
    before_of: Counter[tuple[str, str]] = Counter()
    for item in items:
        old = known.contents.get(world.ids[item.path])
        if old is not None:
            before_of[item.label, old] += 1
    for cluster in find_clusters(items, world.ids):
        assert len({split_of[path] for path in cluster.paths}) == 1, "a leak"
        now = split_of[cluster.paths[0]]
        old = {known.contents[world.ids[path]] for path in cluster.paths if world.ids[path] in known.contents}
        if not old or any(world.items[path].split is not None for path in cluster.paths):
            continue
        expected = next(split for split in SPLITS if split in old)
        moved += now != expected
    lacking = any(not before_of[item.label, split] for item in items for split in SPLITS)
    joined = any(
        len({known.contents.get(world.ids[path]) for path in cluster.paths} - {None}) > 1
        for cluster in find_clusters(items, world.ids)
    )
    named = any(item.split is not None for item in items)
    assert moved == 0 or lacking or joined or named, "a known image moved, and no class was missing"
    return moved == 0


def manifest_of(world: World, split_of: dict[str, Split]) -> Manifest:
    rows = tuple(
        ManifestRow(id=world.ids[path], path=path, label=item.label, group=item.group or path, split=split_of[path])
        for path, item in sorted(world.items.items())
    )
    return Manifest(classes=("a", "b", "c"), rows=rows)


def test_no_history_of_a_study_leaks() -> None:
    outcomes: Counter[str] = Counter()
    for case in range(CASES or 150):
        rng = random.Random(f"{SEED}/{case}")
        world, known = World(rng), KnownSplits()
        for _ in range(8):
            try:
                split_of = world.assign(known)
            except DataError:
                outcomes["error"] += 1
            else:
                outcomes["kept" if check(world, split_of, known) else "moved"] += 1
                again = world.assign(known.with_manifest(manifest_of(world, split_of)))
                assert again == split_of, f"case {case} of seed {SEED}: not stable"
                known = known.with_manifest(manifest_of(world, split_of))
            world.change()
    assert (outcomes["kept"] > 100 and outcomes["error"] > 10) or CASES, outcomes
