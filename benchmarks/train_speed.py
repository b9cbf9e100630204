"""Compare an epoch of stage two to the published training loop, and eight runs in one pass to sequential runs.

    python benchmarks/train_speed.py [--rows 96] [--repeats 5] [--dtype int8] [--threads 1] [--folder DIR]

Geometry: FPT+ on ViT-B at 512 pixels, batches of 16, 5 classes; random features, JPEGs of 1,024 pixels. All variants
take turns within one process, which keeps freed memory as training does; medians, page cache warm. The time includes
loading features and images, augmentation and the training step, but not validation.

"published" is the published training loop (`benchmarks/published.py`): one safetensors float32 file per image; the
original image is decoded, then flipped, jittered and cropped at full size with PIL; samples are stacked by a DataLoader
without workers; attention is not fused, and all tokens and prompts pass through every block. Initial weights and recipe
are the same, and the networks are first checked to be the same function. The JPEGs have 0.34 bytes per pixel and take
5 ms per megapixel to decode (photographs of PH2 at quality 90: 0.25 and 4).

The sweep trains eight learning rates with one seed; the largest difference of a weight to a single run is printed.
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

from schemas.features import FeatureSpec
from schemas.methods import METHODS
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.resolved import ResolvedSettings
from stages.device import keep_freed_memory
from stages.methods.base import gradient_method
from stages.methods.batch import array_names
from stages.methods.fpt import PromptedSideNetwork
from stages.store.memory_rows import MemoryRows
from stages.store.reader import open_store
from stages.threads import CALLING_THREAD, Threads, open_threads
from stages.train.checkpoints import Fit
from stages.train.data import EpochSampler, FeatureDataset, Reading, batches
from stages.train.loop import Recipe, Run, make_optimizer, training_step

CLASSES = 5
RATES = (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3)
METHOD = "fpt+"


def settings(lr: float = 5e-4) -> ResolvedSettings:
    """Return the settings of the published recipe."""
    return resolve(parse_settings({"method": METHOD, "train": {"lr": lr}}), LPM)


def network() -> PromptedSideNetwork:
    """Build FPT+ on ViT-B, with reproducible weights."""
    torch.manual_seed(0)
    method = gradient_method(METHOD)
    built = method.build(method.spec(settings(), LPM, CLASSES))
    if not isinstance(built, PromptedSideNetwork):
        raise TypeError(f"{METHOD} is not a single side network")
    return built


def run_of(model: PromptedSideNetwork, features: FeatureSpec, lr: float = 5e-4) -> Run:
    """Set up a run at its first epoch."""
    recipe = Recipe(settings(lr).train, features, None, torch.device("cpu"), 0)
    model.train().reseed(0, 1)
    return Run(Fit(model, make_optimizer(model, recipe.settings)), recipe, Path(), lambda _: None)


def epoch(runs: list[Run], data: FeatureDataset, threads: Threads = CALLING_THREAD) -> None:
    """Train one epoch of all runs on one stream of batches."""
    for batch in batches(data, EpochSampler(len(data), BATCH, 0)):
        training_step(runs, batch, threads=threads)


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder on the disk to measure; default: the temporary folder"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
        open_threads(len(RATES), torch.device("cpu")) as threads,
    ):
        measure(Path(name), arguments, threads)


def measure(folder: Path, arguments: argparse.Namespace, threads: Threads) -> None:
    """Time all variants in turn."""
    _, receipt = fill(folder / "store", make_spec(arguments.dtype), arguments.rows)
    ids = [image_id(number) for number in range(arguments.rows)]
    files, images = fill_peer(folder / "peer", arguments.rows), make_photos(folder / "images", arguments.rows)
    reader = open_store(folder / "store", receipt)
    memory = MemoryRows(reader, ids, sorted(array_names(METHODS[METHOD].inputs)))
    labels = [number % CLASSES for number in range(arguments.rows)]
    spec, recipe = receipt.spec, settings().train
    reading = Reading(METHODS[METHOD].inputs, recipe.side_image_size, recipe.augment)
    disk, in_memory = (FeatureDataset(rows, ids, labels, reading) for rows in (reader, memory))
    published = published_training([path for _, path in images], files, labels)
    single, many = run_of(network(), spec), [run_of(network(), spec, lr) for lr in RATES]
    sequential = [run_of(network(), spec, lr) for lr in RATES]
    variants: dict[str, Callable[[], object]] = {
        "published": published.epoch,
        "fpt+, from disk": lambda: epoch([single], disk),
        "fpt+, in memory": lambda: epoch([single], in_memory),
        "eight sequential runs": lambda: [epoch([run], in_memory) for run in sequential],
        "eight runs in one pass": lambda: epoch(many, in_memory, threads),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for attempt in range(arguments.repeats + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if attempt:
                times[name].append(time.perf_counter() - start)
        if not attempt:
            print(f"largest difference of a weight after an epoch: {difference(sequential, many):.1e}")
    print(f"{arguments.rows} rows, {arguments.dtype}, {arguments.repeats} repeats, torch threads: {arguments.threads}")
    for name, found in times.items():
        print(f"  {name:<28}{1e3 * statistics.median(found) / arguments.rows:8.1f} ms per image and epoch")
    parts = [
        f"{name} {1e3 * statistics.median(found[1:]) / arguments.rows:.1f}" for name, found in published.parts.items()
    ]
    print(f"  of published: {', '.join(parts)}")
    for ours in ("fpt+, from disk", "fpt+, in memory"):
        print(f"  published / {ours}: {ratio(times['published'], times[ours]):.2f}")
    print(f"  one pass / sequential: {ratio(times['eight runs in one pass'], times['eight sequential runs']):.3f}")


def published_training(images: list[str], files: list[Path], labels: list[int]) -> PublishedTraining:
    """Set up the published loop at its first epoch."""
    recipe, ours = settings().train, network()
    require_same_function(ours.spec, KEPT)
    data = PublishedDataset(images, files, labels, ours.spec.image_size, recipe.augment, (LPM.mean, LPM.std))
    return PublishedTraining(PublishedNetwork.like(ours), data, BATCH, recipe.lr, recipe.weight_decay)


def ratio(left: list[float], right: list[float]) -> float:
    """Return the median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(left, right, strict=True))


def difference(left: list[Run], right: list[Run]) -> float:
    """Return the largest difference of a weight between runs that should be equal."""
    return max(
        float((a - b).detach().abs().max())
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True)
    )


if __name__ == "__main__":
    main()
