"""Shares of several processes: what each reads, and when there are several."""

from __future__ import annotations

import pytest
from study import Study

from schemas.methods import METHODS
from stages.methods.batch import Batch
from stages.ranks import ALONE, Ranks
from stages.store.reader import open_store
from stages.train.data import EpochSampler, FeatureDataset, Reading, batches


@pytest.mark.parametrize("seed", [None, 3])
def test_each_process_reads_its_rows_of_every_batch(study: Study, seed: int | None) -> None:
    study.extract()
    count, size = 14, 4
    whole = EpochSampler(count, size, seed)
    shares = [EpochSampler(count, size, seed, Ranks(rank, 3)) for rank in range(3)]
    for number, (batch, *parts) in enumerate(zip(whole, *shares, strict=True)):
        assert [row for part in parts for row in part] == batch
        assert whole.batch_rows(number) == len(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_without_rows_of_a_batch_gets_an_empty_one(study: Study, workers: int) -> None:
    store = open_store(study.cache, study.extract())
    ids = [row.id for row in study.manifest.of("train")][:5]
    data = FeatureDataset(store, ids, [0, 1, 2, 0, 1], Reading(METHODS["fpt+"].inputs, 32))
    for rank, expected in enumerate(([2, 0], [2, 1])):
        found: list[Batch] = list(batches(data, EpochSampler(5, 4, ranks=Ranks(rank, 2)), workers))
        assert [len(batch.labels) for batch in found] == expected


def test_what_torchrun_says_is_read_only_where_it_says_all() -> None:
    full = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert Ranks.of({**full, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == Ranks(3, 4, 1, 2)
    assert not Ranks.of(full).first
    for name in full:
        assert Ranks.of({key: value for key, value in full.items() if key != name}) == ALONE
