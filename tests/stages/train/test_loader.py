"""Batches through worker processes and from memory: the bytes of the store, whoever reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study import Study

from schemas.cost import StoreMemory
from schemas.machine import StoreSettings
from schemas.methods import METHODS
from stages.store.memory_rows import MemoryRows, available_memory, plan_memory
from stages.store.reader import StoreReader, open_store
from stages.train.data import BatchLoader, EpochSampler, FeatureDataset, Reading
from stages.train.job import Watch
from stages.train.trainer import train


def dataset(study: Study, store: Any) -> FeatureDataset:
    ids = [row.id for row in study.manifest.rows]
    reading = Reading(METHODS["fpt+"].inputs, 32, study.settings.train.augment, seed=3)
    return FeatureDataset(store, ids, list(range(len(ids))), reading)


def opened(study: Study) -> StoreReader:
    return open_store(study.cache, study.extract())


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_workers_hand_out_the_same_batches_in_every_epoch(study: Study, start: str) -> None:
    data = dataset(study, opened(study))
    sampler = EpochSampler(len(data), 3, seed=1)
    loader = BatchLoader(data, sampler, workers=2, start=start)
    data.__getitems__([(0, 0), (0, 5)])  # open files and checked chunks in the parent come first
    for sampler.epoch in (1, 2, 3):
        alone = BatchLoader(data, sampler)
        count = 0
        for helped, own in zip(loader, alone, strict=True):
            count += 1
            assert torch.equal(helped.side, own.side), sampler.epoch
            assert torch.equal(helped.labels, own.labels), sampler.epoch
            for left, right in zip(helped.tokens.tensors(), own.tokens.tensors(), strict=True):
                assert torch.equal(left, right), sampler.epoch
        assert count == len(loader) == 8


@pytest.mark.slow
def test_an_epoch_that_is_left_early_does_not_disturb_the_next(study: Study) -> None:
    data = dataset(study, opened(study))
    sampler = EpochSampler(len(data), 2, seed=1)
    loader = BatchLoader(data, sampler, workers=2, start="fork")
    for _ in range(3):
        for step, _ in enumerate(loader):
            if step == 3:
                break
    for helped, own in zip(loader, BatchLoader(data, sampler), strict=True):
        assert torch.equal(helped.tokens.keys, own.tokens.keys)


@pytest.mark.slow
def test_workers_read_from_shared_memory(study: Study) -> None:
    store = opened(study)
    held = MemoryRows(store, study.manifest.ids(), ("keys", "values", "side"))
    store.close()
    store.store.group.rename(study.root / "moved away")
    data = dataset(study, held)
    sampler = EpochSampler(len(data), 5, seed=1)
    for helped, own in zip(BatchLoader(data, sampler, workers=1), BatchLoader(data, sampler), strict=True):
        assert torch.equal(helped.tokens.keys, own.tokens.keys)
        assert torch.equal(helped.side, own.side)


def test_memory_holds_the_rows_of_the_store(study: Study) -> None:
    store = opened(study)
    ids = [row.id for row in study.manifest.rows][3:17]
    held = MemoryRows(store, ids, ("keys", "side"))
    asked = [ids[5], ids[0], ids[5]]
    out = {"keys": np.empty((4, *held.layouts["keys"].shape), held.layouts["keys"].dtype)}
    found = held.read_rows(held.locate(asked), asked, ("keys", "side"), out)
    direct = store.read(asked, ("keys", "side"))
    assert np.shares_memory(found["keys"], out["keys"])
    for name, values in direct.items():
        assert np.array_equal(found[name], values)


@pytest.mark.parametrize(
    ("budget", "held"), [("auto", True), (0, False), ("1KB", False), ("1.5GiB", True), (None, True)]
)
def test_the_budget_decides(study: Study, budget: Any, held: bool) -> None:
    store = opened(study)
    ids, names = study.manifest.ids(), ("keys", "values", "side")
    needed = sum(values.nbytes for values in store.read(ids, names).values())
    decision = plan_memory(store, ids, names, StoreSettings(memory_budget=needed if budget is None else budget))
    assert (decision.held, decision.needed, decision.rows) == (held, needed, len(ids))
    assert not plan_memory(store, ids, names, StoreSettings(memory_budget=needed - 1)).held
    assert 2**20 < available_memory() < 2**50


@pytest.mark.parametrize("text", ["2 gigabytes", "much", "-1GB", "GB"])
def test_budgets_that_are_no_size_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="2GB"):
        StoreSettings(memory_budget=text)


def test_training_from_memory_and_from_the_disk_give_the_same_model(study: Study) -> None:
    receipt = study.extract()
    models = []
    for budget in ("auto", 0):
        told: list[StoreMemory] = []
        folder: Path = study.root / f"model-{budget}"
        settings = study.changed(store={"memory_budget": budget})
        watch = Watch(on_memory=told.append)
        train(settings, study.files(receipt), folder, study.root / f"checkpoints-{budget}", watch)
        assert [memory.held for memory in told] == [budget == "auto"]
        models.append((folder / "model.safetensors").read_bytes())
    assert models[0] == models[1]
