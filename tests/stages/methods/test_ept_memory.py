"""Memory of a training step of EPT on ViT-B at 224 pixels, measured on tensors without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from schemas.features import LpmInfo
from schemas.parse import parse_settings
from schemas.resolve import feature_spec, resolve
from stages.lpm.adaptation import Adaptation, KeysValues, keys_values
from stages.methods.adapted_lpm import AdaptedLpm, build_lpm
from stages.methods.base import gradient_method
from stages.train.cost import step_cost

VIT_B = LpmInfo(
    name="vit_base_patch16_224", depth=12, width=768, heads=12, patch=16, prefix_tokens=1, has_class_token=True,
    image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=3072,
)  # fmt: skip
BATCH = 16


class OnePrompt(Adaptation):
    """VPT-deep with one prompt, as a key and a value of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(12, 1, 768))

    def extra(self, number: int, block: Any) -> KeysValues:
        return keys_values(block, self.prompts[number])


class Embeddings(Adaptation):
    """The LPM itself, of which the embeddings are trained: what frozen blocks keep for the backward pass."""

    def learns(self, name: str) -> bool:
        return name == "patch_embed.proj.bias"


def activations(method: str, adaptation: type[Adaptation] | None = None) -> float:
    """Return the memory of a training step apart from the parameters, MiB."""
    raw = {"method": method, "lpm": {"name": VIT_B.name}, "features": {"image_size": 224}}
    settings = resolve(parse_settings({**raw, "train": {"batch_size": BATCH}}), VIT_B)
    implementation = gradient_method(method)
    spec: Any = implementation.spec(settings, VIT_B, 5)
    with torch.device("meta"):
        network = implementation.build(spec) if adaptation is None else AdaptedLpm(spec, build_lpm(spec), adaptation())
    parameters = sum(value.numel() for value in network.parameters()) * 4 / 2**20
    features = feature_spec(settings, VIT_B, "0" * 64)
    return step_cost(network, features, settings).total - parameters


@pytest.mark.slow
def test_one_logit_per_token_takes_hardly_more_than_the_lpm_and_less_than_a_prompt() -> None:
    lean, prompt, frozen = activations("ept-lse"), activations("ept-lse", OnePrompt), activations("ept-lse", Embeddings)
    assert lean <= 1.1 * prompt
    # A channel of each head, padded to a multiple of 8: 72 in place of 64.
    assert frozen < lean <= 1.05 * frozen
    # The published form keeps the weights of all pairs, prompts included, of 12 blocks.
    matrices = 12 * BATCH * 12 * 197 * (197 + 100) * 4 / 2**20
    assert activations("ept") > lean + 0.5 * matrices
