"""Compare time and memory of stage one to a plain forward pass of the same LPM.

    python benchmarks/extract_speed.py                       ViT-B at 512, 8 images, 5 rounds: about 15 minutes
    python benchmarks/extract_speed.py --images 4 --rounds 3 --threads 1
    python benchmarks/extract_speed.py --memory              ViT-B at 1024, one image: a minute or two

Time: all variants take turns within one run, on the same images; medians of the rounds and of the ratios within a
round. The LPM has random weights and is loaded before. "bare" is `forward_features` of the timm model with fused
attention, on batches in memory. Ours is a complete extraction without loading the LPM: JPEGs of 1,024 pixels are
decoded and resized, and features are computed and written to a new int8 store. "published" is the published method:
explicit attention in every layer, and one safetensors float32 file per image, with sequential decoding.

Memory: peak of all tensors in a forward pass of one image, measured by MemTracker of torch, with and without weights.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from schemas.features import FeatureSpec
from schemas.parse import parse_settings
from schemas.resolve import feature_spec, resolve
from schemas.resolved import ResolvedSettings
from schemas.views import IDENTITY
from stages.extract.extractor import plan_tasks
from stages.extract.features import Pixels, to_pixels
from stages.extract.shard_task import Extractor
from stages.extract.taps import Tapped, Taps
from stages.files import sha256_file
from stages.images import read_image
from stages.lpm.loading import describe_lpm
from stages.pixels import normalise
from stages.store.layout import create_store
from stages.store.quantise import encode
from stages.train.cost import total_tracker

LPM = "vit_base_patch16_384.orig_in21k_ft_in1k"


@dataclass(frozen=True)
class Variant:
    """A variant of extraction to measure."""

    name: str
    settings: dict[str, Any]


VARIANTS = (
    Variant("fpt+", {"method": "fpt+"}),
    Variant("fpt+, no statistics", {"method": "fpt+", "statistics": False}),
    Variant("fpt+, keys and values only", {"method": "fpt+", "statistics": False, "pooled": False}),
    Variant("statistics only", {"method": "statistics", "tokens": False}),
    Variant("fpt", {"method": "fpt"}),
    Variant("fpt, keys and values only", {"method": "fpt", "statistics": False, "pooled": False}),
    Variant("fpt+, bfloat16", {"method": "fpt+", "precision": "bfloat16"}),
    Variant("fpt+, bfloat16, no statistics", {"method": "fpt+", "precision": "bfloat16", "statistics": False}),
)


def main() -> None:
    """Parse the arguments, measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lpm", default=LPM)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: all that the process may use")
    parser.add_argument("--skip", nargs="*", default=[], help="substrings of names of variants to skip")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.lpm)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure_time(Path(folder), arguments)


def settings_of(lpm: str, variant: Variant, image_size: int, arguments: argparse.Namespace) -> ResolvedSettings:
    """Return the resolved settings of a variant."""
    chosen = dict(variant.settings)
    method = chosen.pop("method")
    raw = {
        "method": method,
        "lpm": {"name": lpm, "weights": "lpm.safetensors"},
        "features": {"image_size": image_size, "shard_size": arguments.images, **chosen},
        "compute": {"device": "cpu", "threads": arguments.threads, "extract_batch_size": arguments.batch},
    }
    return resolve(parse_settings(raw), describe_lpm(lpm, image_size))


def measure_time(folder: Path, arguments: argparse.Namespace) -> None:
    """Time all variants in turn."""
    size = describe_lpm(arguments.lpm, 512).image_size
    model: Any = timm.create_model(arguments.lpm, pretrained=False, num_classes=0, img_size=size).eval()
    save_file(model.state_dict(), folder / "lpm.safetensors")
    images = make_photos(folder / "images", arguments.images)
    variants = [variant for variant in VARIANTS if not any(word in variant.name for word in arguments.skip)]
    specs = {
        variant.name: spec_of(settings_of(arguments.lpm, variant, size, arguments), folder) for variant in variants
    }
    extractors = {}
    for number, variant in enumerate(variants):
        settings = settings_of(arguments.lpm, variant, size, arguments)
        store = create_store(folder / f"cache-{number}", specs[variant.name], arguments.images)
        extractors[variant.name] = (store, Extractor(settings, folder, store))
    batches = [images[first : first + arguments.batch] for first in range(0, len(images), arguments.batch)]
    stacks = [
        [to_pixels(read_image(Path(path), max_pixels=10**8), specs[variants[0].name]) for _, path in batch]
        for batch in batches
    ]
    preloaded = [to_tensor(batch, specs[variants[0].name]) for batch in stacks]
    runs: dict[str, Callable[[], object]] = {"bare": lambda: [model.forward_features(batch) for batch in preloaded]}
    rows = [(*image, IDENTITY) for image in images]
    for name, (store, extractor) in extractors.items():
        runs[name] = lambda s=store, e=extractor: list(e.run(plan_tasks(s, rows), lambda _: None))
    counter = itertools.count()
    runs["published"] = lambda: published(
        model, specs[variants[0].name], images, folder / f"p{next(counter)}", arguments
    )
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for attempt in range(arguments.rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if attempt:
                    times[name].append(time.perf_counter() - start)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{arguments.lpm} at {size}, {len(images)} images, batch {arguments.batch}, {threads} threads, "
          f"{arguments.rounds} rounds; load average {load:.1f}")  # fmt: skip
    print(f"{'variant':<26}{'s per image':>12}{'/ bare':>9}{'(min-max)':>14}{'published /':>13}")
    for name, found in times.items():
        ratios = [mine / bare for mine, bare in zip(found, times["bare"], strict=True)]
        against = statistics.median(theirs / mine for mine, theirs in zip(found, times["published"], strict=True))
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        middle = statistics.median(found) / len(images)
        print(f"{name:<26}{middle:>12.3f}{statistics.median(ratios):>9.3f}{spread:>14}{against:>13.2f}")


def spec_of(settings: ResolvedSettings, folder: Path) -> FeatureSpec:
    """Return the features that the settings store."""
    lpm = describe_lpm(settings.lpm.name, settings.features.image_size)
    return feature_spec(settings, lpm, sha256_file(folder / "lpm.safetensors"))


def make_photos(folder: Path, count: int) -> list[tuple[str, str]]:
    """Write smooth colours with some noise as JPEGs of 1,024 pixels, and return (image id, path) of each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((1024, 1024))
        pixels = np.asarray(coarse, np.int16) + random.integers(-12, 12, (1024, 1024, 1))
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        found.append((sha256_file(path), str(path)))
    return found


def to_tensor(pixels: list[Pixels], spec: FeatureSpec) -> torch.Tensor:
    """Return normalised images, (B, 3, S, S)."""
    stacked = torch.from_numpy(np.stack([image.lpm for image in pixels])).permute(0, 3, 1, 2)
    return normalise(stacked, spec.lpm.mean, spec.lpm.std)


@contextmanager
def explicit_attention(model: Any, keep: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Make every block compute and return its complete attention matrix."""
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: keep(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in model.blocks:
            block.attn.fused_attn = True


def published(
    model: Any, spec: FeatureSpec, images: list[tuple[str, str]], folder: Path, arguments: argparse.Namespace
) -> None:
    """Extract with explicit attention in every layer, column means, and one float32 file per image."""
    folder.mkdir()
    means: list[torch.Tensor] = []
    projected: list[torch.Tensor] = []
    for first in range(0, len(images), arguments.batch):
        part = images[first : first + arguments.batch]
        batch = to_tensor([to_pixels(read_image(Path(path), max_pixels=10**8), spec) for _, path in part], spec)
        means.clear()
        projected.clear()
        handles = [
            block.attn.qkv.register_forward_hook(lambda _m, _i, out: projected.append(out)) for block in model.blocks
        ]
        with explicit_attention(model, lambda matrix: means.append(matrix.mean(dim=2))):
            model.forward_features(batch)
        for handle in handles:
            handle.remove()
        for row, (image_id, _) in enumerate(part):
            kept = {}
            for layer in spec.layers:
                qkv = projected[layer][row].view(-1, 3, spec.lpm.heads, spec.lpm.head_dim).permute(1, 2, 0, 3)
                top = means[layer][row].topk(spec.kept, dim=-1).indices.unsqueeze(-1).expand(-1, -1, spec.lpm.head_dim)
                kept[f"k{layer}"], kept[f"v{layer}"] = qkv[1].gather(1, top), qkv[2].gather(1, top)
            save_file(kept, folder / f"{image_id}.safetensors")


def encoded(spec: FeatureSpec, layer: Tapped) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that an extraction keeps until the end of the pass."""
    return encode(layer.keys[:, None], layer.values[:, None], spec)


def measure_memory(lpm: str, image_size: int = 1024) -> None:
    """Print the peak tensor memory of the forward pass of one image."""
    size = describe_lpm(lpm, image_size).image_size
    arguments = argparse.Namespace(images=1, batch=1, threads=1)
    peaks = {}
    for name in ("explicit attention", "bare, fused attention", "fpt+", "fpt"):
        model: Any = timm.create_model(lpm, pretrained=False, num_classes=0, img_size=size).eval()
        settings = settings_of(
            lpm, Variant(name, {"method": name if name.startswith("fpt") else "fpt+"}), size, arguments
        )
        spec = feature_spec(settings, describe_lpm(lpm, size), "")
        pixels = torch.zeros(1, 3, size, size)
        tracker = total_tracker()
        tracker.track_external(model, pixels)
        with torch.no_grad():
            if name.startswith("fpt"):
                with Taps(model, spec, partial(encoded, spec)) as taps, tracker:
                    taps.run(pixels)
            elif name.startswith("bare"):
                with tracker:
                    model.forward_features(pixels)
            else:
                with explicit_attention(model, lambda _: None), tracker:
                    model.forward_features(pixels)
        peaks[name] = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 2**20
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    tokens = describe_lpm(lpm, size).tokens
    print(f"{lpm} at {size} ({tokens} tokens), one image; weights {weights:.0f} MiB")
    print(f"{'variant':<26}{'peak MiB':>10}{'/ explicit':>12}{'without weights':>18}{'/ explicit':>12}")
    whole = peaks["explicit attention"]
    for name, peak in peaks.items():
        bare = peak - weights
        print(f"{name:<26}{peak:>10.0f}{peak / whole:>12.3f}{bare:>18.0f}{bare / (whole - weights):>12.3f}")


if __name__ == "__main__":
    main()
