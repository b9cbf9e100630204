"""A tiny study on disk: 64-pixel images, timm's test ViT with random weights, resolved settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from schemas.data_settings import DataSettings
from schemas.features import ExtractionReceipt, LpmInfo
from schemas.manifest import Manifest
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.resolved import ResolvedSettings
from schemas.results import Prediction, TrainResult
from schemas.settings import LpmSettings
from stages.evaluate.evaluator import evaluate
from stages.evaluate.predictions import read_predictions
from stages.extract.extractor import ExtractionJob, extract
from stages.lpm.loading import describe_lpm
from stages.manifest import read_manifest
from stages.methods.base import FitInputs
from stages.methods.statistics import StatisticsFit
from stages.predict.classifier import as_row, check_task, load_classifier
from stages.prepare import prepare
from stages.progress import Progress
from stages.store.reader import open_store
from stages.train.bundle import load_bundle
from stages.train.infer import source_logits
from stages.train.inputs import StudyFiles
from stages.train.job import Watch
from stages.train.trainer import train

CLASSES = ("grid", "plain", "stripe")


def make_images(folder: Path, per_class: int, seed: int = 0) -> None:
    """Noise with a pattern that tells the class, 72 x 64 pixels, PNG."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(72), np.arange(64))
    patterns = {"plain": 0 * x, "stripe": 90 * (x // 6 % 2), "grid": 90 * ((x // 6 + y // 6) % 2)}
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = patterns[name] + rng.integers(40, 120, (64, 72))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{seed}-{number:03d}.png")


def save_weights(path: Path, seed: int = 0) -> Path:
    """Random weights of timm's `test_vit`."""
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


@dataclass
class Study:
    root: Path
    settings: ResolvedSettings
    lpm: LpmInfo
    manifest: Manifest

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def features(self) -> Path:
        return self.root / "outputs/features"

    def changed(self, **sections: dict[str, Any]) -> ResolvedSettings:
        """Settings with some keys of some sections changed."""
        update = {name: getattr(self.settings, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.settings.model_copy(update=update)

    def prepare(self) -> Manifest:
        rendering = self.settings.features.rendering
        prepare(self.settings.data, self.root, self.root / "outputs/manifest", rendering=rendering)
        self.manifest = read_manifest(self.root / "outputs/manifest/manifest.parquet")
        return self.manifest

    def files(self, receipt: ExtractionReceipt | None, **changes: Any) -> StudyFiles:
        """What training and evaluation of this study read; `changes` replace fields."""
        files = StudyFiles(
            manifest=self.manifest,
            lpm=self.lpm,
            receipt=receipt,
            cache_root=self.cache,
            root=self.root,
            data=self.settings.data,
            weights=self.settings.lpm,
        )
        return replace(files, **changes)

    def extract(self, **keywords: Any) -> ExtractionReceipt:
        options = {name: keywords.pop(name) for name in ("all_views", "check") if name in keywords}
        job = ExtractionJob(self.settings, self.root, self.cache, self.manifest, self.features, **options)
        return extract(job, **keywords)


def make_study(root: Path, per_class: int = 8, method: str = "fpt+", **sections: dict[str, Any]) -> Study:
    """Images, weights and settings; prepared, not extracted."""
    make_images(root / "images", per_class)
    save_weights(root / "lpm.safetensors")
    raw: dict[str, Any] = {
        "method": method,
        "data": {"images": "images"},
        "lpm": {"name": "test_vit", "weights": "lpm.safetensors"},
        "features": {"image_size": 64, "shard_size": 4, "side_image_size": 40, "dtype": "float16"},
        "train": {"side_image_size": 32, "epochs": 2, "batch_size": 8, "side_reduction": 4},
        "compute": {"threads": 1, "device": "cpu"},
    }
    return study_of(root, raw, sections)


def study_of(root: Path, raw: dict[str, Any], sections: dict[str, dict[str, Any]]) -> Study:
    """The study of raw settings with some keys of some sections changed; prepared."""
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    settings = parse_settings(raw)
    lpm = describe_lpm(settings.lpm.name, settings.features.image_size)
    study = Study(root, resolve(settings, lpm), lpm, Manifest(classes=(), rows=()))
    study.prepare()
    return study


def blind_fit(inputs: FitInputs) -> tuple[StatisticsFit, torch.Tensor]:
    """Linear probes to which all classes are equally probable, as where moments of the tokens say nothing."""
    count, classes, width = len(inputs.sources), inputs.train.classes, sum(one.width for one in inputs.sources)
    return StatisticsFit(
        weight=torch.zeros(classes, width),
        bias=torch.zeros(count, classes),
        mean=torch.zeros(width),
        scale=torch.ones(width),
        share=torch.full((count,), 1 / count),
    ), torch.zeros(len(inputs.val.y), classes)


def train_study(
    study: Study,
    receipt: ExtractionReceipt,
    output: str = "model",
    settings: ResolvedSettings | None = None,
    watch: Watch | None = None,
) -> TrainResult:
    """Train on the features of a receipt; the checkpoints are next to the output."""
    checkpoints = study.root / "checkpoints"
    return train(settings or study.settings, study.files(receipt), study.root / output, checkpoints, watch)


def predict(
    model: Path,
    images: Sequence[Path],
    lpm: LpmSettings | None,
    root: Path,
    *,
    batch_size: int = 4,
    data: DataSettings | None = None,
    progress: Progress | None = None,
) -> list[Prediction]:
    """Predict files with a saved model."""
    bundle = load_bundle(model)
    check_task(bundle.spec, data)
    found = load_classifier(bundle, lpm, root, data or DataSettings()).probabilities(images, batch_size, progress)
    return [as_row(str(path), p, bundle.spec) for path, p in zip(images, found, strict=True)]


def evaluated_and_predicted(study: Study, receipt: ExtractionReceipt | None) -> tuple[Any, Any]:
    """Probabilities (n, C) of the test images by the saved model: from an evaluation, and predicted from the files."""
    evaluate(study.files(receipt), study.root / "model", study.root / "evaluation")
    table = read_predictions(study.root / "evaluation/predictions.parquet")
    images = [study.root / "images" / row.path for row in table.rows]
    rows = predict(study.root / "model", images, study.settings.lpm, study.root)
    return table.probabilities, np.array([list((row.probabilities or {}).values()) for row in rows])


def validation_loss(study: Study, receipt: ExtractionReceipt) -> float:
    """Log-loss of the saved model on the validation images, from the store."""
    rows = list(study.manifest.of("val"))
    reader = open_store(study.cache, receipt)
    logits = source_logits(load_bundle(study.root / "model"), reader, [row.id for row in rows])
    target = torch.tensor([study.manifest.classes.index(row.label) for row in rows])
    return float(torch.nn.functional.cross_entropy(logits, target))
