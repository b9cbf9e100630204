"""Push and pull: what arrives is what was sent, and whatever stops a transfer, the store stays consistent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from stores import SPEC, filled, image_id, random_rows, receipt_of

from schemas.errors import CacheMismatchError, TransferError
from stages.store.layout import Store, create_store, open_store_layout
from stages.store.manage import transfer
from stages.store.manage.transfer import pull, push, require_arrival
from stages.store.manage.verify import verify_store
from stages.store.reader import open_store
from stages.store.remote import Remote, RemoteStore, open_remote, remote_stores
from stages.store.writer import claim_shard, write_shard

URL = "memory://caches/mine"


@pytest.fixture(params=["memory", "file", "folder"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    """An empty place to push to: by URL, by file URL, by path."""
    places = {"memory": URL, "file": f"file://{tmp_path}/there", "folder": str(tmp_path / "there")}
    yield open_remote(places[request.param])
    _forget()


@pytest.fixture
def memory() -> Iterator[Remote]:
    yield open_remote(URL)
    _forget()


def _forget() -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def offered(remote: Remote) -> RemoteStore:
    (store,) = remote_stores(remote)
    return store


def row(store: Store, number: int) -> np.ndarray[Any, Any]:
    return open_store(store.path.parent, receipt_of(store)).read([image_id(number)], ["keys"])["keys"][0]


def spoil(remote: Remote, file: str) -> None:
    """Change a byte of a file on the other side."""
    (path,) = remote.fs.glob(f"{remote.root}/*/{file}")
    content = bytearray(remote.fs.cat_file(path))
    content[40] ^= 1
    remote.fs.pipe_file(path, bytes(content))


def test_a_store_goes_there_and_back(tmp_path: Path, remote: Remote) -> None:
    store, rows = filled(tmp_path / "a")
    steps: list[tuple[int, int]] = []
    there = push(store, remote, lambda done, total: steps.append((done, total)))
    assert (there.copied, there.renumbered, there.present, there.failures) == (3, 0, 0, ())
    assert steps[-1] == (3, 3)
    back = pull(offered(remote), tmp_path / "b")
    assert (back.copied, back.bytes) == (3, there.bytes)
    copy = open_store_layout(tmp_path / "b", SPEC)
    assert verify_store(copy).damages == ()
    assert receipt_of(copy) == receipt_of(store), "a study's receipt holds on both machines"
    for number in (1, 6, 11):
        assert np.array_equal(row(copy, number), rows["keys"][number - 1])


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_a_compressed_store_goes_there_and_back(tmp_path: Path, remote: Remote, codec: str) -> None:
    spec = SPEC.model_copy(update={"codec": codec})
    store, rows = filled(tmp_path / "a", spec=spec)
    assert (push(store, remote).copied, push(store, remote).present) == (3, 3)
    back = pull(offered(remote), tmp_path / "b")
    assert (back.copied, back.failures) == (3, ())
    copy = open_store_layout(tmp_path / "b", spec)
    assert receipt_of(copy) == receipt_of(store)
    for number in (1, 6, 11):
        assert np.array_equal(row(copy, number), rows["keys"][number - 1])


def test_a_second_transfer_copies_only_what_is_new(tmp_path: Path, remote: Remote) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, remote)
    pull(offered(remote), tmp_path / "b")
    with claim_shard(store) as shard:
        write_shard(store, shard, [image_id(90)], random_rows(1), 1.0)
    again = push(store, remote)
    assert (again.copied, again.present) == (1, 3)
    back = pull(offered(remote), tmp_path / "b")
    assert (back.copied, back.present) == (1, 3)
    copy = open_store_layout(tmp_path / "b", SPEC)
    assert verify_store(copy).rows == 12
    assert np.array_equal(row(copy, 90), random_rows(1)["keys"][0])


def test_rows_of_two_machines_meet_under_free_numbers(tmp_path: Path, remote: Remote) -> None:
    store, rows = filled(tmp_path / "a")
    other = create_store(tmp_path / "b", SPEC, 4)
    theirs = random_rows(3, seed=50)
    with claim_shard(other) as shard:
        write_shard(other, shard, [image_id(n) for n in (70, 71, 72)], theirs, 1.0)
    before = receipt_of(other)
    push(store, remote)
    there = push(other, remote)
    assert (there.copied, there.renumbered) == (1, 1)
    back = pull(offered(remote), tmp_path / "b")
    assert (back.copied, back.renumbered, back.present) == (3, 1, 1)
    assert verify_store(other).damages == ()
    assert verify_store(other).rows == 14
    assert open_store(tmp_path / "b", before), "the study that was here first is not disturbed"
    for number in (1, 6, 11):
        assert np.array_equal(row(other, number), rows["keys"][number - 1])
    pull(offered(remote), tmp_path / "c")
    copy = open_store_layout(tmp_path / "c", SPEC)
    assert np.array_equal(row(copy, 71), theirs["keys"][1])
    assert push(other, remote).copied == 0
    assert pull(offered(remote), tmp_path / "b").copied == 0


def test_a_shard_that_is_damaged_there_is_left_out_and_named(tmp_path: Path, remote: Remote) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, remote)
    (name,) = {store.shard_file("values", 1).name}
    spoil(remote, f"features.zarr/values/{name}")
    result = pull(offered(remote), tmp_path / "b")
    assert result.copied == 2
    (failure,) = result.failures
    assert failure.startswith("shard 1: its file of values was damaged")
    copy = open_store_layout(tmp_path / "b", SPEC)
    assert copy.finished_shards() == [0, 2]
    with pytest.raises(TransferError, match="1 shard could not be copied"):
        require_arrival([result], "url")
    require_arrival([pull(offered(open_remote(str(tmp_path / "a"))), tmp_path / "b")], "url")
    assert verify_store(copy).rows == 11
    assert verify_store(copy).damages == ()


def test_a_receipt_that_names_other_rows_does_not_arrive(tmp_path: Path, remote: Remote) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, remote)
    (path,) = remote.fs.glob(f"{remote.root}/*/receipts/000001.json")
    content = remote.fs.cat_file(path).decode()
    remote.fs.pipe_file(path, content.replace(image_id(6), image_id(99)).encode())
    result = pull(offered(remote), tmp_path / "b")
    assert (result.copied, len(result.failures)) == (2, 1)


def test_damage_here_is_not_pushed(tmp_path: Path, memory: Remote) -> None:
    store, _ = filled(tmp_path / "a")
    path = store.shard_file("side", 2)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    result = push(store, memory)
    assert result.copied == 2
    assert "damaged here" in result.failures[0]
    assert sorted(offered(memory).receipts()) == [0, 1]


def test_damage_here_is_replaced_by_a_pull(tmp_path: Path, remote: Remote) -> None:
    store, rows = filled(tmp_path / "a")
    push(store, remote)
    path = store.shard_file("side", 1)
    path.write_bytes(path.read_bytes()[:-1])
    result = pull(offered(remote), tmp_path / "a")
    assert (result.copied, result.renumbered, result.present) == (1, 0, 2)
    assert verify_store(store).damages == ()
    assert np.array_equal(row(store, 6), rows["keys"][5])


def test_a_file_that_was_left_in_the_right_length_is_not_believed(tmp_path: Path, memory: Remote) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, memory)
    copy = create_store(tmp_path / "b", SPEC, 4)
    for array, byte in (("keys", b"!"), ("side", b"")):
        good = store.shard_file(array, 1).read_bytes()
        copy.shard_file(array, 1).write_bytes(byte + good[len(byte) :])
    expected = sum(path.stat().st_size for path in store.group.glob("*/c.*"))
    result = pull(offered(memory), tmp_path / "b")
    assert result.failures == ()
    assert result.bytes == expected - store.shard_file("side", 1).stat().st_size, "what was right is kept"
    assert verify_store(copy).damages == ()


@pytest.mark.parametrize("after", [0, 1, 8, 17])
def test_an_interrupted_pull_leaves_a_consistent_store_and_goes_on(
    tmp_path: Path, memory: Remote, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, memory)
    copies, real = [0], transfer.copy

    def breaks(source: Any, target: Any, length: int) -> Any:
        copies[0] += 1
        if copies[0] > after:
            target.write(source.read(50))
            raise OSError("connection lost")
        return real(source, target, length)

    monkeypatch.setattr(transfer, "copy", breaks)
    with pytest.raises(TransferError, match="same command again"):
        pull(offered(memory), tmp_path / "b")
    copy = open_store_layout(tmp_path / "b", SPEC)
    assert {damage.kind for damage in verify_store(copy).damages} <= {"foreign"}
    assert len(copy.finished_shards()) == after // 6
    monkeypatch.setattr(transfer, "copy", real)
    rest = pull(offered(memory), tmp_path / "b")
    assert rest.present == after // 6
    assert rest.bytes < sum(path.stat().st_size for path in store.group.glob("*/c.*")) or after == 0
    assert verify_store(copy).damages == ()
    assert receipt_of(copy) == receipt_of(store)


@pytest.mark.parametrize("after", [0, 8, 17])
def test_an_interrupted_push_is_never_taken_for_complete(
    tmp_path: Path, memory: Remote, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store, _ = filled(tmp_path / "a")
    copies, real = [0], transfer.copy

    def breaks(source: Any, target: Any, length: int) -> Any:
        copies[0] += 1
        if copies[0] > after:
            raise OSError("connection lost")
        return real(source, target, length)

    monkeypatch.setattr(transfer, "copy", breaks)
    with pytest.raises(TransferError):
        push(store, memory)
    assert len(offered(memory).receipts()) == after // 6
    monkeypatch.setattr(transfer, "copy", real)
    early = pull(offered(memory), tmp_path / "early")
    assert (early.copied, early.failures) == (after // 6, ())
    assert push(store, memory).present == after // 6
    pull(offered(memory), tmp_path / "b")
    assert verify_store(open_store_layout(tmp_path / "b", SPEC)).rows == 11


@pytest.mark.parametrize("same", [True, False])
def test_two_pushes_at_once_do_not_mix_their_shards(
    tmp_path: Path, memory: Remote, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """The second starts on another machine in the middle of the first, with shards of the same number and length."""
    store, _ = filled(tmp_path / "a")
    other = create_store(tmp_path / "b", SPEC, 4)
    theirs = random_rows(4, seed=50)
    with claim_shard(other) as shard:
        write_shard(other, shard, [image_id(n) for n in (70, 71, 72, 73)], theirs, 1.0)
    second, real = store if same else other, transfer.copy
    started, refused = [False], list[TransferError]()

    def interrupted(source: Any, target: Any, length: int) -> Any:
        if not started[0]:
            started[0] = True
            with monkeypatch.context() as elsewhere, pytest.raises(TransferError) as caught:
                elsewhere.setattr("platform.node", lambda: "another machine")
                push(second, memory)
            refused.append(caught.value)
        return real(source, target, length)

    monkeypatch.setattr(transfer, "copy", interrupted)
    assert push(store, memory).copied == 3
    assert "Another push" in str(refused[0])
    assert "delete its note" in str(refused[0])
    assert push(second, memory).failures == (), "the note goes with its push"
    assert pull(offered(memory), tmp_path / "c").failures == ()


def test_the_note_of_a_killed_push_does_not_stop_the_next_one_here(
    tmp_path: Path, memory: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path / "a")
    notes = f"{memory.root}/{SPEC.fingerprint[:16]}/locks"
    for removed in ("claimed by this machine", "claimed by another"):
        with monkeypatch.context() as dead:
            dead.setattr("os.getpid", lambda: 2**22 + 5)  # above the largest process number
            if "another" in removed:
                dead.setattr("platform.node", lambda: "another machine")
            dead.setattr(memory.fs, "rm", lambda _: 1 / 0)  # the connection is gone
            push(store, memory)
        (note,) = memory.fs.ls(notes, detail=False)
        if "another" in removed:
            with pytest.raises(TransferError, match=note):
                push(store, memory)
            memory.fs.rm(note)
        assert push(store, memory).present == 3
        assert memory.fs.ls(notes, detail=False) == []


def test_bytes_that_change_on_the_way_there_are_noticed(
    tmp_path: Path, memory: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path / "a", sizes=(4,))
    real = transfer.copy

    def loses(source: Any, target: Any, length: int) -> Any:
        sent = real(source, target, length)
        target.write(b"!")
        return sent

    monkeypatch.setattr(transfer, "copy", loses)
    result = push(store, memory)
    assert result.copied == 0
    assert "arrived damaged" in result.failures[0]
    assert offered(memory).receipts() == {}


def test_stores_of_other_shard_sizes_are_not_mixed(tmp_path: Path, remote: Remote) -> None:
    store, _ = filled(tmp_path / "a")
    push(store, remote)
    other, _ = filled(tmp_path / "b", sizes=(2,), shard_size=2)
    with pytest.raises(CacheMismatchError, match="shard_size: expected 4, found 2"):
        pull(offered(remote), tmp_path / "b")
    with pytest.raises(CacheMismatchError, match="shard_size"):
        push(other, remote)


def test_places_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="nothing"):
        open_remote("nothing://here")
    assert remote_stores(open_remote(str(tmp_path / "none"))) == []
    (tmp_path / "strange").mkdir()
    (tmp_path / ("0" * 16) / "features.zarr").mkdir(parents=True)
    (tmp_path / ("0" * 16) / "features.zarr" / "zarr.json").write_text("{}")
    assert remote_stores(open_remote(str(tmp_path))) == []
