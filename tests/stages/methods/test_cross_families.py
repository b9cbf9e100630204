"""CVPT, DVPT and APT on every supported family: what they add, and which models they refuse."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import UnsupportedModelError
from schemas.methods import METHODS
from schemas.specs import AdaptationSpec
from stages.lpm.adaptation import Adaptation, install
from stages.lpm.attention import project, queries
from stages.methods.apt import ApproximatedPrompts
from stages.methods.cvpt import CrossPrompts
from stages.methods.dvpt import DynamicPrompts, PromptTokens


def _families() -> Any:
    path = Path(__file__).parent.parent / "lpm/test_attention.py"
    spec = importlib.util.spec_from_file_location("attention_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


families = _families()
BLOCKS = [family for family in families.FAMILIES if family != "vit_res_post_norm"]
"""Families with the norm in front of attention and MLP."""
ADAPTATIONS: dict[str, Any] = {
    "cvpt": CrossPrompts, "dvpt": DynamicPrompts, "dvpt-release": PromptTokens, "apt": ApproximatedPrompts
}  # fmt: skip
NOT_LINEAR = {"vit_qk_norm", "vit_scale_norm", "eva02_sub_norm", "eva02_clip", "beit3"}
"""Families whose attention is not only projections and a softmax: CVPT is served as it was trained."""


def adaptation_of(name: str, model: Any) -> Adaptation:
    """Return an adaptation of a tiny model; every number that starts at 0 is moved from it."""
    section = METHODS[name].options
    assert section is not None
    spec = AdaptationSpec(
        method=name, classes=2, lpm="tiny", image_size=64, depth=2, first_block=0, hidden=None, width=48, heads=3,
        mlp_width=192, patch=16, prefix_tokens=model.num_prefix_tokens,
    )  # fmt: skip
    made: Adaptation = ADAPTATIONS[name](spec, section(prompts=3))
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return made.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_every_family_is_adapted_or_refused(name: str, family: str) -> None:
    model = families.tiny(family)
    pixels = families.images(model)
    with torch.no_grad():
        before = model(pixels)
    adaptation = adaptation_of(name, model)
    relative = any("rel" in key and "pos" in key for key, _ in model.named_modules()) or family.startswith("beit")
    if (name == "dvpt" and model.cls_token is None) or (name == "dvpt-release" and relative and family != "beit3"):
        with pytest.raises(UnsupportedModelError, match="class token" if name == "dvpt" else "more tokens"):
            install(model, adaptation)
        return
    install(model, adaptation)
    after = model(pixels)
    assert after.shape == before.shape and bool(after.isfinite().all())
    assert float((after.detach() - before).abs().max()) > 1e-6
    after.square().sum().backward()
    for key, value in adaptation.named_parameters():
        assert value.grad is not None and bool(value.grad.isfinite().all()) and bool(value.grad.any()), key


@pytest.mark.parametrize("family", BLOCKS)
def test_queries_are_those_of_the_attention_without_positions(family: str) -> None:
    model = families.tiny(family)
    attention = model.blocks[1].attn
    tokens = torch.randn(2, model.num_prefix_tokens + 16, 48, dtype=next(model.parameters()).dtype)
    families.assert_same(queries(attention, tokens), project(attention, tokens).query)


@pytest.mark.parametrize("family", BLOCKS)
def test_cvpt_is_folded_where_attention_is_projections_and_a_softmax(family: str) -> None:
    model = families.tiny(family)
    pixels = families.images(model)
    adaptation = adaptation_of("cvpt", model)
    install(model, adaptation)
    with torch.no_grad():
        live = model(pixels)
        adaptation.fold(model)
        folded = model(pixels)
    assert (adaptation.into is None) == (family in NOT_LINEAR)
    scale = float(live.abs().max())
    torch.testing.assert_close(folded, live, rtol=0, atol=(1e-9 if live.dtype == torch.double else 1e-4) * scale)
