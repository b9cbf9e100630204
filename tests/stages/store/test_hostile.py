"""Stores that are damaged on purpose or by accident: refused with a message, without waiting, with nothing left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import SPEC, filled, image_id, receipt_of
from web import SECRET, refusing_ftp

from schemas.errors import CacheCorruptError, CacheIncompleteError, FptError, TransferError
from stages.extract.plan import take_inventory
from stages.store.index import index_path, refresh_index
from stages.store.layout import Store, create_store, open_store_layout
from stages.store.manage.inventory import find_stores, list_stores
from stages.store.manage.transfer import pull, push, require_arrival
from stages.store.manage.verify import repair_store, verify_store
from stages.store.reader import open_store
from stages.store.remote import open_remote, remote_stores
from stages.store.remote_rows import open_remote_rows

pytestmark = pytest.mark.timeout(60)


def described(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the attributes of the group."""
    path = store.group / "zarr.json"
    content = json.loads(path.read_bytes())
    change(content["attributes"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("size", [-1, 0, 10**9, 4097, 2.5, "4", None, True, [4]])
def test_a_store_with_an_impossible_shard_size_is_not_pulled(tmp_path: Path, size: object) -> None:
    store, _ = filled(tmp_path / "there")
    described(store, lambda attributes: attributes.update(shard_size=size))
    (offered,) = remote_stores(open_remote(str(tmp_path / "there")))
    with pytest.raises(CacheCorruptError, match="shard_size"):
        pull(offered, tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("size", [-1, 10**9, "4"])
def test_a_local_store_with_an_impossible_shard_size_is_refused_and_repaired(tmp_path: Path, size: object) -> None:
    store, _ = filled(tmp_path)
    receipt = receipt_of(store)
    described(store, lambda attributes: attributes.update(shard_size=size))
    for use in (lambda: create_store(tmp_path, SPEC, 4), lambda: open_store(tmp_path, receipt)):
        with pytest.raises(CacheCorruptError, match="fpt cache verify --repair"):
            use()
    (found,) = find_stores(tmp_path)
    assert found.store is not None
    result = verify_store(found.store)
    assert [damage.kind for damage in result.damages] == ["metadata"]
    repair_store(found.store, result)
    assert create_store(tmp_path, SPEC, 4) == store
    assert open_store(tmp_path, receipt).read([image_id(3)], ["keys"])


@pytest.mark.parametrize(
    "change",
    [{"kept": 10**9}, {"kept": 0}, {"side_image_size": 10**7}, {"layers": [1, 10**6]}, {"layers": [3, 1]},
     {"layers": []}, {"layers": [], "kept": 0, "pooled": False}, {"lpm": {"heads": 0}}, {"lpm": {"patch": 0}},
     {"lpm": {"width": 2**40}}],
)  # fmt: skip
def test_a_spec_that_cannot_be_is_not_pulled(tmp_path: Path, change: dict[str, Any]) -> None:
    lpm = SPEC.lpm.model_copy(update=change.pop("lpm", {}))
    spec = SPEC.model_copy(update={**change, "lpm": lpm, "layers": tuple(change.get("layers", SPEC.layers))})
    store, _ = filled(tmp_path / "there")
    described(store, lambda a: a.update(spec=spec.model_dump(mode="json"), fingerprint=spec.fingerprint))
    store.path.rename(store.path.with_name(spec.fingerprint[:16]))
    (offered,) = remote_stores(open_remote(str(tmp_path / "there")))
    with pytest.raises(CacheCorruptError, match="describes itself wrongly"):
        pull(offered, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert [found.store for found in find_stores(tmp_path / "there")] == [None]


RECEIPTS: list[Callable[[dict[str, Any]], object]] = [
    lambda r: r["files"]["keys"].update(bytes=10**15),
    lambda r: r["files"]["keys"].update(bytes=-1),
    lambda r: r["files"].pop("keys"),
    lambda r: r.update(rows=[]),
    lambda r: r.update(rows=[*r["rows"], image_id(80)], crc32c=None),
    lambda r: r.update(fingerprint="0" * 64),
    lambda r: r.update(shard=2**40),
    lambda r: r.update(more=1),
]


@pytest.mark.parametrize("change", RECEIPTS)
def test_receipts_that_cannot_be_are_named_and_leave_nothing(tmp_path: Path, change: Callable[[Any], object]) -> None:
    store, _ = filled(tmp_path / "there")
    for shard in (0, 1, 2):
        content = json.loads(store.receipt(shard).read_bytes())
        change(content)
        name = f"{content.get('shard', shard) if shard == 0 else shard:06d}.json"
        store.receipt(shard).unlink()
        (store.receipts / name).write_text(json.dumps(content))
    result = pull(remote_stores(open_remote(str(tmp_path / "there")))[0], tmp_path / "here")
    assert len(result.failures) == 3
    with pytest.raises(TransferError, match=r"000001.json: it is damaged there"):
        require_arrival([result], "there")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("file", ["keys", "sha256", "receipt", "index", "zarr.json", "keys/zarr.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_entries_that_are_no_files_are_refused_without_waiting(tmp_path: Path, file: str, kind: str) -> None:
    store, _ = filled(tmp_path / "a")
    receipt = receipt_of(store)
    refresh_index(store)
    places = {
        "receipt": store.receipt(1), "index": index_path(store), "zarr.json": store.group / "zarr.json",
        "keys/zarr.json": store.group / "keys/zarr.json",
    }  # fmt: skip
    place = places[file] if file in places else store.shard_file(file, 1)
    place.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](place)
    refused = 0
    for use in (
        lambda: open_store(tmp_path / "a", receipt).read([image_id(6)], ["keys"]),
        lambda: open_remote_rows(f"file://{tmp_path}/a", receipt).require_complete(),
        lambda: create_store(tmp_path / "a", SPEC, 4),
        lambda: take_inventory(store),
        lambda: list_stores(tmp_path / "a"),
        lambda: verify_store(store),
        lambda: require_arrival([pull(s, tmp_path / "b") for s in remote_stores(open_remote(f"{tmp_path}/a"))], "a"),
        lambda: require_arrival([push(store, open_remote(str(tmp_path / "c")))], "c"),
        lambda: require_arrival([push(store, open_remote("memory://hostile"))], "m"),
    ):  # fmt: skip
        try:
            use()
        except FptError:
            refused += 1
    assert refused or file == "index"
    if file == "index":
        assert open_store(tmp_path / "a", receipt).read([image_id(6)], ["keys"]), "made again from the receipts"


def test_a_lost_description_is_written_again(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    before = (store.group / "zarr.json").read_bytes()
    (store.group / "zarr.json").unlink()
    assert create_store(tmp_path, SPEC, 8) == store
    assert (store.group / "zarr.json").read_bytes() == before
    assert verify_store(store).damages == ()
    for path in store.group.rglob("zarr.json"):
        path.unlink()
    with pytest.raises(CacheCorruptError, match="is gone"):
        create_store(tmp_path, SPEC, 8)


def test_a_fifo_in_a_remote_folder_stops_no_push_there(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, open_remote(str(tmp_path / "there")))
    there = open_store_layout(tmp_path / "there", SPEC)
    for place in (there.receipt(0), there.shard_file("keys", 1)):
        place.unlink()
        os.mkfifo(place)
    assert push(store, open_remote(str(tmp_path / "there"))).failures == ()
    assert verify_store(there).rows == 11


@pytest.mark.parametrize(
    ("greeting", "reply"),
    [
        (b"220 hello\r\n", f"530 {SECRET} is not your password\r\n".encode()),
        (b"220 hello\r\n", b"421 too busy\r\n"),
        (b"220 hello\r\n", b"\xff\xfe nonsense\r\n"),
        (b"421 go away\r\n", b""),
        (b"", b""),
    ],
)
def test_a_host_that_refuses_is_a_transfer_error_without_secrets(greeting: bytes, reply: bytes) -> None:
    with refusing_ftp(greeting, reply) as url, pytest.raises(TransferError) as caught:
        open_remote(url)
    assert SECRET not in str(caught.value)
    assert "cannot be" in str(caught.value)
    assert "me:***@127.0.0.1" in str(caught.value)


def test_a_host_that_is_not_there_is_a_transfer_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransferError, match="cannot be used"):
        open_remote("ftp://127.0.0.1:1/caches")


def test_receipts_that_cannot_be_fetched_are_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path / "a")
    remote = open_remote("memory://hostile/receipts")
    push(store, remote)
    (offered,) = remote_stores(remote)
    whole = remote.fs.cat_file

    def refuses(path: str, *words: Any, **more: Any) -> bytes:
        if path.endswith("000001.json"):
            raise EOFError("connection lost")
        return whole(path, *words, **more)

    monkeypatch.setattr(remote.fs, "cat_file", refuses)
    with pytest.raises(TransferError, match="connection lost"):
        pull(offered, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(CacheIncompleteError):
        open_store(tmp_path / "b", receipt_of(store))
