"""Training of methods with epochs: networks of several variants on one stream of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from schemas.features import FeatureSpec, LpmInfo
from schemas.manifest import Split
from schemas.methods import METHODS, model_inputs
from schemas.resolved import ResolvedSettings
from schemas.results import TrainResult
from schemas.statistics import ProbeSource
from schemas.text import counted
from schemas.views import train_views
from stages.groups import cluster_of
from stages.methods.base import FitInputs, Model, Network, gradient_method
from stages.methods.batch import array_names
from stages.methods.statistics import StatisticsFit, fit_statistics
from stages.store.memory_rows import MemoryRows, RowSource, plan_memory
from stages.threads import open_threads
from stages.train.checkpoints import Fit, load_checkpoint
from stages.train.closed_form import MOST_THREADS
from stages.train.compiling import compile_blocks
from stages.train.data import BatchLoader, EpochSampler, FeatureDataset, Reading, batches
from stages.train.job import SPLITS, Job, rows_to_fit, run_key, save_model, taps_of
from stages.train.leg import anchor_of
from stages.train.loop import Recipe, Run, fit, make_optimizer
from stages.train.parallel import begin_alike, sum_over_ranks
from stages.train.source_statistics import MOST, Moments, model_moments

Fits = dict[str | tuple[float, ...], tuple[StatisticsFit, torch.Tensor]]
"""Linear probes by `train.class_weights`, with their out-of-fold logits on the validation images."""


@dataclass(frozen=True)
class _Started:
    """A run before its first new epoch."""

    run: Run
    resumed: int
    """Epochs restored from a checkpoint."""


def train_job(job: Job) -> list[TrainResult]:
    """Train the networks of all variants, and write their bundles.

    Where held-out loss decides how many side networks are trained (`train.adaptive_members`), the first one is trained
    by itself, on one stream of batches with all other variants. If it lowers the held-out log-loss of the linear probes
    by more than the standard error (`stages.methods.held_out_gain`), or the held-out images are too few to tell, the
    others follow on a second stream. Seeds and batches are those of a training of all at once, and in the ensemble of
    each epoch the first network has its weights of that epoch: the model is that of the same number of side networks in
    one training, up to rounding.
    """
    source = _source(job)
    data = {split: _dataset(job, source, split) for split in SPLITS}
    fits: Fits = {}

    def run_stream(positions: Sequence[int], firsts: Mapping[int, _Started]) -> dict[int, _Started]:
        started = {position: _start(job, position, source, fits, firsts.get(position)) for position in positions}
        runs = [one.run for one in started.values()]
        begin_alike([run.network for run in runs], [(one.run.key, one.resumed) for one in started.values()], job.ranks)
        fit(runs, data["train"], data["val"], job.labels["val"], job.first.train.order_seed)
        for run in runs:
            run.network.load_state_dict(run.state.best_state)
        return started

    first = run_stream(range(len(job.variants)), {})
    growing = _growing(job, [one.run for one in first.values()])
    added = run_stream(growing, first) if growing else {}
    results = [_finish(job, position, one) for position, one in sorted((first | added).items())]
    if job.ranks.first:
        for one in (*added.values(), *first.values()):
            _remove_checkpoint(one.run)
    return results


def _growing(job: Job, runs: Sequence[Run]) -> list[int]:
    """Return the positions of the variants whose first side network helps, or may help, so that the others follow."""
    gains = [run.network.held_out if run.keeps_weights else None for run in runs]
    grows = [gain is not None and (gain.helps or gain.undecided) for gain in gains]
    # The processes may be on machines that round differently: rank 0 decides.
    decided = torch.tensor([float(one and job.ranks.first) for one in grows])
    sum_over_ranks([decided], job.ranks)
    positions = [position for position, one in enumerate(decided.tolist()) if one]
    if job.ranks.first:
        for position in positions:
            more = counted(job.variants[position].train.members - 1, "more side network")
            of_several = f"Run {position + 1}: " if len(runs) > 1 else ""
            job.watch.on_notice(f"{of_several}{runs[position].network.conclusion()} Next: {more}.")
    return positions


def _finish(job: Job, position: int, started: _Started) -> TrainResult:
    """Write the bundle of a variant."""
    run = started.run
    [best] = [log for log in run.state.epochs if log.epoch == run.state.best]
    learnable = save_model(job, position, run.network, best, _source_moments(job, run.network))
    return TrainResult(
        best=best,
        epochs=tuple(run.state.epochs),
        resumed_from=started.resumed,
        learnable=learnable,
        chosen=dict(run.network.chosen()),
        conclusion=run.network.conclusion(),
    )


def _remove_checkpoint(run: Run) -> None:
    """Remove the checkpoint of a run, then the weights of its epochs."""
    run.checkpoint.unlink(missing_ok=True)
    for epoch in range(1, len(run.state.epochs) + 1 if run.keeps_weights else 1):
        run.weights_file(epoch).unlink(missing_ok=True)


def _start(job: Job, position: int, source: RowSource, fits: Fits, first: _Started | None) -> _Started:
    """Build the network of a variant, or restore it from its checkpoint.

    Args:
        job: Job.
        position: Position of the variant.
        source: Row source.
        fits: Linear probes that are fitted already.
        first: Finished training of its first side network; None: it is not trained yet.
    """
    settings = job.variants[position]
    adaptive = settings.train.adaptive_members and first is None
    if adaptive:
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"members": 1})})
    network = _network(job, settings)
    probe_logits = fit_probe(job, network, settings, fits)
    if network.standardises:
        network.standardise(_train_batches(job, source))
    if job.leg is not None:
        load_part(network, job.leg.start)
    key = run_key(settings, job.manifest, job.opened.key, job.leg)
    network.to(job.device)
    run = Run(
        Fit(network, make_optimizer(nn.ModuleList(network.members[0 if first is None else 1 :]), settings.train)),
        _recipe(job, settings),
        job.checkpoints / f"{key[:16]}.ckpt",
        partial(job.watch.on_epoch, position),
        probe_logits,
        key,
        _patients(job),
        keeps_weights=adaptive,
        first=None if first is None else first.run,
        leg=job.leg,
        anchor=anchor_of(network, job.leg),
    )
    problem = load_checkpoint(run.state, run.checkpoint, key)
    if problem is not None and job.ranks.first:
        job.watch.on_notice(f"The checkpoint {run.checkpoint} {problem}: training starts from the first epoch.")
    if settings.train.compile:
        compile_blocks([network], job.device)
    for log in run.state.epochs:
        job.watch.on_epoch(position, log)
    return _Started(run, len(run.state.epochs))


def _recipe(job: Job, settings: ResolvedSettings) -> Recipe:
    return Recipe(
        settings=settings.train,
        features=job.opened.features,
        class_weights=job.class_weights(settings, job.device),
        device=job.device,
        workers=settings.compute.loader_workers,
        task=job.manifest.task,
        ranks=job.ranks,
    )


def _patients(job: Job) -> torch.Tensor:
    """Return the numbers of the clusters of the validation images, (n,)."""
    clusters = cluster_of(job.manifest)
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(clusters[row.path], len(numbers)) for row in job.manifest.of("val")])


def _network(job: Job, settings: ResolvedSettings) -> Network:
    """Build a network with the initial weights that its seed determines, or those of a bundle."""
    opened = job.opened
    network = initial_network(settings, job.files.lpm, opened.features, opened.model, len(job.manifest.classes))
    if job.start is not None:
        job.start.apply(network, settings.train.epochs)
    return network


def initial_network(
    settings: ResolvedSettings, lpm: LpmInfo, features: FeatureSpec, model: nn.Module | None, classes: int
) -> Network:
    """Build a network with the initial weights that its seed determines.

    Args:
        settings: Settings of the run.
        lpm: Shape of the LPM.
        features: Spec of the extracted features.
        model: The LPM, for methods that adapt it.
        classes: Outputs.
    """
    method = gradient_method(settings.method)
    torch.manual_seed(settings.train.seed)
    network = method.build(method.spec(taps_of(settings, features), lpm, classes))
    if model is not None:
        network.start_from(model)
    return network


def load_part(network: Model, state: Mapping[str, torch.Tensor]) -> None:
    """Load some of the weights of a network; the others stay.

    Raises:
        ValueError: If it has no such weights.
    """
    own = network.state_dict()
    if unknown := [name for name, value in state.items() if name not in own or own[name].shape != value.shape]:
        raise ValueError(f"the network has no {unknown[0]} of this shape")
    network.load_state_dict({**own, **state})


def fit_probe(job: Job, network: Network, settings: ResolvedSettings, fits: Fits) -> torch.Tensor | None:
    """Fit the linear probes of an ensemble, if it has any, and return their out-of-fold logits on validation images.

    Variants of a job have the same images, so that those with equal class weights share a fit, cached in `fits`.
    """
    if network.probe is None:
        return None
    chosen = settings.train.class_weights
    if chosen not in fits:
        fits[chosen] = _fit_statistics(job, network.probe.sources, settings)
    probe_fit, probe_logits = fits[chosen]
    probe_fit.copy_to(network.probe)
    return probe_logits


def _fit_statistics(
    job: Job, sources: tuple[ProbeSource, ...], settings: ResolvedSettings
) -> tuple[StatisticsFit, torch.Tensor]:
    weights = job.class_weights(settings, torch.device("cpu"))
    originals = {split: [[row.id] for row in job.manifest.of(split)] for split in SPLITS}
    with open_threads(MOST_THREADS, torch.device("cpu")) as threads:
        # From the store: what only the fit reads, once, is not worth the memory.
        train, val = rows_to_fit(job, job.opened.source, originals, job.inputs & {"pooled", "statistics"})
        class_weights = None if weights is None else weights.tolist()
        preference = METHODS[settings.method].preset.preference
        return fit_statistics(
            FitInputs(train, val, sources=sources, preference=preference, class_weights=class_weights, threads=threads)
        )


def _train_batches(job: Job, source: RowSource) -> BatchLoader:
    """Return batches of the training images, un-augmented and each image once, as inputs of `Network.standardise`."""
    ids = [row.id for row in job.manifest.of("train")]
    reading = Reading(job.step_inputs, job.first.train.side_image_size)
    dataset = FeatureDataset(source, ids, job.labels["train"], reading)
    return batches(dataset, EpochSampler(len(ids), job.first.train.batch_size))


def _source_moments(job: Job, network: Network) -> dict[str, Moments]:
    """Compute the statistics of some training images, un-augmented; none where the LPM would have to run for them."""
    if not job.ranks.first or job.leg is not None or METHODS[network.spec.method].adapts_lpm:
        return {}
    ids = sorted(views[0] for views in _views(job))[:MOST]
    inputs = model_inputs(network.spec)
    dataset = FeatureDataset(job.opened.source, ids, [0] * len(ids), Reading(inputs, network.spec.side_size))
    found = batches(dataset, EpochSampler(len(ids), job.first.train.batch_size))
    return model_moments(network.eval(), (batch.to(job.device).prepared(job.opened.features) for batch in found))


def _source(job: Job) -> RowSource:
    """Return the row source, or a copy in memory of the rows that training reads."""
    ids = tuple(dict.fromkeys([row for views in _views(job) for row in views] + [r.id for r in job.manifest.of("val")]))
    source = job.opened.source
    names = [name for name in source.layouts if name in array_names(job.step_inputs)]
    memory = plan_memory(source, ids, names, job.first.store, job.ranks.local_count)
    job.watch.on_memory(memory)
    return MemoryRows(source, ids, names) if memory.held else source


def _views(job: Job) -> Sequence[Sequence[str]]:
    """Return the row ids of each training image; images read as pixels are augmented instead of having views."""
    if "image" in job.inputs:
        return [[row.id] for row in job.manifest.of("train")]
    return [[row.row_id for row in rows] for rows in train_views(job.manifest, job.first.features)]


def _dataset(job: Job, source: RowSource, split: Split) -> FeatureDataset:
    train = job.first.train
    training = split == "train"
    # Only pixels are augmented; cached and hidden tokens are those of the un-augmented image.
    reading = Reading(job.step_inputs, train.side_image_size, train.augment if training else None, train.order_seed)
    ids = [row.id for row in job.manifest.of(split)]
    return FeatureDataset(source, ids, job.labels[split], reading, _views(job) if training else None)
