"""Compare every byte of a store with its receipts, and remove what does not match."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from schemas.cache import Damage, DamageKind, Verification
from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ShardReceipt
from stages.files import atomic_write, read_regular, sha256_file, storage_errors
from stages.progress import Progress
from stages.store.array_sources import ZarrArray
from stages.store.checksums import add_checksums, stored_checksums
from stages.store.index import read_shard_receipt, receipt_digest
from stages.store.layout import Store, agreed_shard_size, create_group, store_lock
from stages.store.manage.usage import LiveUse, lock_is_held, shard_is_being_written
from stages.store.shards import ShardFile
from stages.store.writer import remove_claimed_shards

THREADS = min(8, os.cpu_count() or 1)
"""Files hashed at the same time: hashing releases the GIL."""

_SHARD_FILE = re.compile(r"c\.(\d+)\.")

_CORE = (
    "zarr_format", "node_type", "attributes", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value",
    "dimension_names",
)  # fmt: skip
"""Fields of zarr.json that determine how bytes are decoded; other versions of zarr may add more."""


@dataclass
class _Checked:
    """Result of checking one finished shard."""

    shard: int
    receipt: ShardReceipt | None
    rows: tuple[str, ...]
    """Known row ids, also from the shard itself if the receipt is damaged."""
    damages: list[Damage] = field(default_factory=list)


def damaged_shards(store: Store, progress: Progress | None = None) -> list[int]:
    """Return the finished shards whose receipt or files differ from what was written."""
    return [checked.shard for checked in _check_shards(store, progress) if checked.damages]


def verify_store(
    store: Store,
    uses: Sequence[LiveUse] = (),
    needed_rows: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Find every byte that differs from what was written. Shards and files locked by running writers are skipped.

    Receipts of earlier versions get row checksums once their files have been verified.

    Args:
        store: The store.
        uses: Studies that rely on it; their shards are reported as missing if they are gone with their receipts.
        needed_rows: Row id -> image id of the current study's rows, reported as lost if a shard is gone without a trace
            of its rows.
        progress: Called with shards.
    """
    store = _with_agreed_size(store)
    checked = _check_shards(store, progress)
    damages = [damage for shard in checked for damage in shard.damages]
    damages += _metadata_damage(store, [shard.shard for shard in checked])
    damages += _foreign(store, {shard.shard: shard.receipt for shard in checked})
    expected = _expected(store, uses, {shard.shard: shard for shard in checked})
    damages += expected
    # A damaged receipt leaves only row ids; the image of each view is then taken from `needed_rows`.
    receipts = [shard.receipt for shard in checked if shard.damages and shard.receipt is not None]
    completed = sum(
        add_checksums(store, shard.receipt)
        for shard in checked
        if not shard.damages and shard.receipt is not None and shard.receipt.crc32c is None
    )
    images = {**(needed_rows or {}), **{row.row_id: row.image for receipt in receipts for row in receipt.origins}}
    intact = {row for shard in checked if not shard.damages for row in shard.rows}
    lost = {row for shard in checked if shard.damages for row in shard.rows}
    if any(damage.kind == "missing" for damage in expected) or any(
        shard.damages and not shard.rows for shard in checked
    ):
        lost |= set(needed_rows or ())
    return Verification(
        store=str(store.path),
        fingerprint=store.spec.fingerprint,
        shards=len(checked),
        rows=len(intact),
        damages=tuple(damages),
        images=tuple(sorted({images.get(row, row) for row in lost - intact})),
        completed=completed,
    )


def repair_store(store: Store, verification: Verification) -> None:
    """Remove damaged shards and foreign files, and rewrite damaged metadata; files of running writers are not touched.

    `fpt extract` computes the removed shards again.

    Raises:
        StorageError: If the store cannot be written.
    """
    store = _with_agreed_size(store)
    with storage_errors(store.path):
        for damage in verification.damages:
            path = store.path / damage.file
            if damage.kind == "metadata":
                _write_metadata(store)
            elif damage.kind == "foreign" and not _is_locked(store, damage.shard):
                path.unlink(missing_ok=True)
        handled = ("foreign", "metadata", "replaced")
        remove_claimed_shards(
            store, [d.shard for d in verification.damages if d.shard is not None and d.kind not in handled]
        )


def _check_shards(store: Store, progress: Progress | None) -> list[_Checked]:
    shards = store.finished_shards()
    checked = []
    with ThreadPoolExecutor(THREADS) as pool:
        for shard in pool.map(lambda number: _check_shard(store, number), shards):
            checked.append(shard)
            if progress is not None:
                progress(len(checked), len(shards))
    return checked


def _check_shard(store: Store, shard: int) -> _Checked:
    def damage(kind: DamageKind, path: Path, reason: str) -> Damage:
        return Damage(kind=kind, file=str(path.relative_to(store.path)), shard=shard, reason=reason)

    try:
        receipt = read_shard_receipt(store, shard)
    except (CacheCorruptError, CacheIncompleteError) as error:
        rows = stored_rows(store, shard, store.shard_size) or ()
        return _Checked(shard, None, rows, [damage("receipt", store.receipt(shard), error.state)])
    checked = _Checked(shard, receipt, receipt.rows)
    for name, expected in receipt.files.items():
        path = store.shard_file(name, shard)
        try:
            length = path.stat().st_size
            if length != expected.bytes:
                reason = f"It has {length} bytes instead of {expected.bytes}."
                checked.damages.append(damage("truncated", path, reason))
            elif sha256_file(path) != expected.sha256:
                checked.damages.append(damage("flipped", path, "Its bytes are not those that were written."))
        except FileNotFoundError:
            checked.damages.append(damage("missing", path, "The file is gone."))
        except OSError as error:
            checked.damages.append(damage("flipped", path, f"It cannot be read: {error.strerror}."))
    stored = receipt.rows if checked.damages else stored_rows(store, shard, len(receipt.rows))
    # If the files are intact but their compressed row ids cannot be read, the array's metadata is damaged instead.
    if stored != receipt.rows and (stored is not None or store.spec.codec == "none"):
        # The file digests match, so the row ids in the files are right and those in the receipt are wrong.
        checked.rows = stored_rows(store, shard, store.shard_size) or receipt.rows
        reason = "It names other images than the shard's files."
        checked.damages.append(damage("receipt", store.receipt(shard), reason))
    checksums = receipt.crc32c
    if not checked.damages and checksums is not None and _row_checksums(store, receipt) not in (None, checksums):
        reason = "Its row checksums do not match its files."
        checked.damages.append(damage("receipt", store.receipt(shard), reason))
    return checked


def _row_checksums(store: Store, receipt: ShardReceipt) -> dict[str, str] | None:
    """Return the row checksums of files that match their receipt, or None if the metadata of an array is damaged."""
    try:
        return stored_checksums(store, receipt.shard, len(receipt.rows))
    except (CacheCorruptError, CacheIncompleteError):
        return None


def stored_rows(store: Store, shard: int, count: int) -> tuple[str, ...] | None:
    """Return the row ids in the files of a shard, up to the first empty row; None if they cannot be read.

    Args:
        store: The store.
        shard: The shard.
        count: Number of rows to read.
    """
    rows = []
    if store.spec.codec != "none":
        packed = ZarrArray(str(store.group), "sha256", store.layouts["sha256"], store.shard_size)
        ids = np.empty((count, 32), np.uint8)
        try:
            packed.read(range(shard * store.shard_size, shard * store.shard_size + count), ids)
        except (CacheCorruptError, CacheIncompleteError):
            return None
        return tuple(row.tobytes().hex() for row in itertools.takewhile(np.any, ids))
    try:
        file = ShardFile(store.shard_name("sha256", shard), store.shard_size, 32)
    except (CacheCorruptError, CacheIncompleteError, OSError):
        return None
    try:
        row = np.empty(32, np.uint8)
        for slot in range(count):
            file.read_into(slot, row)
            rows.append(row.tobytes().hex())
    except CacheIncompleteError:
        pass
    except (CacheCorruptError, OSError):
        return None
    finally:
        file.close()
    return tuple(rows)


def _foreign(store: Store, receipts: dict[int, ShardReceipt | None]) -> Iterator[Damage]:
    """Find files of the group that no receipt names, except those of running writers."""
    arrays = store.layouts
    named = {store.group / "zarr.json"} | {store.group / name / "zarr.json" for name in arrays}
    named |= {store.shard_file(name, shard) for shard in receipts for name in arrays}
    named |= {store.receipt(shard) for shard in receipts}
    files = [path for folder in (store.group, store.receipts) for path in folder.rglob("*") if not path.is_dir()]
    for path in sorted(set(files) - named):
        match = _SHARD_FILE.match(path.name) if path.parent.name in arrays else None
        shard = int(match[1]) if match else None
        if _is_locked(store, shard) or not path.exists():
            continue
        # A writer may have finished this shard since the receipts were listed.
        if shard is not None and shard not in receipts and store.receipt(shard).exists():
            continue
        yield Damage(
            kind="foreign",
            file=str(path.relative_to(store.path)),
            shard=shard,
            reason="No receipt names it: an interrupted writer left it, or it was copied there.",
        )


def _is_locked(store: Store, shard: int | None) -> bool:
    if shard is not None:
        return shard_is_being_written(store.path, shard)
    return lock_is_held(store.path / "locks" / "store.lock")


def _expected(store: Store, uses: Sequence[LiveUse], checked: dict[int, _Checked]) -> list[Damage]:
    """Find the shards that a study relies on and that are gone or have other content now."""
    damages: dict[tuple[DamageKind, int], Damage] = {}
    for live in uses:
        digests = {} if live.receipt is None else live.receipt.shards
        for shard in sorted(live.shards or ()):
            file = str(store.receipt(shard).relative_to(store.path))
            present = checked.get(shard)
            if present is None:
                # A locked shard is being computed again at this moment.
                if shard_is_being_written(store.path, shard) or store.receipt(shard).exists():
                    continue
                reason = f"The shard that {live.use.study} relies on is gone."
                damages[("missing", shard)] = Damage(kind="missing", file=file, shard=shard, reason=reason)
            elif (
                present.receipt is not None
                and not present.damages
                and str(shard) in digests
                and receipt_digest(present.receipt) != digests[str(shard)]
            ):
                reason = f"It is not the shard that {live.use.study} extracted; run `fpt extract` there to accept it."
                damages[("replaced", shard)] = Damage(kind="replaced", file=file, shard=shard, reason=reason)
    return list(damages.values())


def _metadata_damage(store: Store, shards: Sequence[int]) -> Iterator[Damage]:
    """Compare the metadata of the group and of each array with those of a new store of the same spec."""
    rows = (max(shards, default=-1) + 1) * store.shard_size
    for file, expected in _fresh_metadata(store).items():
        path = store.group / file
        try:
            stored = json.loads(read_regular(path))
            long_enough = "shape" not in expected or (
                stored["shape"][0] >= rows and stored["shape"][0] % store.shard_size == 0
            )
            same = _without_rows(stored) == _without_rows(expected)
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            long_enough = same = False
        if not (long_enough and same):
            yield Damage(
                kind="metadata",
                file=str(path.relative_to(store.path)),
                shard=None,
                reason="It does not describe the arrays of this store.",
            )


def _with_agreed_size(store: Store) -> Store:
    """Use the shard size of the arrays if they agree: one flipped digit in the group must not make all shards fail."""
    return replace(store, shard_size=agreed_shard_size(store.path, store.spec) or store.shard_size)


def _write_metadata(store: Store) -> None:
    rows = (max(store.finished_shards(), default=-1) + 1) * store.shard_size
    with store_lock(store.path):
        for file, expected in _fresh_metadata(store).items():
            if "shape" in expected:
                expected["shape"][0] = rows
            atomic_write(store.group / file, json.dumps(expected, indent=2).encode())


def _fresh_metadata(store: Store) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        group = Path(folder) / "features.zarr"
        create_group(group, store.spec, store.shard_size)
        return {str(path.relative_to(group)): json.loads(path.read_bytes()) for path in group.rglob("zarr.json")}


def _without_rows(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that must be equal in all stores of one spec: everything but the number of rows."""
    core = {key: metadata.get(key) for key in _CORE}
    return {**core, "shape": metadata["shape"][1:] if "shape" in metadata else None}
