"""Flipped, truncated, exchanged and copied files of a store: rows are read as written, or refused.

FPT_FUZZ_SEED selects other cases, FPT_FUZZ_CASES their number.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import FORMS, SPEC, filled, image_id, receipt_of

from schemas.errors import FptError
from schemas.features import ExtractionReceipt
from stages.extract.plan import take_inventory
from stages.store.checksums import exchanged_shards
from stages.store.layout import create_store, open_store_layout
from stages.store.memory_rows import MemoryRows
from stages.store.reader import StoreReader, open_store

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "70"))
SPECS = {
    "int8": SPEC.model_copy(update={"dtype": "int8", "pooled": False}),
    "only statistics": FORMS["only statistics"],
    "zstd": SPEC.model_copy(update={"codec": "zstd", "pooled": False}),
}
IDS = [image_id(number) for number in range(1, 12)]


@pytest.fixture(scope="module", params=SPECS)
def complete(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, ExtractionReceipt, dict[str, Any]]]:
    """Write a store with index, and return its receipt and rows."""
    cache = tmp_path_factory.mktemp("complete") / "cache"
    store, rows = filled(cache, spec=SPECS[request.param])
    take_inventory(store)
    yield cache, receipt_of(store), rows


def damage(files: list[Path], random: np.random.Generator) -> str:
    """Damage the files of a store and return a description."""
    first = files[int(random.integers(len(files)))]
    alike = [path for path in files if path.parent == first.parent and path.suffix == first.suffix and path != first]
    kinds = ["flip", "cut", "remove", "empty", "longer"] + (["exchange", "copy", "part"] * 2 if alike else [])
    kind = kinds[int(random.integers(len(kinds)))]
    content = first.read_bytes() if first.exists() else b""
    at = int(random.integers(max(1, len(content))))
    if kind in ("exchange", "copy", "part"):
        second = alike[int(random.integers(len(alike)))]
        if not (first.exists() and second.exists()):
            return "nothing"
        theirs = second.read_bytes()
        # Replace some rows of a file by those of another.
        first.write_bytes(theirs[:at] + content[at:] if kind == "part" else theirs)
        if kind == "exchange":
            second.write_bytes(content)
        return f"{kind} {first.name} {second.name} {at}"
    if kind == "remove":
        first.unlink(missing_ok=True)
    elif kind == "flip" and content:
        first.write_bytes(content[:at] + bytes([content[at] ^ int(random.integers(1, 256))]) + content[at + 1 :])
    elif kind != "flip":
        first.write_bytes({"cut": content[:at], "empty": b"", "longer": content + content[:at]}[kind])
    return f"{kind} {first} {at}"


def compare(reader: Any, rows: dict[str, Any], what: str) -> int:
    """Read each row of each array, and return the number of refused rows."""
    refused = 0
    for number, row_id in enumerate(IDS):
        for name, values in rows.items():
            try:
                found = reader.read([row_id], [name])[name][0]
            except FptError:
                refused += 1
            else:
                assert found.tobytes() == values[number].tobytes(), (what, number, name)
    return refused


def in_memory(reader: StoreReader, rows: dict[str, Any], what: str) -> None:
    try:
        memory = MemoryRows(reader, IDS, list(rows))
        found = memory.read_rows(memory.locate(IDS), IDS, list(rows))
    except FptError:
        return
    for name, values in rows.items():
        assert found[name].tobytes() == values.tobytes(), (what, name)


def test_rows_are_those_that_were_written_or_refused(
    complete: tuple[Path, ExtractionReceipt, dict[str, Any]], tmp_path: Path
) -> None:
    cache, receipt, rows = complete
    random = np.random.default_rng(SEED)
    refused = 0
    for case in range(CASES if receipt.spec.codec == "none" else CASES // 5):
        place = tmp_path / "cache"
        shutil.copytree(cache, place)
        store = open_store_layout(place, receipt.spec)
        files = sorted(path for path in store.path.rglob("*") if path.is_file() and "locks" not in path.parts)
        what = f"case {case} of seed {SEED}: " + "; ".join(damage(files, random) for _ in range(1 + case % 2))
        try:
            reader = open_store(place, receipt)
            refused += compare(reader, rows, what)
            in_memory(open_store(place, receipt), rows, what)
            reader.close()
        except FptError:
            refused += 1
        try:
            again = create_store(place, receipt.spec, 4)
            broken = {*take_inventory(again).broken, *exchanged_shards(again, again.finished_shards())}
        except FptError:
            pass
        else:
            assert broken <= {0, 1, 2}, what
        shutil.rmtree(place)
    assert refused > CASES // 10
