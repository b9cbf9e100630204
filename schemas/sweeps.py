"""Results of a sweep: the record of each run, and their summary."""

from __future__ import annotations

from schemas.base import Contract

METHOD_AXIS, SEED_AXIS = "method", "seed"
"""Axes with a meaning of their own: methods are compared with each other, seeds are averaged."""


class Spread(Contract):
    """Several values of one number."""

    mean: float
    """Their mean."""
    std: float | None
    """Standard deviation of the sample (n - 1); null for a single value."""
    values: tuple[float, ...]
    """All of them, in the order of the runs."""


class Separation(Contract):
    """How far apart the classes are in a space of features, on some images. Scale-free; higher is better."""

    silhouette: float | None
    """Mean silhouette coefficient, -1 to 1; null where no class has two images, or there is one class."""
    margin: float | None
    """Mean of (b - a) / (a + b), -1 to 1: a is the distance to the mean of the other images of the class, b that to the
    nearest mean of another class; null as above."""
    effective_rank: float | None
    """exp(entropy of the normalised singular values) of the centred features; null where all are equal."""


class RunRecord(Contract):
    """`run.json` of a run: it is trained; written last, so that everything next to it is complete."""

    run: str
    """Digest of everything that decides the model."""
    best_epoch: int
    """Whose weights are kept."""
    val_auc: float | None
    """Validation AUC of that epoch; null if the validation split lacks a class."""
    val_loss: float
    """Validation loss of that epoch."""
    judged: bool = False
    """Whether its evaluation is complete."""
    seconds: float | None = None
    """Time of the training with reading and loading; runs of one pass share it equally. Null: trained by an earlier
    version."""
    separation: Separation | None = None
    """Separation of the adapted features of the test images; null: not measured, or the LPM is not adapted."""


class SweptRun(Contract):
    """One run of a sweep."""

    name: str
    """Folder below `runs/`."""
    part: str
    """Split or fold; empty for the split of the study."""
    values: dict[str, str]
    """Axis -> value, as it was written."""
    settings: str
    """Name of its settings: the values without the seed."""
    val_auc: float | None
    """Validation AUC of the epoch that is kept: what chooses."""
    val_loss: float
    """Validation loss of that epoch."""
    test: dict[str, float]
    """Metric -> value on the test images; what is not defined there is left out."""


class SweptSettings(Contract):
    """Runs that share settings, or a value of an axis."""

    runs: int
    """How many."""
    val_auc: Spread | None
    """Null where a run has none."""
    val_loss: Spread
    """Validation loss of the kept epochs."""
    test: dict[str, Spread]
    """Metric -> values of the runs, each on the test images of its split or fold."""
    pooled_auc: Spread | None = None
    """Cross-validation: AUC over the predictions of all folds at once, one value a seed."""
    averaged_auc: Spread | None = None
    """AUC of the runs averaged (log-probabilities), one value a split; of a cross-validation one, over all folds."""


class PairedDifference(Contract):
    """A metric of one method minus that of the first, on equal rows."""

    difference: Spread
    """One value a split."""
    interval: tuple[float, float] | None
    """95% interval over draws of whole groups; null for several splits, whose test images overlap."""


class SweepSummary(Contract):
    """`summary.json`: numbers that `dvc metrics show` reads, and every value."""

    best: str
    """Settings with the highest mean validation AUC (the lowest loss of equals). Test metrics play no part."""
    chosen_test_auc: Spread | None
    """Test AUC of what the validation images of each split or fold choose there; the mean over its seeds."""
    settings: dict[str, SweptSettings]
    """Name -> its runs."""
    axes: dict[str, dict[str, SweptSettings]]
    """Axis -> value -> all runs with it, whatever their other values."""
    all: SweptSettings
    """Every run; `averaged_auc` is that of all of them averaged."""
    differences: dict[str, dict[str, PairedDifference]]
    """Method -> metric -> difference to the first method; each by its best settings, runs averaged."""
    runs: dict[str, SweptRun]
    """Folder below `runs/` -> run."""


class RateTrial(Contract):
    """A learning rate that was tried."""

    lr: float
    """The rate."""
    val_loss: Spread
    """Validation loss of the kept epoch, one value per seed."""
    val_auc: Spread | None
    """Validation AUC of the same epochs; null if the validation split lacks a class."""
    smoothed_loss: float
    """Mean loss averaged with its neighbours (1/4, 1/2, 1/4): what chooses."""


class RateFinding(Contract):
    """Result of `fpt lr-find`."""

    lr: float
    """With the lowest smoothed validation loss."""
    at_edge: bool
    """Whether it is the lowest or highest that was tried: a better one may lie beyond."""
    trials: tuple[RateTrial, ...]
    """Ascending."""
