"""Measure the accuracy cost of compressed features: the same features as float32, float16, int8 and int4.

    python benchmarks/dtype_accuracy.py STUDY                     e.g. a folder with params.yaml and real images
    python benchmarks/dtype_accuracy.py STUDY --seeds 3 --set train.lr=1e-3 --json result.json

The LPM runs at most once, for the float32 store in the cache of the study. All other stores are encoded from it with
the code of `fpt extract`, in a temporary folder that is removed at the end. The side network is then trained from each
store with the same seeds. Only the cache of the study is written to.

Prints the test AUC of each seed and its mean, the relative L2 error of keys and values, bytes per image on disk, and
images per second for shuffled batches with a warm page cache (medians of alternate rounds, one process).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from pipeline.project import Study, open_study
from schemas.features import ExtractionReceipt, FeatureSpec
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from schemas.settings import FeatureDtype
from stages.evaluate.evaluator import probabilities
from stages.extract.extractor import ExtractionJob, extract
from stages.manifest import read_manifest
from stages.prepare import prepare
from stages.scores import macro_auc
from stages.store.layout import CACHED, array_layouts, create_store
from stages.store.quantise import dequantise, encode
from stages.store.reader import StoreReader, open_store, read_receipt, receipt_digest
from stages.store.writer import claim_shard, write_shard
from stages.train.bundle import load_bundle
from stages.train.infer import source_logits
from stages.train.inputs import StudyFiles
from stages.train.trainer import train

TOLERANCE = 0.003
"""Largest loss of mean AUC at which a smaller dtype may be the default."""
BATCH = 16
ROUNDS = 5


def main() -> None:
    """Parse the arguments, measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of params.yaml")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per store")
    parser.add_argument("--dtypes", nargs="+", default=list(get_args(FeatureDtype)), choices=get_args(FeatureDtype))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of params.yaml")
    parser.add_argument("--work", type=Path, help="folder for the temporary stores; default: the system's")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    float32 = ["features.dtype=float32", "features.codec=none", "features.bitround=null"]
    study = open_study(arguments.study / "params.yaml", [*arguments.set, *float32])
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        result = measure(study, Path(work), arguments.dtypes, arguments.seeds)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(study: Study, work: Path, dtypes: list[str], seeds: int) -> dict[str, Any]:
    """Encode, train from and read each dtype."""
    manifest = find_manifest(study, work)
    say(f"{study.lpm.name}, {study.settings.method}: float32 features of {len(manifest.ids())} images")
    exact = extract(ExtractionJob(study.settings, study.root, study.cache, manifest, work / "float32"), print_progress)
    forms: dict[str, dict[str, Any]] = {}
    stores: dict[str, tuple[Path, ExtractionReceipt]] = {}
    for dtype in dtypes:
        if dtype == "float32":
            stores[dtype] = (study.cache, exact)
        else:
            stores[dtype] = (work / "cache", encode_again(study.cache, exact, work / "cache", dtype))
        forms[dtype] = {
            "bytes_an_image": bytes_an_image(*stores[dtype]),
            "errors": errors(study.cache, exact, *stores[dtype]),
        }
    speeds = read_speeds(stores)
    for dtype in dtypes:
        forms[dtype]["images_a_second"] = speeds[dtype]
        forms[dtype]["auc"] = []
        for seed in range(seeds):
            settings = with_keys(study.settings, dtype, seed)
            auc = train_and_test(study, settings, manifest, *stores[dtype], work / f"{dtype}-{seed}")
            forms[dtype]["auc"].append(auc)
            say(f"{dtype}, seed {seed}: test AUC {auc:.4f}")
    return {
        "study": study.root.name,
        "lpm": study.lpm.name,
        "image_size": study.lpm.image_size,
        "method": study.settings.method,
        "epochs": study.settings.train.epochs,
        "lr": study.settings.train.lr,
        "images": {split: len(list(manifest.of(split))) for split in ("train", "val", "test")},
        "dtypes": forms,
    }


def find_manifest(study: Study, work: Path) -> Manifest:
    """Read the manifest of the study, or prepare one."""
    if study.manifest.exists():
        return read_manifest(study.manifest)
    prepare(study.settings.data, study.root, work / "manifest")
    return read_manifest(work / "manifest" / "manifest.parquet")


def encode_again(cache: Path, receipt: ExtractionReceipt, target: Path, dtype: str) -> ExtractionReceipt:
    """Convert the float32 store to another dtype, with the result of `extract` but without running the LPM."""
    spec = FeatureSpec.model_validate({**receipt.spec.model_dump(), "dtype": dtype})
    reader = open_store(cache, receipt)
    shards: dict[str, str] = {}
    try:
        store = create_store(target, spec, reader.store.shard_size)
        for number in receipt.shards:
            ids = read_receipt(reader.store, int(number)).rows
            rows = reader.read(ids, ["keys", "values", "indices", "pooled", "side"])
            codes = encode(torch.from_numpy(rows.pop("keys")), torch.from_numpy(rows.pop("values")), spec)
            rows.update({name: array.numpy() for name, array in codes.items()})
            with claim_shard(store) as shard:
                shards[str(shard)] = receipt_digest(write_shard(store, shard, ids, rows, 0.0))
    finally:
        reader.close()
    return receipt.model_copy(update={"fingerprint": spec.fingerprint, "spec": spec, "shards": shards})


def bytes_an_image(cache: Path, receipt: ExtractionReceipt) -> float:
    """Return the size on disk, including checksums and shard indices."""
    reader = open_store(cache, receipt)
    receipts = [read_receipt(reader.store, int(number)) for number in receipt.shards]
    reader.close()
    return sum(file.bytes for one in receipts for file in one.files.values()) / sum(len(one.rows) for one in receipts)


def errors(cache: Path, exact: ExtractionReceipt, other: Path, receipt: ExtractionReceipt) -> list[float]:
    """Return the relative L2 errors of keys and of values over some images."""
    readers = open_store(cache, exact), open_store(other, receipt)
    ids = some_ids(readers[0], exact)[:32]
    true = readers[0].read(ids, ["keys", "values"])
    found = dequantise(readers[1].read(ids, cached_names(receipt.spec)), receipt.spec)
    for reader in readers:
        reader.close()
    return [
        float(np.linalg.norm((x - true[name]).ravel()) / np.linalg.norm(true[name].ravel()))
        for name, x in zip(("keys", "values"), found, strict=True)
    ]


def read_speeds(stores: dict[str, tuple[Path, ExtractionReceipt]]) -> dict[str, float]:
    """Return images per second for reading keys, values, their scales and side images in shuffled batches."""
    readers = {dtype: open_store(*place) for dtype, place in stores.items()}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in stores}
    count = 0
    for turn in range(ROUNDS + 1):
        for dtype, (_, receipt) in stores.items():
            reader, names = readers[dtype], [*cached_names(receipt.spec), "side"]
            ids = some_ids(reader, receipt, seed=turn)[: 8 * BATCH]
            batches = [ids[first : first + BATCH] for first in range(0, len(ids), BATCH)]
            # Buffers are allocated and chunks verified first, as in all epochs but the first.
            buffers = reader.read(batches[0], names)
            for batch in batches:
                reader.read(batch, names, buffers)
            start = time.perf_counter()
            for batch in batches:
                reader.read(batch, names, buffers)
            if turn:
                seconds[dtype].append(time.perf_counter() - start)
            count = len(ids)
    for reader in readers.values():
        reader.close()
    return {dtype: round(count / statistics.median(times), 1) for dtype, times in seconds.items()}


def some_ids(reader: StoreReader, receipt: ExtractionReceipt, seed: int = 0) -> list[str]:
    """Return the image ids of a store, shuffled."""
    ids = sorted(id_ for number in receipt.shards for id_ in read_receipt(reader.store, int(number)).rows)
    return [ids[place] for place in np.random.default_rng(seed).permutation(len(ids))]


def cached_names(spec: FeatureSpec) -> list[str]:
    """Return the names of the arrays with keys and values."""
    return [name for name in array_layouts(spec) if name in CACHED]


def with_keys(settings: ResolvedSettings, dtype: str, seed: int) -> ResolvedSettings:
    """Return the settings of one training run."""
    features = settings.features.model_copy(update={"dtype": dtype})
    return settings.model_copy(update={"features": features, "train": settings.train.model_copy(update={"seed": seed})})


def train_and_test(
    study: Study,
    settings: ResolvedSettings,
    manifest: Manifest,
    cache: Path,
    receipt: ExtractionReceipt,
    output: Path,
) -> float:
    """Train, and return the test AUC of the best epoch."""
    train(settings, StudyFiles(manifest, study.lpm, receipt, cache), output, output / "checkpoints")
    rows = list(manifest.of("test"))
    reader = open_store(cache, receipt)
    logits = source_logits(load_bundle(output), reader, [row.id for row in rows])
    reader.close()
    labels = np.array([manifest.classes.index(row.label) for row in rows])
    auc = macro_auc(labels, probabilities(logits).astype(np.float64))
    if auc is None:
        raise SystemExit(
            "The AUC is undefined because the test split lacks a class. Raise data.test_share, or use more images."
        )
    return auc


def show(result: dict[str, Any]) -> None:
    """Print a table, and the smallest dtype with acceptable accuracy."""
    images = ", ".join(f"{count} {split}" for split, count in result["images"].items())
    print(
        f"{result['study']}: {result['method']} on {result['lpm']} at {result['image_size']}, {images} images, ", end=""
    )
    print(f"{result['epochs']} epochs, lr {result['lr']}")
    print(
        f"{'dtype':8} {'mean AUC':>8} {'bytes/image':>12} {'images/s':>9} {'keys':>9} {'values':>9}  AUC of each seed"
    )
    means = {}
    for dtype, form in result["dtypes"].items():
        means[dtype] = statistics.mean(form["auc"])
        error = " ".join(f"{100 * value:8.3f}%" for value in form["errors"])
        each = " ".join(f"{auc:.4f}" for auc in form["auc"])
        figures = f"{means[dtype]:8.4f} {form['bytes_an_image']:12,.0f} {form['images_a_second']:9,.1f}"
        print(f"{dtype:8} {figures} {error}  {each}")
    if "float32" in means:
        good = [dtype for dtype in means if means[dtype] >= means["float32"] - TOLERANCE]
        smallest = min(good, key=lambda dtype: result["dtypes"][dtype]["bytes_an_image"])
        print(f"Smallest within {TOLERANCE} of float32: {smallest}")


def print_progress(progress: Any) -> None:
    """Print progress about every hundredth image."""
    if progress.done % 100 < 4:
        say(f"  {progress.done} of {progress.total}")


def say(line: str) -> None:
    """Print a line without buffering."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
