"""Compare stage one on two Dask workers with one torch thread each to one such worker.

    python benchmarks/cluster_speed.py [--model vit_small_patch16_224] [--images 48] [--rounds 3]

Measures complete extractions: decoding, computing and writing features with their receipts, and loading the LPM in
each worker, but not starting the worker processes. Both clusters run all the time and take turns; medians are printed.
Weights and images are random. Two cores should nearly double the speed; expect a factor of at least 1.6.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import timm
import torch
from distributed import LocalCluster
from PIL import Image
from safetensors.torch import save_file

from pipeline.cluster.executor import on_cluster
from pipeline.cluster.start import TASKS_PER_WORKER
from schemas.manifest import Manifest
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.resolved import ResolvedSettings
from stages.extract.extractor import Execute, ExtractionJob, extract
from stages.extract.shard_task import inline
from stages.lpm.loading import describe_lpm
from stages.manifest import read_manifest
from stages.prepare import prepare

CLASSES = ("left", "right")


def make_study(root: Path, model: str, size: int, images: int) -> tuple[ResolvedSettings, Manifest]:
    """Write smooth JPEGs of twice the input size of the LPM, and random weights."""
    rng = np.random.default_rng(0)
    for number in range(images):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        path = root / "images" / CLASSES[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((2 * size, 2 * size), Image.Resampling.BICUBIC).save(path, quality=92)
    torch.manual_seed(0)
    save_file(timm.create_model(model, pretrained=False).state_dict(), root / "lpm.safetensors")
    raw = {
        "data": {"images": "images"},
        "lpm": {"name": model, "weights": "lpm.safetensors"},
        "features": {"image_size": size, "shard_size": 4},
        "compute": {"device": "cpu", "threads": 1},
    }
    settings = resolve(parse_settings(raw), describe_lpm(model, size))
    prepare(settings.data, root, root / "outputs/manifest")
    return settings, read_manifest(root / "outputs/manifest/manifest.parquet")


def seconds(settings: ResolvedSettings, root: Path, manifest: Manifest, execute: Execute) -> float:
    """Time one extraction into an empty cache."""
    cache = root / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    start = time.perf_counter()
    extract(ExtractionJob(settings, root, cache, manifest, root / "outputs/features"), execute=execute)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="for the images and the store")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        settings, manifest = make_study(root, options.model, options.image_size, options.images)
        variants: dict[str, tuple[ResolvedSettings, Execute]] = {"this process, one thread": (settings, inline)}
        for workers in (1, 2):
            cluster = stack.enter_context(
                LocalCluster(n_workers=workers, threads_per_worker=TASKS_PER_WORKER, dashboard_address="127.0.0.1:0")
            )
            raw = {"cluster": {"kind": "scheduler", "address": cluster.scheduler_address}}
            on_workers = settings.model_copy(update={"cluster": parse_settings(raw).cluster})
            variants[f"{workers} worker{'s' * (workers > 1)}, one thread each"] = (on_workers, on_cluster)
        print(f"{options.model} at {options.image_size}, {options.images} images, {len(os.sched_getaffinity(0))} cores")
        print(f"load at the start {os.getloadavg()[0]:.2f}")
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(options.rounds + 1):
            for name, (on_workers, execute) in variants.items():
                spent = seconds(on_workers, root, manifest, execute)
                # The first turn is a warm-up, for imports of the workers and the page cache.
                if turn:
                    times[name].append(spent)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        all_times = " ".join(f"{value:.1f}" for value in times[name])
        print(f"{name:32} {median:7.2f} s  {options.images / median:6.2f} images/s   ({all_times})")
    inline_time, one, two = medians.values()
    print(f"two workers against one: {one / two:.2f}x; against this process: {inline_time / two:.2f}x")


if __name__ == "__main__":
    main()
