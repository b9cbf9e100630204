"""Estimate how the store and the scheduler scale to ten million images.

    python benchmarks/scale_simulation.py [--shards 31250] [--rows 1] [--no-files] [--folder DIR]

31,250 shards take about a minute; `--shards 1000000 --no-files` needs some minutes, 1,000,000 inodes and 4 GB in
FOLDER (default: the folder for temporary files); `--rows 32` writes receipts of full shards. Everything is removed at
the end. Results: docs/scale.md.

1. Measured on synthetic receipts: claiming and writing a shard, listing, building and opening the index, with many
   finished shards. Receipts are like those of `write_shard`; array files are empty, or missing with --no-files.
2. Simulated: a scheduler that assigns one shard per task, workers that die, and the lock for growing arrays.
3. Computed: bytes, files, requests and GPU hours from the specs of real models.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schemas.features import ExtractionReceipt, FeatureSpec, LpmInfo
from schemas.parse import parse_settings
from schemas.resolve import feature_spec, resolve
from stages.extract.plan import forward_operations, take_inventory
from stages.lpm.loading import describe_lpm
from stages.store.index import index_path, refresh_index, shard_record
from stages.store.layout import Store, array_layouts, capacity, create_store, grow_store
from stages.store.reader import open_store
from stages.store.writer import claim_shard, write_shard

SIZE = 32
"""Rows per shard: the default of `features.shard_size`."""
TINY = FeatureSpec(
    lpm=LpmInfo(
        name="tiny", depth=2, width=8, heads=2, patch=16, prefix_tokens=1, has_class_token=True, image_size=32,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic",
    ),
    weights_sha256="0" * 64, layers=(1,), importance="global", kept=2, dtype="int8", side_image_size=16,
)  # fmt: skip
IMAGES, GPUS = 10_000_000, 64
EFFICIENCY = 0.4
"""Assumed share of peak performance that the forward pass of a ViT reaches in bf16."""
PEAKS = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 operations per second, from data sheets."""
SCHEDULER_SECONDS = 1e-3
"""Scheduler time per task; order of magnitude from the documentation of Dask."""


def image_ids(shard: int, rows: int) -> list[str]:
    """Return ids that are distributed like digests."""
    return [hashlib.sha256(f"{shard}:{row}".encode()).hexdigest() for row in range(rows)]


def rows_of(count: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return zeros in the shapes of the tiny spec."""
    return {
        name: np.zeros((count, *layout.shape), layout.dtype)
        for name, layout in array_layouts(TINY).items()
        if name != "sha256"
    }


def write_real(store: Store, start: int) -> tuple[float, float]:
    """Measure the seconds to claim and to write a shard of one row."""
    begin = time.perf_counter()
    with claim_shard(store, start) as shard:
        claimed = time.perf_counter()
        write_shard(store, shard, image_ids(shard, 1), rows_of(1), 1.0)
        return claimed - begin, time.perf_counter() - claimed


def claim_once(store: Store) -> None:
    """Claim a shard without a hint where the finished shards end, and release it."""
    with claim_shard(store):
        pass


def fill(store: Store, first: int, last: int, rows: int, files: bool) -> None:
    """Write receipts of finished shards, and optionally empty array files."""
    names = list(array_layouts(TINY))
    empty = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()} for name in names}
    folders = [store.shard_file(name, 0) for name in names]
    for shard in range(first, last):
        receipt = {
            "shard": shard, "fingerprint": TINY.fingerprint, "rows": image_ids(shard, rows), "files": empty,
            "seconds": 1.0,
        }  # fmt: skip
        store.receipt(shard).write_text(json.dumps(receipt, indent=1))
        if files:
            for folder in folders:
                path = folder.with_name(folder.name.replace("c.0", f"c.{shard}", 1))
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    grow_store(store, last)


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Return median seconds and the last result."""
    seconds, result = [], None
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), result


def measure(folder: Path, shards: int, rows: int, files: bool) -> float:
    """Print the costs of a growing store, and return the seconds for which one growth locks the store."""
    store = create_store(folder, TINY, SIZE)
    head = ("finished shards", "claim, start known", "claim from 0", "write", "grow (lock held)", "list", "receipts")
    print(" | ".join(head))
    first, grow = 0, 0.0
    for count in sorted({min(1000, shards), shards // 8, shards}):
        fill(store, first, count, rows, files)
        claims, writes = zip(*(write_real(store, count) for _ in range(5)), strict=True)
        room = capacity(count + 5)
        grow, _ = timed(lambda: grow_store(store, room + 1))  # noqa: B023
        known = statistics.median(claims)
        from_zero, _ = timed(lambda: claim_once(store))
        listing, names = timed(store.finished_shards)
        print(
            f"{count:,} | {1e3 * known:.2f} ms | {1e3 * from_zero:.1f} ms | {1e3 * statistics.median(writes):.1f} ms | "
            f"{1e3 * grow:.1f} ms | {1e3 * listing:.1f} ms | {len(names):,}"
        )
        first = count + 5
    rebuild, (index, _) = timed(lambda: refresh_index(store))
    write_real(store, first)
    one_more, (index, _) = timed(lambda: refresh_index(store))
    unchanged, _ = timed(lambda: refresh_index(store))
    record = shard_record(len(array_layouts(TINY))).itemsize
    size = index_path(store).stat().st_size
    print(
        f"index built from all receipts: {rebuild:.1f} s; with one more shard: {one_more:.2f} s; "
        f"unchanged: {unchanged:.2f} s"
    )
    print(f"index: {size / 1e6:.1f} MB = 64 + {record} per shard + 36 per row; {len(index):,} rows")
    inventory, found = timed(lambda: take_inventory(store))
    wrong = len(found.broken)
    print(f"take_inventory: {inventory:.2f} s{f' ({wrong:,} shards without files)' if wrong else ''}")
    receipt = ExtractionReceipt(
        fingerprint=TINY.fingerprint, spec=TINY, images=len(index), manifest_sha256="",
        shards={str(number): digest for number, digest in index.digests().items()},
    )  # fmt: skip
    text = receipt.model_dump_json(indent=1)
    parse, _ = timed(lambda: ExtractionReceipt.model_validate_json(text))
    opened, reader = timed(lambda: open_store(folder, receipt))
    ids = [image_id for shard in range(0, shards, max(1, shards // 1000)) for image_id in image_ids(shard, rows)]
    find, places = timed(lambda: reader.find(ids))
    missing = int((places < 0).sum())
    reader.close()
    print(f"extraction receipt: {len(text) / 1e6:.1f} MB, parsed in {parse:.2f} s; store opened in {opened:.2f} s")
    print(f"{len(ids):,} images found in {1e3 * find:.1f} ms ({missing} missing)")
    return grow


@dataclass(frozen=True)
class Run:
    """Result of one simulated extraction."""

    seconds: float
    """Seconds until the last receipt."""
    ideal: float
    """Seconds without scheduler, lock and failures."""
    scheduler: float
    """Share of the time in which the scheduler is busy."""
    repeated: int
    """Number of lost attempts."""


def simulate(
    tasks: int, workers: int, task_seconds: float, lock_seconds: float, failure: float, restart: float, seed: int = 0
) -> Run:
    """Simulate a serial scheduler, a serial lock, and workers that run one task at a time.

    Args:
        tasks: Number of shards.
        workers: Number of GPUs.
        task_seconds: Mean duration of a task (log-normal, sigma 0.2).
        lock_seconds: Duration for which a finishing task locks the store.
        failure: Probability that an attempt dies, at a uniformly distributed time.
        restart: Seconds until a dead worker is back.
        seed: Seed of the simulation.
    """
    draw = random.Random(seed)
    # (time, action, worker): "request" a task, "store" its rows.
    events = [(0.0, "request", worker) for worker in range(workers)]
    waiting, handled, locked, lost, done = tasks, 0.0, 0.0, 0, 0
    busy = 0.0
    while done < tasks:
        now, what, worker = heapq.heappop(events)
        if what == "store":
            locked = max(locked, now) + lock_seconds
            done += 1
            heapq.heappush(events, (locked, "request", worker))
        elif waiting:
            handled = max(handled, now) + SCHEDULER_SECONDS
            busy += SCHEDULER_SECONDS
            length = task_seconds * draw.lognormvariate(-0.02, 0.2)
            if draw.random() < failure:
                lost += 1
                heapq.heappush(events, (handled + length * draw.random() + restart, "request", worker))
            else:
                waiting -= 1
                heapq.heappush(events, (handled + length, "store", worker))
    end = max(locked, handled)
    return Run(end, tasks * task_seconds / workers, busy / end, lost)


def show_simulations(lock_seconds: float) -> None:
    """Print how the scheduler limits the run as tasks get shorter, and the effect of growing arrays once per shard.

    Args:
        lock_seconds: Duration for which one growth of the arrays locks the store.
    """
    print(
        "per task | tasks | hours | of ideal | scheduler busy | attempts lost | of ideal, if each shard grew the arrays"
    )
    for size, seconds in ((32, 0.02), (32, 0.05), (32, 0.2), (32, 1.0), (32, 5.0), (1024, 1.7), (1024, 32.0)):
        tasks = -(-IMAGES // size)
        growths = len({capacity(shards) for shards in range(1, tasks + 1)})
        run = simulate(tasks, GPUS, seconds, lock_seconds * growths / tasks, 1e-3, 60.0)
        each = simulate(tasks, GPUS, seconds, lock_seconds, 1e-3, 60.0)
        print(
            f"{seconds:g} s ({size} images) | {tasks:,} | {run.seconds / 3600:.2f} | {run.seconds / run.ideal:.2f}x | "
            f"{run.scheduler:.0%} | {run.repeated:,} | {each.seconds / each.ideal:.2f}x"
        )


def show_costs() -> None:
    """Print the cost of ten million images for some models."""
    print(
        "model | GFLOP per image | A100 hours on 64 | H100 hours on 64 | bytes per image | TB | GB/s to keep up (A100)"
    )
    models: Sequence[tuple[str, str, int]] = (
        ("fpt+", "vit_base_patch16_384.orig_in21k_ft_in1k", 512),
        ("fpt", "vit_base_patch16_384.orig_in21k_ft_in1k", 512),
        ("fpt+", "vit_large_patch14_dinov2.lvd142m", 518),
        ("fpt+", "vit_giant_patch14_dinov2.lvd142m", 518),
    )
    for method, name, size in models:
        lpm = describe_lpm(name, size)
        raw = {"method": method, "lpm": {"name": name}, "features": {"image_size": size}}
        if lpm.width % (8 * lpm.heads):
            raw["train"] = {"side_reduction": 4}
        spec = feature_spec(resolve(parse_settings(raw), lpm), lpm, "0" * 64)
        work = forward_operations(lpm)
        hours = {kind: IMAGES * work / (peak * EFFICIENCY) / GPUS / 3600 for kind, peak in PEAKS.items()}
        total = IMAGES * spec.bytes_per_image
        print(
            f"{method} {name} | {work / 1e9:.0f} | {hours['A100']:.2f} | {hours['H100']:.2f} | "
            f"{spec.bytes_per_image:,} | {total / 1e12:.1f} | {total / 1e9 / (3600 * hours['A100']):.1f}"
        )
    arrays = len(array_layouts(TINY))
    print("images per shard | shards | files | extraction receipt | index of rows")
    for size in (32, 256, 1024, 4096):
        shards = -(-IMAGES // size)
        index = shards * shard_record(arrays).itemsize + 36 * IMAGES
        print(f"{size} | {shards:,} | {shards * (arrays + 1):,} | {shards * 78 / 1e6:.1f} MB | {index / 1e6:.0f} MB")


def main() -> None:
    """Measure, simulate and compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=31_250)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--no-files", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fpt-scale-", dir=arguments.folder) as folder:
        grow = measure(Path(folder), arguments.shards, arguments.rows, not arguments.no_files)
    print()
    show_simulations(grow)
    print()
    show_costs()


if __name__ == "__main__":
    main()
