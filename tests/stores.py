"""Small stores of random rows, for tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from schemas.features import ExtractionReceipt, FeatureSpec, LpmInfo
from stages.store.index import build_index, refresh_index, shard_record, write_index
from stages.store.layout import Store, array_layouts, create_store
from stages.store.reader import read_receipt, receipt_digest
from stages.store.writer import claim_shard, write_shard

LPM = LpmInfo(
    name="tiny", depth=4, width=12, heads=3, patch=16, prefix_tokens=1, has_class_token=True, image_size=64,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=48,
)  # fmt: skip
SPEC = FeatureSpec(
    lpm=LPM, weights_sha256="0" * 64, layers=(1, 3), importance="global", kept=5, dtype="float16", side_image_size=16
)
FORMS = {
    "tokens": SPEC,
    "statistics": SPEC.model_copy(update={"statistics": True}),
    "only statistics": SPEC.model_copy(update={"layers": (), "kept": 0, "statistics": True, "dtype": "int8"}),
}
"""Specs of stores with other arrays."""


def image_id(number: int) -> str:
    return f"{number:064x}"


def random_rows(count: int, seed: int = 0, spec: FeatureSpec = SPEC) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    rows = {}
    for name, layout in array_layouts(spec).items():
        if name != "sha256":
            rows[name] = rng.integers(0, 200, (count, *layout.shape)).astype(layout.dtype)
    rows["keys" if "keys" in rows else "pooled"][0] = 0  # a row of zeros is a row, not a hole
    return rows


def filled(
    cache: Path, sizes: tuple[int, ...] = (4, 4, 3), shard_size: int = 4, spec: FeatureSpec = SPEC
) -> tuple[Store, dict[str, Any]]:
    """A store with one shard per size, and all rows by name."""
    store = create_store(cache, spec, shard_size)
    parts, first = [], 1
    for number, size in enumerate(sizes):
        rows = random_rows(size, seed=number, spec=spec)
        with claim_shard(store) as shard:
            assert shard == number
            write_shard(store, shard, [image_id(first + i) for i in range(size)], rows, 1.0)
        parts.append(rows)
        first += size
    return store, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def receipt_of(store: Store) -> ExtractionReceipt:
    receipts = [read_receipt(store, shard) for shard in store.finished_shards()]
    return ExtractionReceipt(
        fingerprint=store.spec.fingerprint,
        spec=store.spec,
        images=sum(len(receipt.rows) for receipt in receipts),
        manifest_sha256="",
        shards={str(receipt.shard): receipt_digest(receipt) for receipt in receipts},
    )


def million(cache: Path, shards: int = 31_250, size: int = 32) -> tuple[ExtractionReceipt, dict[str, Any]]:
    """A store whose index knows a million rows; its first shard is real."""
    store = create_store(cache, SPEC, size)
    rows = random_rows(size)
    with claim_shard(store) as shard:
        write_shard(store, shard, [image_id(n) for n in range(size)], rows, 1.0)
    real, _ = refresh_index(store)
    table = np.zeros(shards, shard_record(len(array_layouts(SPEC))))
    table[:] = real.shards[0]
    table["number"] = np.arange(shards)
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (shards, 32), np.uint8)
    digests[0] = np.frombuffer(bytes(real.shards["digest"][0]), np.uint8)
    table["digest"] = digests.view("V32")[:, 0]
    ids = rng.integers(0, 256, ((shards - 1) * size, 32), np.uint8).view("S32")[:, 0]
    places = np.arange(shards * size, dtype=np.uint32)
    write_index(store, build_index(store, table, np.concatenate([real.ids[np.argsort(real.places)], ids]), places))
    receipt = ExtractionReceipt(
        fingerprint=SPEC.fingerprint, spec=SPEC, images=shards * size, manifest_sha256="",
        shards={str(number): digest.tobytes().hex() for number, digest in enumerate(digests)},
    )  # fmt: skip
    return receipt, rows
