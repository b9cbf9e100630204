"""Compare an epoch of adaptations from cached hidden tokens to one from images.

    python benchmarks/adaptation_speed.py                          ViT-S/14 at 224, 32 images, 3 rounds: some minutes
    python benchmarks/adaptation_speed.py --lpm vit_base_patch16_224 --methods ept-lse lora --block 6 --threads 1

The LPM has random weights; images are JPEGs of 1,024 pixels. Every method trains, in turn within one process, one epoch
from images with all blocks adapted (the published form), from images with the upper blocks adapted, and from the hidden
tokens that enter the first of those blocks; medians of the rounds, and of the ratios within a round. The time includes
reading and augmenting the images, or reading and decoding the hidden tokens, but not validation or the extraction.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from extract_speed import make_photos
from safetensors.torch import save_file

from pipeline.params import load_settings
from pipeline.project import CACHE_VARIABLE, Study, open_study
from pipeline.template import params_yaml
from schemas.methods import METHODS
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.resolved import ResolvedSettings
from stages.extract.extractor import ExtractionJob, extract
from stages.files import atomic_write
from stages.manifest import read_manifest
from stages.methods.base import Network, gradient_method
from stages.prepare import prepare
from stages.train.checkpoints import Fit
from stages.train.data import EpochSampler, FeatureDataset, Reading, batches
from stages.train.inputs import StudyFiles, open_inputs
from stages.train.loop import Recipe, Run, make_optimizer, training_step

CLASSES = 2


@dataclass(frozen=True)
class Variant:
    """A training whose epochs are timed."""

    name: str
    """For the table."""
    run: Run
    """Network and optimiser."""
    data: FeatureDataset
    """Rows."""

    def epoch(self, batch_size: int) -> float:
        """Train an epoch and return its seconds."""
        start = time.perf_counter()
        for batch in batches(self.data, EpochSampler(len(self.data), batch_size, 0)):
            training_step([self.run], batch)
        return time.perf_counter() - start


def make_study(folder: Path, arguments: argparse.Namespace) -> Study:
    """Write images, weights and settings."""
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
    for number, (_, path) in enumerate(make_photos(folder / "photos", arguments.images)):
        Path(path).rename(folder / "images" / "ab"[number % CLASSES] / Path(path).name)
    model = timm.create_model(arguments.lpm, pretrained=False, img_size=arguments.image_size)
    save_file(model.state_dict(), folder / "lpm.safetensors")
    settings = parse_settings(
        {
            "method": "finetune",
            "data": {"images": "images"},
            "lpm": {"name": arguments.lpm, "weights": "lpm.safetensors"},
            "features": {"image_size": arguments.image_size, "hidden": arguments.block, "tokens": False},
            "compute": {"device": "cpu", "threads": arguments.threads},
        }
    )
    atomic_write(folder / "params.yaml", params_yaml(settings).encode())
    return open_study(folder / "params.yaml")


def variants_of(study: Study, files: StudyFiles, method: str, block: int) -> list[Variant]:
    """Set up the trainings of a method."""
    choices = {
        "images, all blocks": ["features.hidden=null", "train.start_block=0"],
        f"images, blocks {block} and above": ["features.hidden=null", f"train.start_block={block}"],
        f"hidden tokens, blocks {block} and above": [f"train.start_block={block}"],
    }
    return [Variant(name, *_training(study, files, method, words)) for name, words in choices.items()]


def _training(study: Study, files: StudyFiles, method: str, words: Sequence[str]) -> tuple[Run, FeatureDataset]:
    settings: ResolvedSettings = resolve(load_settings(study.params, [f"method={method}", *words]), study.lpm)
    inputs = METHODS[method].trains_on(settings)
    opened = open_inputs(settings, files, inputs)
    built = gradient_method(method)
    torch.manual_seed(0)
    network: Network = built.build(built.spec(settings, study.lpm, CLASSES))
    if opened.model is not None:
        network.start_from(opened.model)
    network.train()
    recipe = Recipe(settings.train, opened.features, None, torch.device("cpu"), 0)
    run = Run(Fit(network, make_optimizer(network, settings.train)), recipe, Path(), lambda _: None)
    ids = [row.id for row in files.manifest.rows]
    labels = [number % CLASSES for number in range(len(ids))]
    return run, FeatureDataset(opened.source, ids, labels, Reading(inputs, augment=settings.train.augment))


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Time all variants in turn, and print a table."""
    study = make_study(folder, arguments)
    prepare(study.settings.data, study.root, folder / "manifest")
    manifest = read_manifest(folder / "manifest" / "manifest.parquet")
    files = study.files(manifest)
    job = ExtractionJob(study.settings, study.root, study.cache, manifest, folder / "features")
    files = replace(files, receipt=extract(job))
    print(
        f"{arguments.lpm} at {arguments.image_size}, {len(manifest.rows)} images, batches of {arguments.batch}, "
        f"{arguments.rounds} rounds, torch {torch.__version__}, threads: {torch.get_num_threads()}"
    )
    print(f"{'seconds per epoch':<46}{'median':>10}{'images / this':>16}")
    for method in arguments.methods:
        trainings = variants_of(study, files, method, arguments.block)
        times: dict[str, list[float]] = {one.name: [] for one in trainings}
        for attempt in range(arguments.rounds + 1):
            for one in trainings:
                seconds = one.epoch(arguments.batch)
                if attempt:
                    times[one.name].append(seconds)
        first = times[trainings[0].name]
        for name, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
            print(f"{method + ', ' + name:<46}{statistics.median(found):>10.2f}{ratio:>16.2f}")


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lpm", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=6, help="block that the hidden tokens enter")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--methods", nargs="+", default=["ept-lse", "vpt-deep", "ept", "bitfit", "ssf"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        os.environ[CACHE_VARIABLE] = str(Path(name) / "cache")
        measure(Path(name), arguments)


if __name__ == "__main__":
    main()
