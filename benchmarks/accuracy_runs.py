"""Runs of `accuracy.py`: recipes, cached features, folds, and one file of test predictions per finished run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from dtype_accuracy import bytes_an_image
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.console import say
from pipeline.params import read_params
from pipeline.progress import ImageBar
from pipeline.project import open_study
from schemas.base import Contract, digest
from schemas.errors import SettingsError
from schemas.manifest import Manifest, ManifestRow
from schemas.methods import METHODS, model_inputs
from schemas.parse import parse_settings
from schemas.resolved import ResolvedSettings
from stages.device import set_up
from stages.extract.extractor import ExtractionJob, extract
from stages.files import atomic_write, read_regular
from stages.manifest import read_manifest
from stages.prepare import MANIFEST_FILE, prepare
from stages.prepare.folds import draw_folds
from stages.scores import probabilities
from stages.train.bundle import load_bundle
from stages.train.infer import source_logits
from stages.train.inputs import StudyFiles, inputs_key, open_inputs, reads_images
from stages.train.job import run_key
from stages.train.trainer import train_together


class Recipe(Contract):
    """One way to train, as in a file of recipes."""

    method: str
    """Method, as in params.yaml."""
    set: tuple[str, ...] = ()
    """`key=value` overrides of params.yaml, such as train.lr=1e-3."""
    features: tuple[str, ...] = ()
    """`key=value` overrides of its section `features`, such as ratio=0.4."""
    seeds: Annotated[int, Field(ge=1, le=100)] = 1
    """Trainings per fold, with the seeds 0, 1, ...; their probabilities are averaged."""
    label_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the training and validation images with the label of another class: a control that has to lose."""
    version: str = ""
    """Version of the code: runs of another version are not read."""

    @property
    def assignments(self) -> list[str]:
        """All overrides of params.yaml; seeds share the order of the images, and so one pass over them."""
        features = [f"features.{item}" for item in self.features]
        return [f"method={self.method}", "train.order_seed=0", *self.set, *features]


BUILT_IN = {name: Recipe(method=name) for name in METHODS}
"""Recipes that need no file."""


class Run(Contract):
    """A finished run: the predictions for the test images of one fold."""

    key: str
    """Digest of what determines the model: settings, split, seed, features, version."""
    repeat: int
    """Number of the cross-validation, from 0."""
    fold: int
    """Number of the fold, from 0."""
    seed: int
    """`train.seed`."""
    seconds: float
    """Training time; runs of one pass share it equally."""
    classes: tuple[str, ...]
    """In the order of the probabilities."""
    rows: tuple[str, ...]
    """Paths of the n test images."""
    ids: tuple[str, ...]
    """Their row ids."""
    labels: tuple[str, ...]
    """Their labels."""
    patients: tuple[str, ...]
    """Their patients."""
    probabilities: tuple[tuple[float, ...], ...]
    """(n, classes)."""


@dataclass(frozen=True)
class DataSet:
    """A data set with its folder of results."""

    name: str
    """Name of its folder."""
    root: Path
    """Folder of params.yaml, the manifest and the runs."""
    manifest: Manifest
    """From `prepare`; its splits are not used."""


@dataclass(frozen=True)
class Prepared:
    """A recipe on a data set, with its features extracted."""

    recipe: Recipe
    """The recipe."""
    data: DataSet
    """The data set."""
    settings: ResolvedSettings
    """Resolved, with seed 0."""
    files: StudyFiles
    """Features and images."""
    bytes_per_image: float
    """Size of the features; 0 for methods that read images."""


@dataclass(frozen=True)
class Fold:
    """The runs of a recipe on one fold, finished or not."""

    repeat: int
    """Number of the cross-validation."""
    number: int
    """Number of the fold."""
    files: StudyFiles
    """With the manifest of the fold."""
    variants: tuple[ResolvedSettings, ...]
    """Settings of each seed."""
    keys: tuple[str, ...]
    """Key of each seed."""


def read_recipes(path: Path | None, names: Sequence[str]) -> dict[str, Recipe]:
    """Return the built-in recipes of these names, then those of a file."""
    if unknown := [name for name in names if name not in BUILT_IN]:
        raise SettingsError(f"No built-in recipe: {', '.join(unknown)}.", repair=f"Use {', '.join(BUILT_IN)}.")
    recipes = {name: BUILT_IN[name] for name in names}
    if path is not None:
        try:
            recipes |= TypeAdapter(dict[str, Recipe]).validate_python(read_params(path))
        except ValidationError as error:
            problems = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
            raise SettingsError(f"{path} is not a file of recipes.", problems) from None
    if not recipes:
        raise SettingsError("There are no recipes.", repair="Name a file with --recipes, or one with --recipe linear.")
    return recipes


def open_data(folder: Path, work: Path, lpm: dict[str, Any], image_size: int) -> DataSet:
    """Write params.yaml for a data set, and prepare it unless that is done."""
    root, source = work / folder.name, folder.absolute()
    data = {"images": str(source / "images"), "labels": str(source / "labels.csv"), "group_column": "patient"}
    settings = {"data": data | {"split_column": None}, "lpm": lpm, "features": {"image_size": image_size}}
    params, manifest = root / "params.yaml", root / "manifest" / MANIFEST_FILE
    if params.exists() and (known := read_params(params)["data"]) != settings["data"]:
        raise SettingsError(f"{root} was made for {known['images']}.", repair="Use another --work.")
    parsed = parse_settings(settings)
    atomic_write(params, yaml.safe_dump(settings, sort_keys=False).encode())
    if not manifest.exists():
        say(f"{folder.name}: reading the images")
        with ImageBar(folder.name) as bar:
            prepare(parsed.data, root, manifest.parent, bar)
    return DataSet(folder.name, root, read_manifest(manifest))


def prepare_recipe(recipe: Recipe, data: DataSet) -> Prepared:
    """Resolve the settings of a recipe, and extract its features unless the cache has them."""
    study = open_study(data.root / "params.yaml", recipe.assignments)
    settings, files = study.settings, study.files(data.manifest)
    if reads_images(settings):
        return Prepared(recipe, data, settings, files, 0.0)
    features = digest([settings.features.model_dump(mode="json"), settings.lpm.model_dump(mode="json")])
    output = data.root / "features" / features[:16]
    with ImageBar(f"{data.name}: features of {study.lpm.name}") as bar:
        # Folds train on any image, so all of them need their views.
        job = ExtractionJob(settings, study.root, study.cache, data.manifest, output, all_views=True)
        receipt = extract(job, lambda progress: bar(progress.done, progress.total))
    rows_per_image = len(receipt.views) + receipt.crops
    size = bytes_an_image(study.cache, receipt) * rows_per_image
    return Prepared(recipe, data, settings, replace(files, receipt=receipt), size)


def plan_folds(prepared: Prepared, folds: int, repeats: int) -> Iterator[Fold]:
    """Yield the folds of every cross-validation, with the key of each run."""
    recipe, settings, data = prepared.recipe, prepared.settings, prepared.settings.data
    # A closed form has no seed: another one would fit the same model.
    seeds = 1 if METHODS[recipe.method].closed_form else recipe.seeds
    variants = tuple(
        settings.model_copy(update={"train": settings.train.model_copy(update={"seed": seed})}) for seed in range(seeds)
    )
    content = {**inputs_key(settings, prepared.files), "version": recipe.version}
    for repeat in range(repeats):
        manifests = draw_folds(prepared.data.manifest, folds, data.val_share / (1.0 - data.test_share), repeat)
        for number, drawn in enumerate(manifests):
            manifest = with_label_noise(drawn, recipe.label_noise, (repeat, number))
            keys = tuple(run_key(variant, manifest, content) for variant in variants)
            yield Fold(repeat, number, replace(prepared.files, manifest=manifest), variants, keys)


def with_label_noise(manifest: Manifest, share: float, seed: Sequence[int]) -> Manifest:
    """Give a share of the training and validation images the label of another class."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in manifest.rows:
        others = [name for name in manifest.classes if name != row.label]
        # Drawn for every row, so that a larger share changes the same images and more.
        wrong, label = generator.random() < share, others[int(generator.integers(len(others)))]
        rows.append(row.model_copy(update={"label": label}) if wrong and row.split != "test" else row)
    return manifest.model_copy(update={"rows": tuple(rows)})


def finish(prepared: Prepared, fold: Fold) -> tuple[list[Run], int]:
    """Train the runs of a fold that are not finished; return all of its runs, and the number of trained ones."""
    paths = [prepared.data.root / "runs" / f"{key}.json" for key in fold.keys]
    runs = {key: run for key, path in zip(fold.keys, paths, strict=True) if (run := read_run(path, key)) is not None}
    waiting = [position for position, key in enumerate(fold.keys) if key not in runs]
    if waiting:
        for position, run in zip(waiting, train_runs(prepared, fold, waiting), strict=True):
            atomic_write(paths[position], run.model_dump_json().encode())
            runs[run.key] = run
    return [runs[key] for key in fold.keys], len(waiting)


def read_run(path: Path, key: str) -> Run | None:
    """Return a finished run, or None if there is no complete file of this run."""
    try:
        run = Run.model_validate_json(read_regular(path))
    except (OSError, ValueError):
        return None
    return run if run.key == key else None


def train_runs(prepared: Prepared, fold: Fold, positions: Sequence[int]) -> list[Run]:
    """Train some seeds in one pass over the features, and predict the test images."""
    root, manifest = prepared.data.root, fold.files.manifest
    variants = [fold.variants[position] for position in positions]
    models = [root / "models" / fold.keys[position] for position in positions]
    start = time.perf_counter()
    results = train_together(variants, fold.files, models, root / "checkpoints")
    # Epochs before a kill took time as well.
    before = sum(log.seconds for log in results[0].epochs[: results[0].resumed_from])
    seconds = (time.perf_counter() - start + before) / len(positions)
    rows = tuple(manifest.of("test"))
    runs = [
        Run(
            key=fold.keys[position],
            repeat=fold.repeat,
            fold=fold.number,
            seed=settings.train.seed,
            seconds=round(seconds, 4),
            classes=manifest.classes,
            rows=tuple(row.path for row in rows),
            ids=tuple(row.id for row in rows),
            labels=tuple(row.label for row in rows),
            patients=tuple(row.group for row in rows),
            probabilities=predict(settings, fold.files, model, rows),
        )
        for position, settings, model in zip(positions, variants, models, strict=True)
    ]
    for model in models:
        shutil.rmtree(model)
    return runs


def predict(
    settings: ResolvedSettings, files: StudyFiles, model: Path, rows: Sequence[ManifestRow]
) -> tuple[tuple[float, ...], ...]:
    """Return the probabilities (n, classes) of a saved model for rows of the manifest."""
    bundle = load_bundle(model, set_up(settings.compute))
    inputs = model_inputs(bundle.spec.network)
    opened = open_inputs(settings, files, inputs)
    try:
        if bundle.network.needs_lpm and opened.model is not None:
            bundle.network.use_lpm(opened.model.to(bundle.device))
        logits = source_logits(bundle, opened.source, [row.id for row in rows])
    finally:
        opened.close()
    return tuple(map(tuple, probabilities(logits, files.manifest.task).tolist()))
