"""The index of rows: a million rows open without a look at their receipts; receipts stay the truth."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from stores import SPEC, filled, image_id, million, random_rows, receipt_of

from schemas.errors import CacheCorruptError, CacheIncompleteError
from stages.store.index import build_index, index_path, load_index, refresh_index, write_index
from stages.store.layout import array_layouts
from stages.store.reader import open_store
from stages.store.writer import claim_shard, write_shard

OPENED: Counter[str] = Counter()
"""Files opened and folders listed, by what they are; an audit hook stays until the process ends."""
COUNTING = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if COUNTING and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str | os.PathLike):
        path = Path(arguments[0])
        OPENED["receipts" if path.parent.name == "receipts" else path.name if event == "open" else event] += 1


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    if not getattr(sys, "_fpt_hook", False):
        sys.addaudithook(_hook)
        sys._fpt_hook = True  # type: ignore[attr-defined]
    OPENED.clear()
    monkeypatch.setattr(sys.modules[__name__], "COUNTING", True)
    return OPENED


def test_a_million_rows_open_with_a_handful_of_files(tmp_path: Path, opened: Counter[str]) -> None:
    receipt, rows = million(tmp_path)
    opened.clear()
    reader = open_store(tmp_path, receipt)
    assert len(reader) == 1_000_000
    assert opened["receipts"] == opened["os.scandir"] == opened["os.listdir"] == 0
    assert opened["rows.bin"] == 1
    assert sum(opened.values()) <= 2 * (len(array_layouts(SPEC)) + 2)
    opened.clear()
    found = reader.read([image_id(7), image_id(30), image_id(7)], ["keys", "values"])
    assert np.array_equal(found["keys"], rows["keys"][[7, 30, 7]])
    assert dict(opened) == {"receipts": 1, "c.0.0.0.0.0": 2}
    with pytest.raises(CacheIncompleteError, match=r"000001\.json is gone"):
        reader.require_complete()


def test_a_new_shard_is_all_that_is_read_to_extend_the_index(tmp_path: Path, opened: Counter[str]) -> None:
    store, _ = filled(tmp_path)
    first, _ = refresh_index(store)
    with claim_shard(store) as shard:
        write_shard(store, shard, [image_id(80)], random_rows(1, seed=9), 1.0)
    opened.clear()
    second, broken = refresh_index(store)
    assert opened["receipts"] == 1
    assert (len(first), len(second), broken) == (11, 12, ())
    opened.clear()
    assert open_store(tmp_path, receipt_of(store)).missing([image_id(80), image_id(90)]) == [image_id(90)]
    fresh = load_index(store)
    assert fresh is not None
    index_path(store).unlink()
    again, _ = refresh_index(store)
    for field in ("shards", "ids", "places"):
        assert np.array_equal(getattr(again, field), getattr(fresh, field)), field


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    store, rows = filled(tmp_path)
    receipt = receipt_of(store)
    refresh_index(store)
    good = index_path(store).read_bytes()
    for position in range(0, len(good), 37):
        bad = bytearray(good)
        bad[position] ^= 16
        index_path(store).write_bytes(bad)
        assert load_index(store) is None
    index_path(store).write_bytes(good[:-5])
    reader = open_store(tmp_path, receipt)
    assert np.array_equal(reader.read([image_id(11)], ["side"])["side"][0], rows["side"][10])
    assert index_path(store).read_bytes() == good


def test_an_index_that_lies_about_a_row_is_noticed(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    index, _ = refresh_index(store)
    write_index(store, build_index(store, index.shards.copy(), index.ids.copy(), index.places[::-1].copy()))
    with pytest.raises(CacheCorruptError, match="is not the one of image"):
        open_store(tmp_path, receipt_of(store)).read([image_id(1)], ["side"])


def test_an_image_in_two_shards_is_read_from_the_one_of_the_receipt(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, sizes=(2,))
    twin = random_rows(1, seed=77)
    with claim_shard(store) as shard:
        write_shard(store, shard, [image_id(1)], twin, 1.0)
    receipt = receipt_of(store)
    later = receipt.model_copy(update={"shards": {"1": receipt.shards["1"]}})
    reader = open_store(tmp_path, later)
    assert np.array_equal(reader.read([image_id(1)], ["values"])["values"], twin["values"])
    assert (len(reader), reader.missing([image_id(2)])) == (1, [image_id(2)])


def test_a_store_on_a_read_only_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = filled(tmp_path)

    def refuse(*_: object) -> None:
        from schemas.errors import StorageError

        raise StorageError("read-only")

    monkeypatch.setattr("stages.store.index.atomic_write", refuse)
    reader = open_store(tmp_path, receipt_of(store))
    assert np.array_equal(reader.read([image_id(3)], ["keys"])["keys"][0], rows["keys"][2])
    assert not index_path(store).exists()


def replace_arrays(group: Path, **changes: Any) -> None:
    """Rewrite every array of a store with plain zarr, in another layout."""
    old = zarr.open_group(group, mode="r")
    fresh = zarr.create_group(group.with_name("other.zarr"), zarr_format=3, attributes=dict(old.attrs))
    for name in old.array_keys():
        array: Any = old[name]
        chunks = tuple(min(3, length) for length in array.shape)
        made = fresh.create_array(
            name, shape=array.shape, chunks=chunks, dtype=array.dtype, config={"write_empty_chunks": True}, **changes
        )
        made[:] = array[:]
    for path in (group.with_name("other.zarr")).iterdir():
        target = group / path.name
        if path.is_dir():
            (target / "zarr.json").write_bytes((path / "zarr.json").read_bytes())
            if (path / "c").exists():
                (path / "c").rename(target / "c")


def test_another_codec_and_chunking_are_read_through_zarr(tmp_path: Path) -> None:
    store, rows = filled(tmp_path)
    receipt = receipt_of(store)
    assert open_store(tmp_path, receipt).direct
    replace_arrays(store.group, compressors=[zarr.codecs.ZstdCodec(level=1)])
    reader = open_store(tmp_path, receipt)
    assert not reader.direct
    order = [11, 2, 2, 7]
    found = reader.read([image_id(n) for n in order], rows)
    for name, values in rows.items():
        assert np.array_equal(found[name], values[[n - 1 for n in order]]), name
    chunk = next(path for path in (store.group / "keys" / "c").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 255
    chunk.write_bytes(data[:-3])
    with pytest.raises(CacheCorruptError, match="cannot be read"):
        reader.read([image_id(n) for n in range(1, 12)], ["keys"])
    chunk.unlink()
    with pytest.raises(CacheIncompleteError, match="never written"):
        open_store(tmp_path, receipt).read([image_id(n) for n in range(1, 12)], ["keys"])
