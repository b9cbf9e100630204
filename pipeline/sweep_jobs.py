"""Runs of a sweep: plan them, train the unfinished ones, and evaluate them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import say
from pipeline.sweep_grid import Combination
from schemas.errors import CacheIncompleteError, StorageError
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog, Metrics
from schemas.sweeps import RunRecord
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.features import ExtractionReceipt
    from stages.train.inputs import StudyFiles

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Part:
    """A split of the images, or a fold of a cross-validation."""

    name: str
    """Folder of its runs; empty for the study's own split."""
    manifest: Manifest
    """With its splits."""
    seed: int
    """`data.seed` that its runs write down."""


@dataclass(frozen=True)
class Job:
    """One run."""

    part: Part
    """On which split."""
    combination: Combination
    """Which values."""
    settings: ResolvedSettings
    """Resolved."""
    folder: Path
    """Folder of model/, train/, evaluation/ and `run.json`."""
    key: str
    """Digest of everything that decides the model."""

    @property
    def name(self) -> str:
        """For people, and in the summary."""
        return "/".join(filter(None, (self.part.name, self.combination.name)))

    @property
    def record(self) -> RunRecord | None:
        """Its record; None if it is not trained with these settings."""
        from stages.files import read_regular

        try:
            found = RunRecord.model_validate_json(read_regular(self.folder / RUN_FILE))
        except (OSError, ValueError):
            return None
        return found if found.run == self.key else None

    def note(self, record: RunRecord) -> None:
        """Write its note."""
        from stages.files import atomic_write

        atomic_write(self.folder / RUN_FILE, (record.model_dump_json(indent=1) + "\n").encode())


def plan_jobs(
    study: Study,
    combinations: Sequence[Combination],
    parts: Sequence[Part],
    files: StudyFiles,
    folder: Path,
    keys: dict[tuple[bool, str | None], dict[str, Any]] | None = None,
) -> list[Job]:
    """Every combination on every part, refused as a whole where one of them cannot be trained.

    Args:
        study: The study.
        combinations: Which values.
        parts: On which splits.
        files: What training reads.
        folder: Folder of all runs.
        keys: Keys of the inputs (`inputs_kind` -> key), to share among calls; missing ones are added.

    Raises:
        SettingsError: Values that are not valid.
        CacheMismatchError: The features do not fit a run.
        CacheIncompleteError: Images or views have no features.
    """
    from stages.train.inputs import inputs_key, inputs_kind
    from stages.train.job import run_key

    variants = _variants(study, combinations)
    _check(study, files, [settings for _, settings in variants], parts)
    # Features are no axis of a sweep: variants differ only in the kind of inputs. The key of images hashes the weights.
    by_kind = {inputs_kind(settings): settings for _, settings in variants}
    keys = {} if keys is None else keys
    keys |= {kind: inputs_key(settings, files) for kind, settings in by_kind.items() if kind not in keys}
    jobs = []
    for part in parts:
        for combination, settings in variants:
            own = settings.model_copy(update={"data": settings.data.model_copy(update={"seed": part.seed})})
            place = folder / "runs" / part.name / combination.name
            jobs.append(Job(part, combination, own, place, run_key(own, part.manifest, keys[inputs_kind(own)])))
    return jobs


def _variants(study: Study, combinations: Sequence[Combination]) -> list[tuple[Combination, ResolvedSettings]]:
    """Resolved settings of each combination; all have the order of images of the study."""
    from pipeline.params import override
    from schemas.parse import parse_settings
    from schemas.resolve import resolve

    shared = [
        f"train.order_seed={study.settings.train.order_seed}",
        f"features.precision={study.settings.features.precision}",
    ]
    # Not the resolved settings: what "auto" means depends on the method, which may be an axis.
    tree = study.asked.model_dump(mode="json", exclude_unset=True)
    resolved: dict[str, tuple[Combination, ResolvedSettings]] = {}
    for asked in combinations:
        settings = parse_settings(override(tree, [*asked.assignments, *shared]), source=study.params.name)
        combination = asked.effective(settings.method)
        if combination != asked:
            # The same model for every value of an axis without effect: once is enough.
            settings = parse_settings(override(tree, [*combination.assignments, *shared]), source=study.params.name)
        if combination.name not in resolved:
            resolved[combination.name] = (combination, resolve(settings, study.lpm))
    return list(resolved.values())


def _check(study: Study, files: StudyFiles, variants: Sequence[ResolvedSettings], parts: Sequence[Part]) -> None:
    """Refuse features that do not serve every variant that reads them."""
    from stages.store.remote_rows import open_rows
    from stages.train.checks import check_features, check_rows, check_views
    from stages.train.inputs import reads_images

    reading = [settings for settings in variants if not reads_images(settings)]
    if not reading:
        return
    receipt = files.need_receipt()
    for settings in reading:
        check_features(settings, study.lpm, receipt)
        check_views(settings, receipt)
    store = open_rows(study.cache, receipt, study.remote)
    try:
        for part in parts:
            check_rows(reading[0], part.manifest, store)
    except CacheIncompleteError as error:
        if reading[0].features.views == ("identity",) and not reading[0].features.crops:
            raise
        raise CacheIncompleteError(
            f"No features of every view: {counted(len(error.missing), 'image')}.",
            error.missing,
            "Extraction computes views only of the training images; in other splits and folds others are trained on.",
            "Run `fpt extract --all-views`: it computes the views of every image.",
        ) from None
    finally:
        store.close()


def ready_split(study: Study) -> str | None:
    """Return the column that the splits of the study come from, or None."""
    from schemas.manifest import PrepareSummary
    from stages.files import read_regular

    try:
        summary = read_regular(study.manifest_folder / "summary.json")
        return PrepareSummary.model_validate_json(summary).split_column
    except (OSError, ValueError):
        named = study.settings.data.split_column
        return None if named == "auto" else named


def note_use(study: Study, receipt: ExtractionReceipt | None) -> None:
    """Register the study as a user of its store."""
    from stages.store.manage.usage import register_use

    if receipt is None:
        return
    with suppress(StorageError):  # A store that cannot be written can be trained from all the same.
        register_use(study.cache, receipt.fingerprint, study.root, study.receipt, [int(n) for n in receipt.shards])


def train_jobs(study: Study, files: StudyFiles, jobs: Sequence[Job]) -> int:
    """Train what has no note, all that can share a pass together; return how many were trained."""
    note_use(study, files.receipt)
    waiting = [job for job in jobs if job.record is None]
    passes = list(together(waiting))
    for number, members in enumerate(passes, start=1):
        if len(passes) > 1:
            where = f"{members[0].part.name}, " if members[0].part.name else ""
            count = counted(len(members), "run")
            say(f"Pass {number} of {len(passes)}: {where}{members[0].settings.method}, {count}")
        train_pass(study, files, members)
    return len(waiting)


def together(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that can share a stream of batches, part by part."""
    from schemas.base import digest
    from stages.train.checks import shared_fields

    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.part.name, digest(shared_fields(job.settings))), []).append(job)
    yield from groups.values()


def train_pass(study: Study, files: StudyFiles, jobs: Sequence[Job]) -> None:
    """Train jobs that share a stream of batches, and note each.

    Raises:
        FptError: As `stages.train.trainer.train_together`; epochs that are finished are kept.
    """
    from pipeline.epoch_log import EpochLogger
    from pipeline.params import write_settings
    from schemas.methods import METHODS
    from stages.train.job import Watch
    from stages.train.trainer import train_together

    with ExitStack() as stack:
        loggers = []
        for job in jobs:
            epochs = 1 if METHODS[job.settings.method].closed_form else job.settings.train.epochs
            loggers.append(stack.enter_context(EpochLogger(job.folder / "train", epochs, title=f"{job.name}  ")))

        def follow(position: int, log: EpochLog) -> None:
            loggers[position](log)

        start = time.perf_counter()
        results = train_together(
            [job.settings for job in jobs],
            replace(files, manifest=jobs[0].part.manifest),
            [job.folder / "model" for job in jobs],
            study.checkpoints,
            Watch(on_epoch=follow, on_notice=say),
        )
        for logger, result in zip(loggers, results, strict=True):
            logger.finish(result.best)
    # Epochs before a kill took time as well.
    before = sum(log.seconds for log in results[0].epochs[: results[0].resumed_from])
    seconds = round((time.perf_counter() - start + before) / len(jobs), 4)
    for job, result in zip(jobs, results, strict=True):
        write_settings(job.settings, job.folder / "model")
        best = result.best
        job.note(
            RunRecord(run=job.key, best_epoch=best.epoch, val_auc=best.val_auc, val_loss=best.val_loss, seconds=seconds)
        )


def evaluate_job(files: StudyFiles, job: Job, record: RunRecord) -> Metrics:
    """Metrics on the test images of its part; computed once.

    Metrics of other rows (another evaluation may have been written over this one) are computed again: side by side with
    those of other runs they would not compare.
    """
    from stages.device import set_up
    from stages.evaluate.evaluator import evaluate
    from stages.evaluate.scoring import rows_sha256
    from stages.files import read_regular

    output = job.folder / "evaluation"
    if record.judged:
        expected = rows_sha256(tuple(job.part.manifest.of("test")))
        with suppress(OSError, ValueError):
            metrics = Metrics.model_validate_json(read_regular(output / "metrics.json"))
            if metrics.rows_sha256 == expected:
                return metrics
    metrics = evaluate(
        replace(files, manifest=job.part.manifest),
        job.folder / "model",
        output,
        device=set_up(job.settings.compute),
    )
    job.note(record.model_copy(update={"judged": True}))
    return metrics
