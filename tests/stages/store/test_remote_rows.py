"""A store behind a URL, read in place: the rows of the local one, or an error that names the problem."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from stores import SPEC, filled, image_id, receipt_of
from web import served

from schemas.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, FptError, TransferError
from schemas.features import ExtractionReceipt, ShardReceipt
from schemas.machine import StoreSettings
from stages.store.layout import Store, create_store
from stages.store.manage.transfer import push
from stages.store.memory_rows import MemoryRows, plan_memory
from stages.store.reader import StoreReader, open_store
from stages.store.remote import Remote, open_remote
from stages.store.remote_rows import RemoteRows, open_remote_rows, open_rows

NAMES = ("keys", "values", "side")


@dataclass
class There:
    """A store that was pushed to a place, which is read by URL."""

    url: str
    files: Remote
    """The same place, to change files in it."""
    store: Store
    """Where it was pushed from."""
    rows: dict[str, Any]
    receipt: ExtractionReceipt

    def path(self, file: str) -> str:
        return f"{self.files.root}/{SPEC.fingerprint[:16]}/{file}"

    def change(self, file: str, change: Callable[[bytes], bytes]) -> None:
        place = self.path(file)
        self.files.fs.pipe_file(place, change(self.files.fs.cat_file(place)))

    def open(self) -> StoreReader:
        return open_remote_rows(self.url, self.receipt)


@pytest.fixture(params=["memory", "http"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[There]:
    store, rows = filled(tmp_path / "a")
    if request.param == "memory":
        fs = fsspec.filesystem("memory")
        remote = open_remote("memory://caches/mine")
        push(store, remote)
        yield There(remote.url, remote, store, rows, receipt_of(store))
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]
        return
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    remote = open_remote(str(tmp_path / "there"))
    push(store, remote)
    with served(tmp_path / "there") as (url, _):
        yield There(url, remote, store, rows, receipt_of(store))


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_rows_are_those_of_the_local_store(there: There) -> None:
    reader = there.open()
    assert isinstance(reader, RemoteRows)
    reader.require_complete()
    assert len(reader) == 11
    assert image_id(7) in reader
    assert reader.missing([image_id(3), image_id(12)]) == [image_id(12)]
    wanted = [image_id(number) for number in (11, 2, 7, 2, 1)]
    got = reader.read(wanted, reader.layouts)
    for name, expected in open_store(there.store.path.parent, there.receipt).read(wanted, reader.layouts).items():
        assert got[name].dtype == expected.dtype
        assert np.array_equal(got[name], expected), name
    buffers = {name: np.zeros((4, *reader.layouts[name].shape), reader.layouts[name].dtype) for name in NAMES}
    again = reader.read(wanted[:2], NAMES, buffers)
    assert all(np.shares_memory(again[name], buffers[name]) for name in NAMES)
    assert np.array_equal(buffers["keys"][:2], there.rows["keys"][[10, 1]])
    assert reader.read([], NAMES)["keys"].shape[0] == 0
    reader.close()


def test_a_file_url_reads_like_a_folder(tmp_path: Path) -> None:
    store, rows = filled(tmp_path / "a")
    push(store, open_remote(f"file://{tmp_path}/there"))
    for url in (f"file://{tmp_path}/there", str(tmp_path / "there")):
        reader = open_remote_rows(url, receipt_of(store))
        assert reader.direct
        assert reader.url is None
        assert np.array_equal(reader.read([image_id(6)], ["keys"])["keys"][0], rows["keys"][5])


def test_a_copy_reads_on_in_another_process(there: There) -> None:
    reader = there.open()
    before = reader.read([image_id(4)], NAMES)
    copy = pickle.loads(pickle.dumps(reader))
    rows = reader.locate([image_id(4), image_id(9)])
    after = copy.read_rows(rows, [image_id(4), image_id(9)], NAMES)
    assert np.array_equal(after["keys"][0], before["keys"][0])
    assert np.array_equal(after["keys"][1], there.rows["keys"][8])


def test_what_fits_is_held_and_then_nothing_is_fetched(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    store, rows = filled(tmp_path / "a")
    ids = [image_id(number) for number in (11, 2, 7, 1)]
    with served(tmp_path / "a") as (url, asked):
        reader = open_remote_rows(url, receipt_of(store))
        decision = plan_memory(reader, ids, NAMES, StoreSettings(memory_budget="1GB"))
        assert decision.held
        assert decision.remote == f"{url}/{SPEC.fingerprint[:16]}"
        held = MemoryRows(reader, ids, NAMES)
        before = len(asked)
        assert before
        assert np.array_equal(held.read_rows(held.locate(ids), ids, NAMES)["keys"], rows["keys"][[10, 1, 6, 0]])
        assert len(asked) == before
        assert not plan_memory(reader, ids, NAMES, StoreSettings(memory_budget=0)).held


@pytest.mark.parametrize("place", ["first row", "index"])
def test_a_flipped_byte_is_found(there: There, place: str) -> None:
    file = f"features.zarr/values/{there.store.shard_file('values', 1).name}"
    there.change(file, flipped(40 if place == "first row" else -30))
    reader = there.open()
    reader.require_complete()  # The length is right.
    with pytest.raises(CacheCorruptError, match=r"features.zarr/values cannot be read") as caught:
        reader.read([image_id(5)], NAMES)
    assert "fpt cache push" in str(caught.value)
    assert np.array_equal(reader.read([image_id(1)], NAMES)["keys"][0], there.rows["keys"][0])


def test_a_short_file_is_found_by_its_length(there: There) -> None:
    there.change(f"features.zarr/side/{there.store.shard_file('side', 2).name}", lambda content: content[:-1])
    with pytest.raises(CacheCorruptError, match="bytes instead of"):
        there.open().require_complete()
    with pytest.raises(CacheCorruptError, match="bytes instead of"):
        there.open().read([image_id(9)], ["keys"])
    there.open().read([image_id(5)], ["keys"])


@pytest.mark.parametrize("array", ["keys", "sha256"])
def test_a_missing_shard_is_no_row_of_zeros(there: There, array: str) -> None:
    file = there.store.shard_file(array, 1).name
    there.files.fs.rm(there.path(f"features.zarr/{array}/{file}"))
    with pytest.raises(CacheIncompleteError, match=re.escape(file)):
        there.open().require_complete()
    with pytest.raises(CacheIncompleteError, match=re.escape(file)):
        there.open().read([image_id(5)], ["keys"])


def test_a_shard_that_goes_after_it_was_compared_is_an_error(there: There) -> None:
    reader = there.open()
    reader.require_complete()
    there.files.fs.rm(there.path(f"features.zarr/keys/{there.store.shard_file('keys', 1).name}"))
    with pytest.raises(CacheIncompleteError, match="never written"):
        reader.read([image_id(5)], ["keys"])


def test_shards_that_changed_places_are_not_mistaken(there: There) -> None:
    names = [f"features.zarr/sha256/{there.store.shard_file('sha256', shard).name}" for shard in (0, 1)]
    first, second = (there.files.fs.cat_file(there.path(name)) for name in names)
    there.change(names[0], lambda _: second)
    there.change(names[1], lambda _: first)
    with pytest.raises(CacheCorruptError, match="does not match its receipt"):
        there.open().read([image_id(5)], ["keys"])


def test_receipts_are_compared(there: There) -> None:
    def other(content: bytes) -> bytes:
        receipt = ShardReceipt.model_validate_json(content)
        rows = (image_id(70), *receipt.rows[1:])
        return receipt.model_copy(update={"rows": rows}).model_dump_json().encode()

    there.change("receipts/000001.json", other)
    with pytest.raises(CacheCorruptError, match=r"Shard 1 of .* is not the one that this study"):
        there.open()
    there.change("receipts/000001.json", lambda content: content[:50])
    with pytest.raises(CacheCorruptError, match=r"000001.json is damaged"):
        there.open()
    there.files.fs.rm(there.path("receipts/000001.json"))
    with pytest.raises(CacheIncompleteError, match=r"000001.json is gone"):
        there.open()


def test_a_store_of_other_features_is_refused(there: There) -> None:
    old, new = b'"importance": "global"', b'"importance": "class_token"'
    there.change("features.zarr/zarr.json", lambda content: content.replace(old, new))
    with pytest.raises(CacheMismatchError, match="importance: expected 'global', found 'class_token'"):
        there.open()
    there.change("features.zarr/zarr.json", lambda content: content[:100])
    with pytest.raises(CacheCorruptError, match="does not describe itself"):
        there.open()


def test_damaged_metadata_of_an_array_is_an_error(there: There) -> None:
    there.change("features.zarr/keys/zarr.json", lambda content: content[:100])
    with pytest.raises(CacheCorruptError, match=r"features.zarr/keys cannot be read"):
        there.open().read([image_id(5)], ["keys"])


def test_an_empty_place_is_named(there: There) -> None:
    with pytest.raises(CacheIncompleteError, match=r"no feature store .* at .*elsewhere"):
        open_remote_rows(f"{there.url}/elsewhere", there.receipt)


def test_a_server_that_cannot_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    store, _ = filled(tmp_path / "a")
    receipt = receipt_of(store)
    with served(tmp_path / "a") as (url, _):
        reader, fresh = open_remote_rows(url, receipt), open_remote_rows(url, receipt)
        reader.read([image_id(1)], ["keys"])
    with pytest.raises(TransferError, match="cannot be used"):
        open_remote_rows(url, receipt)
    with pytest.raises(TransferError, match="cannot be used"):
        fresh.require_complete()
    with pytest.raises(TransferError, match="cannot be used"):
        reader.read([image_id(2)], ["keys"])
    with pytest.raises(TransferError, match="nothing"):
        open_remote_rows("nothing://here", receipt)


def test_a_server_without_range_requests_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    store, _ = filled(tmp_path / "a")
    with served(tmp_path / "a", ranges=False) as (url, _), pytest.raises(TransferError, match="range requests"):
        open_remote_rows(url, receipt_of(store))


def test_the_local_store_comes_first(there: There, tmp_path: Path) -> None:
    root = there.store.path.parent
    assert open_rows(root, there.receipt, "nothing://here").direct
    shutil.rmtree(there.store.path)
    with pytest.raises(FptError, match=r"store\.remote") as caught:
        open_rows(root, there.receipt)
    assert isinstance(caught.value, CacheIncompleteError)
    assert "fpt cache pull" in str(caught.value)
    assert isinstance(open_rows(root, there.receipt, there.url), RemoteRows)
    create_store(tmp_path / "a", SPEC, 4)  # The store is there, but not the shards of this study.
    assert isinstance(open_rows(root, there.receipt, there.url), RemoteRows)
