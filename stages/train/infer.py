"""Logits of a trained bundle, from a row source or from features in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from schemas.methods import model_inputs
from stages.methods.batch import IMAGE, Batch, array_names
from stages.pixels import to_size
from stages.store.memory_rows import RowSource
from stages.train.bundle import Bundle
from stages.train.data import BatchLoader, EpochSampler, FeatureDataset, Reading, batches


@torch.inference_mode()
def bundle_logits(bundle: Bundle, batch: Batch) -> torch.Tensor:
    """Compute logits (B, classes), float32 on the CPU, of a batch as read."""
    prepared = batch.to(bundle.device).prepared(bundle.spec.features)
    logits: torch.Tensor = bundle.network(prepared)
    return logits.float().cpu()


@torch.inference_mode()
def source_logits(bundle: Bundle, source: RowSource, ids: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Compute the logits of images of a row source, un-augmented.

    Returns:
        (len(ids), classes) float32 on the CPU.

    Raises:
        CacheIncompleteError: If an image has no row.
    """
    logits = [bundle_logits(bundle, batch) for batch in _read(bundle, source, ids, batch_size)]
    return torch.cat(logits) if logits else torch.empty(0, bundle.spec.network.classes)


@torch.inference_mode()
def source_features(bundle: Bundle, source: RowSource, ids: Sequence[str], batch_size: int = 64) -> torch.Tensor | None:
    """Compute the pooled outputs of the adapted LPM for images of a row source, un-augmented.

    Returns:
        (len(ids), D) float32 on the CPU; None if the model does not adapt the LPM.

    Raises:
        CacheIncompleteError: If an image has no row.
    """
    outputs = []
    for batch in _read(bundle, source, ids, batch_size):
        pooled = bundle.network.features(batch.to(bundle.device).prepared(bundle.spec.features))
        if pooled is None:
            return None
        outputs.append(pooled.float().cpu())
    return torch.cat(outputs) if outputs else None


def _read(bundle: Bundle, source: RowSource, ids: Sequence[str], batch_size: int) -> BatchLoader:
    """Return batches of what a model reads."""
    network = bundle.spec.network
    reading = Reading(model_inputs(network), network.side_size)
    dataset = FeatureDataset(source, ids, [0] * len(ids), reading)
    return batches(dataset, EpochSampler(len(ids), batch_size))


@torch.inference_mode()
def source_maps(bundle: Bundle, source: RowSource, ids: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """Compute the maps that a model offers (`Model.maps`) for a few images of a row source, in one batch.

    Returns:
        By name, (len(ids), blocks, gh, gw) float32 on the CPU; empty if the model offers none.
    """
    network = bundle.spec.network
    dataset = FeatureDataset(source, ids, [0] * len(ids), Reading(model_inputs(network), network.side_size))
    [batch] = batches(dataset, EpochSampler(len(ids), len(ids)))
    maps = bundle.network.maps(batch.to(bundle.device).prepared(bundle.spec.features))
    return {name: values.float().cpu() for name, values in maps.items()}


@torch.inference_mode()
def feature_logits(bundle: Bundle, arrays: Mapping[str, NDArray[Any]]) -> torch.Tensor:
    """Compute the logits of features in memory, by array name as in the store; `image` contains the LPM's pixels.

    Returns:
        (B, classes) float32 on the CPU.
    """
    network = bundle.spec.network
    names = array_names(model_inputs(network))
    read = {name: array for name, array in arrays.items() if name in names}
    side = to_size(torch.from_numpy(read["side"]), network.side_size) if "side" in read else None
    image = torch.from_numpy(read[IMAGE]) if IMAGE in read else None
    labels = torch.zeros(len(next(iter(read.values()))), dtype=torch.int64)
    return bundle_logits(bundle, Batch.of(read, labels, side, image))
