"""The store: what is read is exactly what was written, or a clear error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from stores import FORMS, SPEC, filled, image_id, random_rows, receipt_of

from schemas.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, StorageError
from stages.store.index import refresh_index
from stages.store.layout import Store, array_layouts, capacity, create_store, grow_store, store_path
from stages.store.manage.verify import damaged_shards
from stages.store.reader import StoreReader, open_store
from stages.store.writer import claim_shard, write_shard


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_returned_in_the_requested_order(tmp_path: Path, form: str) -> None:
    store, rows = filled(tmp_path, spec=FORMS[form])
    assert ("keys" in rows, "statistics" in rows) == ("only" not in form, "statistics" in form)
    reader = open_store(tmp_path, receipt_of(store))
    order = [7, 1, 11, 1, 4]
    found = reader.read([image_id(n) for n in order], rows)
    for name, values in rows.items():
        assert found[name].dtype == values.dtype
        assert np.array_equal(found[name], values[[n - 1 for n in order]]), name


def test_a_buffer_is_reused(tmp_path: Path) -> None:
    store, rows = filled(tmp_path)
    reader = open_store(tmp_path, receipt_of(store))
    first = reader.read([image_id(1), image_id(2)], ["keys"])
    again = reader.read([image_id(9)], ["keys"], out=first)
    assert again["keys"].base is first["keys"] or again["keys"].base is first["keys"].base
    assert np.array_equal(first["keys"][0], rows["keys"][8])


@pytest.mark.parametrize("form", FORMS)
def test_zarr_reads_every_array_with_dimension_names(tmp_path: Path, form: str) -> None:
    store, rows = filled(tmp_path, spec=FORMS[form])
    group = zarr.open_group(store.group, mode="r")
    assert set(group.array_keys()) == {*rows, "sha256"}
    for name, values in rows.items():
        array: Any = group[name]
        assert np.array_equal(array[: len(values)], values)
        assert array.metadata.dimension_names == ("row", *array_layouts(FORMS[form])[name].dims)
    digests: Any = group["sha256"]
    assert bytes(digests[4]).hex() == image_id(5)
    assert not np.asarray(digests[11]).any(), "the last row of a partly filled shard is empty"


def test_a_partly_filled_shard_costs_no_bytes_for_empty_rows(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, sizes=(4, 1))
    full, part = (store.shard_file("values", shard).stat().st_size for shard in (0, 1))
    assert part < full / 2


def test_few_files(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    files = [path for path in store.path.rglob("*") if path.is_file()]
    arrays = len(array_layouts(SPEC))
    metadata_and_store_lock = arrays + 1 + 1
    assert len(files) == 3 * (arrays + 1) + metadata_and_store_lock
    assert max(len(path.relative_to(store.path).parts) for path in files) == 3


def test_a_reader_survives_pickling(tmp_path: Path) -> None:
    store, rows = filled(tmp_path)
    reader = open_store(tmp_path, receipt_of(store))
    reader.read([image_id(1)], ["keys"])
    copy: StoreReader = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.read([image_id(6)], ["side"])["side"][0], rows["side"][5])


def test_many_shards_are_read_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.store.array_sources.OPEN_FILES", 3)
    store, rows = filled(tmp_path, sizes=(1, 1, 1, 1, 1), shard_size=1)
    reader = open_store(tmp_path, receipt_of(store))
    for _ in range(2):
        found = reader.read([image_id(n) for n in (5, 4, 3, 2, 1)], ["keys", "side"])
        assert np.array_equal(found["keys"], rows["keys"][::-1])
    assert reader.open_files() == 2 * 3


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    store, rows = filled(tmp_path, sizes=(3,))
    receipt = receipt_of(store)
    path = store.shard_file("keys", 0)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(good), 60, replace=False):
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        reader = open_store(tmp_path, receipt)
        try:
            found = reader.read([image_id(n) for n in (1, 2, 3)], ["keys"])["keys"]
        except (CacheCorruptError, CacheIncompleteError):
            pass
        else:
            # Only bytes that no row needs may change unnoticed by a read; `damaged_shards` sees those too.
            assert np.array_equal(found, rows["keys"])
        assert damaged_shards(store) == [0]
        reader.close()
    path.write_bytes(good)
    assert damaged_shards(store) == []


@pytest.mark.parametrize("cut", [1, 20, 500])
def test_a_truncated_shard_is_refused_before_it_is_read(tmp_path: Path, cut: int) -> None:
    store, _ = filled(tmp_path)
    receipt = receipt_of(store)
    path = store.shard_file("values", 1)
    path.write_bytes(path.read_bytes()[:-cut])
    reader = open_store(tmp_path, receipt)
    with pytest.raises(CacheCorruptError, match="bytes instead of"):
        reader.require_complete()
    with pytest.raises(CacheCorruptError, match="bytes instead of"):
        reader.read([image_id(5)], ["side"])


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    receipt = receipt_of(store)
    reader = open_store(tmp_path, receipt)
    with pytest.raises(CacheIncompleteError, match="fpt extract") as caught:
        reader.read([image_id(99)], ["keys"])
    assert caught.value.missing == (image_id(99),)
    store.shard_file("values", 1).unlink()
    with pytest.raises(CacheIncompleteError, match=r"shard file .* is gone"):
        open_store(tmp_path, receipt).require_complete()
    with pytest.raises(CacheIncompleteError, match=r"shard file .* is gone"):
        reader.read([image_id(5)], ["side"])
    store.receipt(2).unlink()
    with pytest.raises(CacheIncompleteError, match=r"receipt .* is gone"):
        reader.read([image_id(9)], ["side"])
    with pytest.raises(CacheIncompleteError, match="FPT_CACHE_DIR"):
        open_store(tmp_path / "elsewhere", receipt)


def test_a_shard_of_another_extraction_is_refused(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    receipt = receipt_of(store)
    store.receipt(1).unlink()
    with claim_shard(store) as shard:
        assert shard == 1
        write_shard(store, shard, [image_id(70)], random_rows(1, seed=9), 1.0)
    with pytest.raises(CacheCorruptError, match="Shard 1"):
        open_store(tmp_path, receipt)
    refresh_index(store)
    with pytest.raises(CacheCorruptError, match="Shard 1"):
        open_store(tmp_path, receipt)


def test_a_store_of_another_spec_is_refused(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    other = SPEC.model_copy(update={"kept": 6, "dtype": "float32"})
    store.path.rename(store_path(tmp_path, other.fingerprint))
    with pytest.raises(CacheMismatchError) as caught:
        create_store(tmp_path, other, 4)
    assert caught.value.differing == {"kept": (6, 5), "dtype": ("float32", "float16")}


def test_two_writers_never_get_one_shard(tmp_path: Path) -> None:
    store = create_store(tmp_path, SPEC, 4)
    with claim_shard(store) as first, claim_shard(store) as second:
        assert (first, second) == (0, 1)
    with claim_shard(store) as again:
        assert again == 0, "the number of a writer that gave up is taken up again"


def test_claims_pass_what_is_finished_without_and_with_a_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path, sizes=(4, 4, 4, 4, 4))
    store.receipt(3).unlink()
    listed = []
    monkeypatch.setattr(Store, "finished_shards", lambda self: listed.append(1) or [0, 1, 2, 4])
    for start, expected in ((0, 3), (3, 3), (4, 5), (100, 100)):
        with claim_shard(store, start) as shard:
            assert shard == expected
    assert not listed, "a million receipts are not listed for every shard"
    monkeypatch.setattr("stages.store.writer.LOOKAHEAD", 2)
    with claim_shard(store) as first, claim_shard(store) as second:
        assert (first, second) == (3, 5)
    assert len(listed) == 2


def test_a_shard_is_written_without_listing_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path, sizes=(4,))
    monkeypatch.setattr(Path, "glob", lambda *_: pytest.fail("lists a folder that may hold a million files"))
    with claim_shard(store, 1) as shard:
        write_shard(store, shard, [image_id(50)], random_rows(1), 1.0)


def test_growth_that_others_did_waits_for_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path, sizes=(4, 4))
    path = store.group / "side" / "zarr.json"
    metadata = json.loads(path.read_bytes())
    path.write_text(json.dumps({**metadata, "shape": [4, *metadata["shape"][1:]]}))
    grow_store(store, 2)
    assert json.loads(path.read_bytes())["shape"][0] == 8, "one array was shorter than the others"
    monkeypatch.setattr("stages.store.layout.store_lock", lambda _: pytest.fail("takes the lock of all writers"))
    grow_store(store, 2)
    grow_store(store, 1)


def test_arrays_grow_seldom_and_to_a_length_that_no_order_of_writers_changes() -> None:
    ladder = [capacity(shards) for shards in range(1, 20_000)]
    assert ladder[:31] == list(range(1, 32)), "a small study has no empty rows"
    assert all(shards <= room <= shards * 17 / 16 for shards, room in enumerate(ladder, 1))
    assert ladder == sorted(ladder) and len(set(ladder)) < 250
    assert all(capacity(room) == room for room in ladder)


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, sizes=(4,))
    for name in ("keys", "side"):
        store.shard_file(name, 1).write_bytes(b"half a shard")
        store.shard_file(name, 1).with_suffix(".1234.partial").write_bytes(b"less")
    (store.group / "values" / "zarr.1234.partial").write_bytes(b"half the metadata of a longer array")
    (store.path / "locks" / "000001.lock").touch()  # the system frees the lock of a killed writer, its file stays
    rows = random_rows(2, seed=5)
    with claim_shard(store) as shard:
        write_shard(store, shard, [image_id(50), image_id(51)], rows, 1.0)
    assert not list(store.group.rglob("*.partial"))
    found = open_store(tmp_path, receipt_of(store)).read([image_id(51)], ["keys"])
    assert np.array_equal(found["keys"][0], rows["keys"][1])


def test_a_full_disk_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path, sizes=(4,))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.store.writer.atomic_write", full)
    with claim_shard(store) as shard, pytest.raises(StorageError, match="full"):
        write_shard(store, shard, [image_id(60)], random_rows(1), 1.0)
    assert store.finished_shards() == [0]
    assert not list(store.group.rglob("c.1.*"))


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = create_store(tmp_path, SPEC, 4)
    rows = random_rows(2)
    rows["values"] = rows["values"].astype(np.float32)
    with claim_shard(store) as shard, pytest.raises(ValueError, match="values"):
        write_shard(store, shard, [image_id(1), image_id(2)], rows, 1.0)
    assert store.finished_shards() == []
