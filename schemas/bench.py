"""Result of a bench: methods side by side on the same few-shot samplings and test images."""

from __future__ import annotations

from schemas.base import Contract
from schemas.manifest import GroupUnit
from schemas.methods import Method
from schemas.sweeps import PairedDifference, Separation, Spread
from schemas.tasks import Task

ALL_SHOTS = "all"
"""Number of shots that stands for the splits of the study."""


class BenchRun(Contract):
    """A training with the learning rate that its sampling chose."""

    sampling: int
    """Number of the sampling, from 0."""
    seed: int | None
    """`train.seed`; null for closed forms, which have none."""
    rate: float | None
    """Learning rate; null for closed forms."""
    folder: str
    """Folder of model/, train/ and evaluation/, relative to the folder of the bench."""
    best_epoch: int
    """Epoch whose weights are kept."""
    val_auc: float | None
    """Validation AUC of that epoch."""
    val_loss: float
    """Validation log loss of that epoch."""
    seconds: float | None
    """Training time; runs of one pass share it equally."""
    learnable: int
    """Parameters that were trained."""
    test: dict[str, float]
    """Metric -> value on the test images, as in `metrics.json`, and log_loss; undefined ones are left out."""
    separation: Separation | None
    """Separation of the adapted features of the test images; null where the LPM is not adapted."""


class BenchRow(Contract):
    """A method with a number of shots: one row of a table."""

    method: Method
    """Name in the registry."""
    auc: Spread | None
    """Test AUC of all runs, sampling by sampling; null where it is not defined."""
    difference: PairedDifference | None
    """AUC minus that of the reference, a value per sampling (means over seeds), with the 95% interval of their mean
    over draws of test patients; null for the reference, and without it."""
    test: dict[str, Spread]
    """Every metric of all runs."""
    seconds: Spread | None
    """Training time of a run."""
    learnable: int
    """Parameters that were trained; the largest number where runs differ."""
    learnable_share: float
    """Share of the parameters of the LPM with a linear head."""
    tensor_mib: float | None
    """Peak tensor memory of a training step, MiB; null for closed forms, which have no step."""
    ppe: float | None
    """Mean AUC times exp(-log10(r + 1)), r the learnable share."""
    pme: float | None
    """Mean AUC times exp(-log10(m / m_full + 1)), m the memory of a step and m_full that of full fine-tuning."""
    separation: Separation | None
    """Means over runs; null where the LPM is not adapted."""
    rates: dict[str, float]
    """Sampling -> chosen learning rate; empty for closed forms."""
    validation: dict[str, dict[str, float | None]]
    """Sampling -> learning rate -> validation loss, mean over seeds; null where training diverged. What chooses."""
    runs: tuple[BenchRun, ...]
    """Runs with the chosen rates."""


class BenchResult(Contract):
    """`bench.json`."""

    task: Task
    """Kind of the labels."""
    lpm: str
    """Name of the LPM."""
    image_size: int
    """Input of the LPM, in pixels."""
    classes: tuple[str, ...]
    """Label names."""
    test_images: int
    """Test images, the same for every run."""
    test_groups: int
    """Their patients (or other groups)."""
    unit: GroupUnit | None
    """What the groups are."""
    reference: Method
    """Method that the others are compared with."""
    full_finetune_tensor_mib: float
    """Peak tensor memory of a step of full fine-tuning, MiB."""
    lpm_parameters: int
    """Parameters of the LPM with a linear head."""
    before: Separation | None
    """Separation of the cached pooled outputs of the test images; null without them."""
    shots: dict[str, dict[str, BenchRow]]
    """Number of shots, or all -> method -> row."""
    left_out: dict[str, str]
    """Method -> why it was not trained, or not to the end."""
    settings: dict[str, object]
    """Options of the bench, and the settings of the study."""
    machine: dict[str, str]
    """Where it ran last."""
    versions: dict[str, str]
    """Versions of Python and packages."""


class PlannedMethod(Contract):
    """A method before it runs: one row of `fpt bench --plan`."""

    method: Method
    """Name in the registry."""
    learnable: int | None
    """Parameters to train; null for closed forms before they are fitted."""
    tensor_mib: float | None
    """Peak tensor memory of the training step of one run, MiB; null for closed forms."""
    together: int
    """Runs that are trained in one pass."""
    runs: int
    """All runs: shots, samplings, rates and seeds."""
    finished: int
    """Those of them that are trained."""
    seconds: float | None
    """Estimated time of the unfinished runs, one after the other; null if it could not be measured."""
    basis: str
    """What the estimate is based on: finished runs, a step on this machine, or why there is none."""


class BenchPlan(Contract):
    """Result of `fpt bench --plan`."""

    methods: tuple[PlannedMethod, ...]
    """What would run."""
    left_out: dict[str, str]
    """Method -> why it would not."""
    memory_gib: float | None
    """Limit of the memory of a training step, GiB; null: none."""
