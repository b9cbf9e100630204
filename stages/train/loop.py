"""The training loop of the published recipe.

AdamW, cosine to zero without warm-up, gradient norm clipped, best epoch by validation AUC (arXiv 2408.02426,
section IV), or the last. Every random draw follows from (seed, epoch), so that a run that goes on from its checkpoint
ends exactly where an undisturbed one ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from schemas.errors import TrainingError
from schemas.results import EpochLog
from schemas.settings import TrainSettings
from stages.evaluate.metrics import macro_auc
from stages.files import storage_errors
from stages.train.data import Batch, BatchLoader, EpochSampler, FeatureDataset, batches
from stages.train.infer import batch_logits, training_logits
from stages.train.network import Network


@dataclass
class Fit:
    """State of a run: what a checkpoint holds."""

    network: Network
    """Current weights."""
    optimizer: torch.optim.Optimizer
    """AdamW."""
    epochs: list[EpochLog] = field(default_factory=list)
    """Finished epochs."""
    best: int = 0
    """Number of the epoch whose weights are kept, from 1; 0 before the first."""
    best_state: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights of that epoch, on the CPU."""


@dataclass(frozen=True)
class Recipe:
    """What the loop needs besides data."""

    settings: TrainSettings
    """Resolved."""
    mean: Sequence[float]
    """Of the side image, per channel."""
    std: Sequence[float]
    """Of the side image, per channel."""
    class_weights: torch.Tensor | None
    """(C,), or None."""
    device: torch.device
    """Where the network is."""
    workers: int
    """Of the data loader."""


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over all learnable parameters."""
    return torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)


def training_step(network: Network, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe) -> torch.Tensor:
    """Forward, backward, clip, update.

    Returns:
        The loss of the batch before the update, a scalar; the mean over the members.
    """
    optimizer.zero_grad(set_to_none=True)
    logits = training_logits(network, batch, recipe.mean, recipe.std)
    # A sum, not a mean: each member learns as it would alone.
    losses = [F.cross_entropy(member, batch.labels, weight=recipe.class_weights) for member in logits]
    loss = torch.stack(losses).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for member in network.members:
        nn.utils.clip_grad_norm_(member.parameters(), recipe.settings.clip_norm)
    optimizer.step()
    return loss.detach() / len(losses)


def fit(
    state: Fit,
    train: FeatureDataset,
    val: FeatureDataset,
    val_labels: Sequence[int],
    recipe: Recipe,
    checkpoint: Path,
    on_epoch: Callable[[EpochLog], None],
) -> None:
    """Train from the state's last finished epoch to the end; a checkpoint is written after every epoch.

    Raises:
        TrainingError: If the loss is not finite.
        StorageError: If the checkpoint cannot be written.
    """
    settings = recipe.settings
    sampler = EpochSampler(len(train), settings.batch_size, settings.seed)
    # One loader for all epochs: a worker takes seconds to start.
    train_batches = batches(train, sampler, recipe.workers)
    val_batches = batches(val, EpochSampler(len(val), settings.batch_size), recipe.workers)
    for epoch in range(len(state.epochs) + 1, settings.epochs + 1):
        start = time.perf_counter()
        sampler.epoch = epoch
        # Dropout draws from the global generator: seeded per epoch it does not depend on what ran before.
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, epoch)).generate_state(1)[0]))
        train_loss = _train_epoch(state, train_batches, recipe, epoch)
        val_loss, auc, accuracy = _validate(state.network, val_batches, val_labels, recipe)
        log = EpochLog(
            epoch=epoch,
            train_loss=train_loss,
            val_loss=val_loss,
            val_auc=auc,
            val_accuracy=accuracy,
            lr=state.optimizer.param_groups[0]["lr"],
            seconds=round(time.perf_counter() - start, 3),
        )
        if settings.keep == "last" or state.best == 0 or _merit(log) > _merit(state.epochs[state.best - 1]):
            state.best = epoch
            state.best_state = {name: t.detach().cpu().clone() for name, t in state.network.state_dict().items()}
        state.epochs.append(log)
        save_checkpoint(state, checkpoint)
        on_epoch(log)


def _train_epoch(state: Fit, loader: BatchLoader, recipe: Recipe, epoch: int) -> float:
    state.network.train()
    total, seen = torch.zeros((), device=recipe.device), 0
    steps = len(loader)
    for step, batch in enumerate(loader):
        progress = ((epoch - 1) * steps + step) / (recipe.settings.epochs * steps)
        for group in state.optimizer.param_groups:
            group["lr"] = recipe.settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        loss = training_step(state.network, state.optimizer, batch.to(recipe.device), recipe)
        total += loss * len(batch.labels)
        seen += len(batch.labels)
    mean = float(total) / seen
    if not math.isfinite(mean):
        raise TrainingError(
            f"The training loss of epoch {epoch} is {mean}.",
            "The learning rate is too high for these features.",
            "Lower train.lr (the published range is 5e-5 to 5e-3).",
        )
    return mean


@torch.inference_mode()
def _validate(
    network: Network, loader: BatchLoader, labels: Sequence[int], recipe: Recipe
) -> tuple[float, float | None, float]:
    """Loss, AUC and accuracy of the validation images."""
    network.eval()
    parts = [batch_logits(network, batch.to(recipe.device), recipe.mean, recipe.std).float().cpu() for batch in loader]
    logits, target = torch.cat(parts), torch.tensor(labels)
    auc = macro_auc(target.numpy(), logits.double().softmax(dim=1).numpy())
    weight = None if recipe.class_weights is None else recipe.class_weights.cpu()
    loss = float(F.cross_entropy(logits, target, weight=weight))
    return loss, auc, float((logits.argmax(dim=1) == target).double().mean())


def _merit(log: EpochLog) -> tuple[float, float]:
    """Higher is better: AUC, then the lower loss; the loss alone where the AUC is not defined."""
    return (log.val_auc if log.val_auc is not None else 0.0, -log.val_loss)


def save_checkpoint(state: Fit, path: Path) -> None:
    """Write the whole state to a new file, then rename it over the old one."""
    content: dict[str, Any] = {
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "epochs": [log.model_dump_json() for log in state.epochs],
        "best": state.best,
        "best_state": state.best_state,
    }
    partial = path.with_suffix(".part")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)


def load_checkpoint(state: Fit, path: Path) -> bool:
    """Go on from a checkpoint, if there is a whole one; says whether there was."""
    if not path.exists():
        return False
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state.network.load_state_dict(content["network"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.epochs = [EpochLog.model_validate_json(text) for text in content["epochs"]]
        state.best, state.best_state = content["best"], content["best_state"]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise TrainingError(
            f"The checkpoint {path} cannot be read: {error}",
            "It was damaged.",
            f"Delete it (rm {path}) to start this run afresh.",
        ) from error
    return True
