"""Logits of a trained bundle, from the store or from features computed a moment ago."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from schemas.results import ModelSpec, SideNetworkSpec
from stages.methods.joint_attention import Member, member_logits
from stages.pixels import normalise, to_size
from stages.store.reader import StoreReader
from stages.train.bundle import Bundle
from stages.train.data import Batch, EpochSampler, FeatureDataset, array_names, batches
from stages.train.models import Model


def batch_logits(network: Model, batch: Batch, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(B, classes): the one way from a batch to logits, in validation, evaluation and prediction, for every model."""
    logits: torch.Tensor = network(_image(batch, mean, std), batch.cached, batch.pooled)
    return logits


def training_logits(
    members: Sequence[Member],
    batch: Batch,
    mean: Sequence[float],
    std: Sequence[float],
    checkpointing: bool = False,
) -> torch.Tensor:
    """(members, B, classes): logits of each member by itself, which is what it learns from."""
    image: torch.Tensor | Callable[[], torch.Tensor] | None
    if checkpointing and batch.image is not None:
        image = partial(normalise, batch.image, mean, std)
    else:
        image = _image(batch, mean, std)
    return member_logits(members, image, batch.cached, checkpointing)


@torch.inference_mode()
def store_logits(bundle: Bundle, store: StoreReader, ids: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """Logits of rows of the store, un-augmented.

    Returns:
        (len(ids), classes) float32 on the CPU.

    Raises:
        CacheIncompleteError: If an image has no row.
    """
    spec, lpm = bundle.spec.network, bundle.spec.features.lpm
    dataset = FeatureDataset(store, ids, [0] * len(ids), _side_size(spec), method=spec.method, probe=_has_probe(spec))
    parts = [
        batch_logits(bundle.network, batch.to(bundle.device), lpm.mean, lpm.std).float().cpu()
        for batch in batches(dataset, EpochSampler(len(ids), batch_size))
    ]
    return torch.cat(parts) if parts else torch.empty(0, spec.classes)


@torch.inference_mode()
def feature_logits(bundle: Bundle, features: Mapping[str, NDArray[Any]]) -> torch.Tensor:
    """Logits of features that are in memory.

    Returns:
        (B, classes) float32 on the CPU.
    """
    spec, lpm = bundle.spec.network, bundle.spec.features.lpm
    names = array_names(features, spec.method, _has_probe(spec))
    arrays = {name: features[name] for name in names}
    image = to_size(torch.from_numpy(arrays["side"]), _side_size(spec)) if "side" in arrays else None
    batch = Batch.of(arrays, image, torch.zeros(len(next(iter(arrays.values()))), dtype=torch.int64))
    return batch_logits(bundle.network, batch.to(bundle.device), lpm.mean, lpm.std).float().cpu()


def _image(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor | None:
    return None if batch.image is None else normalise(batch.image, mean, std)


def _side_size(spec: ModelSpec) -> int:
    """Side of the image that the model reads, in pixels; 0 for none."""
    return spec.image_size if isinstance(spec, SideNetworkSpec) else 0


def _has_probe(spec: ModelSpec) -> bool:
    """Whether a linear probe joins side networks."""
    return isinstance(spec, SideNetworkSpec) and bool(spec.probe_weight)
