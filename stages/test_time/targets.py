"""What adaptation at test time changes in a model: side networks, or the LPM with a head of its pooled outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from schemas.errors import EvaluationError
from schemas.features import FeatureSpec
from schemas.methods import METHODS, model_inputs
from schemas.results import BundleSpec
from schemas.test_time import Adapt
from stages.device import in_precision
from stages.extract.features import pooled_outputs
from stages.lpm.loading import LoadedLpm
from stages.methods.base import Model
from stages.methods.batch import Batch, array_names, required
from stages.methods.side_prompts import PROMPTS, SidePrompts
from stages.test_time.lpm_probes import ClassTokens, PatchNorms, input_prompts
from stages.train.bundle import Bundle
from stages.train.source_statistics import side_prompts_of

CHUNK = 16
"""Images of a pass of the LPM: bounds memory."""

CAN = (
    "foa-shift adapts every model with one vector per image before its head, which is all methods but knn.\n"
    "foa adapts side networks (fpt, fpt+, fpt-x, side), heads of the LPM's class token and patch mean (linear, "
    "nearest-mean, mlp-3), and adaptations of the LPM without parameters per token.\n"
    "vptta adapts those heads (and knn), and adaptations of the LPM that were trained from images."
)
"""What can be adapted, for messages."""


class SideTarget:
    """Side networks, whose prompts are searched; the LPM runs once per image, if its tokens are not cached."""

    def __init__(self, model: Model, side: SidePrompts) -> None:
        self._model, self._side = model, side
        self.reads = array_names(model_inputs(model.spec))

    @property
    def numbers(self) -> int:
        """Numbers of a candidate."""
        return self._side.numbers

    def begin(self, batch: Batch) -> Any:
        """Embed the small images, and attend to the cached tokens, once for all candidates."""
        return self._side.begin(batch)

    def run(self, state: Any, candidate: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations (B, A) and what the heads read (B, F)."""
        return self._side.run(state, candidate)

    def logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of what the heads read."""
        return self._model.head_logits(vectors)


class LpmTarget:
    """The LPM, adapted or frozen, with a head: prompts at its input are searched, or its images prompted."""

    def __init__(self, bundle: Bundle, lpm: LoadedLpm | None) -> None:
        """Take the LPM.

        Args:
            bundle: Model that reads pooled outputs, or adapts the LPM and has its weights (`Model.use_lpm`).
            lpm: Frozen LPM of a model that reads pooled outputs; None: the model holds its own.
        """
        model, self._features = bundle.network, bundle.spec.features
        self._model, self._frozen = model, lpm is not None
        self._lpm: Any = getattr(model, "lpm", None) if lpm is None else lpm.model
        inputs = model_inputs(bundle.spec.network)
        self.reads = array_names(frozenset({"image"}) if self._frozen else inputs)
        self._device = bundle.device

    @property
    def numbers(self) -> int:
        """Numbers of a candidate: three prompts of the width of the LPM."""
        return PROMPTS * self._features.lpm.width

    def begin(self, batch: Batch) -> Batch:
        """Return the batch: every candidate is a pass of the LPM."""
        return batch

    def run(self, state: Batch, candidate: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations (B, A) of the class token and what the head reads (B, F)."""
        prompts: AbstractContextManager[None] = nullcontext()
        if candidate is not None:
            tokens = candidate.view(PROMPTS, -1)
            prompts = input_prompts(self._lpm, tokens, self._features.lpm.prefix_tokens)
        parts = []
        with prompts, ClassTokens(self._lpm) as recorded:
            for start in range(0, len(state.labels), CHUNK):
                vectors = self._vectors(state.rows(slice(start, start + CHUNK)))
                parts.append((recorded.take(), vectors))
        activations, found = zip(*parts, strict=True)
        return torch.cat(activations), torch.cat(found)

    def logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of what the head reads."""
        return self._model.head_logits(vectors)

    def norms(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and variance (K, D) of the outputs of all norms over the patch tokens of images."""
        info = self._features.lpm
        with PatchNorms(self._lpm, info.tokens - info.prefix_tokens) as recorded:
            self._forward(images)
            return recorded.take()

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of normalised images."""
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        if not self._frozen:
            return self._call(Batch(labels, image=images))
        return self._call(Batch(labels, pooled=pooled_outputs(self._forward(images), self._features)))

    def _call(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self._model(batch)
        return logits

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens (B, N, D) float32 after the final norm."""
        if not self._frozen:
            tokens: torch.Tensor = self._lpm.forward_features(images)
            return tokens.float()
        kind = next(self._lpm.parameters()).dtype
        with in_precision(self._features.precision, self._device):
            tokens = self._lpm.forward_features(images.to(kind))
        return tokens.float()

    def _vectors(self, batch: Batch) -> torch.Tensor:
        if not self._frozen:
            return self._model.head_inputs(batch)
        pooled = pooled_outputs(self._forward(required(batch.image, "image")), self._features)
        return self._model.head_inputs(Batch(batch.labels, pooled=pooled))


def check_adaptable(name: Adapt, spec: BundleSpec, model: Model) -> None:
    """Refuse a model that a kind of adaptation cannot change, before anything is loaded.

    Raises:
        EvaluationError: Says why, and what can be adapted.
    """
    checks: dict[Adapt, Callable[[BundleSpec, Model], str]] = {
        "foa": _against_foa,
        "foa-shift": lambda _, model: "" if model.has_head else "It has no vector that a head reads.",
        "vptta": lambda spec, _: _against_pixels(spec),
    }
    if reason := checks[name](spec, model):
        title = METHODS[spec.network.method].title
        raise EvaluationError(f"{title} ({spec.network.method}) cannot be adapted by {name}.", reason, CAN)


def runs_lpm(name: Adapt, spec: BundleSpec) -> bool:
    """Whether the frozen LPM runs again for every image, apart from its cached features."""
    return name != "foa-shift" and model_inputs(spec.network) == {"pooled"}


def _against_foa(spec: BundleSpec, model: Model) -> str:
    if not model.has_head:
        return "It has no vector that a head reads."
    if side_prompts_of(model) is not None:
        return ""
    if model_inputs(spec.network) not in ({"pooled"}, {"image"}, {"hidden"}) or not _has_lpm(spec):
        return "Prompts enter side networks or the LPM, and it reads cached features that do not come from these."
    adaptation: Any = getattr(model, "adaptation", None)
    if getattr(adaptation, "bound_to_tokens", False):
        return "It has parameters for each token of the LPM, and none for prompts."
    return _against_lpm(spec.features, model)


def _against_pixels(spec: BundleSpec) -> str:
    if model_inputs(spec.network) not in ({"pooled"}, {"image"}):
        hidden = " (it was trained on cached hidden tokens: features.hidden)" if spec.features.hidden else ""
        return f"Its predictions do not come from the pixels of the LPM only{hidden}."
    return _against_lpm(spec.features, None)


def _has_lpm(spec: BundleSpec) -> bool:
    """Whether the model holds the LPM or reads only its pooled outputs; loff-ta reads hidden tokens without it."""
    return METHODS[spec.network.method].adapts_lpm or model_inputs(spec.network) == {"pooled"}


def _against_lpm(features: FeatureSpec, model: Model | None) -> str:
    info = features.lpm
    if info.map_widths:
        return f"{info.name} has no tokens: it gives feature maps."
    if model is None:
        return ""
    if not info.has_class_token:
        return f"{info.name} has no class token, whose statistics are compared."
    lpm: Any = getattr(model, "lpm", None)
    if lpm is not None and any("rel_pos" in one or "relative_position" in one for one, _ in lpm.named_parameters()):
        return f"The positions of {info.name} are biases between pairs of its own tokens, which prompts do not have."
    return ""


def open_target(bundle: Bundle, lpm: LoadedLpm | None) -> SideTarget | LpmTarget:
    """Return what is adapted of a model.

    Args:
        bundle: Checked by `check_adaptable`.
        lpm: Frozen LPM, where `runs_lpm`.
    """
    side = side_prompts_of(bundle.network)
    return LpmTarget(bundle, lpm) if side is None else SideTarget(bundle.network, side)
