"""SSF (arXiv 2210.08823): scale and shift of what every operation of the LPM returns.

    x <- gamma * x + beta        after patch embedding, norm1, qkv, proj, norm2, fc1 (before its activation), fc2, final
                                 norm; gamma and beta of the width of x

The published start is gamma ~ N(1, 0.02^2) and beta ~ N(0, 0.02^2), which changes the LPM; ours is 1 and 0, with the
published one as an option. What is stored is the difference from 1 and 0: weight decay pulls towards the LPM, where
the published code has none on vectors. Drop path and the moving average of weights are left out.

The patch embedding takes part only where it runs: with images, from block 0 upward. EVA and BEiT add the biases of
queries and values after qkv, unscaled: the shift can make up for it. A gated MLP has two layers in place of fc1.

For prediction everything is folded exactly: W' = diag(gamma) W, b' = gamma b + beta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from schemas.specs import AdaptationSpec
from schemas.weight_adaptations import SsfSettings
from stages.lpm.adaptation import Adaptation
from stages.lpm.attention import projections
from stages.methods.adapted_lpm import AdaptationMethod
from stages.methods.tuned_weights import embeds

INITIAL = 0.02
"""Standard deviation of the published start."""


class ScaleAndShift(Adaptation):
    """Scale and shift of every operation; parameters are filed under the name of its module, with _ for dots."""

    def __init__(self, spec: AdaptationSpec, options: SsfSettings) -> None:
        super().__init__(spec.first_block)
        self._embeds, self._deviation = embeds(spec), INITIAL if options.published_start else 0.0
        self.scales, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        self._hooks: dict[str, RemovableHandle] = {}

    def attach(self, lpm: Any) -> None:
        """Add the hooks."""
        for name, module in self._operations(lpm):
            key, width = _key(name), lpm.embed_dim
            if (weight := getattr(module, "weight", None)) is not None:
                width = weight.shape[0]
            for values in (self.scales, self.shifts):
                values[key] = nn.Parameter(self._deviation * torch.randn(width))
            self._hooks[key] = module.register_forward_hook(self._hook(key))

    def _hook(self, key: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            scale, shift = (1 + self.scales[key]).to(output.dtype), self.shifts[key].to(output.dtype)
            changed: torch.Tensor = output * scale + shift
            return changed

        return hook

    def _operations(self, lpm: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules whose output is changed."""
        if self._embeds:
            yield "patch_embed", lpm.patch_embed
        for number, block in self.adapted(lpm):
            attention = (f"attn.{name}" for name in (*projections(block.attn), "proj"))
            for name in ("norm1", *attention, "norm2", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"):
                place, _, last = name.rpartition(".")
                if (module := getattr(block.get_submodule(place), last, None)) is not None:
                    yield f"blocks.{number}.{name}", module
        for name in ("norm", "fc_norm"):
            if not isinstance(module := getattr(lpm, name, None), nn.Identity | None):
                yield name, module

    def fold(self, lpm: Any) -> None:
        """Fold scales and shifts into the layers and norms; norms without a bias keep their hook."""
        for name, module in self._operations(lpm):
            layer = module
            if name == "patch_embed":
                layer = lpm.patch_embed.proj if isinstance(lpm.patch_embed.norm, nn.Identity) else lpm.patch_embed.norm
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm) and isinstance(layer.weight, torch.Tensor):
                _fold(layer, 1 + self.scales[_key(name)], self.shifts[_key(name)])
                self._hooks[_key(name)].remove()


def _key(name: str) -> str:
    return name.replace(".", "_")


def _fold(layer: nn.Linear | nn.Conv2d | nn.LayerNorm, scale: torch.Tensor, shift: torch.Tensor) -> None:
    weight, bias = layer.weight, layer.bias
    scale, shift = scale.to(weight), shift.to(weight)
    factors = scale.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(weight * factors, requires_grad=False)
    layer.bias = nn.Parameter(shift if bias is None else scale * bias + shift, requires_grad=False)


METHOD = AdaptationMethod(ScaleAndShift)
