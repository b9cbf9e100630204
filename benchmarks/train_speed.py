"""What an epoch of stage two costs beside the published way, and eight runs in one pass beside one after the other.

    python benchmarks/train_speed.py [--rows 96] [--repeats 5] [--dtype int8] [--threads 1] [--folder DIR]

Geometry: FPT+ on ViT-B at 512 pixels, batches of 16, 5 classes; random features, JPEGs of 1,024 pixels. All ways take
turns within one process, which keeps freed memory as training does; medians, page cache warm. Loading a row's features,
its image, augmentation and the training step are in it; validation is not.

"published" is the published training loop as `benchmarks/published.py` says: one safetensors float32 file an image, the
original image decoded, then flipped, jittered and cropped at full size with PIL, samples stacked by a DataLoader
without workers, attention of all layers to the cached tokens and of the side ViT in plain operations, all tokens and
prompts through every block. Same weights at the start and same recipe; that it is the same function is checked first.
The JPEGs have 0.34 bytes a pixel and take 5 ms a megapixel to decode (photographs of PH2 at quality 90: 0.25 and 4).

Of the sweep, eight learning rates with one seed are trained; the largest difference of a weight to the run alone is
printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from extract_speed import make_photos
from published import PublishedDataset, PublishedNetwork, PublishedTraining, require_same_function
from read_speed import BATCH, KEPT, LPM, fill, fill_peer, image_id, make_spec

from schemas.parse import parse_settings
from schemas.resolve import network_spec, resolve
from schemas.settings import TrainSettings
from stages.device import keep_freed_memory
from stages.methods.fpt import PromptedSideNetwork
from stages.store.memory_rows import MemoryRows
from stages.store.reader import open_store
from stages.threads import CALLING_THREAD, Threads, open_threads
from stages.train.checkpoints import Fit
from stages.train.data import EpochSampler, FeatureDataset, array_names, batches
from stages.train.loop import Recipe, Run, make_optimizer, training_step

CLASSES = 5
RATES = (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3)
MEAN = STD = (0.5, 0.5, 0.5)


def settings(lr: float = 5e-4) -> TrainSettings:
    """The published recipe."""
    return resolve(parse_settings({"method": "fpt+", "train": {"lr": lr}}), LPM).train


def network() -> PromptedSideNetwork:
    """FPT+ on ViT-B, always the same weights."""
    torch.manual_seed(0)
    return PromptedSideNetwork(network_spec(resolve(parse_settings({"method": "fpt+"}), LPM), LPM, CLASSES))


def run_of(model: PromptedSideNetwork, lr: float = 5e-4) -> Run:
    """A run at its start."""
    recipe = Recipe(settings(lr), MEAN, STD, None, torch.device("cpu"), 0)
    model.train().reseed(0, 1)
    return Run(Fit(model, make_optimizer(model, recipe.settings)), recipe, Path(), lambda _: None)


def epoch(runs: list[Run], data: FeatureDataset, threads: Threads = CALLING_THREAD) -> None:
    """One epoch of all runs on one stream."""
    for batch in batches(data, EpochSampler(len(data), BATCH, 0)):
        training_step(runs, batch, threads=threads)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; else the temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
        open_threads(len(RATES), torch.device("cpu")) as threads,
    ):
        measure(Path(name), arguments, threads)


def measure(folder: Path, arguments: argparse.Namespace, threads: Threads) -> None:
    """Time everything in turns."""
    _, receipt = fill(folder / "store", make_spec(arguments.dtype), arguments.rows)
    ids = [image_id(number) for number in range(arguments.rows)]
    files, images = fill_peer(folder / "peer", arguments.rows), make_photos(folder / "images", arguments.rows)
    reader = open_store(folder / "store", receipt)
    memory = MemoryRows(reader, ids, array_names(reader.layouts, "fpt+"))
    labels = [number % CLASSES for number in range(arguments.rows)]
    disk, held = (FeatureDataset(rows, ids, labels, 128, augment=settings().augment) for rows in (reader, memory))
    published = published_training([path for _, path in images], files, labels)
    single, many = run_of(network()), [run_of(network(), lr) for lr in RATES]
    alone = [run_of(network(), lr) for lr in RATES]
    ways: dict[str, Callable[[], object]] = {
        "published": published.epoch,
        "fpt+, from the disk": lambda: epoch([single], disk),
        "fpt+, held in memory": lambda: epoch([single], held),
        "eight one after the other": lambda: [epoch([run], held) for run in alone],
        "eight in one pass": lambda: epoch(many, held, threads),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for attempt in range(arguments.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if attempt:
                times[name].append(time.perf_counter() - start)
        if not attempt:
            print(f"largest difference of a weight after an epoch: {difference(alone, many):.1e}")
    print(f"{arguments.rows} rows, {arguments.dtype}, {arguments.repeats} repeats, torch threads: {arguments.threads}")
    for name, found in times.items():
        print(f"  {name:<28}{1e3 * statistics.median(found) / arguments.rows:8.1f} ms an image and epoch")
    parts = [
        f"{name} {1e3 * statistics.median(found[1:]) / arguments.rows:.1f}" for name, found in published.parts.items()
    ]
    print(f"  of published: {', '.join(parts)}")
    for ours in ("fpt+, from the disk", "fpt+, held in memory"):
        print(f"  published / {ours}: {ratio(times['published'], times[ours]):.2f}")
    print(
        f"  one pass / one after the other: {ratio(times['eight in one pass'], times['eight one after the other']):.3f}"
    )


def published_training(images: list[str], files: list[Path], labels: list[int]) -> PublishedTraining:
    """The published loop at its start."""
    recipe, ours = settings(), network()
    require_same_function(ours.spec, KEPT)
    data = PublishedDataset(images, files, labels, ours.spec.image_size, recipe.augment, (MEAN, STD))
    return PublishedTraining(PublishedNetwork.like(ours), data, BATCH, recipe.lr, recipe.weight_decay)


def ratio(left: list[float], right: list[float]) -> float:
    """Median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def difference(left: list[Run], right: list[Run]) -> float:
    """Largest difference of a weight between runs that should be equal."""
    return max(
        float((a - b).detach().abs().max())
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True)
    )


if __name__ == "__main__":
    main()
