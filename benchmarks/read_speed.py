"""Compare the read speed of the store to one safetensors file per image and to plain preads of the same bytes.

    python benchmarks/read_speed.py [--rows 192] [--repeats 15] [--dtype float16] [--folder DIR] [--million]

Geometry: FPT+ on ViT-B at 512 pixels (6 layers, 12 heads, 205 tokens, 64 channels); random numbers. The baseline is
the format of the published code: float32, one file per image, `safetensors.torch.load_file`, stacked. All variants take
turns within one run; medians, one torch thread. Cold: the pages of the files are dropped with posix_fadvise before each
batch.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from schemas.features import ExtractionReceipt, FeatureSpec, LpmInfo
from schemas.methods import METHODS
from stages.store.index import refresh_index
from stages.store.layout import Store, array_layouts, create_store, grow_store
from stages.store.reader import StoreReader, open_store, read_receipt
from stages.store.writer import claim_shard, write_shard
from stages.train.data import BatchLoader, EpochSampler, FeatureDataset, Reading

BATCH = 16
KEPT, HEADS, WIDTH, LAYERS = 205, 12, 768, 6
SIDE = 144
LPM = LpmInfo(
    name="benchmark", depth=12, width=WIDTH, heads=HEADS, patch=16, prefix_tokens=1, has_class_token=True,
    image_size=512, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic",
)  # fmt: skip
Read = Callable[[list[int]], object]


def image_id(number: int) -> str:
    """Return the id of a synthetic image."""
    return f"{number + 1:064x}"


def make_spec(dtype: Any) -> FeatureSpec:
    """Return the feature spec of FPT+ on ViT-B at 512 pixels."""
    return FeatureSpec(
        lpm=LPM, weights_sha256="0" * 64, layers=tuple(range(6, 12)), importance="global", kept=KEPT, dtype=dtype,
        side_image_size=SIDE,
    )  # fmt: skip


def fill(folder: Path, spec: FeatureSpec, rows: int) -> tuple[Store, ExtractionReceipt]:
    """Write a store of random rows."""
    store = create_store(folder, spec, 32)
    layouts = array_layouts(spec)
    for first in range(0, rows, 32):
        count = min(32, rows - first)
        arrays = {}
        for name, layout in layouts.items():
            if name != "sha256":
                size = count * int(np.prod(layout.shape))
                kind = np.dtype(layout.dtype)
                # Random bits of float16 would include infinities.
                numbers = np.resize(np.random.default_rng(first).standard_normal(2**20, np.float32) * 20, size)
                arrays[name] = numbers.astype(kind).reshape(count, *layout.shape)
        with claim_shard(store) as shard:
            write_shard(store, shard, [image_id(first + n) for n in range(count)], arrays, 1.0)
    index, _ = refresh_index(store)
    digests = {str(number): value for number, value in index.digests().items()}
    return store, ExtractionReceipt(
        fingerprint=spec.fingerprint, spec=spec, images=rows, manifest_sha256="", shards=digests
    )


def fill_peer(folder: Path, rows: int) -> list[Path]:
    """Write one float32 file per image."""
    folder.mkdir()
    shape = (LAYERS, HEADS, KEPT, WIDTH // HEADS)
    for number in range(rows):
        save_file({name: torch.randn(shape) for name in ("keys", "values")}, folder / f"{number}.safetensors")
    return [folder / f"{number}.safetensors" for number in range(rows)]


def peer_batch(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a batch as a data set of the published code does."""
    loaded = [load_file(file) for file in files]
    return torch.stack([one["keys"] for one in loaded]), torch.stack([one["values"] for one in loaded])


class PeerDataset(Dataset[Any]):
    """The published data set, for a DataLoader."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        loaded = load_file(self._files[position])
        return loaded["keys"], loaded["values"]


class Plain:
    """Plain preads of the same number of bytes, at similar offsets, into one buffer."""

    def __init__(self, store: Store) -> None:
        self._files = {
            (name, shard): os.open(store.shard_file(name, shard), os.O_RDONLY)
            for name in ("keys", "values")
            for shard in store.finished_shards()
        }
        self._rows: dict[str, int] = {}
        self._buffer: dict[str, memoryview] = {}
        for name in ("keys", "values"):
            layout = array_layouts(store.spec)[name]
            self._rows[name] = int(np.prod(layout.shape)) * np.dtype(layout.dtype).itemsize
            self._buffer[name] = memoryview(np.empty(BATCH * self._rows[name], np.uint8))

    def __call__(self, numbers: list[int]) -> None:
        """Read a batch."""
        for name, size in self._rows.items():
            buffer = self._buffer[name]
            for at, number in enumerate(numbers):
                shard, slot = divmod(number, 32)
                os.preadv(self._files[name, shard], [buffer[at * size : (at + 1) * size]], slot * (size + 4))


def drop(files: list[Path]) -> None:
    """Drop the pages of files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def in_turns(variants: dict[str, Read], rows: int, repeats: int, before: Callable[[], None] = lambda: None) -> None:
    """Print the median samples per second of each variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    pick = random.Random(0)
    for _ in range(repeats):
        for name, variant in variants.items():
            numbers = pick.sample(range(rows), BATCH)
            before()
            start = time.perf_counter()
            variant(numbers)
            times[name].append(time.perf_counter() - start)
    table({name: BATCH / statistics.median(values) for name, values in times.items()})


def table(speeds: dict[str, float]) -> None:
    """Print each variant relative to the first one."""
    first = next(iter(speeds.values()))
    for name, speed in speeds.items():
        print(f"  {name:46s} {speed:9.0f} samples/s {speed / first:7.2f}x", flush=True)


def through_loaders(store: Path, receipt: ExtractionReceipt, files: list[Path], rows: int, rounds: int) -> None:
    """Time epochs of both loaders in turn; workers are started once, and the first epoch is not counted."""
    reader = open_store(store, receipt)
    ids = [image_id(number) for number in range(rows)]
    for workers in (0, 2):
        print(f"through the data loader, {workers} workers, page cache warm")
        data = FeatureDataset(reader, ids, [0] * rows, Reading(METHODS["fpt+"].inputs, SIDE))
        ours = BatchLoader(data, EpochSampler(rows, BATCH, seed=0), workers)
        peer: Any = DataLoader(
            PeerDataset(files), BATCH, shuffle=True, num_workers=workers, persistent_workers=bool(workers),
            multiprocessing_context="forkserver" if workers else None,
        )  # fmt: skip
        times: dict[str, list[float]] = {"safetensors fp32": [], "fpt (with side images)": []}
        for round_ in range(rounds + 1):
            for name, loader in zip(times, (peer, ours), strict=True):
                start = time.perf_counter()
                count = 0
                for _ in loader:
                    count += 1
                if round_:
                    times[name].append((time.perf_counter() - start) / count)
        table({name: BATCH / statistics.median(values) for name, values in times.items()})


def buffers(reader: StoreReader) -> dict[str, Any]:
    """Buffers that all batches reuse."""
    return {name: np.zeros((BATCH, *reader.layouts[name].shape), reader.layouts[name].dtype) for name in ARRAYS(reader)}


def ARRAYS(reader: StoreReader) -> list[str]:  # noqa: N802
    """Return the names of keys, values and their scales."""
    return [name for name in reader.layouts if name.startswith(("keys", "values"))]


def warm_and_cold(folder: Path, store: Store, receipt: ExtractionReceipt, files: list[Path], args: Any) -> None:
    """Time single batches."""
    reader = open_store(folder, receipt)
    kept, names = buffers(reader), ARRAYS(reader)

    def ours(numbers: list[int]) -> object:
        return reader.read([image_id(number) for number in numbers], names, kept)

    def peer(numbers: list[int]) -> object:
        return peer_batch([files[number] for number in numbers])

    plain = Plain(store)
    shards = [path for name in names for path in (store.group / name).glob("c.*")]
    for number in range(0, args.rows, BATCH):
        some = list(range(number, min(args.rows, number + BATCH)))
        ours(some), peer(some)
    print("page cache warm")
    variants: dict[str, Read] = {"safetensors fp32": peer, "fpt": ours, "plain pread of the same bytes": plain}
    in_turns(variants, args.rows, args.repeats)
    os.sync()
    print("page cache dropped before each batch")
    in_turns(variants, args.rows, max(3, args.repeats // 2), lambda: drop([*files, *shards]))
    fresh = open_store(folder, receipt)
    print("first read of every row (checksums), page cache warm")
    variants = {"safetensors fp32": peer, "fpt": lambda some: fresh.read([image_id(n) for n in some], names, kept)}
    in_turns(variants, args.rows, max(3, args.rows // BATCH // 3))


def million(folder: Path) -> None:
    """Time opening a store with a million rows in its index."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from stores import image_id as real_id
    from stores import million as make

    from stages.store.extraction_receipt import read_extraction_receipt, write_extraction_receipt
    from stages.store.index import load_index

    receipt, _ = make(folder / "million")
    write_extraction_receipt(receipt, folder / "receipt.json")
    small, _ = make(folder / "thousand", shards=32)
    for name, each in (("1,000", small), ("1,000,000", receipt)):
        root = folder / ("million" if each is receipt else "thousand")
        opening, finding, reading = [], [], []
        for _ in range(9):
            start = time.perf_counter()
            reader = open_store(root, each)
            opening.append(time.perf_counter() - start)
            reader.read([real_id(1)], ["keys", "values"])
            start = time.perf_counter()
            rows = reader.locate([real_id(n) for n in range(16)])
            finding.append(time.perf_counter() - start)
            start = time.perf_counter()
            reader.read_rows(rows, [real_id(n) for n in range(16)], ["keys", "values"])
            reading.append(time.perf_counter() - start)
        a, b, c = (1e3 * statistics.median(values) for values in (opening, finding, reading))
        print(f"  {name:>10s} rows: open {a:7.2f} ms, find 16 rows {b:6.3f} ms, read 16 tiny rows {c:6.3f} ms")
    start = time.perf_counter()
    read_extraction_receipt(folder / "receipt.json")
    size = (folder / "receipt.json").stat().st_size / 1e6
    print(f"  the extraction receipt itself ({size:.1f} MB): {1e3 * (time.perf_counter() - start):.1f} ms")
    store = reader.store
    start = time.perf_counter()
    load_index(store)
    print(f"  only the index: {1e3 * (time.perf_counter() - start):.1f} ms")


def linked(folder: Path, base: Store, shards: int) -> tuple[Store, ExtractionReceipt, float]:
    """Build a store of many shards whose files are links to the few shards of `base`, to save space.

    Returns:
        Store, receipt, and the seconds for building its index from all receipts.
    """
    store = create_store(folder, base.spec, base.shard_size)
    grow_store(store, shards)
    sources = [read_receipt(base, number) for number in base.finished_shards()]
    for number in range(shards):
        source = sources[number % len(sources)]
        for name in source.files:
            os.link(base.shard_file(name, source.shard), store.shard_file(name, number))
        rows = tuple(image_id(number * base.shard_size + slot) for slot in range(len(source.rows)))
        receipt = source.model_copy(update={"shard": number, "rows": rows})
        store.receipt(number).write_text(receipt.model_dump_json(indent=1))
    start = time.perf_counter()
    index, _ = refresh_index(store)
    seconds = time.perf_counter() - start
    digests = {str(number): value for number, value in index.digests().items()}
    made = ExtractionReceipt(
        fingerprint=base.spec.fingerprint, spec=base.spec, images=len(index), manifest_sha256="", shards=digests
    )
    return store, made, seconds


def spread(folder: Path, dtype: str) -> None:
    """Compare random batches from a million rows in 31,250 shards to batches from a thousand rows."""
    base, _ = fill(folder / "base", make_spec(dtype), 256)
    readers, wanted = {}, {}
    random_ = random.Random(0)
    for name, shards in (("1,000", 32), ("1,000,000", 31_250)):
        _, receipt, seconds = linked(folder / name, base, shards)
        print(f"  {name:>10s} rows: index built from {shards:,} receipts in {seconds:.2f} s")
        readers[name] = open_store(folder / name, receipt)
        ids = [image_id(number) for number in range(shards * 32)]
        wanted[name] = [random_.sample(ids, BATCH) for _ in range(96)]
    out: dict[str, dict[str, Any] | None] = dict.fromkeys(readers)
    for title in ("first read", "read again"):
        times: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(96):
            for name, reader in readers.items():
                ids = wanted[name][turn]
                start = time.perf_counter()
                rows = reader.read_rows(
                    reader.locate(ids), ids, ["keys", "values", "scale", "offset", "side"], out[name]
                )
                times[name].append(time.perf_counter() - start)
                out[name] = rows
        small, large = (statistics.median(times[name]) for name in readers)
        print(f"  {title}: 16 rows of 1,000 in {1e3 * small:.1f} ms, of 1,000,000 in {1e3 * large:.1f} ms:"
              f" {large / small:.2f}x")  # fmt: skip


def temporary(folder: Path | None) -> Iterator[Path]:
    """Provide a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="read-speed-") as name:
        yield Path(name)


def main() -> None:
    """Parse the arguments and run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder on the disk to measure; default: the temporary folder"
    )
    parser.add_argument(
        "--million", action="store_true", help="only measure opening and random reads of a million rows"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in temporary(args.folder):
        if args.million:
            million(folder)
            spread(folder, "int8")
            continue
        store, receipt = fill(folder / "store", make_spec(args.dtype), args.rows)
        files = fill_peer(folder / "peer", args.rows)
        print(f"{args.rows} rows, {args.dtype}, batches of {BATCH} in random order")
        warm_and_cold(folder / "store", store, receipt, files, args)
        through_loaders(folder / "store", receipt, files, args.rows, 3)


if __name__ == "__main__":
    main()
