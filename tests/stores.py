"""Small stores of random rows, for tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from schemas.features import ExtractionReceipt, FeatureSpec, LpmInfo
from stages.store.layout import Store, array_layouts, create_store
from stages.store.reader import read_receipt, receipt_digest
from stages.store.writer import claim_shard, write_shard

LPM = LpmInfo(
    name="tiny", depth=4, width=12, heads=3, patch=16, prefix_tokens=1, has_class_token=True, image_size=64,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic",
)  # fmt: skip
SPEC = FeatureSpec(
    lpm=LPM, weights_sha256="0" * 64, layers=(1, 3), importance="global", kept=5, dtype="float16", side_image_size=16
)


def image_id(number: int) -> str:
    return f"{number:064x}"


def random_rows(count: int, seed: int = 0, spec: FeatureSpec = SPEC) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    rows = {}
    for name, layout in array_layouts(spec).items():
        if name != "sha256":
            rows[name] = rng.integers(0, 200, (count, *layout.shape)).astype(layout.dtype)
    rows["keys"][0] = 0  # a row of zeros is a row, not a hole
    return rows


def filled(cache: Path, sizes: tuple[int, ...] = (4, 4, 3), shard_size: int = 4) -> tuple[Store, dict[str, Any]]:
    """A store with one shard per size, and all rows by name."""
    store = create_store(cache, SPEC, shard_size)
    parts, first = [], 1
    for number, size in enumerate(sizes):
        rows = random_rows(size, seed=number)
        with claim_shard(store) as shard:
            assert shard == number
            write_shard(store, shard, [image_id(first + i) for i in range(size)], rows, 1.0)
        parts.append(rows)
        first += size
    return store, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def receipt_of(store: Store) -> ExtractionReceipt:
    receipts = [read_receipt(store, shard) for shard in store.finished_shards()]
    return ExtractionReceipt(
        fingerprint=SPEC.fingerprint,
        spec=SPEC,
        images=sum(len(receipt.rows) for receipt in receipts),
        manifest_sha256="",
        shards={str(receipt.shard): receipt_digest(receipt) for receipt in receipts},
    )
