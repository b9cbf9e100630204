"""Garbage collection: what a study refers to stays, and so does what a living process works in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from stores import SPEC, filled, receipt_of

from schemas.errors import ProjectError
from schemas.features import ExtractionReceipt
from stages.store.extraction_receipt import write_extraction_receipt
from stages.store.layout import Store, create_store
from stages.store.manage.gc import Retention, drop_garbage, find_garbage, forgettable, unreachable_studies
from stages.store.manage.inventory import list_stores
from stages.store.manage.usage import USES, keep_from_gc, live_uses, register_use, study_use
from stages.store.manage.verify import verify_store
from stages.store.writer import claim_shard


def study_of(cache: Path, store: Store, root: Path, shards: list[int]) -> Path:
    """A study with a receipt that names some shards of the store, noted in the store."""
    whole = receipt_of(store)
    receipt: ExtractionReceipt = whole.model_copy(update={"shards": {str(n): whole.shards[str(n)] for n in shards}})
    path = root / "receipt.json"
    write_extraction_receipt(receipt, path)
    register_use(cache, SPEC.fingerprint, root, path, shards)
    return path


def test_a_store_without_a_study_is_deleted_completely(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    (garbage,) = find_garbage(cache)
    assert (garbage.whole, garbage.shards, garbage.last_used) == (True, (0, 1, 2), None)
    assert store.path.exists(), "finding deletes nothing"
    assert drop_garbage(cache, [garbage]) == garbage.bytes
    assert list(cache.iterdir()) == []


def test_only_shards_that_no_study_needs_go(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0])
    gone = study_of(cache, store, tmp_path / "b", [1, 2])
    (tmp_path / "b/params.yaml").touch()
    assert find_garbage(cache) == []
    gone.unlink()
    (garbage,) = find_garbage(cache)
    assert (garbage.whole, garbage.shards) == (False, (1, 2))
    assert drop_garbage(cache, [garbage]) == garbage.bytes > 0
    assert store.finished_shards() == [0]
    assert verify_store(store, live_uses(store.path)).damages == ()
    assert len(list((store.path / USES).iterdir())) == 1, "the note of the study that is gone went too"


def test_a_study_that_moved_on_to_other_features_refers_no_more(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    path = study_of(cache, store, tmp_path / "a", [0, 1, 2])
    other = SPEC.model_copy(update={"kept": 2})
    receipt = receipt_of(store).model_copy(update={"spec": other, "fingerprint": other.fingerprint, "shards": {}})
    write_extraction_receipt(receipt, path)
    assert [garbage.whole for garbage in find_garbage(cache)] == [True]


def test_a_damaged_receipt_counts_as_it_was_noted(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0, 1]).write_text("{")
    assert [garbage.shards for garbage in find_garbage(cache)] == [(2,)]


def test_nothing_is_deleted_while_a_process_works_in_the_store(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    (garbage,) = find_garbage(cache)
    killed = store.path / "locks" / "at-work-1.lock"
    killed.touch()
    assert len(find_garbage(cache)) == 1, "nobody holds it"
    with keep_from_gc(store.path), keep_from_gc(store.path):
        assert not killed.exists()
        assert find_garbage(cache) == []
        assert drop_garbage(cache, [garbage]) == 0
    with claim_shard(store):
        assert find_garbage(cache) == []
        assert drop_garbage(cache, [garbage]) == 0
    assert verify_store(store).rows == 11
    assert len(find_garbage(cache)) == 1


def test_an_extraction_that_was_stopped_keeps_its_store_until_the_study_finishes_another(tmp_path: Path) -> None:
    cache, root = tmp_path / "cache", tmp_path / "a"
    root.mkdir()
    store, _ = filled(cache)
    register_use(cache, SPEC.fingerprint, root, root / "receipt.json", None)
    assert find_garbage(cache) == []
    other = create_store(cache, SPEC.model_copy(update={"kept": 2}), 4)
    register_use(cache, other.spec.fingerprint, root, root / "receipt.json", [])
    assert str(store.path) in [garbage.store for garbage in find_garbage(cache)]


def test_studies_of_other_machines_count_unless_told_otherwise(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0, 1])
    (note,) = (store.path / USES).iterdir()
    note.write_text(json.dumps({**json.loads(note.read_text()), "host": "elsewhere"}))
    assert [garbage.shards for garbage in find_garbage(cache)] == [(2,)]
    assert [garbage.whole for garbage in find_garbage(cache, Retention(other_hosts=False))] == [True]


def test_what_is_needed_again_since_it_was_shown_stays(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    shown = find_garbage(cache)
    study_of(cache, store, tmp_path / "a", [0])
    assert drop_garbage(cache, shown) == 0
    assert store.finished_shards() == [0, 1, 2]


def test_the_list_shows_rows_bytes_and_studies(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0])
    (cache / "notes").mkdir()
    damaged = cache / ("0" * 16)
    (damaged / "features.zarr").mkdir(parents=True)
    broken, listed = list_stores(cache)
    assert (broken.spec, broken.rows) == (None, 0)
    assert (listed.rows, listed.shards, listed.studies) == (11, 3, (str(tmp_path / "a"),))
    assert listed.bytes == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    assert listed.last_used is not None


def test_a_note_in_a_store_that_is_not_there_makes_none(tmp_path: Path) -> None:
    register_use(tmp_path, SPEC.fingerprint, tmp_path, tmp_path / "receipt.json", [0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}"])
def test_an_unreadable_note_is_no_use(tmp_path: Path, content: str) -> None:
    store, _ = filled(tmp_path)
    (store.path / USES).mkdir()
    (store.path / USES / "1.json").write_text(content)
    assert live_uses(store.path) == []


def test_the_current_study_keeps_its_shards_wherever_it_is_now(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "old", [0, 1])
    (tmp_path / "old").rename(tmp_path / "new")
    for note in (store.path / USES).iterdir():
        note.unlink()
    assert [garbage.whole for garbage in find_garbage(cache)] == [True]
    keep = Retention(current=study_use(tmp_path / "new", tmp_path / "new/receipt.json"))
    (garbage,) = find_garbage(cache, keep)
    assert (garbage.whole, garbage.shards) == (False, (2,))
    drop_garbage(cache, find_garbage(cache), keep)
    drop_garbage(cache, [garbage], keep)
    assert store.finished_shards() == [0, 1]


@pytest.mark.parametrize("state", ["moved", "unmounted", "dangling link", "a file instead", "stopped extraction"])
def test_a_study_that_cannot_be_reached_counts_until_it_is_forgotten(tmp_path: Path, state: str) -> None:
    cache, root = tmp_path / "cache", tmp_path / "disk/a"
    store, _ = filled(cache)
    if state == "dangling link":
        (tmp_path / "elsewhere").mkdir()
        root.parent.mkdir()
        root.symlink_to(tmp_path / "elsewhere")
    study_of(cache, store, root, [0, 1])
    if state == "stopped extraction":
        register_use(cache, SPEC.fingerprint, root, root / "receipt.json", None)
    (tmp_path / "elsewhere" if state == "dangling link" else root).rename(tmp_path / "kept elsewhere")
    if state == "unmounted":
        root.mkdir()
    if state == "a file instead":
        root.touch()
    whole_store = state == "stopped extraction"
    assert [garbage.shards for garbage in find_garbage(cache)] == ([] if whole_store else [(2,)])
    (study,) = unreachable_studies(cache)
    assert (study.study, study.stores) == (str(root), (store.path.name,))
    assert study.reason
    keep = Retention(forgotten=forgettable(cache, [root]))
    (garbage,) = find_garbage(cache, keep)
    assert garbage.whole
    drop_garbage(cache, [garbage], keep)
    assert list(cache.iterdir()) == []


def test_studies_that_exchanged_their_folders_keep_their_stores(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other = SPEC.model_copy(update={"kept": 2})
    for name, spec in (("a", SPEC), ("b", other)):
        store, _ = filled(cache, spec=spec)
        path = tmp_path / name / "receipt.json"
        write_extraction_receipt(receipt_of(store), path)
        register_use(cache, spec.fingerprint, path.parent, path, [0, 1, 2])
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "b")
    assert find_garbage(cache) == []
    (tmp_path / "b/receipt.json").unlink()
    (garbage,) = find_garbage(cache)
    assert garbage.store == str(cache / SPEC.fingerprint[:16])


def test_outputs_that_dvc_removed_do_not_give_the_features_up(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study = tmp_path / "a"
    path = study / "outputs/features/receipt.json"
    write_extraction_receipt(receipt_of(store), path)
    register_use(cache, SPEC.fingerprint, study, path, [0, 1, 2])
    (study / "dvc.yaml").touch()
    shutil.rmtree(path.parent)
    assert find_garbage(cache) == []
    assert [garbage.whole for garbage in find_garbage(cache, Retention(forgotten=forgettable(cache, [study])))] == [
        True
    ]


def test_a_study_is_forgotten_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0])
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    assert forgettable(cache, [Path("../a/")]) == {str(tmp_path / "a")}


def test_a_forgotten_study_leaves_the_shards_of_others(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0, 1])
    study_of(cache, store, tmp_path / "b", [0, 1, 2])
    (tmp_path / "a").rename(tmp_path / "gone")
    with pytest.raises(ProjectError, match="not an unreachable study"):
        forgettable(cache, [tmp_path / "b"])
    with pytest.raises(ProjectError, match="not an unreachable study"):
        forgettable(cache, [tmp_path / "c"])
    keep = Retention(forgotten=forgettable(cache, [tmp_path / "a"]))
    assert find_garbage(cache, keep) == []
    assert drop_garbage(cache, [], keep) == 0
    assert [live.use.study for live in live_uses(store.path)] == [str(tmp_path / "b")]
    assert unreachable_studies(cache) == []


def test_a_removed_temporary_copy_of_dvc_is_no_study(tmp_path: Path) -> None:
    cache, copy = tmp_path / "cache", tmp_path / "repo/.dvc/tmp/exps/tmp1/study"
    store, _ = filled(cache)
    for shards in ([0], None):
        study_of(cache, store, copy, [0])
        register_use(cache, SPEC.fingerprint, copy, copy / "receipt.json", shards)
        assert len(live_uses(store.path)) == 1
        shutil.rmtree(copy)
        assert live_uses(store.path) == []
    shutil.rmtree(tmp_path / "repo")
    assert len(live_uses(store.path)) == 1, "the repository itself cannot be reached"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_study_without_permission_counts(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store, _ = filled(cache)
    study_of(cache, store, tmp_path / "a", [0, 1])
    (tmp_path / "a").chmod(0)
    try:
        assert [garbage.shards for garbage in find_garbage(cache)] == [(2,)]
        assert "Permission denied" in unreachable_studies(cache)[0].reason
    finally:
        (tmp_path / "a").chmod(0o755)
