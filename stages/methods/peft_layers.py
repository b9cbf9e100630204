"""LoRA, DoRA, IA3 and VeRA through Hugging Face peft, an optional dependency.

    lora    W x + B A x                                    A (r, D) Kaiming-uniform, B zero (arXiv 2106.09685)
    dora    m * (W + B A) x / |W + B A| per output         m starts as |W| (arXiv 2402.09353)
    ia3     l * (W x + b); of fc2 W (l * x) + b            l starts as 1 (arXiv 2205.05638)
    vera    W x + b * B (d * A x)                          A, B random and frozen, b zero, d 0.1 (arXiv 2310.11454)

of the layers to queries, keys and values in every adapted block; ia3 of fc2 as well. Most models have one fused layer
to all three, so that lora and dora of rank r have 4 r D parameters per block as those of separate queries and values
have, which peft cannot express on a fused layer. Where the layers are separate (EVA-02), each has its update. EVA and
BEiT add their biases of queries and values after the layer, without the factor of ia3. The factor alpha / r of lora is
1; dropout is left out. With `freeze_a`, A keeps its random values, which are saved, and 3 r D parameters per block are
trained. Layers are trained and computed as peft does, and folded into the LPM for prediction.

A bundle has none of the random projections of vera, which come again from a constant seed; their sums are saved, and
compared.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from schemas.errors import BundleError, PlatformError
from schemas.specs import AdaptationSpec
from schemas.weight_adaptations import LoraSettings, VeraSettings
from stages.lpm.adaptation import Adaptation
from stages.lpm.attention import projections
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.base import Details

PROJECTION_SEED = 0
"""Of the random projections of vera, in all models."""
_NAME = "default"
"""Of the adapter, in peft."""
_PARAMETERS = ("lora_", "ia3_l", "vera_lambda_")
"""First part of the names of peft's parameters."""


class PeftLayers(Adaptation):
    """Layers of the LPM that are wrapped by peft."""

    projection_sums: torch.Tensor
    """Sums of the random projections of vera, (2,)."""

    def __init__(self, spec: AdaptationSpec, options: LoraSettings | VeraSettings | None) -> None:
        """Import peft.

        Args:
            spec: Method and first adapted block.
            options: Rank; None for ia3.

        Raises:
            PlatformError: If peft is not installed.
        """
        super().__init__(spec.first_block)
        self._peft = _import_peft(spec.method)
        self._method, self._rank = spec.method, getattr(options, "rank", 0)
        self._frozen = ("lora_A",) if getattr(options, "freeze_a", False) else ()
        if spec.method == "vera":
            self.register_buffer("projection_sums", torch.zeros(2))

    def attach(self, lpm: Any) -> None:
        """Wrap the layers."""
        blocks = self.adapted(lpm)
        outputs = _any_of(f"blocks.{number}.attn.{name}" for number, one in blocks for name in projections(one.attn))
        inputs = _any_of(f"blocks.{number}.mlp.fc2" for number, _ in blocks)
        if self._method == "vera":
            with warnings.catch_warnings():
                # That the projections are not saved.
                warnings.simplefilter("ignore", UserWarning)
                config = self._peft.VeraConfig(
                    r=self._rank, target_modules=outputs, projection_prng_key=PROJECTION_SEED, save_projection=False
                )
            # The wrapper that it returns is not needed; for layers with shared projections peft has no other way.
            self._peft.get_peft_model(lpm, config)
            self.projection_sums = _projection_sums(lpm)
            return
        if self._method == "ia3":
            config = self._peft.IA3Config(target_modules=f"{outputs}|{inputs}", feedforward_modules=inputs)
        else:
            config = self._peft.LoraConfig(
                r=self._rank, lora_alpha=self._rank, target_modules=outputs, use_dora=self._method == "dora"
            )
        self._peft.inject_adapter_in_model(config, lpm)

    def learns(self, name: str) -> bool:
        """Whether this parameter is one of peft's that is trained."""
        return self.saves(name) and not any(part in self._frozen for part in name.split("."))

    def saves(self, name: str) -> bool:
        """Whether this parameter is one of peft's."""
        return any(part.startswith(_PARAMETERS) for part in name.split("."))

    def start(self, lpm: Any) -> None:
        """Set the magnitudes of dora to the norms of the LPM's weights."""
        if self._method == "dora":
            for _, layer in _wrapped(lpm):
                norms = torch.linalg.norm(layer.get_base_layer().weight, dim=1)
                layer.lora_magnitude_vector[_NAME].weight.copy_(norms)

    def fold(self, lpm: Any) -> None:
        """Merge the layers into new weights.

        Raises:
            BundleError: If the random projections of vera are not those of training.
        """
        if self._method == "vera":
            sums = _projection_sums(lpm)
            if not torch.allclose(sums, self.projection_sums.to(sums), rtol=1e-5, atol=0):
                raise BundleError(
                    "The random projections of vera are not those of training.",
                    "The installed versions of peft and torch draw other numbers from the same seed.",
                    "Install the versions of training, or train again.",
                )
        for name, layer in _wrapped(lpm):
            base = layer.get_base_layer()
            for part in ("weight", "bias"):
                # peft merges in place, and the LPM's weights are shared.
                if (value := getattr(base, part)) is not None:
                    setattr(base, part, nn.Parameter(value.clone(), requires_grad=False))
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(lpm.get_submodule(parent), last, base)


def _import_peft(method: str) -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise PlatformError(
            f"The package peft, which computes {method}, cannot be imported: {error}.",
            "It is not installed with fpt.",
            'Run: pip install "fpt-vit[peft]"',
        ) from None


def _any_of(names: Iterable[str]) -> str:
    """Return a regular expression of these names."""
    return "|".join(map(re.escape, names))


def _wrapped(lpm: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers of peft, with their names."""
    kind = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return [(name, module) for name, module in lpm.named_modules() if isinstance(module, kind)]


def _projection_sums(lpm: nn.Module) -> torch.Tensor:
    """Return the sums of both random projections, which all layers share, (2,)."""
    _, layer = _wrapped(lpm)[0]
    return torch.stack([layer.vera_A[_NAME].double().sum(), layer.vera_B[_NAME].double().sum()]).float()


def _describe(_spec: AdaptationSpec, options: LoraSettings | VeraSettings | None) -> Details:
    if options is None:
        return ()
    frozen = ", first matrix frozen" if getattr(options, "freeze_a", False) else ""
    return (("Rank", f"{options.rank}{frozen}"),)


METHOD = AdaptationMethod(PeftLayers, _describe)
