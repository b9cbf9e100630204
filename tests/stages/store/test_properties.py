"""Whatever is written, killed, resumed and flipped: a read gives the exact row or a clear error.

60 cases by default; HYPOTHESIS_PROFILE=thorough runs 1,000.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stores import SPEC, image_id, receipt_of

from schemas.errors import FptError
from stages.extract.plan import take_inventory
from stages.store import index, writer
from stages.store.layout import Store, array_layouts, create_store
from stages.store.reader import open_store
from stages.store.writer import claim_shard, remove_claimed_shards, write_shard

CASES = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 60
SHARD_SIZE = 2
LAYOUTS = array_layouts(SPEC)


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


@contextmanager
def killed_at(step: int, cut: float) -> Iterator[None]:
    """Die at one of the moments before and after a write; a file that is being written may end anywhere."""
    left, dead = step, False

    def moment(path: Path | None = None) -> None:
        nonlocal left, dead
        left -= 1
        if left < 0 and not dead:
            dead = True
            if path is not None and path.exists():
                os.truncate(path, int(cut * path.stat().st_size))
            raise Killed

    def guarded(function: Any, names_a_file: bool) -> Any:
        def run(*arguments: Any) -> Any:
            if dead:
                raise Killed
            moment()
            result = function(*arguments)
            moment(arguments[0] if names_a_file else None)
            return result

        return run

    real_seal = writer._sync_and_digest

    def seal(path: Path) -> Any:
        moment(path)
        return real_seal(path)

    with (
        mock.patch.object(writer, "grow_store", guarded(writer.grow_store, False)),
        mock.patch.object(writer, "_sync_and_digest", seal),
        mock.patch.object(writer, "remove_shard", guarded(writer.remove_shard, False)),
        mock.patch.object(writer, "atomic_write", guarded(writer.atomic_write, False)),
        mock.patch.object(index, "atomic_write", guarded(index.atomic_write, False)),
    ):
        yield


@pytest.fixture(scope="module")
def empty_store() -> Iterator[Path]:
    """A fresh store, to be copied: making one is slow."""
    with tempfile.TemporaryDirectory() as folder:
        create_store(Path(folder), SPEC, SHARD_SIZE)
        yield Path(folder)


Rows = dict[str, dict[str, Any]]


def write_missing(store: Store, rows: Rows) -> None:
    """Act like an extraction: repair, then write the missing rows, then the index."""
    inventory = take_inventory(store)
    if inventory.broken:
        remove_claimed_shards(store, inventory.broken)
        inventory = take_inventory(store)
    missing = inventory.missing(list(rows))
    for first in range(0, len(missing), SHARD_SIZE):
        ids = missing[first : first + SHARD_SIZE]
        arrays = {name: np.stack([rows[image][name] for image in ids]) for name in LAYOUTS if name != "sha256"}
        with claim_shard(store) as shard:
            write_shard(store, shard, ids, arrays, 0.5)
    take_inventory(store)


def check(store: Store, receipt: Any, rows: Rows, whole: bool) -> int:
    """Exact rows or a clear error; the number of errors."""
    errors = 0
    try:
        reader = open_store(store.path.parent, receipt)
    except FptError as error:
        assert not whole, error
        return 1
    for image, expected in rows.items():
        for name, values in expected.items():
            try:
                found = reader.read([image], [name])[name][0]
            except FptError as error:
                assert not whole, error
                assert error.state
                errors += 1
            else:
                assert found.dtype == values.dtype
                assert found.tobytes() == values.tobytes(), (image, name)
    reader.close()
    return errors


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    count=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    kills=st.lists(st.tuples(st.integers(0, 45), st.floats(0, 1)), max_size=2),
    flips=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 255)), max_size=4),
)
def test_a_read_gives_the_exact_row_or_a_clear_error(
    empty_store: Path, count: int, seed: int, kills: list[tuple[int, float]], flips: list[tuple[float, float, int]]
) -> None:
    rng = np.random.default_rng(seed)
    rows: Rows = {
        image_id(int(number)): {
            # Any bit pattern, infinities and NaN as well.
            name: rng.bytes(int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize)
            for name, layout in LAYOUTS.items()
            if name != "sha256"
        }
        for number in rng.choice(1000, count, replace=False)
    }
    for row in rows.values():
        for name in row:
            row[name] = np.frombuffer(row[name], LAYOUTS[name].dtype).reshape(LAYOUTS[name].shape)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cache"
        shutil.copytree(empty_store, root)
        store = create_store(root, SPEC, SHARD_SIZE)
        for step, cut in kills:
            with suppress(Killed), killed_at(step, cut):
                write_missing(store, rows)
            check(store, receipt_of(store), {}, whole=True)
        write_missing(store, rows)
        receipt = receipt_of(store)
        assert check(store, receipt, rows, whole=True) == 0
        files = sorted(path for path in store.path.rglob("*") if path.is_file() and "locks" not in path.parts)
        for which, where, mask in flips:
            path = files[min(int(which * len(files)), len(files) - 1)]
            data = bytearray(path.read_bytes())
            data[min(int(where * len(data)), len(data) - 1)] ^= mask
            path.write_bytes(data)
        errors = check(store, receipt, rows, whole=not flips)
        event("an error" if errors else "exact")
        with suppress(FptError):
            take_inventory(store)
