"""The training loop of the published recipe.

AdamW (or `train.optimizer`), cosine decay to zero without warm-up, gradient clipping, and the best epoch by validation
AUC (arXiv 2408.02426, section IV) or the last one. (seed, epoch) determine every random draw, so that a resumed run
gives exactly the same model as an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from schemas.errors import TrainingError
from schemas.features import FeatureSpec
from schemas.results import EpochLog
from schemas.settings import TrainSettings
from schemas.tasks import Task
from stages.device import in_precision
from stages.losses import Reduction, plain_loss, training_loss
from stages.methods.base import Network
from stages.methods.batch import Batch
from stages.ranks import ALONE, Ranks
from stages.scores import macro_auc, probabilities
from stages.tasks import decide, hits
from stages.threads import CALLING_THREAD, Threads, open_threads
from stages.train.checkpoints import Fit, load_weights, save_checkpoint, save_weights
from stages.train.compiling import eager_unless
from stages.train.data import BatchLoader, EpochSampler, FeatureDataset, batches
from stages.train.extrapolation import Extrapolation, gather_workers
from stages.train.leg import Anchor, Leg, pull
from stages.train.micro_batches import MicroBatch, join_gradients, split_batch, split_workers
from stages.train.parallel import copy_from_first, gather_rows
from stages.train.sampling import make_sampler
from stages.train.targets import Target


@dataclass(frozen=True)
class Recipe:
    """Everything the loop needs except data."""

    settings: TrainSettings
    """Resolved settings."""
    features: FeatureSpec
    """Preprocessing of the images, and type of the hidden tokens."""
    class_weights: torch.Tensor | None
    """Loss weights of the classes, (C,), or None."""
    device: torch.device
    """Device of the network."""
    workers: int
    """Worker processes of the data loader."""
    task: Task = "multiclass"
    """Kind of the labels."""
    ranks: Ranks = ALONE
    """Position of this process among those that train together."""


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimiser of all learnable parameters; of `train.optimizer` with extrapolation, the inner one."""
    learnable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if settings.optimizer.endswith("sgd"):
        return torch.optim.SGD(
            learnable, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(learnable, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


@dataclass
class Run:
    """One of the trainings that share a stream of batches."""

    state: Fit
    """Weights, optimiser and finished epochs."""
    recipe: Recipe
    """Recipe; batch size, epochs, mean, std, device and workers are those of the other runs."""
    checkpoint: Path
    """Checkpoint file, written after every epoch."""
    on_epoch: Callable[[EpochLog], None]
    """Called after every epoch."""
    probe_logits: torch.Tensor | None = None
    """Out-of-fold logits (n, C) of the linear probes on the validation images, or None without probes."""
    key: str = ""
    """Identifies settings and inputs; a checkpoint with another key is not resumed."""
    patients: torch.Tensor | None = None
    """Numbers of the patients of the validation images, (n,); None: one per image."""
    keeps_weights: bool = False
    """Whether the weights of every epoch of its first member are written to a file, for a run that adds members."""
    first: Run | None = None
    """Finished run of the first member, which this run does not train; None: it trains all members."""
    leg: Leg | None = None
    """Epochs to train, from given weights; None: all of them."""
    anchor: Anchor = ()
    """Parameters that are pulled to given weights; empty: none."""

    def awaits(self, epoch: int) -> bool:
        """Return whether this epoch is to be trained and not finished yet."""
        finished = len(self.state.epochs)
        if self.leg is None:
            return finished < epoch
        return self.leg.first + finished <= epoch <= self.leg.last

    @property
    def network(self) -> Network:
        """Network of this run."""
        return self.state.network

    @property
    def trained(self) -> Sequence[nn.Module]:
        """Members that this run trains."""
        return self.network.members[0 if self.first is None else 1 :]

    def weights_file(self, epoch: int) -> Path:
        """Return the file with the weights of the first member after an epoch."""
        return self.checkpoint.with_name(f"{self.checkpoint.stem}-{epoch}.weights")


def training_step(
    runs: Sequence[Run], batch: Batch, batch_rows: int | None = None, threads: Threads = CALLING_THREAD
) -> list[torch.Tensor]:
    """Train every run for one step on the same batch: forward, backward, clip, update.

    Args:
        runs: Runs whose recipes are compatible.
        batch: Batch as read, on any device; micro-batches are copied to the device of the networks one by one.
        batch_rows: Rows of the batch of all processes together; None: this process is the only one.
        threads: Thread pool for the members.

    Returns:
        Loss of each run before the update, averaged over its members; scalars.
    """
    shared, networks = runs[0].recipe, [run.network for run in runs]
    count, settings = len(batch.labels), shared.settings
    micro_batches = _micro_batches(count, batch_rows or count, settings, shared.ranks)
    single = len(micro_batches) == shared.ranks.count == 1
    for run in runs:
        run.state.optimizer.zero_grad(set_to_none=True)
    totals, extrapolation = [torch.zeros((), device=shared.device) for _ in runs], Extrapolation(runs)
    for micro_batch in micro_batches:
        micro_batch.prepare(networks)
        rows = batch.rows(micro_batch.rows).to(shared.device)
        with (
            eager_unless(micro_batch.usual) if settings.compile else nullcontext(),
            extrapolation.at(micro_batch.worker, rows.labels, summed=not single),
        ):
            losses = _add_gradients(runs, rows, "mean" if single else "sum", threads)
        for total, loss in zip(totals, losses, strict=True):
            total += loss
    extrapolation.join()
    if not single:
        join_gradients(runs, totals, batch.labels, shared.ranks)
    threads.map(_update, runs)
    extrapolation.remember()
    return [total / len(run.trained) for run, total in zip(runs, totals, strict=True)]


def _micro_batches(count: int, batch_rows: int, settings: TrainSettings, ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches of a batch of which this process read `count` rows."""
    if settings.extrapolates:
        return split_workers(batch_rows, settings.batch_size, settings.extrapolation.workers, ranks)
    return split_batch(count, batch_rows, settings.batch_size, settings.accumulate, ranks)


def _update(runs: Sequence[Run]) -> list[None]:
    """Clip the gradients of each member separately, and update the weights."""
    for run in runs:
        run.network.read_gradients()
        if run.leg is not None:
            pull(run.anchor, run.leg.mu)
        for member in run.trained:
            nn.utils.clip_grad_norm_(member.parameters(), run.recipe.settings.clip_norm)
        run.state.optimizer.step()
    return [None] * len(runs)


def _add_gradients(runs: Sequence[Run], batch: Batch, reduction: Reduction, threads: Threads) -> list[torch.Tensor]:
    """Run forward and backward; return the loss per run, summed over its members, which train independently."""
    shared = runs[0].recipe

    checkpointing, network = shared.settings.checkpointing, runs[0].network
    prepared = batch.prepared(shared.features, lazy=checkpointing)

    def losses_of(chunk: Sequence[tuple[Run, nn.Module]]) -> list[torch.Tensor]:
        with in_precision(shared.settings.precision, shared.device):
            logits = network.member_logits([member for _, member in chunk], prepared, checkpointing)
        losses = [
            _member_loss(member.float(), batch.labels, run.recipe, reduction)
            for (run, _), member in zip(chunk, logits, strict=True)
        ]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        return [loss.detach() for loss in losses]

    pairs = [(run, member) for run in runs for member in run.trained]
    member_losses = iter(threads.map(losses_of, pairs))
    return [torch.stack([next(member_losses) for _ in run.trained]).sum() for run in runs]


def _member_loss(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe, reduction: Reduction) -> torch.Tensor:
    return training_loss(logits, labels, recipe.settings, recipe.task, recipe.class_weights, reduction)


def fit(
    runs: Sequence[Run], train: FeatureDataset, val: FeatureDataset, val_labels: Sequence[Target], order_seed: int
) -> None:
    """Train every run from its last finished epoch to the end, all on one stream of batches.

    Each gives the same model as if trained by itself: its seed and the epoch determine dropout, and `order_seed` the
    stream of batches.

    Raises:
        TrainingError: If the loss is not finite.
        StorageError: If a checkpoint cannot be written.
    """
    shared = runs[0].recipe
    settings, ranks = shared.settings, shared.ranks
    sampler = make_sampler(settings, train.labels, runs[0].network.spec.classes, order_seed, ranks)
    val_sampler = EpochSampler(len(val), max(ranks.count, settings.batch_size // settings.accumulate), ranks=ranks)
    # One loader for all epochs: a worker takes seconds to start.
    train_batches = batches(train, sampler, shared.workers)
    val_batches = batches(val, val_sampler, shared.workers)
    members = sum(len(run.trained) for run in runs)
    with open_threads(1 if settings.compile else members, shared.device) as threads:
        for epoch in range(1, shared.settings.epochs + 1):
            for run in runs:
                run.network.begin_epoch(epoch, settings.epochs)
            # A kill between two checkpoints leaves some runs one epoch ahead; they skip it.
            behind = [run for run in runs if run.awaits(epoch)]
            if not behind:
                continue
            start = time.perf_counter()
            sampler.epoch = epoch
            for run in behind:
                run.network.reseed(run.recipe.settings.seed, epoch)
                if run.network.phase(epoch, settings.epochs).first == epoch:
                    run.state.optimizer.state.clear()
                    run.network.begin_phase(epoch, settings.epochs)
            train_losses = _train_epoch(behind, train_batches, sampler, epoch, threads)
            for run in behind:
                _load_first(run, epoch)
            validated = _validate(behind, val_batches, val_sampler, val_labels, threads)
            seconds = round(time.perf_counter() - start, 3)
            for run, train_loss, (val_loss, auc, accuracy) in zip(behind, train_losses, validated, strict=True):
                log = EpochLog(
                    epoch=epoch,
                    train_loss=_mean_loss(run, epoch, train_loss),
                    val_loss=val_loss,
                    val_auc=auc,
                    val_accuracy=accuracy,
                    lr=run.state.optimizer.param_groups[0]["lr"],
                    seconds=seconds,
                )
                keep_epoch(run, log)
                gather_workers(run, ranks)
                if ranks.first:
                    if run.keeps_weights:
                        save_weights(run.network.members[0], run.weights_file(epoch), run.key)
                    save_checkpoint(run.state, run.checkpoint, run.key)
                run.on_epoch(log)


def _load_first(run: Run, epoch: int) -> None:
    """Give the first member the weights that it had after this epoch, if another run has trained it."""
    if run.first is None:
        return
    member, ranks = run.network.members[0], run.recipe.ranks
    if ranks.first:
        load_weights(member, run.first.weights_file(epoch), run.first.key)
    copy_from_first([member], ranks)


def _mean_loss(run: Run, epoch: int, loss: float) -> float:
    """Return the training loss over all members, from that over the trained ones."""
    if run.first is None:
        return loss
    return (run.first.state.epochs[epoch - 1].train_loss + len(run.trained) * loss) / len(run.network.members)


def keep_epoch(run: Run, log: EpochLog) -> None:
    """Append an epoch to a run, and keep its weights if `train.keep` selects them from the last phase."""
    state, settings = run.state, run.recipe.settings
    first = run.network.phase(log.epoch, settings.epochs).first
    # With few validation images, an early epoch can score well by chance; any epoch of the second half replaces it.
    middle = first - 1 + (settings.epochs - first + 1) // 2
    second_half = settings.keep == "late" and state.best <= middle < log.epoch
    replaced = settings.keep == "last" or state.best < first or second_half
    if replaced or _merit(log) > _merit(state.epochs[state.best - 1]):
        state.best = log.epoch
        state.best_state = {name: t.detach().cpu().clone() for name, t in state.network.state_dict().items()}
    state.epochs.append(log)


def _train_epoch(
    runs: Sequence[Run], loader: BatchLoader, sampler: EpochSampler, epoch: int, threads: Threads
) -> list[float]:
    """Train an epoch, and return the mean training loss per run."""
    device, steps, rows_read = runs[0].recipe.device, len(loader), 0
    totals = [torch.zeros((), device=device) for _ in runs]
    for run in runs:
        run.network.train()
    for step, batch in enumerate(loader):
        for run in runs:
            settings = run.recipe.settings
            phase = run.network.phase(epoch, settings.epochs)
            progress = phase.progress(epoch, step, steps)
            for group in run.state.optimizer.param_groups:
                group["lr"] = settings.lr * phase.rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        batch_rows = sampler.batch_rows(step)
        for total, loss in zip(totals, training_step(runs, batch, batch_rows, threads), strict=True):
            total += loss * batch_rows
        rows_read += batch_rows
    means = [float(total) / rows_read for total in totals]
    for run, mean in zip(runs, means, strict=True):
        if not math.isfinite(mean):
            raise TrainingError(
                f"The training loss of epoch {epoch} is {mean} with a learning rate of {run.recipe.settings.lr:g}.",
                "The learning rate is too high for these features.",
                "Lower train.lr (the published range is 5e-5 to 5e-3).",
            )
    return means


@torch.inference_mode()
def _validate(
    runs: Sequence[Run], loader: BatchLoader, sampler: EpochSampler, labels: Sequence[Target], threads: Threads
) -> list[tuple[float, float | None, float]]:
    """Return loss, AUC and accuracy on the validation images per run, and calibrate its experts on them.

    Always in float32, independently of the precision of training.
    """
    shared = runs[0].recipe
    positions = [[position for _, position in batch] for batch in sampler]
    members = [member for run in runs for member in run.network.members]
    batch_experts: list[list[torch.Tensor]] = [[] for _ in runs]
    for run in runs:
        run.network.eval()
    for rows, batch in zip(positions, loader, strict=True):
        if not rows:
            continue
        prepared = batch.to(shared.device).prepared(shared.features)
        with eager_unless(not shared.settings.compile):
            logits = iter(threads.map(partial(_eval_logits, runs[0].network, prepared), members))
        for run_experts, run in zip(batch_experts, runs, strict=True):
            of_members = torch.stack([next(logits) for _ in run.network.members]).float().cpu()
            of_probe = None if run.probe_logits is None else run.probe_logits[rows]
            run_experts.append(run.network.experts(of_members, of_probe))
    target, scores = torch.tensor(labels), []
    for run_experts, run in zip(batch_experts, runs, strict=True):
        network, weights = run.network, run.recipe.class_weights
        of_rank = torch.cat(run_experts) if run_experts else torch.empty(0, network.kinds, network.spec.classes)
        experts = gather_rows(of_rank, [row for rows in positions for row in rows], len(labels), shared.ranks)
        averaged = network.calibrate(experts, target, weights, run.patients)
        scores.append(score_logits(averaged, labels, weights, run.recipe.task))
    return scores


@torch.inference_mode()
def _eval_logits(network: Network, batch: Batch, members: Sequence[nn.Module]) -> Sequence[torch.Tensor]:
    """Compute logits (B, classes) of each member; decorated, because inference mode is set per thread."""
    return network.member_logits(members, batch).unbind(0)


def score_logits(
    logits: torch.Tensor, labels: Sequence[Target], class_weights: torch.Tensor | None, task: Task = "multiclass"
) -> tuple[float, float | None, float]:
    """Return log-loss, AUC and accuracy of logits (n, C) on the CPU."""
    target, p = torch.tensor(labels), probabilities(logits, task).numpy()
    weight = None if class_weights is None else class_weights.cpu()
    loss = float(plain_loss(logits, target, task, weight))
    return loss, macro_auc(target.numpy(), p), float(hits(target.numpy(), decide(p, task)).mean())


def _merit(log: EpochLog) -> tuple[float, float]:
    """Return a sort key, higher is better: by AUC, ties by loss; only by loss if the AUC is not defined."""
    return (log.val_auc if log.val_auc is not None else 0.0, -log.val_loss)
