"""Shard files of one array have equal lengths and indices: an exchanged or copied one is noticed by its rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from stores import SPEC, filled, image_id, receipt_of
from study import Study

from schemas.errors import CacheCorruptError
from schemas.features import ShardReceipt
from stages.extract.plan import take_inventory
from stages.store.checksums import exchanged_shards
from stages.store.layout import Store, open_store_layout
from stages.store.manage.transfer import pull, push
from stages.store.manage.verify import verify_store
from stages.store.memory_rows import MemoryRows
from stages.store.reader import open_store
from stages.store.remote import open_remote, remote_stores
from stages.store.remote_rows import open_remote_rows

ARRAYS = ("keys", "values", "indices", "pooled", "side")
NOT_THE_ROW = "does not match its receipt"


def exchange(store: Store, array: str, first: int = 0, second: int = 1) -> None:
    """Two shard files of one array change places; nothing but their content differs."""
    one, other = store.shard_file(array, first), store.shard_file(array, second)
    assert one.stat().st_size == other.stat().st_size or store.spec.codec != "none"
    content, theirs = one.read_bytes(), other.read_bytes()
    assert content != theirs
    one.write_bytes(theirs)
    other.write_bytes(content)


def without_checksums(store: Store) -> None:
    """Receipts as earlier versions wrote them."""
    for shard in store.finished_shards():
        path = store.receipt(shard)
        path.write_bytes(
            ShardReceipt.model_validate_json(path.read_bytes()).model_copy(update={"crc32c": None}).to_json()
        )


def expect_lengths(store: Store, array: str) -> None:
    """Receipts expect the lengths that the files of an array have now."""
    for shard in store.finished_shards():
        written = ShardReceipt.model_validate_json(store.receipt(shard).read_bytes())
        length = store.shard_file(array, shard).stat().st_size
        files = {**written.files, array: written.files[array].model_copy(update={"bytes": length})}
        store.receipt(shard).write_bytes(written.model_copy(update={"files": files}).to_json())


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_every_exchanged_array_is_refused_by_a_read(tmp_path: Path, dtype: str) -> None:
    spec = SPEC.model_copy(update={"dtype": dtype})
    store, rows = filled(tmp_path, spec=spec)
    receipt = receipt_of(store)
    for array in store.layouts:
        exchange(store, array)
        assert exchanged_shards(store, [0, 1, 2]) == [0, 1]
        reader = open_store(tmp_path, receipt)
        reader.require_complete()
        if array != "sha256":
            for number in (2, 3, 4, 6, 7, 8):  # The keys of rows 1 and 5 are equal: all zeros.
                with pytest.raises(CacheCorruptError, match=NOT_THE_ROW):
                    reader.read([image_id(number)], [array])
            with pytest.raises(CacheCorruptError, match=NOT_THE_ROW):
                MemoryRows(open_store(tmp_path, receipt), [image_id(9), image_id(2)], [array])
        assert np.array_equal(reader.read([image_id(9)], ["side"])["side"][0], rows["side"][8])
        exchange(store, array)
    assert exchanged_shards(store, [0, 1, 2]) == []
    assert verify_store(store).damages == ()


@pytest.mark.parametrize("layout", ["compressed", "chunks per layer", "no shards"])
def test_other_layouts_are_compared_row_by_row(tmp_path: Path, layout: str) -> None:
    spec = SPEC.model_copy(update={"codec": "zstd"}) if layout == "compressed" else SPEC
    store, rows = filled(tmp_path, sizes=(4, 4), spec=spec)
    receipt = receipt_of(store)
    values = store.layouts["values"]
    if layout != "compressed":
        group: Any = zarr.open_group(store.group, mode="r+")
        shards = {} if layout == "no shards" else {"shards": (4, *values.shape)}
        chunks = (4, *values.shape) if layout == "no shards" else (1, 1, *values.shape[1:])
        array = group.create_array(
            "values", shape=(8, *values.shape), chunks=chunks, dtype=values.dtype,
            compressors=[zarr.codecs.Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."}, filters=None, overwrite=True, **shards,
            config={"write_empty_chunks": True},
        )  # fmt: skip
        array[:] = rows["values"]
        expect_lengths(store, "values")
        receipt = receipt_of(store)
    assert np.array_equal(open_store(tmp_path, receipt).read([image_id(7)], ["values"])["values"][0], rows["values"][6])
    assert exchanged_shards(store, [0, 1]) == []
    exchange(store, "values")
    expect_lengths(store, "values")  # Compressed files of equal length are rare.
    receipt = receipt_of(store)
    assert exchanged_shards(store, [0, 1]) == [0, 1]
    for number in range(1, 9):
        with pytest.raises(CacheCorruptError, match=NOT_THE_ROW):
            open_store(tmp_path, receipt).read([image_id(number)], ["values"])


def test_exchanged_files_of_a_remote_store_are_refused(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, open_remote("memory://caches/mine"))
    fs = fsspec.filesystem("memory")
    try:
        for array in ARRAYS:
            names = [
                f"/caches/mine/{store.path.name}/features.zarr/{array}/{store.shard_file(array, n).name}"
                for n in (0, 1)
            ]
            one, other = (fs.cat_file(name) for name in names)
            fs.pipe_file(names[0], other)
            fs.pipe_file(names[1], one)
            reader = open_remote_rows("memory://caches/mine", receipt_of(store))
            reader.require_complete()
            with pytest.raises(CacheCorruptError, match=NOT_THE_ROW):
                reader.read([image_id(6)], [array])
        result = pull(remote_stores(open_remote("memory://caches/mine"))[0], tmp_path / "b")
        assert (result.copied, len(result.failures)) == (1, 2)
    finally:
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]


def test_a_pull_replaces_exchanged_files(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = open_store_layout(tmp_path / "b", SPEC)
    exchange(copy, "keys")
    result = pull(remote_stores(open_remote(str(tmp_path / "a")))[0], tmp_path / "b")
    assert (result.copied, result.present, result.failures) == (2, 1, ())
    assert verify_store(copy).damages == ()


def test_receipts_without_checksums_are_read_and_completed_by_verify(tmp_path: Path) -> None:
    store, rows = filled(tmp_path / "a")
    receipt = receipt_of(store)
    before = {shard: store.receipt(shard).read_bytes() for shard in (0, 1, 2)}
    without_checksums(store)
    assert all(store.receipt(shard).read_bytes() != content for shard, content in before.items())
    assert receipt_of(store) == receipt, "the study's receipt holds as before"
    got = open_store(tmp_path / "a", receipt).read([image_id(6)], ["keys"])
    assert np.array_equal(got["keys"][0], rows["keys"][5])
    assert exchanged_shards(store, [0, 1, 2]) == []
    pull(remote_stores(open_remote(str(tmp_path / "a")))[0], tmp_path / "b")
    copy = open_store_layout(tmp_path / "b", SPEC)
    assert {shard: copy.receipt(shard).read_bytes() for shard in (0, 1, 2)} == before, "a copy is completed on arrival"
    result = verify_store(store)
    assert (result.damages, result.completed) == ((), 3)
    assert {shard: store.receipt(shard).read_bytes() for shard in (0, 1, 2)} == before
    assert take_inventory(store).broken == ()
    assert open_store(tmp_path / "a", receipt).read([image_id(6)], ["keys"])
    assert verify_store(store).completed == 0


def test_verify_does_not_complete_what_is_damaged(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    without_checksums(store)
    exchange(store, "side", 0, 1)
    result = verify_store(store)
    assert [damage.kind for damage in result.damages] == ["flipped", "flipped"]
    assert result.completed == 1


def test_wrong_checksums_in_a_receipt_are_damage(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    path = store.receipt(1)
    content = json.loads(path.read_bytes())
    first = content["crc32c"]["keys"][0]
    content["crc32c"]["keys"] = ("0" if first != "0" else "1") + content["crc32c"]["keys"][1:]
    path.write_text(json.dumps(content))
    (damage,) = verify_store(store).damages
    assert (damage.kind, damage.shard) == ("receipt", 1)
    assert "row checksums" in damage.reason


@pytest.mark.parametrize("checksums", [{}, {"keys": "00"}, {"keys": "zz"}])
def test_a_receipt_with_impossible_checksums_is_refused(tmp_path: Path, checksums: dict[str, str]) -> None:
    store, _ = filled(tmp_path)
    content = json.loads(store.receipt(0).read_bytes())
    content["crc32c"] = {**content["crc32c"], **checksums} if checksums else {}
    store.receipt(0).write_text(json.dumps(content))
    with pytest.raises(CacheCorruptError, match="damaged"):
        receipt_of(store)


def _of_study(study: Study) -> Store:
    (path,) = study.cache.iterdir()
    receipt = study.extract()
    assert path.name == receipt.fingerprint[:16]
    return open_store_layout(study.cache, receipt.spec)


@pytest.mark.parametrize("array", ["keys", "side", "sha256"])
def test_extract_computes_exchanged_shards_again(study: Study, array: str) -> None:
    before = study.extract()
    store = _of_study(study)
    exchange(store, array)
    computed: list[int] = []
    again = study.extract(progress=lambda progress: computed.append(progress.total - progress.cached))
    assert computed[0] == 8, "two shards of four images"
    assert again == before
    assert verify_store(store).damages == ()


def test_rows_of_exchanged_files_are_not_copied_into_another_store(study: Study) -> None:
    study.extract()
    exchange(_of_study(study), "keys")
    seen: list[Any] = []
    tell: Callable[[Any], None] = seen.append
    study.settings = study.changed(features={"layers": study.settings.features.layers[-1:]})
    receipt = study.extract(progress=tell)
    assert seen[-1].reused == 24 - 8
    assert verify_store(open_store_layout(study.cache, receipt.spec)).damages == ()
