"""Compare federated training with central training and with each site by itself, on simulated sites.

    python benchmarks/federated.py DATA... --weights FILE --work DIR --json result.json

DATA are folders with `images/` and `labels.csv` (columns path, label, patient). Features are extracted once per data
set, into DIR. Every model is trained for the same number of epochs (rounds x local epochs; closed forms once), its last
weights are kept, and it is scored on the test images of the complete data set. "central" has the images of all sites,
"alone" is the mean over sites of models of the images of one site. Finished models are lines of DIR/results.jsonl,
which are read, not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline import api
from pipeline.console import say, show_table
from pipeline.project import Study, open_study
from schemas.federated import FederatedPlan, Partition
from schemas.manifest import Manifest
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from stages.evaluate.evaluator import open_source
from stages.federate.messages import Request
from stages.federate.partition import simulate
from stages.federate.server import Server, federate
from stages.federate.site import Site, in_process
from stages.manifest import read_manifest
from stages.methods.base import FitShape
from stages.methods.summed import summed_method
from stages.scores import macro_auc, probabilities
from stages.train.bundle import Bundle, load_bundle
from stages.train.infer import source_logits
from stages.train.inputs import StudyFiles
from stages.train.leg import Leg
from stages.train.targets import targets
from stages.train.trainer import open_checked, train_leg

SETTINGS: dict[str, list[str]] = {
    "ridge": [],
    "fpt+": ["train.lr=1e-3"],
    "lora": ["methods.lora.freeze_a=true", "train.lr=3e-3"],
    "decomposed-prompts": ["train.lr=5e-3"],
    "vpt-deep": ["train.lr=5e-3"],
    "ept-lse": ["train.lr=2e-2"],
}
"""Settings of each method; one learning rate for all of its models."""


@dataclass
class Bench:
    """What all models share."""

    name: str
    """Data set."""
    work: Path
    """Folder of its study."""
    plan: FederatedPlan
    """Rounds and local epochs."""
    results: Path
    """Lines of finished models."""

    def settings(self, method: str) -> tuple[Study, ResolvedSettings]:
        """Return the study and the settings of a method; the last weights are kept."""
        words = [f"method={method}", "train.keep=last", f"train.epochs={self.plan.epochs}", *SETTINGS[method]]
        study = open_study(self.work / kind_of(method) / "params.yaml", words)
        return study, study.settings

    def key(self, method: str) -> str:
        """Return the beginning of the keys of a method's models."""
        proximal = f" mu {self.plan.mu:g}" if self.plan.mu else ""
        return f"{self.name}/{method}/{self.plan.rounds}x{self.plan.local_epochs}{proximal}"

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the finished models by key."""
        if not self.results.exists():
            return {}
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        return {line["key"]: line for line in lines}

    def add(self, key: str, **values: Any) -> dict[str, Any]:
        """Write a finished model."""
        line = {"key": key, **values}
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        say(json.dumps(line))
        return line


FEATURES: dict[str, dict[str, Any]] = {
    "cached": {},
    "hidden": {"tokens": False, "statistics": False},
}
"""Features of the two studies of a data set: what side networks and closed forms read, and what adaptations read."""


def kind_of(method: str) -> str:
    """Return which features a method reads."""
    return "hidden" if METHODS[method].adapts_lpm else "cached"


def prepared(data: Path, options: argparse.Namespace, method: str) -> None:
    """Prepare a study with the features that a method reads, once."""
    kind = kind_of(method)
    folder = options.work.absolute() / data.name / kind
    folder.mkdir(parents=True, exist_ok=True)
    hidden = {"hidden": options.hidden} if kind == "hidden" else {}
    raw = {
        "method": method,
        "data": {"images": str(data / "images"), "labels": str(data / "labels.csv"), "group_column": "patient"},
        "lpm": {"name": options.lpm, "weights": str(options.weights.absolute())},
        "features": {"image_size": 224, "precision": options.precision, **FEATURES[kind], **hidden},
        "compute": {"device": "cpu", "threads": 1},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    study = open_study(folder / "params.yaml")
    if not study.manifest.exists():
        api.prepare(study)
    if not study.receipt.exists():
        began = time.perf_counter()
        api.extract(study)
        say(f"Features of {data.name}, {kind}: {time.perf_counter() - began:.0f} s")


def test_auc(bundle: Bundle, files: StudyFiles) -> float | None:
    """Return the macro AUC of a model on the test images."""
    rows = list(files.manifest.of("test"))
    with open_source(bundle, files) as source:
        logits = source_logits(bundle, source, [row.id for row in rows])
    found = probabilities(logits, files.manifest.task).numpy()
    return macro_auc(torch.tensor(targets(files.manifest, "test")).numpy(), found)


def trained_on(study: Study, settings: ResolvedSettings, manifest: Manifest, folder: Path) -> Bundle:
    """Train on the images of one manifest, of which classes may be absent."""
    files = replace(study.files(read_manifest(study.manifest)), manifest=manifest)
    if METHODS[settings.method].closed_form:
        return summed_alone(settings, files, folder)
    _, opened = open_checked([settings], files)
    train_leg(settings, with_validation(files), opened, folder, folder, Leg({}, 1, settings.train.epochs))
    opened.close()
    return load_bundle(folder)


def with_validation(files: StudyFiles) -> StudyFiles:
    """Return files with a validation image: only logs read them."""
    if any(True for _ in files.manifest.of("val")):
        return files
    first = next(files.manifest.of("train")).model_copy(update={"split": "val"})
    rows = (first.model_copy(update={"path": f"{first.path}#val"}), *files.manifest.rows)
    return replace(files, manifest=files.manifest.model_copy(update={"rows": rows}))


def summed_alone(settings: ResolvedSettings, files: StudyFiles, folder: Path) -> Bundle:
    """Fit a closed form to the sums of one site."""
    site = Site("alone", settings, files, folder)
    reply = site.answer(Request("sums", values={"train": settings.train.model_dump_json()}))
    features, row = site.opened.features, METHODS[settings.method]
    site.close()
    method = summed_method(settings.method)
    shape = FitShape(
        method=settings.method,
        task=files.manifest.task,
        classes=len(files.manifest.classes),
        width=0,
        rows=site.examples,
        sources=row.preset.probe_sources(features, "pooled" in row.inputs),
    )
    model = method.fit_sums({name: value.numpy() for name, value in reply.tensors.items()}, shape)
    pooled = load_bundle(folder.parents[1] / "pooled" / settings.method)
    return Bundle(pooled.spec.model_copy(update={"network": model.saved_spec}), model)


def federated(
    bench: Bench, study: Study, settings: ResolvedSettings, manifests: dict[str, Manifest], folder: Path
) -> Any:
    """Train at sites; return the result."""
    files = study.files(read_manifest(study.manifest))
    sites = {
        name: Site(name, settings, replace(files, manifest=manifest), bench.work / "sites" / name)
        for name, manifest in manifests.items()
    }
    plan = FederatedPlan(rounds=1) if METHODS[settings.method].closed_form else bench.plan
    server = Server(settings, files, in_process(sites), folder, bench.work / "server")
    result = federate(server, tuple(sites), plan)
    for site in sites.values():
        site.close()
    return result


def run_method(bench: Bench, method: str, partitions: Sequence[Partition], alone: Sequence[int]) -> None:
    """Train all models of a method that are not finished."""
    study, settings = bench.settings(method)
    files = study.files(read_manifest(study.manifest))
    done = bench.finished()
    key = bench.key(method)
    pooled = bench.work / "pooled" / method
    if f"{key}/central" not in done:
        began = time.perf_counter()
        if METHODS[method].closed_form:
            federated(bench, study, settings, {"all": files.manifest}, pooled)
        else:
            trained_on(study, settings, files.manifest, pooled)
        bench.add(f"{key}/central", auc=test_auc(load_bundle(pooled), files), seconds=time.perf_counter() - began)
    for partition in partitions:
        name = f"{key}/{partition.sites} sites/{rule(partition)}/seed {partition.seed}"
        manifests = simulate(files.manifest, partition)
        if f"{name}/federated" not in done:
            began, folder = time.perf_counter(), bench.work / "federated"
            result = federated(bench, study, settings, manifests, folder)
            auc = test_auc(load_bundle(folder), files)
            images = [site.train for site in result.sites]
            seconds = time.perf_counter() - began
            bench.add(f"{name}/federated", auc=auc, bytes=result.up_bytes, images=images, seconds=seconds)
        if partition.sites in alone and f"{name}/alone" not in done:
            began, aucs = time.perf_counter(), []
            for site, manifest in manifests.items():
                folder = bench.work / "alone" / site
                aucs.append(test_auc(trained_on(study, settings, manifest, folder), files))
            values = [one for one in aucs if one is not None]
            mean = sum(values) / len(values)
            bench.add(f"{name}/alone", auc=mean, aucs=aucs, seconds=time.perf_counter() - began)


def rule(partition: Partition) -> str:
    """Return the name of a partition."""
    return "iid" if partition.alpha is None else f"dirichlet {partition.alpha:g}"


def report(benches: Sequence[Bench], methods: Sequence[str], partitions: Sequence[Partition]) -> None:
    """Print a table per data set."""
    for bench in benches:
        done, rows = bench.finished(), []
        for method in methods:
            key = bench.key(method)
            for partition in partitions:
                name = f"{key}/{partition.sites} sites/{rule(partition)}/seed {partition.seed}"
                one, central, alone = (
                    done.get(k, {}) for k in (f"{name}/federated", f"{key}/central", f"{name}/alone")
                )
                if not one:
                    continue
                cells = [f"{found['auc']:.3f}" if found else "-" for found in (central, one, alone)]
                images = f"{min(one['images'])} to {max(one['images'])}"
                rows.append([method, str(partition.sites), rule(partition), images, *cells, f"{one['bytes']:,}"])
        columns = ["method", "sites", "partition", "training images", "central", "federated", "alone", "bytes up"]
        show_table(f"{bench.name}: AUC on the test images", columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="folder with images/ and labels.csv")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="weights of the LPM")
    parser.add_argument("--lpm", default="vit_small_patch14_dinov2.lvd142m", metavar="NAME")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of studies and results")
    parser.add_argument("--methods", nargs="+", default=["ridge", "fpt+", "lora", "ept-lse"], choices=list(SETTINGS))
    parser.add_argument("--sites", nargs="+", type=int, default=[3, 6])
    parser.add_argument("--partitions", nargs="+", default=["iid", "dirichlet:0.5", "dirichlet:0.1"])
    parser.add_argument("--alone", nargs="*", type=int, default=[3, 6], metavar="SITES", help="train each site alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-epochs", type=int, default=2)
    parser.add_argument("--mu", type=float, default=0.0, help="weight of the proximal term (FedProx)")
    parser.add_argument("--hidden", type=int, default=11, help="first block that adaptations change")
    parser.add_argument("--precision", default="bfloat16", help="of the LPM's forward pass")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the partitions")
    options = parser.parse_args(arguments)
    plan = FederatedPlan(rounds=options.rounds, local_epochs=options.local_epochs, mu=options.mu)
    partitions = [
        Partition.parse(sites, text, seed)
        for sites in options.sites
        for text in options.partitions
        for seed in options.seeds
    ]
    results = options.work.absolute() / "results.jsonl"
    benches = {data: Bench(data.name, options.work.absolute() / data.name, plan, results) for data in options.data}
    for method in options.methods:
        for data, bench in benches.items():
            prepared(data.absolute(), options, method)
            run_method(bench, method, partitions, options.alone)
    report(list(benches.values()), options.methods, partitions)


if __name__ == "__main__":
    main()
