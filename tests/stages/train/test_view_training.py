"""Training on views: each sample and epoch has one, features and side image alike, whoever reads it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study import Study, make_study, train_study

from schemas.cost import StoreMemory
from schemas.errors import CacheIncompleteError
from schemas.features import ExtractionReceipt
from schemas.methods import METHODS
from schemas.results import EpochLog
from schemas.views import train_views
from stages.evaluate.evaluator import evaluate
from stages.store.memory_rows import MemoryRows
from stages.store.reader import open_store
from stages.train.data import BatchLoader, EpochSampler, FeatureDataset, Reading
from stages.train.job import Watch

TURNS = ("identity", "hflip", "rot90")


class Killed(BaseException):
    """A kill signal, from inside."""


@pytest.fixture
def viewed(tmp_path: Path) -> tuple[Study, ExtractionReceipt]:
    """A study with two more views and a crop, extracted."""
    study = make_study(tmp_path, features={"views": TURNS, "crops": 1, "crop_scale": (0.5, 0.8)}, train={"epochs": 3})
    return study, study.extract()


def names(study: Study) -> list[list[str]]:
    """Names of the rows of each training image."""
    return [[row.row_id for row in rows] for rows in train_views(study.manifest, study.settings.features)]


def dataset(study: Study, store: Any, seed: int = 3, augmented: bool = False, size: int = 40) -> FeatureDataset:
    ids = [row.id for row in study.manifest.of("train")]
    augment = study.settings.train.augment if augmented else None
    reading = Reading(METHODS["fpt+"].inputs, size, augment, seed)
    return FeatureDataset(store, ids, list(range(len(ids))), reading, views=names(study))


def drawn(study: Study, store: Any, data: FeatureDataset, epoch: int) -> list[int]:
    """Which view each position has: the one whose keys and side image both are in the batch."""
    batch = data.__getitems__([(epoch, position) for position in range(len(data))])
    keys, sides, views = batch.tokens.keys.numpy().copy(), batch.side.numpy(), []
    for position, rows in enumerate(names(study)):
        stored = store.read(rows, ["keys", "side"])
        same = [
            number
            for number in range(len(rows))
            if np.array_equal(stored["keys"][number], keys[position])
            and np.array_equal(stored["side"][number], sides[position])
        ]
        assert len(same) == 1, "features and side image are of one view"
        views += same
    return views


def test_every_view_is_drawn_alike_often_and_with_its_own_side_image(viewed: tuple[Study, ExtractionReceipt]) -> None:
    study, receipt = viewed
    store = open_store(study.cache, receipt)
    data = dataset(study, store)
    epochs = [drawn(study, store, data, epoch) for epoch in range(1, 41)]
    for position in range(len(data)):
        assert {views[position] for views in epochs} == {0, 1, 2, 3}
    counts = Counter(view for views in epochs for view in views)
    mean = 40 * len(data) / 4
    # Of n draws with chance 1/4 the count has the variance 3 n / 16; five deviations never happen.
    assert all(abs(counts[view] - mean) < 5 * (mean * 0.75) ** 0.5 for view in range(4))
    assert drawn(study, store, dataset(study, store), 7) == epochs[6]
    assert drawn(study, store, dataset(study, store, seed=4), 7) != epochs[6]


def test_the_draw_does_not_disturb_the_augmentation(viewed: tuple[Study, ExtractionReceipt]) -> None:
    study, receipt = viewed
    store = open_store(study.cache, receipt)
    ids = [row.id for row in study.manifest.of("train")]
    reading = Reading(METHODS["fpt+"].inputs, 32, study.settings.train.augment, 3)
    plain = FeatureDataset(store, ids, list(range(len(ids))), reading)
    data, raw = dataset(study, store, augmented=True, size=32), dataset(study, store)
    views = drawn(study, store, raw, 1)
    index = [(1, position) for position, view in enumerate(views) if view == 0]
    assert index
    assert torch.equal(data.__getitems__(index).side, plain.__getitems__(index).side)
    others = [(1, position) for position, view in enumerate(views) if view != 0]
    assert not torch.equal(data.__getitems__(others).side, plain.__getitems__(others).side)


@pytest.mark.slow
def test_workers_and_memory_give_the_same_views(viewed: tuple[Study, ExtractionReceipt]) -> None:
    study, receipt = viewed
    store = open_store(study.cache, receipt)
    held = MemoryRows(store, [row for rows in names(study) for row in rows], ("keys", "values", "side"))
    data, in_memory = dataset(study, store, augmented=True), dataset(study, held, augmented=True)
    sampler = EpochSampler(len(data), 5, seed=1)
    loaders = [BatchLoader(data, sampler, workers=2), BatchLoader(in_memory, sampler), BatchLoader(data, sampler)]
    for sampler.epoch in (1, 2):
        count = 0
        for helped, remembered, own in zip(*loaders, strict=True):
            count += 1
            for other in (helped, remembered):
                assert torch.equal(other.side, own.side)
                assert torch.equal(other.labels, own.labels)
                assert torch.equal(other.tokens.keys, own.tokens.keys)
        assert count == len(loaders[0])


def test_views_change_the_model_and_a_killed_run_ends_where_an_undisturbed_one_ends(
    viewed: tuple[Study, ExtractionReceipt],
) -> None:
    study, receipt = viewed
    train_study(study, receipt, "calm")

    def die(_: int, log: EpochLog) -> None:
        if log.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train_study(study, receipt, "killed", watch=Watch(on_epoch=die))
    fewer = study.changed(features={"views": TURNS[:1], "crops": 0})
    assert train_study(study, receipt, "plain", settings=fewer).resumed_from == 0, "fewer views are another run"
    assert train_study(study, receipt, "killed").resumed_from == 1
    calm, killed, plain = (
        (study.root / name / "model.safetensors").read_bytes() for name in ("calm", "killed", "plain")
    )
    assert calm == killed
    assert calm != plain


@pytest.mark.parametrize("budget", ["auto", 0])
def test_what_is_held_in_memory_counts_the_views_and_changes_nothing(
    viewed: tuple[Study, ExtractionReceipt], budget: Any
) -> None:
    study, receipt = viewed
    told: list[StoreMemory] = []
    settings = study.changed(store={"memory_budget": budget})
    train_study(study, receipt, "a", settings=settings, watch=Watch(on_memory=told.append))
    expected = 4 * len(names(study)) + len(list(study.manifest.of("val")))
    assert (told[0].held, told[0].rows) == (budget == "auto", expected)
    train_study(study, receipt, "b")
    a, b = ((study.root / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"views": (*TURNS, "vflip")}, "vflip"),
        ({"crops": 2}, "2 crops of 0.5 to 0.8 of the area"),
        ({"crop_scale": (0.4, 0.8)}, "1 crop of 0.4 to 0.8 of the area"),
    ],
)
def test_views_that_were_not_extracted_are_refused_by_name(
    viewed: tuple[Study, ExtractionReceipt], change: dict[str, Any], named: str
) -> None:
    study, receipt = viewed
    with pytest.raises(CacheIncompleteError, match="fpt extract") as caught:
        train_study(study, receipt, settings=study.changed(features=change))
    assert list(caught.value.missing) == [named]


def test_a_receipt_from_before_there_were_views_has_none(study: Study) -> None:
    old = study.extract().model_dump(mode="json", exclude={"views", "crops", "crop_scale"})
    receipt = ExtractionReceipt.model_validate(old)
    train_study(study, receipt)
    with pytest.raises(CacheIncompleteError, match="hflip"):
        train_study(study, receipt, settings=study.changed(features={"views": ("identity", "hflip")}))


def test_images_that_moved_to_training_since_lack_their_views(viewed: tuple[Study, ExtractionReceipt]) -> None:
    study, receipt = viewed
    before = {row.id for row in study.manifest.of("train")}
    study.settings = study.changed(data={"seed": 3})
    study.prepare()
    new = {row.id for row in study.manifest.of("train")} - before
    with pytest.raises(CacheIncompleteError, match="not of every view") as caught:
        train_study(study, receipt)
    assert set(caught.value.missing) == new
    train_study(study, study.extract())


def test_the_side_network_alone_sees_the_views_too_and_evaluation_sees_none(
    viewed: tuple[Study, ExtractionReceipt],
) -> None:
    study, receipt = viewed
    side = study.settings.model_copy(update={"method": "side"})
    train_study(study, receipt, settings=side)
    metrics = evaluate(study.files(receipt), study.root / "model", study.root / "evaluation", "train")
    assert metrics.images == len(names(study))
