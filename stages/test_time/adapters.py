"""Adapters: objects that turn a stream of batches into adapted logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from schemas.errors import BundleError
from schemas.methods import model_inputs
from schemas.test_time import SOURCE_KINDS, AdaptOptions
from stages.lpm.loading import LoadedLpm
from stages.methods.batch import Batch, array_names, required
from stages.test_time.foa import ActivationShift, Foa
from stages.test_time.targets import LpmTarget, open_target
from stages.test_time.vptta import Vptta
from stages.train.bundle import Bundle
from stages.train.source_statistics import Kind, Moments


class Adapter(Protocol):
    """An adaptation of a model, whose state changes with every batch."""

    @property
    def reads(self) -> frozenset[str]:
        """Names of the arrays of a row source that `step` needs."""

    def step(self, batch: Batch, /) -> torch.Tensor:
        """Return adapted logits (B, C), float32 on the CPU, of a batch as read."""


class ShiftAdapter:
    """foa-shift: the vector that the head reads is shifted by the mean of earlier batches."""

    def __init__(self, bundle: Bundle, vectors: Moments) -> None:
        self._bundle, self._shift = bundle, ActivationShift(vectors)
        self.reads = array_names(model_inputs(bundle.spec.network))

    @torch.inference_mode()
    def step(self, batch: Batch) -> torch.Tensor:
        """Return shifted logits, and take the batch into the running mean."""
        model = self._bundle.network
        vectors = model.head_inputs(_prepared(self._bundle, batch))
        logits = model.head_logits(self._shift.shifted(vectors))
        self._shift.update(vectors.cpu().double().mean(dim=0))
        return logits.float().cpu()


class FoaAdapter:
    """foa: a search of prompts, and the shift."""

    def __init__(self, bundle: Bundle, source: Mapping[Kind, Moments], seed: int, lpm: LoadedLpm | None) -> None:
        target = open_target(bundle, lpm)
        self._bundle, self.reads = bundle, target.reads
        self._foa = Foa(target, source["vectors"], source["activations"], seed, bundle.spec.task)

    @torch.inference_mode()
    def step(self, batch: Batch) -> torch.Tensor:
        """Return the logits of the best candidate, and go on with the search."""
        return self._foa.step(_prepared(self._bundle, batch)).float().cpu()


class VpttaAdapter:
    """vptta: a prompt per image."""

    def __init__(self, bundle: Bundle, norms: Moments, lpm: LoadedLpm | None) -> None:
        target = LpmTarget(bundle, lpm)
        self._bundle, self.reads = bundle, target.reads
        self._vptta = Vptta(target, norms)

    def step(self, batch: Batch) -> torch.Tensor:
        """Return the logits of the images with their prompts."""
        images = required(_prepared(self._bundle, batch).image, "image")
        return self._vptta.step(images).float().cpu()


def open_adapter(
    bundle: Bundle, options: AdaptOptions, source: Mapping[Kind, Moments], lpm: LoadedLpm | None
) -> Adapter:
    """Return an adapter at the beginning of a stream.

    Args:
        bundle: Model, checked by `check_adaptable`.
        options: Kind of the adaptation, and seed.
        source: Statistics of source images, with all of `SOURCE_KINDS`.
        lpm: Frozen LPM, where `runs_lpm`.

    Raises:
        BundleError: Statistics that the adaptation needs are missing.
    """
    missing = [kind for kind in SOURCE_KINDS[options.name] if kind not in source]
    if missing:
        raise BundleError(f"The statistics of source images lack {', '.join(missing)}.")
    if options.name == "foa":
        return FoaAdapter(bundle, source, options.seed, lpm)
    if options.name == "vptta":
        return VpttaAdapter(bundle, source["norms"], lpm)
    return ShiftAdapter(bundle, source["vectors"])


def _prepared(bundle: Bundle, batch: Batch) -> Batch:
    return batch.to(bundle.device).prepared(bundle.spec.features)
