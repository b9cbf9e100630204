"""Run a bench: train each method on each sampling, choose its learning rate by validation, evaluate what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.bench_plan import Group, reason
from pipeline.console import say
from pipeline.sweep_jobs import Job, evaluate_job, train_pass
from schemas.errors import FptError, TrainingError
from schemas.sweeps import RunRecord

if TYPE_CHECKING:
    from pipeline.project import Study
    from stages.train.inputs import StudyFiles

Skip = Callable[[Group], bool]
"""Whether a group is not to be started any more."""
Execute = Callable[["Study", "StudyFiles", Sequence[Group], Skip], Iterator[tuple[Group, str]]]
"""Runs groups, and yields each when it ends, with why it failed; empty: it did not."""


def inline(study: Study, files: StudyFiles, groups: Sequence[Group], skip: Skip) -> Iterator[tuple[Group, str]]:
    """Run groups in this process, one after the other; an `Execute`."""
    for number, group in enumerate(groups, start=1):
        if skip(group):
            continue
        if any(job.record is None for job in group.jobs):
            say(f"{number} of {len(groups)}: {group.name}")
        yield group, attempt(study, files, group)


def attempt(study: Study, files: StudyFiles, group: Group) -> str:
    """Finish a group; return why it failed, or an empty text."""
    try:
        finish(study, files, group)
    except Exception as error:  # Whatever one method raises, the others go on; it is named at the end.
        return reason(error)
    return ""


def run_groups(study: Study, files: StudyFiles, groups: Sequence[Group], execute: Execute) -> dict[str, str]:
    """Run all groups; return method -> why it failed. After a failure, a method gets no further group."""
    failed: dict[str, str] = {}
    for group, why in execute(study, files, groups, lambda group: group.method in failed):
        if why and group.method not in failed:
            failed[group.method] = f"{group.sampling.part.name}: {why}"
            say(f"{group.name} failed: {why}")
    return failed


def finish(study: Study, files: StudyFiles, group: Group) -> None:
    """Train what has no record, and evaluate the runs of the chosen learning rate.

    Raises:
        FptError: Of training or evaluation. Learning rates with which training fails are passed over where one remains.
    """
    waiting = [job for job in group.jobs if job.record is None]
    errors: list[TrainingError] = []
    for start in range(0, len(waiting), group.together):
        errors += _train(study, files, waiting[start : start + group.together])
    if errors and not any(trials(group).values()):
        raise errors[0]
    for job in chosen(group):
        _evaluate(files, job)


def _train(study: Study, files: StudyFiles, jobs: Sequence[Job]) -> list[TrainingError]:
    """Train runs in one pass; if one of them fails, each by itself from its last epoch. Return what failed."""
    try:
        train_pass(study, files, jobs)
    except TrainingError as error:
        if len(jobs) > 1:
            return [failure for job in jobs for failure in _train(study, files, [job])]
        say(f"{jobs[0].name}: {error.state}")
        return [error]
    return []


def chosen(group: Group) -> list[Job]:
    """Return the runs of the learning rate with the lowest validation loss.

    Raises:
        TrainingError: No learning rate has all its runs.
    """
    from stages.evaluate.bench_summary import choose_rate

    trained = {rate: records for rate, records in trials(group).items() if records}
    if not trained:
        raise TrainingError(f"No learning rate of {group.name} has all its runs.", repair="Run `fpt bench` again.")
    return group.by_rate()[choose_rate(trained)]


def trials(group: Group) -> dict[str, list[RunRecord]]:
    """Return learning rate -> records of its seeds; none where one of them is missing."""
    of_rate = {}
    for rate, jobs in group.by_rate().items():
        records = [record for job in jobs if (record := job.record) is not None]
        of_rate[rate] = records if len(records) == len(jobs) else []
    return of_rate


def _evaluate(files: StudyFiles, job: Job) -> None:
    """Evaluate a run, and measure its features; both once."""
    from stages.device import set_up
    from stages.evaluate.separation import separation_of_model

    record = _record(job)
    if not record.judged:
        part = replace(files, manifest=job.part.manifest)
        separation = separation_of_model(part, job.folder / "model", set_up(job.settings.compute))
        record = record.model_copy(update={"separation": separation})
    evaluate_job(files, job, record)


def _record(job: Job) -> RunRecord:
    record = job.record
    if record is None:
        raise FptError(f"{job.folder} was changed by another process.", repair="Run `fpt bench` again.")
    return record
