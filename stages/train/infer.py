"""Logits of a trained bundle, from the store or from features computed a moment ago."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stages.extract.features import FeatureBatch, normalise
from stages.store.reader import StoreReader
from stages.train.bundle import Bundle
from stages.train.cached import Cached
from stages.train.data import Batch, EpochSampler, FeatureDataset, batches, to_size
from stages.train.network import Network


def batch_logits(network: Network, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(B, classes): the one way from a batch to logits, in validation, evaluation and prediction."""
    logits: torch.Tensor = network(normalise(batch.image, mean, std), batch.cached, batch.pooled)
    return logits


def training_logits(network: Network, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(M, B, classes): logits of each member by itself, which is what it learns from."""
    return network.member_logits(normalise(batch.image, mean, std), batch.cached)


@torch.inference_mode()
def store_logits(bundle: Bundle, store: StoreReader, ids: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Logits of rows of the store, un-augmented.

    Returns:
        (len(ids), classes) float32 on the CPU.

    Raises:
        CacheIncompleteError: If an image has no row.
    """
    network, lpm = bundle.network, bundle.spec.features.lpm
    dataset = FeatureDataset(
        store,
        ids,
        [0] * len(ids),
        network.spec.image_size,
        features=network.spec.method != "side",
        pooled=bool(network.spec.probe_weight),
    )
    device = next(network.parameters()).device
    parts = [
        batch_logits(network, batch.to(device), lpm.mean, lpm.std).float().cpu()
        for batch in batches(dataset, EpochSampler(len(ids), batch_size))
    ]
    return torch.cat(parts) if parts else torch.empty(0, network.spec.classes)


@torch.inference_mode()
def feature_logits(bundle: Bundle, features: FeatureBatch) -> torch.Tensor:
    """Logits of features that are in memory.

    Returns:
        (B, classes) float32 on the CPU.
    """
    network, lpm = bundle.network, bundle.spec.features.lpm
    batch = Batch(
        image=to_size(torch.from_numpy(features["side"]), network.spec.image_size),
        cached=Cached.of(features.arrays),
        labels=torch.zeros(len(features), dtype=torch.int64),
        pooled=torch.from_numpy(features["pooled"]) if network.spec.probe_weight else None,
    )
    device = next(network.parameters()).device
    return batch_logits(network, batch.to(device), lpm.mean, lpm.std).float().cpu()
