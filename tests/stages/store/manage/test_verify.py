"""Verification: every byte that is not what a writer wrote is found, and repair removes just that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stores import SPEC, filled, image_id, random_rows, receipt_of

from schemas.errors import CacheCorruptError
from stages.store.extraction_receipt import write_extraction_receipt
from stages.store.layout import Store, create_store, open_store_layout
from stages.store.manage.usage import live_uses, register_use, study_use
from stages.store.manage.verify import repair_store, verify_store
from stages.store.reader import open_store
from stages.store.writer import claim_shard, write_shard

SECOND = tuple(image_id(number) for number in (5, 6, 7, 8))
"""Rows of shard 1."""


def flip(path: Path, position: int = 40) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap_rows(path: Path) -> None:
    """A receipt that parses and belongs here, but names the rows in another order."""
    receipt = json.loads(path.read_bytes())
    receipt["rows"].reverse()
    path.write_text(json.dumps(receipt))


DAMAGES: dict[str, tuple[str, Callable[[Store], None]]] = {
    "flipped bit": ("flipped", lambda s: flip(s.shard_file("values", 1))),
    "flipped bit in the empty tail": ("flipped", lambda s: flip(s.shard_file("side", 1), -1)),
    "cut off": ("truncated", lambda s: cut(s.shard_file("keys", 1))),
    "gone file": ("missing", lambda s: s.shard_file("pooled", 1).unlink()),
    "unreadable receipt": ("receipt", lambda s: s.receipt(1).write_text("{")),
    "receipt of another shard": ("receipt", lambda s: shutil.copy(s.receipt(0), s.receipt(1)) and None),
    "receipt of other rows": ("receipt", lambda s: swap_rows(s.receipt(1))),
}


@pytest.mark.parametrize("codec", ["none", "zstd", "blosc"])
def test_an_intact_store_has_no_damage(tmp_path: Path, codec: str) -> None:
    store, _ = filled(tmp_path, spec=SPEC.model_copy(update={"codec": codec}))
    seen: list[tuple[int, int]] = []
    result = verify_store(store, progress=lambda done, total: seen.append((done, total)))
    assert (result.shards, result.rows, result.damages, result.images) == (3, 11, (), ())
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_named_and_repaired(tmp_path: Path, name: str, codec: str) -> None:
    store, rows = filled(tmp_path, spec=SPEC.model_copy(update={"codec": codec}))
    kind, harm = DAMAGES[name]
    harm(store)
    result = verify_store(store)
    assert [(damage.kind, damage.shard) for damage in result.damages] == [(kind, 1)]
    assert result.images == SECOND
    assert result.rows == 7
    repair_store(store, result)
    assert store.finished_shards() == [0, 2]
    assert verify_store(store).damages == ()
    found = open_store(tmp_path, receipt_of(store)).read([image_id(11)], ["keys"])
    assert np.array_equal(found["keys"][0], rows["keys"][10])


def test_every_flipped_bit_of_a_shard_and_its_metadata_is_found(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, sizes=(2,), shard_size=2)
    rng = np.random.default_rng(0)
    for name in ("keys", "side", "sha256"):
        path = store.shard_file(name, 0)
        good = path.read_bytes()
        for position in rng.choice(len(good), 5, replace=False):
            flip(path, int(position))
            assert verify_store(store).images == (image_id(1), image_id(2))
            path.write_bytes(good)


def test_an_image_that_another_shard_holds_is_not_lost(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    with claim_shard(store) as shard:
        write_shard(store, shard, [image_id(5), image_id(6)], random_rows(2), 1.0)
    flip(store.shard_file("keys", 1))
    assert verify_store(store).images == (image_id(7), image_id(8))


def test_files_that_no_receipt_names_are_foreign_unless_a_living_writer_holds_them(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    left = store.shard_file("keys", 7)
    left.write_bytes(b"half")
    stranger = store.group / "keys" / "notes.txt"
    stranger.write_text("hello")
    misnamed = store.receipts / "12.json"
    misnamed.write_text("{}")
    with claim_shard(store, 7):
        assert {damage.file for damage in verify_store(store).damages} == {
            "features.zarr/keys/notes.txt",
            "receipts/12.json",
        }
    result = verify_store(store)
    assert {damage.kind for damage in result.damages} == {"foreign"}
    assert {store.path / damage.file for damage in result.damages} == {left, stranger, misnamed}
    assert result.images == ()
    with claim_shard(store, 7):
        repair_store(store, result)
        assert left.exists(), "a writer has taken the number up since"
    repair_store(store, result)
    assert not left.exists()
    assert not stranger.exists()
    assert store.finished_shards() == [0, 1, 2]


@pytest.mark.parametrize("change", [("row", "raw"), ('"shape": [\n    12', '"shape": [\n    8'), ("{", "")])
def test_damaged_metadata_is_found_and_rewritten(tmp_path: Path, change: tuple[str, str]) -> None:
    store, rows = filled(tmp_path)
    path = store.group / "keys" / "zarr.json"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    result = verify_store(store)
    assert [(damage.kind, damage.file) for damage in result.damages] == [("metadata", "features.zarr/keys/zarr.json")]
    assert result.images == ()
    repair_store(store, result)
    assert verify_store(store).damages == ()
    assert json.loads(path.read_text()) == json.loads(text)
    assert len(rows["keys"]) == 11


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_damaged_metadata_of_the_ids_condemns_no_shard(tmp_path: Path, codec: str) -> None:
    store, _ = filled(tmp_path, spec=SPEC.model_copy(update={"codec": codec}))
    (store.group / "sha256" / "zarr.json").write_text("{")
    result = verify_store(store)
    assert [damage.kind for damage in result.damages] == ["metadata"]
    repair_store(store, result)
    assert verify_store(store).damages == ()


def test_a_wrong_shard_size_in_the_group_condemns_no_shard(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    path = store.group / "zarr.json"
    path.write_text(path.read_text().replace('"shard_size": 4', '"shard_size": 5'))
    with pytest.raises(CacheCorruptError, match="fpt cache verify --repair"):
        create_store(tmp_path, SPEC, 4)
    misled = open_store_layout(tmp_path, SPEC)
    assert misled.shard_size == 5
    result = verify_store(misled)
    assert [damage.file for damage in result.damages] == ["features.zarr/zarr.json"]
    assert result.rows == 11
    repair_store(misled, result)
    assert create_store(tmp_path, SPEC, 4) == store


def test_a_shard_that_vanished_with_its_receipt_is_missed_for_the_study_that_needs_it(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    receipt, place = receipt_of(store), tmp_path / "study" / "receipt.json"
    write_extraction_receipt(receipt, place)
    register_use(tmp_path, SPEC.fingerprint, place.parent, place, [0, 1, 2])
    for path in [store.receipt(1), *store.group.glob("*/c.1.*")]:
        path.unlink()
    ids = {image_id(number): image_id(number) for number in range(1, 12)}
    result = verify_store(store, live_uses(store.path), ids)
    assert [(damage.kind, damage.shard) for damage in result.damages] == [("missing", 1)]
    assert result.images == SECOND
    with claim_shard(store) as shard:
        assert verify_store(store, live_uses(store.path), ids).damages == (), "it is being written again"
        write_shard(store, shard, list(SECOND[::-1]), random_rows(4), 1.0)
    assert [damage.kind for damage in verify_store(store, live_uses(store.path)).damages] == ["replaced"]
    mine = study_use(place.parent, place)
    assert mine is not None
    assert mine.shards == {0, 1, 2}


def test_an_empty_store_has_no_damage(tmp_path: Path) -> None:
    assert verify_store(create_store(tmp_path, SPEC, 4)).damages == ()
