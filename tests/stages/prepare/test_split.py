"""Splits: no leaks, classes keep their shares, and neither names nor order matter."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.manifest import SPLITS, Split
from stages.groups import find_clusters
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.split_assignment import assign_splits
from stages.prepare.split_history import KnownSplits
from stages.prepare.stratified_split import draw_splits


def content(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def draw(items: Sequence[LabelledImage], ids: dict[str, str], val: float = 0.2, test: float = 0.2, seed: int = 0):
    return draw_splits(find_clusters(items, ids), val, test, seed)


def singles(counts: dict[str, int]) -> tuple[list[LabelledImage], dict[str, str]]:
    items = [
        LabelledImage(f"{label}/{number}.png", label) for label, count in counts.items() for number in range(count)
    ]
    return items, {item.path: content(item.path) for item in items}


@st.composite
def studies(draw: st.DrawFn) -> tuple[list[LabelledImage], dict[str, str]]:
    """Images of 2-4 classes with shared groups and shared contents, and three independent images of each class."""
    labels = "abcd"[: draw(st.integers(2, 4))]
    rows = draw(
        st.lists(st.tuples(st.sampled_from(labels), st.none() | st.integers(0, 12), st.integers(0, 40)), max_size=60)
    )
    items = [
        LabelledImage(f"{number}.png", label, None if group is None else f"g{group}")
        for number, (label, group, _) in enumerate(rows)
    ]
    # A content has one label, since conflicts are refused earlier.
    ids = {item.path: content((item.label, row[2])) for item, row in zip(items, rows, strict=True)}
    for label in labels:
        own = [LabelledImage(f"own/{label}{number}.png", label) for number in range(3)]
        items += own
        ids |= {item.path: content(item.path) for item in own}
    return items, ids


@given(study=studies(), seed=st.integers(0, 5), data=st.data())
@settings(max_examples=150, deadline=None)
def test_invariants(study: tuple[list[LabelledImage], dict[str, str]], seed: int, data: st.DataObject) -> None:
    items, ids = study
    split_of = draw(items, ids, seed=seed)
    assert split_of.keys() == {item.path for item in items}
    by_content, by_group, by_split = defaultdict(set), defaultdict(set), defaultdict(set)
    for item in items:
        by_content[ids[item.path]].add(split_of[item.path])
        by_group[item.group or item.path].add(split_of[item.path])
        by_split[split_of[item.path]].add(item.label)
    assert all(len(splits) == 1 for splits in by_content.values())
    assert all(len(splits) == 1 for splits in by_group.values())
    assert all(by_split[split] == {item.label for item in items} for split in SPLITS)

    shuffled = data.draw(st.permutations(items))
    assert draw(shuffled, ids, seed=seed) == split_of

    # Different names of files, groups and labels, but the same contents.
    renamed = [
        LabelledImage(f"moved/{item.path}", item.label, None if item.group is None else f"patient {item.group}")
        for item in items
    ]
    again = draw(renamed, {f"moved/{path}": id_ for path, id_ in ids.items()}, seed=seed)
    assert again == {f"moved/{path}": split for path, split in split_of.items()}


@pytest.mark.parametrize("seed", range(5))
def test_single_images_are_split_exactly(seed: int) -> None:
    items, ids = singles({"a": 50, "b": 100, "c": 10})
    split_of = draw(items, ids, seed=seed)
    counts = Counter((item.label, split_of[item.path]) for item in items)
    assert counts == {
        (label, split): int(count * share)
        for label, count in {"a": 50, "b": 100, "c": 10}.items()
        for split, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items()
    }


def test_the_seed_decides_and_only_it() -> None:
    items, ids = singles({"a": 60, "b": 60})
    first = draw(items, ids, seed=0)
    assert first == draw(items, ids, seed=0)
    others = [draw(items, ids, seed=seed) for seed in range(1, 20)]
    assert all(other != first for other in others)
    tested = Counter(path for split in others for path in split if split[path] == "test")
    assert len(tested) > 110, "over many seeds nearly every image is in the test at some time"


KNOWN_TEST = ["a/0.png", "a/1.png", "b/1.png", "b/2.png"]


def test_a_known_split_stays_as_it_is() -> None:
    # A change here changes the test set of every study, so it has to be in the changelog.
    items, ids = singles({"a": 10, "b": 10})
    split_of = draw(items, ids)
    assert sorted(path for path, split in split_of.items() if split == "test") == [
        "a/0.png",
        "a/1.png",
        "b/1.png",
        "b/2.png",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_shares_with_very_unequal_groups(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [120, 60, 40, 20, 20, 10, 10, *[rng.randint(1, 6) for _ in range(40)]]
    items = [
        LabelledImage(f"{group}/{number}.png", rng.choice("aab"), f"g{group}")
        for group, size in enumerate(sizes)
        for number in range(size)
    ]
    ids = {item.path: content(item.path) for item in items}
    split_of = draw(items, ids, seed=seed)
    for label in (None, "a", "b"):
        counts = Counter(split_of[item.path] for item in items if label in (None, item.label))
        for split, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
            assert counts[split] / counts.total() == pytest.approx(share, abs=0.03), (label, split)


def test_one_group_with_most_images_goes_to_train() -> None:
    items = [LabelledImage(f"big/{n}.png", "ab"[n % 2], "big") for n in range(80)]
    items += [LabelledImage(f"{n}.png", "ab"[n % 2], f"g{n}") for n in range(20)]
    ids = {item.path: content(item.path) for item in items}
    split_of = draw(items, ids)
    counts = Counter(split_of.values())
    assert split_of["big/0.png"] == "train"
    assert counts["val"] == pytest.approx(10, abs=1) and counts["test"] == pytest.approx(10, abs=1)


@pytest.mark.parametrize("seed", range(5))
def test_large_groups_are_dealt_first(seed: int) -> None:
    items = [LabelledImage(f"big/{n}.png", "ab"[n % 2], "big") for n in range(60)]
    items += [LabelledImage(f"{n}.png", "ab"[n % 2], f"g{n}") for n in range(100)]
    ids = {item.path: content(item.path) for item in items}
    assert Counter(draw(items, ids, seed=seed).values()) == {"train": 96, "val": 32, "test": 32}


def test_large_groups_are_not_all_in_train() -> None:
    items = [LabelledImage(f"{g}/{n}.png", "ab"[g % 2], f"g{g}") for g in range(40) for n in range(10 if g < 20 else 1)]
    ids = {item.path: content(item.path) for item in items}
    split_of = draw(items, ids)
    sizes = Counter(item.group for item in items)
    large = {split_of[item.path] for item in items if sizes[item.group] == 10}
    assert large == set(SPLITS)


def test_groups_and_copies_join_through_each_other() -> None:
    # g1 - shared content - g2 - another - g3: one cluster of three patients.
    items = [
        LabelledImage("1.png", "a", "g1"),
        LabelledImage("2.png", "a", "g2"),
        LabelledImage("3.png", "a", "g2"),
        LabelledImage("4.png", "a", "g3"),
        *singles({"a": 9, "b": 9})[0],
    ]
    ids = {item.path: content(item.path) for item in items}
    ids["2.png"], ids["4.png"] = ids["1.png"], ids["3.png"]
    for seed in range(10):
        split_of = draw(items, ids, seed=seed)
        assert len({split_of[f"{n}.png"] for n in range(1, 5)}) == 1


@pytest.mark.parametrize(("val", "test"), [(0.2, 0.2), (0.05, 0.05), (0.4, 0.5)])
def test_a_class_of_three_images_is_everywhere(val: float, test: float) -> None:
    items, ids = singles({"rare": 3, "common": 300})
    for seed in range(5):
        split_of = draw(items, ids, val, test, seed)
        assert {split_of[f"rare/{n}.png"] for n in range(3)} == set(SPLITS)
        counts = Counter(split_of.values())
        assert counts["val"] / 303 == pytest.approx(val, abs=0.02)


def test_a_class_with_too_few_groups() -> None:
    items, ids = singles({"a": 10, "b": 10})
    items += [LabelledImage(f"rare/{n}.png", "rare", f"g{n % 2}") for n in range(8)]
    ids |= {item.path: content(item.path) for item in items}
    with pytest.raises(DataError, match=r"'rare': 8 images of 2 groups"):
        draw(items, ids)


def of_groups(groups: dict[str, str], salt: object = "") -> tuple[list[LabelledImage], dict[str, str]]:
    """One image per class (a letter) in each group."""
    items = [LabelledImage(f"{group}{label}.png", label, group) for group, labels in groups.items() for label in labels]
    return items, {item.path: content((salt, item.path)) for item in items}


@pytest.mark.parametrize("seed", range(60))
def test_mixed_groups_are_split_wherever_they_can_be(seed: int) -> None:
    rng = random.Random(seed)
    groups = {f"g{n}": "".join(rng.sample("abc", rng.randint(1, 3))) for n in range(rng.randint(4, 7))}
    labels = sorted(set("".join(groups.values())))

    def everywhere(deal: tuple[Split, ...], label: str) -> bool:
        return {split for split, held in zip(deal, groups.values(), strict=True) if label in held} == set(SPLITS)

    deals = itertools.product(SPLITS, repeat=len(groups))
    possible = any(all(everywhere(deal, label) for label in labels) for deal in deals)
    items, ids = of_groups(groups, seed)
    if not possible:
        with pytest.raises(DataError):
            draw(items, ids)
        return
    split_of = draw(items, ids)
    assert {(item.label, split_of[item.path]) for item in items} == set(itertools.product(labels, SPLITS))


def test_other_orders_are_tried() -> None:
    # Eight groups of five classes: the order of the first attempt leads to a dead end.
    groups = {"0": "ad", "1": "ac", "2": "e", "3": "b", "4": "abcd", "5": "bcde", "6": "acde", "7": "e"}
    for salt in range(40):
        items, ids = of_groups(groups, salt)
        split_of = draw(items, ids)
        assert {(item.label, split_of[item.path]) for item in items} == set(itertools.product("abcde", SPLITS))


def test_an_impossible_arrangement_is_an_error() -> None:
    # a needs g1, g2, g3 in three splits and b needs g1, g2, g4, so g3 and g4 share one, which leaves two for c.
    items, ids = of_groups({"g1": "ab", "g2": "ab", "g3": "ac", "g4": "bc", "g5": "c"})
    with pytest.raises(DataError) as caught:
        draw(items, ids)
    assert "keeps groups together" in caught.value.state
    assert "no 'c' in" in caught.value.cause
    assert "data.split_column" in caught.value.repair


def ready(**splits: Split) -> tuple[list[LabelledImage], dict[str, str]]:
    base = [LabelledImage(f"{label}{s}.png", label, None, s) for label in "ab" for s in SPLITS]
    extra = [LabelledImage(f"{name}.png", "a", "p1", s) for name, s in splits.items()]
    return base + extra, {item.path: content(item.path) for item in base + extra}


def assign(items: Sequence[LabelledImage], ids: dict[str, str]) -> dict[str, Split]:
    return assign_splits(items, ids, ("a", "b"), DataSettings(), KnownSplits())


def test_ready_splits_are_kept() -> None:
    items, ids = ready(x="test", y="test")
    assert assign(items, ids) == {item.path: item.split for item in items}


def test_ready_splits_with_a_group_in_two() -> None:
    items, ids = ready(x="train", y="test")
    with pytest.raises(DataError, match=r"group 'p1': x.png \(train\), y.png \(test\)"):
        assign(items, ids)


def test_ready_splits_with_a_content_in_two() -> None:
    items, ids = ready()
    ids["atest.png"] = ids["atrain.png"]
    with pytest.raises(DataError, match=r"content of .*: atrain.png \(train\), atest.png \(test\)"):
        assign(items, ids)


def test_ready_splits_without_a_class() -> None:
    items, ids = ready()
    with pytest.raises(DataError, match=r"no 'b' in val"):
        assign([item for item in items if item.path != "bval.png"], ids)
