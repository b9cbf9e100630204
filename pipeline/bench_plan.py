"""What a bench runs: samplings, methods with their learning rates, and what is left out because it does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import say
from pipeline.sweep_grid import Combination
from pipeline.sweep_jobs import Job, Part, plan_jobs, ready_split
from schemas.bench import ALL_SHOTS, BenchPlan, PlannedMethod
from schemas.cost import CostReport
from schemas.errors import FptError
from schemas.manifest import Manifest
from schemas.methods import METHODS
from schemas.sweeps import METHOD_AXIS, SEED_AXIS
from schemas.version import __version__

if TYPE_CHECKING:
    from pipeline.project import Study
    from schemas.resolved import ResolvedSettings
    from stages.train.inputs import StudyFiles

RATE_AXIS = "lr"
MIB = 2**20


@dataclass(frozen=True)
class Asked:
    """Options of a bench."""

    methods: tuple[str, ...]
    """Names in the registry, in the order of the table."""
    shots: tuple[int | None, ...]
    """Patients per class; None: the splits of the study."""
    samplings: int
    """Draws of each number of shots."""
    seeds: int
    """Trainings of each sampling and learning rate."""
    rates: tuple[float, ...] = ()
    """In place of the learning rates of the registry; empty: those."""


@dataclass(frozen=True)
class Sampling:
    """One draw of training and validation images."""

    shots: str
    """Number of patients per class, or `ALL_SHOTS`."""
    number: int
    """From 0."""
    part: Part
    """With the manifest of the draw."""


@dataclass(frozen=True)
class Group:
    """The runs of a method on one sampling: the unit of work, inline or on a cluster."""

    method: str
    """Name in the registry."""
    sampling: Sampling
    """On which images."""
    jobs: tuple[Job, ...]
    """A run per learning rate and seed."""
    together: int
    """Runs that are trained in one pass."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method}, {self.sampling.part.name}"

    def by_rate(self) -> dict[str, list[Job]]:
        """Return learning rate, or an empty text without one -> runs."""
        rates: dict[str, list[Job]] = {}
        for job in self.jobs:
            rates.setdefault(job.combination.values.get(RATE_AXIS, ""), []).append(job)
        return rates


@dataclass(frozen=True)
class Plan:
    """Everything that a bench trains."""

    groups: tuple[Group, ...]
    """Method by method."""
    costs: Mapping[str, CostReport]
    """Method -> cost of a training step; closed forms have none."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Method -> why it is not trained."""

    @property
    def methods(self) -> list[str]:
        """Methods to train, in order."""
        return list(dict.fromkeys(group.method for group in self.groups))

    def of(self, method: str) -> list[Group]:
        """Return the groups of a method."""
        return [group for group in self.groups if group.method == method]


def draw_samplings(study: Study, manifest: Manifest, asked: Asked) -> list[Sampling]:
    """Draw the training and validation images of every sampling; the test images are always those of the study.

    Raises:
        DataError: A class has too few patients.
    """
    from stages.prepare.folds import draw_validation
    from stages.prepare.shots import draw_shots

    data, ready = study.settings.data, ready_split(study)
    if ready is not None and asked.samplings > 1 and None in asked.shots:
        say(f"All images are one sampling: data.split_column ({ready}) gives their splits.")
    drawn = []
    for shots in asked.shots:
        name = ALL_SHOTS if shots is None else str(shots)
        for number in range(1 if shots is None and ready is not None else asked.samplings):
            seed = data.seed + number
            if shots is not None:
                images = draw_shots(manifest, shots, seed)
            elif number == 0:
                images = manifest
            else:
                images = draw_validation(manifest, data.val_share / (1.0 - data.test_share), seed)
            drawn.append(Sampling(name, number, Part(f"shots-{name}/sampling-{number}", images, seed)))
    return drawn


def plan_bench(
    study: Study, files: StudyFiles, asked: Asked, samplings: Sequence[Sampling], folder: Path, memory: float | None
) -> Plan:
    """Plan every method by itself: one that cannot be trained is left out by name.

    Args:
        study: The study.
        files: What training reads.
        asked: Options.
        samplings: From `draw_samplings`.
        folder: Folder of the bench.
        memory: Bytes that a training step may take; None: any number.
    """
    left_out: dict[str, str] = {}
    groups: list[Group] = []
    costs: dict[str, CostReport] = {}
    keys: dict[tuple[bool, str | None], dict[str, Any]] = {}
    of_part = {sampling.part.name: sampling for sampling in samplings}
    for method in asked.methods:
        try:
            jobs = plan_jobs(
                study, _combinations(study, method, asked), [one.part for one in samplings], files, folder, keys
            )
            cost = _cost(study, files, jobs[0].settings, folder)
        except (FptError, ImportError) as error:
            left_out[method] = reason(error)
            continue
        if cost is not None:
            costs[method] = cost
            step = cost.train_tensor_mib or 0.0
            if memory is not None and step * MIB > memory:
                left_out[method] = (
                    f"A training step takes {step / 1024:,.2f} GiB of {memory / 2**30:,.2f} GiB. "
                    "Lower train.batch_size, or raise train.accumulate."
                )
                continue
        together = _together(cost, memory, len(jobs))
        for name, sampling in of_part.items():
            members = tuple(job for job in jobs if job.part.name == name)
            groups.append(Group(method, sampling, members, together))
    return Plan(tuple(groups), costs, left_out)


def reason(error: BaseException) -> str:
    """Return why a method failed, in one line."""
    if isinstance(error, FptError):
        text = error.state
        problems = getattr(error, "problems", ())
        details = [f"{key}: {message}" for key, message in problems] or error.cause.splitlines()[:1]
        return " ".join([text, *(f"{detail.strip().rstrip('.')}." for detail in details if detail.strip())])
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"


def _combinations(study: Study, method: str, asked: Asked) -> list[Combination]:
    """Return every learning rate with every seed; a closed form has neither (`Combination.effective`)."""
    row = METHODS[method]
    if row.closed_form:
        return [Combination({METHOD_AXIS: method})]
    first = study.asked.train.seed
    return [
        Combination({METHOD_AXIS: method, RATE_AXIS: f"{rate:g}", SEED_AXIS: str(first + seed)})
        for rate in asked.rates or row.rates
        for seed in range(asked.seeds)
    ]


def _cost(study: Study, files: StudyFiles, settings: ResolvedSettings, folder: Path) -> CostReport | None:
    """Estimate the cost of a method, or read it if it is known: the estimate takes seconds."""
    import torch

    from schemas.base import digest
    from stages.files import atomic_write, read_regular
    from stages.train.cost import estimate_cost

    if METHODS[settings.method].closed_form:
        return None
    classes = len(files.manifest.classes)
    sections = settings.model_dump(mode="json", include={"method", "lpm", "features", "train", "methods"})
    key = digest([sections, study.lpm.model_dump(mode="json"), classes, __version__, str(torch.__version__)])
    path = folder / "costs" / f"{key[:16]}.json"
    with suppress(OSError, ValueError):
        return CostReport.model_validate_json(read_regular(path))
    cost = estimate_cost(settings, study.lpm, classes, study.root)
    atomic_write(path, (cost.model_dump_json(indent=1) + "\n").encode())
    return cost


def _together(cost: CostReport | None, memory: float | None, runs: int) -> int:
    """Return how many runs fit into the memory of one pass, which share the batch."""
    if cost is None or memory is None or cost.train_tensor_mib is None or cost.train_batch_mib is None:
        return runs
    own = cost.train_tensor_mib - cost.train_batch_mib
    return max(1, min(runs, int((memory / MIB - cost.train_batch_mib) / max(own, 1e-6))))


def describe_plan(plan: Plan, files: StudyFiles, checkpoints: Path, memory: float | None) -> BenchPlan:
    """Estimate the time of every method from its finished runs, or else from a step on the real inputs.

    Args:
        plan: From `plan_bench`.
        files: What training reads.
        checkpoints: Folder for what a trial writes.
        memory: Limit of the memory, bytes.
    """
    methods, left_out = [], dict(plan.left_out)
    for method in plan.methods:
        groups = plan.of(method)
        jobs = [job for group in groups for job in group.jobs]
        finished = [(job, record) for job in jobs if (record := job.record) is not None]
        known = [record.seconds / (_epochs(job) * _rows(job)) for job, record in finished if record.seconds is not None]
        waiting = [job for job in jobs if job.record is None]
        seconds, basis = _estimate(waiting, known, files, checkpoints)
        cost = plan.costs.get(method)
        methods.append(
            PlannedMethod(
                method=method,
                learnable=None if cost is None else cost.learnable,
                tensor_mib=None if cost is None else cost.train_tensor_mib,
                together=groups[0].together,
                runs=len(jobs),
                finished=len(finished),
                seconds=seconds,
                basis=basis,
            )
        )
    return BenchPlan(methods=tuple(methods), left_out=left_out, memory_gib=None if memory is None else memory / 2**30)


def _rows(job: Job) -> int:
    return sum(1 for _ in job.part.manifest.of("train"))


def _epochs(job: Job) -> int:
    return 1 if METHODS[job.settings.method].closed_form else job.settings.train.epochs


def _estimate(
    waiting: Sequence[Job], known: Sequence[float], files: StudyFiles, checkpoints: Path
) -> tuple[float | None, str]:
    from stages.train.trial import seconds_per_row

    if not waiting:
        return 0.0, "finished"
    work = sum(_epochs(job) * _rows(job) for job in waiting)
    if known:
        return work * sorted(known)[len(known) // 2], "finished runs"
    try:
        return work * seconds_per_row(waiting[0].settings, files, checkpoints), "a step on this machine"
    except Exception as error:  # A method that fails is one line of the plan.
        return None, reason(error)
