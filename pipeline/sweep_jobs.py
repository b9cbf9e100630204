"""The runs of a sweep: which there are, training what is not finished, judging what is not judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import say
from pipeline.sweep_grid import Combination
from schemas.errors import CacheIncompleteError, StorageError
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog, Metrics
from schemas.sweeps import METHOD_AXIS, RunRecord
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.features import ExtractionReceipt

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
    """Of model/, train/, evaluation/ and `run.json`."""
    key: str
    """Digest of everything that decides the model."""

    @property
    def name(self) -> str:
        """For people, and in the summary."""
        return "/".join(filter(None, (self.part.name, self.combination.name)))

    @property
    def record(self) -> RunRecord | None:
        """Its note; None where it is not trained as it is asked for now."""
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
    params: Path,
    assignments: Sequence[str],
    combinations: Sequence[Combination],
    parts: Sequence[Part],
    receipt: ExtractionReceipt,
    folder: Path,
) -> list[Job]:
    """Every combination on every part, refused as a whole where one of them cannot be trained.

    Raises:
        SettingsError: Values that are not valid.
        CacheMismatchError: The features do not fit a run.
        CacheIncompleteError: Images or views have no features.
    """
    from stages.train.trainer import run_key

    variants = _variants(study, params, assignments, combinations)
    _check(study, receipt, [settings for _, settings in variants], parts)
    jobs = []
    for part in parts:
        for combination, settings in variants:
            own = settings.model_copy(update={"data": settings.data.model_copy(update={"seed": part.seed})})
            place = folder / "runs" / part.name / combination.name
            jobs.append(Job(part, combination, own, place, run_key(own, part.manifest, receipt)))
    return jobs


def _variants(
    study: Study, params: Path, assignments: Sequence[str], combinations: Sequence[Combination]
) -> list[tuple[Combination, ResolvedSettings]]:
    """Resolved settings of each combination; all have the order of images of the study."""
    from pipeline.params import load_settings
    from schemas.resolve import resolve
    from stages.train.closed_form import FITTED, READ

    shared = [
        f"train.order_seed={study.settings.train.order_seed}",
        f"features.precision={study.settings.features.precision}",
    ]
    found: list[tuple[Combination, ResolvedSettings]] = []
    names: set[str] = set()
    for asked in combinations:
        combination = asked
        settings = load_settings(params, [*assignments, *combination.assignments, *shared])
        if settings.method in FITTED:
            # The same fit for every seed and rate: once is enough.
            combination = combination.only(READ | {METHOD_AXIS})
            settings = load_settings(params, [*assignments, *combination.assignments, *shared])
        if combination.name not in names:
            names.add(combination.name)
            found.append((combination, resolve(settings, study.lpm)))
    return found


def _check(
    study: Study, receipt: ExtractionReceipt, variants: Sequence[ResolvedSettings], parts: Sequence[Part]
) -> None:
    from stages.store.remote_rows import open_rows
    from stages.train.checks import check_features, check_rows, check_views

    for settings in variants:
        check_features(settings, study.lpm, receipt)
        check_views(settings, receipt)
    store = open_rows(study.cache, receipt, study.remote)
    try:
        for part in parts:
            check_rows(variants[0], part.manifest, store)
    except CacheIncompleteError as error:
        if variants[0].features.views == ("identity",) and not variants[0].features.crops:
            raise
        raise CacheIncompleteError(
            f"No features of every view: {counted(len(error.missing), 'image')}.",
            error.missing,
            "Extraction computes views of the training images alone; in other splits and folds others are trained on.",
            "Run `fpt extract --all-views`: it computes the views of every image.",
        ) from None
    finally:
        store.close()


def note_use(study: Study, receipt: ExtractionReceipt) -> None:
    """Tell the store that this study relies on it."""
    from stages.store.manage.usage import register_use

    with suppress(StorageError):  # A store that cannot be written can be trained from all the same.
        register_use(study.cache, receipt.fingerprint, study.root, study.receipt, [int(n) for n in receipt.shards])


def train_jobs(study: Study, receipt: ExtractionReceipt, jobs: Sequence[Job]) -> int:
    """Train what has no note, all that can share a pass in one; says how many."""
    note_use(study, receipt)
    waiting = [job for job in jobs if job.record is None]
    passes = list(_passes(waiting))
    for number, members in enumerate(passes, start=1):
        if len(passes) > 1:
            where = f"{members[0].part.name}, " if members[0].part.name else ""
            count = counted(len(members), "run")
            say(f"Pass {number} of {len(passes)}: {where}{members[0].settings.method}, {count}")
        _train(study, receipt, members)
    return len(waiting)


def _passes(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that can share a stream of batches, part by part."""
    from schemas.base import digest
    from stages.train.checks import shared_fields

    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.part.name, digest(shared_fields(job.settings))), []).append(job)
    yield from groups.values()


def _train(study: Study, receipt: ExtractionReceipt, jobs: Sequence[Job]) -> None:
    from pipeline.epoch_log import EpochLogger
    from pipeline.params import write_settings
    from stages.train.closed_form import FITTED
    from stages.train.trainer import train_together

    with ExitStack() as stack:
        loggers = []
        for job in jobs:
            epochs = 1 if job.settings.method in FITTED else job.settings.train.epochs
            loggers.append(stack.enter_context(EpochLogger(job.folder / "train", epochs, title=f"{job.name}  ")))

        def follow(position: int, log: EpochLog) -> None:
            loggers[position](log)

        results = train_together(
            [job.settings for job in jobs],
            study.lpm,
            jobs[0].part.manifest,
            receipt,
            study.cache,
            [job.folder / "model" for job in jobs],
            study.checkpoints,
            follow,
            remote=study.remote,
            on_notice=say,
        )
        for logger, result in zip(loggers, results, strict=True):
            logger.finish(result.best)
    for job, result in zip(jobs, results, strict=True):
        write_settings(job.settings, job.folder / "model")
        best = result.best
        job.note(RunRecord(run=job.key, best_epoch=best.epoch, val_auc=best.val_auc, val_loss=best.val_loss))


def judge_job(study: Study, receipt: ExtractionReceipt, job: Job, record: RunRecord) -> Metrics:
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
        job.part.manifest,
        receipt,
        job.folder / "model",
        study.cache,
        output,
        device=set_up(job.settings.compute),
        remote=study.remote,
    )
    job.note(record.model_copy(update={"judged": True}))
    return metrics
