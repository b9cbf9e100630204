"""The readable forward pass and the fast one are one function: equal logits, equal gradients."""

from __future__ import annotations

import pytest
import torch

from schemas.specs import SideNetworkSpec
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fpt import PromptedSideNetwork
from stages.methods.reference import reference_forward

LAYERS, HEADS, WIDTH, TOKENS = 3, 2, 32, 7


def build(method: str) -> PromptedSideNetwork:
    torch.manual_seed(0)
    spec = SideNetworkSpec(
        method=method,
        classes=3,
        layers=LAYERS,
        lpm_width=WIDTH,
        heads=HEADS,
        width=8,
        image_size=32,
        prompts=4,
        dropout=0.0,
    )
    network = PromptedSideNetwork(spec).double()
    with torch.no_grad():
        # Far from the initial values, of which some are zero and would hide a term.
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network


@pytest.mark.parametrize("method", ["fpt", "fpt+", "side"])
def test_reference_equals_the_fast_path_in_output_and_gradient(method: str) -> None:
    network = build(method)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    shape = (2, LAYERS, HEADS, TOKENS, WIDTH // HEADS)
    keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def logits_and_gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        network.zero_grad()
        (logits * weights).sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)]

    fast = logits_and_gradients(network(Batch(torch.zeros(2), side=image, tokens=CachedTokens(keys, values))))
    plain = logits_and_gradients(reference_forward(network, image, keys, values))
    assert len(fast) == len(plain) == 1 + len(list(network.parameters()))
    for one, other in zip(fast, plain, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
