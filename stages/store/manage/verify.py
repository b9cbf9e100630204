"""Comparing every byte of a store with its receipts, and removing what does not fit."""

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
"""Digests at a time: hashing leaves Python's lock."""

_SHARD_FILE = re.compile(r"c\.(\d+)\.")

_CORE = (
    "zarr_format", "node_type", "attributes", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value",
    "dimension_names",
)  # fmt: skip
"""Fields of zarr.json that say how bytes are read; other versions of zarr may add more."""


@dataclass
class _Checked:
    """One finished shard after the comparison."""

    shard: int
    receipt: ShardReceipt | None
    rows: tuple[str, ...]
    """Names of the rows as far as they are known, also where the receipt is damaged."""
    damages: list[Damage] = field(default_factory=list)


def damaged_shards(store: Store, progress: Progress | None = None) -> list[int]:
    """Numbers of the finished shards of which a receipt or a file differs from what was written."""
    return [checked.shard for checked in _check_shards(store, progress) if checked.damages]


def verify_store(
    store: Store,
    uses: Sequence[LiveUse] = (),
    wanted: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Find every byte that is not what a writer wrote. What living writers hold is left out.

    Receipts of earlier versions get the checksums of their rows, once their files are known to be right.

    Args:
        store: The store.
        uses: Studies that rely on it: a shard of theirs that is gone with its receipt is missed for them.
        wanted: Name of a row -> image id, of the rows that are missed where a shard is gone without a trace of them.
        progress: Called with shards.
    """
    store = _with_agreed_size(store)
    checked = _check_shards(store, progress)
    damages = [damage for shard in checked for damage in shard.damages]
    damages += _metadata_damage(store, [shard.shard for shard in checked])
    damages += _foreign(store, {shard.shard: shard.receipt for shard in checked})
    expected = _expected(store, uses, {shard.shard: shard for shard in checked})
    damages += expected
    # Of a damaged receipt the names alone are left: which image another view is of, its study knows.
    receipts = [shard.receipt for shard in checked if shard.damages and shard.receipt is not None]
    completed = sum(
        add_checksums(store, shard.receipt)
        for shard in checked
        if not shard.damages and shard.receipt is not None and shard.receipt.crc32c is None
    )
    images = {**(wanted or {}), **{row.row_id: row.image for receipt in receipts for row in receipt.origins}}
    whole = {row for shard in checked if not shard.damages for row in shard.rows}
    lost = {row for shard in checked if shard.damages for row in shard.rows}
    if any(damage.kind == "missing" for damage in expected) or any(
        shard.damages and not shard.rows for shard in checked
    ):
        lost |= set(wanted or ())
    return Verification(
        store=str(store.path),
        fingerprint=store.spec.fingerprint,
        shards=len(checked),
        rows=len(whole),
        damages=tuple(damages),
        images=tuple(sorted({images.get(row, row) for row in lost - whole})),
        completed=completed,
    )


def repair_store(store: Store, verification: Verification) -> None:
    """Remove damaged shards and foreign files, and write damaged metadata anew; nothing of a living writer is touched.

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
            elif damage.kind == "foreign" and not _in_work(store, damage.shard):
                path.unlink(missing_ok=True)
        gone = ("foreign", "metadata", "replaced")
        remove_claimed_shards(
            store, [d.shard for d in verification.damages if d.shard is not None and d.kind not in gone]
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
    found = _Checked(shard, receipt, receipt.rows)
    for name, expected in receipt.files.items():
        path = store.shard_file(name, shard)
        try:
            length = path.stat().st_size
            if length != expected.bytes:
                reason = f"It has {length} bytes instead of {expected.bytes}."
                found.damages.append(damage("truncated", path, reason))
            elif sha256_file(path) != expected.sha256:
                found.damages.append(damage("flipped", path, "Its bytes are not those that were written."))
        except FileNotFoundError:
            found.damages.append(damage("missing", path, "The file is gone."))
        except OSError as error:
            found.damages.append(damage("flipped", path, f"It cannot be read: {error.strerror}."))
    stored = receipt.rows if found.damages else stored_rows(store, shard, len(receipt.rows))
    # Files as they were written whose compressed ids cannot be read: their array's metadata is damaged, not they.
    if stored != receipt.rows and (stored is not None or store.spec.codec == "none"):
        # The digests hold the files; the ids are held by the digests of the images among them.
        found.rows = stored_rows(store, shard, store.shard_size) or receipt.rows
        reason = "It names other images than the shard holds."
        found.damages.append(damage("receipt", store.receipt(shard), reason))
    if not found.damages and receipt.crc32c is not None and _stored(store, receipt) not in (None, receipt.crc32c):
        reason = "Its checksums of rows are not those of its files."
        found.damages.append(damage("receipt", store.receipt(shard), reason))
    return found


def _stored(store: Store, receipt: ShardReceipt) -> dict[str, str] | None:
    """Checksums of the rows in files that are those of their receipt; None: the metadata of an array is damaged."""
    try:
        return stored_checksums(store, receipt.shard, len(receipt.rows))
    except (CacheCorruptError, CacheIncompleteError):
        return None


def stored_rows(store: Store, shard: int, count: int) -> tuple[str, ...] | None:
    """Names of the rows that the shard itself holds; None where it cannot be read. Ends before the first empty row."""
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
    """Files of the group that no receipt names, without those that a living writer is at work on."""
    arrays = store.layouts
    named = {store.group / "zarr.json"} | {store.group / name / "zarr.json" for name in arrays}
    named |= {store.shard_file(name, shard) for shard in receipts for name in arrays}
    named |= {store.receipt(shard) for shard in receipts}
    files = [path for folder in (store.group, store.receipts) for path in folder.rglob("*") if not path.is_dir()]
    for path in sorted(set(files) - named):
        match = _SHARD_FILE.match(path.name) if path.parent.name in arrays else None
        shard = int(match[1]) if match else None
        if _in_work(store, shard) or not path.exists():
            continue
        # A writer may have finished this very shard since the receipts were listed.
        if shard is not None and shard not in receipts and store.receipt(shard).exists():
            continue
        yield Damage(
            kind="foreign",
            file=str(path.relative_to(store.path)),
            shard=shard,
            reason="No receipt names it: a writer that was stopped left it, or it came from elsewhere.",
        )


def _in_work(store: Store, shard: int | None) -> bool:
    if shard is not None:
        return shard_is_being_written(store.path, shard)
    return lock_is_held(store.path / "locks" / "store.lock")


def _expected(store: Store, uses: Sequence[LiveUse], checked: dict[int, _Checked]) -> list[Damage]:
    """Shards that a study relies on and that are gone, or are others now."""
    damages: dict[tuple[DamageKind, int], Damage] = {}
    for live in uses:
        digests = {} if live.receipt is None else live.receipt.shards
        for shard in sorted(live.shards or ()):
            file = str(store.receipt(shard).relative_to(store.path))
            found = checked.get(shard)
            if found is None:
                # Held: somebody computes it again at this moment.
                if shard_is_being_written(store.path, shard) or store.receipt(shard).exists():
                    continue
                reason = f"The shard that {live.use.study} relies on is gone."
                damages[("missing", shard)] = Damage(kind="missing", file=file, shard=shard, reason=reason)
            elif (
                found.receipt is not None
                and not found.damages
                and str(shard) in digests
                and receipt_digest(found.receipt) != digests[str(shard)]
            ):
                reason = f"It is not the shard that {live.use.study} extracted; `fpt extract` there takes it over."
                damages[("replaced", shard)] = Damage(kind="replaced", file=file, shard=shard, reason=reason)
    return list(damages.values())


def _metadata_damage(store: Store, shards: Sequence[int]) -> Iterator[Damage]:
    """Metadata of the group and of each array, compared with those of a fresh store of the same spec."""
    rows = (max(shards, default=-1) + 1) * store.shard_size
    for file, expected in _fresh_metadata(store).items():
        path = store.group / file
        try:
            found = json.loads(read_regular(path))
            enough = "shape" not in expected or (
                found["shape"][0] >= rows and found["shape"][0] % store.shard_size == 0
            )
            same = _without_rows(found) == _without_rows(expected)
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            enough = same = False
        if not (enough and same):
            yield Damage(
                kind="metadata",
                file=str(path.relative_to(store.path)),
                shard=None,
                reason="It does not describe the arrays of this store.",
            )


def _with_agreed_size(store: Store) -> Store:
    """The store in the shard size that all its arrays have: one flipped digit in the group must not condemn them."""
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
    """What must be equal in the metadata of two stores of one spec: all but the number of rows."""
    core = {key: metadata.get(key) for key in _CORE}
    return {**core, "shape": metadata["shape"][1:] if "shape" in metadata else None}
