"""Shift bench: evaluate the trained runs of a bench on corrupted test images and held-out sites, with adaptation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bench_plan import Group
from pipeline.bench_result import rows_as_csv
from pipeline.bench_runs import chosen
from pipeline.console import say
from schemas.errors import EvaluationError, FptError
from schemas.shift import SITE, UNCHANGED, Condition, ShiftResult, ShiftRow, ShiftRun
from schemas.test_time import LEAST_BATCH, AdaptOptions
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study
    from pipeline.sweep_jobs import Job
    from schemas.manifest import Manifest, ManifestRow
    from stages.predict.shifted import Entry, ShiftedImages
    from stages.train.inputs import StudyFiles

RECIPE = 1
"""Bump it when a corruption or an adaptation gives other numbers: earlier ones are then computed again."""


@dataclass(frozen=True)
class ShiftAsked:
    """Options of a shift bench."""

    shifts: tuple[str, ...]
    """Corruptions, and "site" for held-out sites."""
    strengths: tuple[int, ...]
    """Strengths of the corruptions."""
    adapts: tuple[AdaptOptions | None, ...]
    """Adaptations; None: the model as it is, which is always among them."""
    seed: int
    """Seed of the noise, and of the order of the images."""
    batch: int
    """Images of a batch."""


@dataclass(frozen=True)
class Wanted:
    """A run with an adaptation."""

    group: Group
    """Method and sampling."""
    job: Job
    """Trained run."""
    adapt: AdaptOptions | None
    """Adaptation; None: none."""

    @property
    def name(self) -> str:
        """For people."""
        return self.group.method if self.adapt is None else f"{self.group.method} with {self.adapt.name}"

    def file(self, condition: Condition) -> Path:
        """Return the file of its numbers under a condition."""
        from schemas.base import digest

        kind = "none" if self.adapt is None else self.adapt.name
        site = "" if condition.site is None else f"-{digest(condition.site)[:12]}"
        return self.job.folder / "shift" / f"{condition.shift}-{condition.strength}{site}_{kind}.json"


def conditions_of(manifest: Manifest, asked: ShiftAsked) -> tuple[list[Condition], dict[str, str]]:
    """Return the conditions of a bench, and held-out site -> why it is left out."""
    found = [Condition(shift=UNCHANGED)]
    found += [
        Condition(shift=shift, strength=strength)
        for shift in asked.shifts
        if shift != SITE
        for strength in asked.strengths
    ]
    left_out = {}
    if SITE in asked.shifts:
        for site in held_out_sites(manifest):
            rows = condition_rows(manifest, Condition(shift=SITE, site=site))
            if len(rows) < LEAST_BATCH:
                left_out[f"site {site}"] = f"{counted(len(rows), 'test image')}, fewer than {LEAST_BATCH}."
            else:
                found.append(Condition(shift=SITE, site=site))
    return found, left_out


def held_out_sites(manifest: Manifest) -> list[str]:
    """Return the sites that have test images only."""
    trained = {row.site for row in manifest.rows if row.split != "test"}
    tested = dict.fromkeys(row.site for row in manifest.of("test") if row.site is not None)
    return [site for site in tested if site not in trained]


def condition_rows(manifest: Manifest, condition: Condition) -> list[ManifestRow]:
    """Return the test rows of a condition, each image once.

    Without a site these are the images of all sites that have training images, so that a held-out site is compared with
    familiar ones; of all sites if the test split has no others.
    """
    if condition.site is not None:
        rows = [row for row in manifest.of("test") if row.site == condition.site]
    else:
        foreign = held_out_sites(manifest)
        tested = list(manifest.of("test"))
        rows = [row for row in tested if row.site not in foreign] or tested
    return list({row.id: row for row in rows}.values())


def describe_shift(
    groups: Sequence[Group], conditions: Sequence[Condition], asked: ShiftAsked, manifest: Manifest
) -> str:
    """Return what a shift bench would compute, in lines for people."""
    images = sum(len(condition_rows(manifest, condition)) for condition in conditions)
    adapts = [one.name for one in asked.adapts if one is not None]
    methods = dict.fromkeys(group.method for group in groups)
    lines = [
        f"{counted(len(conditions), 'condition')}: {', '.join(condition.name for condition in conditions)}",
        f"{counted(len(methods), 'method')}, {counted(len(groups), 'group')} of runs; without adaptation"
        + (f", and by {', '.join(adapts)}" if adapts else ""),
        f"{images:,} passes of the LPM for cached features, shared by all methods; an adaptation of the LPM needs "
        "passes of its own",
    ]
    if "foa" in adapts:
        lines.append(f"foa: for each run of a head or an adaptation of the LPM {28 * images:,} passes more")
    if "vptta" in adapts:
        lines.append(f"vptta: for each such run {2 * images:,} passes more, and {images:,} backward")
    return "\n".join(lines)


def run_shift(
    study: Study, files: StudyFiles, wanted: Sequence[Wanted], conditions: Sequence[Condition], asked: ShiftAsked
) -> None:
    """Compute what is missing.

    Raises:
        EvaluationError: The runs have different features.
        FptError: As reading the images and loading the LPM.
    """
    images = _images(study, files, asked)
    for number, condition in enumerate(conditions, start=1):
        rows = condition_rows(files.manifest, condition)
        missing = [one for one in wanted if _known(one, condition, rows, asked) is None]
        if not missing:
            continue
        say(
            f"{number} of {len(conditions)}: {condition.name}, {counted(len(rows), 'image')}, {len(missing)} to predict"
        )
        found = images.probabilities(list(_entries(files, missing, images)), rows, condition, asked.batch)
        for one, p in zip(missing, found, strict=True):
            _note(one, condition, rows, p, asked)


def wanted_runs(groups: Sequence[Group], asked: ShiftAsked) -> tuple[list[Wanted], dict[str, str]]:
    """Return the runs with each adaptation that they can have, and method and adaptation -> why it is left out.

    Raises:
        EvaluationError: No run can be evaluated.
    """
    from stages.test_time.targets import check_adaptable
    from stages.train.bundle import load_bundle

    wanted, left_out = [], {}
    for group in groups:
        try:
            jobs = chosen(group)
        except FptError as error:
            left_out[group.method] = error.state
            continue
        for job in jobs:
            bundle = load_bundle(job.folder / "model")
            for adapt in asked.adapts:
                one = Wanted(group, job, adapt)
                try:
                    if adapt is not None:
                        check_adaptable(adapt.name, bundle.spec, bundle.network)
                except EvaluationError as error:
                    left_out[one.name] = error.cause.splitlines()[0]
                    continue
                wanted.append(one)
    if not wanted:
        raise EvaluationError("No trained run can be evaluated.", repair="Run `fpt bench` first.")
    return wanted, left_out


def _images(study: Study, files: StudyFiles, asked: ShiftAsked) -> ShiftedImages:
    from stages.device import set_up
    from stages.extract.shard_task import batch_size
    from stages.predict.shifted import ShiftedImages
    from stages.prepare.class_folders import images_folder

    device = set_up(study.settings.compute)
    return ShiftedImages(
        folder=images_folder(files.data, files.root),
        data=files.data,
        lpm=files.weights_source,
        root=files.root,
        device=device,
        batch_size=batch_size(study.settings.compute, device),
        seed=asked.seed,
    )


def _entries(files: StudyFiles, wanted: Sequence[Wanted], images: ShiftedImages) -> Iterator[Entry]:
    """Yield the loaded models; the adaptations of a run share its model."""
    from dataclasses import replace

    from stages.predict.shifted import Entry
    from stages.test_time.stream import AdaptContext
    from stages.train.bundle import Bundle, load_bundle

    loaded: dict[Path, Bundle] = {}
    for one in wanted:
        folder = one.job.folder / "model"
        if folder not in loaded:
            loaded[folder] = load_bundle(folder, images.device)
        own = replace(files, manifest=one.job.part.manifest)
        yield Entry(loaded[folder], AdaptContext(folder, files.root, files.weights_source, own), one.adapt)


def _key(one: Wanted, condition: Condition, rows: Sequence[ManifestRow], asked: ShiftAsked) -> str:
    from schemas.base import digest
    from stages.evaluate.scoring import rows_sha256

    adapt = None if one.adapt is None else one.adapt.model_dump(mode="json")
    return digest([RECIPE, one.job.key, condition.model_dump(mode="json"), adapt, rows_sha256(tuple(rows)), asked.seed])


def _known(one: Wanted, condition: Condition, rows: Sequence[ManifestRow], asked: ShiftAsked) -> ShiftRun | None:
    """Return the numbers that were computed before; None if they are missing or of other settings."""
    from stages.files import read_regular

    with suppress(OSError, ValueError):
        found = ShiftRun.model_validate_json(read_regular(one.file(condition)))
        if found.key == _key(one, condition, rows, asked):
            return found
    return None


def _note(one: Wanted, condition: Condition, rows: Sequence[ManifestRow], p: Any, asked: ShiftAsked) -> None:
    """Score probabilities (n, C) and write their metrics."""
    from stages.evaluate.predictions import Predictions
    from stages.evaluate.shift_table import shift_metrics
    from stages.files import atomic_write

    manifest = one.job.part.manifest
    run = ShiftRun(
        key=_key(one, condition, rows, asked),
        condition=condition,
        adapt=None if one.adapt is None else one.adapt.name,
        images=len(rows),
        metrics=shift_metrics(Predictions(manifest.classes, tuple(rows), p, None, manifest.task)),
    )
    atomic_write(one.file(condition), (run.model_dump_json(indent=1) + "\n").encode())


def collect_shift(
    wanted: Sequence[Wanted],
    conditions: Sequence[Condition],
    asked: ShiftAsked,
    manifest: Manifest,
    left_out: Mapping[str, str],
    place: tuple[dict[str, str], dict[str, str]],
) -> ShiftResult:
    """Collect the numbers of all runs.

    Args:
        wanted: From `wanted_runs`.
        conditions: From `conditions_of`.
        asked: Options.
        manifest: Of the study.
        left_out: What is not in the table.
        place: Machine and versions.
    """
    from stages.evaluate.sweep_statistics import spread_known

    rows = []
    for condition in conditions:
        tested = condition_rows(manifest, condition)
        found: dict[tuple[str, str, str | None], list[ShiftRun]] = {}
        for one in wanted:
            run = _known(one, condition, tested, asked)
            if run is not None:
                found.setdefault((one.group.sampling.shots, one.group.method, run.adapt), []).append(run)
        for (shots, method, _), runs in found.items():
            names = dict.fromkeys(name for run in runs for name in run.metrics)
            spreads = {name: spread_known([run.metrics.get(name) for run in runs]) for name in names}
            metrics = {name: one for name, one in spreads.items() if one is not None}
            rows.append(
                ShiftRow(
                    shots=shots,
                    method=method,
                    condition=condition,
                    adapt=runs[0].adapt,
                    images=len(tested),
                    metrics=metrics,
                )
            )
    machine, versions = place
    return ShiftResult(
        rows=tuple(rows),
        seed=asked.seed,
        batch=asked.batch,
        left_out=dict(left_out),
        machine=machine,
        versions=versions,
    )


def write_shift(result: ShiftResult, folder: Path) -> None:
    """Write shift.json, shift.csv and shift.html.

    Raises:
        StorageError: If the folder cannot be written.
    """
    from stages.evaluate.shift_table import render_shift
    from stages.files import atomic_write

    atomic_write(folder / "shift.csv", rows_as_csv(_table(result)))
    atomic_write(folder / "shift.html", render_shift(result).encode())
    atomic_write(folder / "shift.json", (result.model_dump_json(indent=1) + "\n").encode())


def _table(result: ShiftResult) -> list[dict[str, Any]]:
    from schemas.shift import SHIFT_METRICS

    return [
        {
            "shots": row.shots,
            "method": row.method,
            "shift": row.condition.shift,
            "strength": row.condition.strength,
            "site": row.condition.site,
            "adapt": row.adapt or "none",
            "images": row.images,
            "runs": max((len(one.values) for one in row.metrics.values()), default=0),
            **{name: row.metrics[name].mean if name in row.metrics else None for name in SHIFT_METRICS},
        }
        for row in result.rows
    ]
