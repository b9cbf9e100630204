"""What an epoch of stage two costs beside the published way, and eight runs in one pass beside one after the other.

    python benchmarks/train_speed.py [--rows 96] [--repeats 5] [--dtype int8] [--threads 1] [--folder DIR]

Geometry: FPT+ on ViT-B at 512 pixels, batches of 16, 5 classes; random features, JPEGs of 1,024 pixels. All ways take
turns within one run, medians, page cache warm. Loading a row's features, its image, augmentation
and the training step are in it; validation is not.

"published" reads one safetensors float32 file an image, decodes the original image and augments it at full size, as the
published code does, and computes attention explicitly; same network, same recipe. Of the sweep, eight learning rates
with one seed are trained; the largest difference of a weight to the run alone is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from extract_speed import make_photos
from PIL import Image
from read_speed import BATCH, LPM, fill, fill_peer, image_id, make_spec
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from schemas.parse import parse_settings
from schemas.resolve import network_spec, resolve
from schemas.settings import TrainSettings
from stages.extract.features import normalise
from stages.store.memory import MemoryRows
from stages.store.reader import open_store
from stages.train.data import EpochSampler, FeatureDataset, array_names, augmentation, batches
from stages.train.lanes import ONE, Lanes, open_lanes
from stages.train.loop import Fit, Recipe, Run, make_optimizer, training_step
from stages.train.network import PromptedSideNetwork
from stages.train.side_network import Attention

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


def epoch(runs: list[Run], data: FeatureDataset, lanes: Lanes = ONE) -> None:
    """One epoch of all runs on one stream."""
    for batch in batches(data, EpochSampler(len(data), BATCH, 0)):
        training_step(runs, batch, lanes=lanes)


class ExplicitAttention(nn.Module):
    """The side network's attention as plain operations."""

    def __init__(self, inner: Attention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor, kept: int) -> torch.Tensor:
        """Every token attends; those that nobody reads are cut afterwards."""
        batch, count, width = tokens.shape
        heads = self.inner.heads
        query, key, value = self.inner.qkv(tokens).view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1)
        mixed: torch.Tensor = self.inner.proj((weights @ value).transpose(1, 2).reshape(batch, count, width))
        return mixed[:, :kept]


def published_step(
    model: PromptedSideNetwork,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    cached: list[dict[str, torch.Tensor]],
) -> None:
    """Forward with explicit cross-attention, backward, clip, update."""
    keys, values = (torch.stack([one[name] for one in cached]) for name in ("keys", "values"))
    fusion = model.fusion
    assert fusion is not None
    tokens = model.side.embed(normalise(images, MEAN, STD))
    for layer in range(model.spec.layers):
        prompts = fusion.prompts[layer].expand(len(images), -1, -1)
        query = fusion.query(prompts).view(len(images), -1, LPM.heads, LPM.head_dim).transpose(1, 2)
        weights = (query @ keys[:, layer].transpose(-2, -1) * LPM.head_dim**-0.5).softmax(dim=-1)
        mixed = (weights @ values[:, layer]).transpose(1, 2).flatten(2)
        tokens = model.side.block(layer, tokens, fusion.dropout(fusion.out(mixed + prompts)))
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model.side.classify(tokens), torch.zeros(len(images), dtype=torch.int64))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def published_epoch(files: list[Path], images: list[tuple[str, str]], model: PromptedSideNetwork) -> None:
    """One epoch, the published way."""
    augment, optimizer = augmentation(settings().augment, model.spec.image_size), make_optimizer(model, settings())
    order = np.random.default_rng(0).permutation(len(files)).tolist()
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        pixels = [
            torch.from_numpy(np.array(Image.open(images[row][1]).convert("RGB"))).permute(2, 0, 1) for row in part
        ]
        published_step(
            model, optimizer, torch.stack([augment(one) for one in pixels]), [load_file(files[row]) for row in part]
        )


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
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
        open_lanes(len(RATES), torch.device("cpu")) as lanes,
    ):
        measure(Path(name), arguments, lanes)


def measure(folder: Path, arguments: argparse.Namespace, lanes: Lanes) -> None:
    """Time everything in turns."""
    _, receipt = fill(folder / "store", make_spec(arguments.dtype), arguments.rows)
    ids = [image_id(number) for number in range(arguments.rows)]
    files, images = fill_peer(folder / "peer", arguments.rows), make_photos(folder / "images", arguments.rows)
    reader = open_store(folder / "store", receipt)
    memory = MemoryRows(reader, ids, array_names(reader.layouts, "fpt+"))
    labels = [number % CLASSES for number in range(arguments.rows)]
    disk, held = (FeatureDataset(rows, ids, labels, 128, augment=settings().augment) for rows in (reader, memory))
    explicit = network()
    for block in explicit.side.blocks:
        block.attn = ExplicitAttention(block.attn)  # type: ignore[arg-type, assignment]
    explicit.train()
    single, many = run_of(network()), [run_of(network(), lr) for lr in RATES]
    alone = [run_of(network(), lr) for lr in RATES]
    ways: dict[str, Callable[[], object]] = {
        "published": lambda: published_epoch(files, images, explicit),
        "fpt+, from the disk": lambda: epoch([single], disk),
        "fpt+, held in memory": lambda: epoch([single], held),
        "eight one after the other": lambda: [epoch([run], held) for run in alone],
        "eight in one pass": lambda: epoch(many, held, lanes),
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
    for ours in ("fpt+, from the disk", "fpt+, held in memory"):
        print(f"  published / {ours}: {ratio(times['published'], times[ours]):.2f}")
    print(
        f"  one pass / one after the other: {ratio(times['eight in one pass'], times['eight one after the other']):.3f}"
    )


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
