"""Fusion and side network against a direct transcription of the published equations, image by image, head by head."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from schemas.features import FeatureSpec, LpmInfo
from schemas.specs import SideNetworkSpec
from stages.methods.base import learnable_parameters
from stages.methods.batch import Batch
from stages.methods.cached_tokens import CachedTokens
from stages.methods.fpt import PromptedSideNetwork
from stages.methods.fusion import context
from stages.store.quantise import dequantise, encode

Weights = dict[str, torch.Tensor]

TINY = {
    "classes": 3,
    "layers": 3,
    "lpm_width": 32,
    "heads": 2,
    "width": 8,
    "image_size": 32,
    "prompts": 4,
    "dropout": 0.5,
}
KEPT = 7


def tiny(method: str) -> SideNetworkSpec:
    return SideNetworkSpec(method=method, **TINY)


def build(method: str) -> PromptedSideNetwork:
    """A network whose every parameter is far from its initial value, so that no term of an equation is hidden."""
    torch.manual_seed(0)
    network = PromptedSideNetwork(tiny(method))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=1.0 if "prompts" in name else 0.3)
            if ("norm" in name and name.endswith("weight")) or (name == "fusion.query.weight" and method == "fpt+"):
                parameter.add_(1.0)
    return network


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, TINY["layers"], TINY["heads"], KEPT, TINY["lpm_width"] // TINY["heads"])
    image = torch.randn(batch, 3, TINY["image_size"], TINY["image_size"], generator=generator)
    return image, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def logits_of(
    network: PromptedSideNetwork,
    image: torch.Tensor,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens = None if keys is None or values is None else CachedTokens(keys, values)
    logits: torch.Tensor = network(Batch(torch.zeros(len(image), dtype=torch.int64), side=image, tokens=tokens))
    return logits


# The transcription. x: vectors and matrices of one image in float64; w: the weights of the module by name.


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: torch.Tensor, w: Weights, name: str, eps: float) -> torch.Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q . k / sqrt(d)) v for one query (d,) and (T, d) keys and values."""
    scores = torch.stack([(query * key).sum() / math.sqrt(len(query)) for key in keys])
    shares = (scores - scores.max()).exp()
    shares = shares / shares.sum()
    return sum((share * value for share, value in zip(shares, values, strict=True)), torch.zeros_like(query))


def fuse(method: str, layer: int, keys: torch.Tensor, values: torch.Tensor, w: Weights) -> torch.Tensor:
    """Prompts for one side block, before dropout. keys, values: (H, T, d) of one image."""
    heads, _, dim = keys.shape
    fused = []
    for prompt in w["fusion.prompts"][layer]:
        if method == "fpt":
            query = linear(prompt, w, "fusion.query")
        else:
            query = layer_norm(prompt, w, "fusion.query", eps=1e-5)
        parts = [attend(query[h * dim : (h + 1) * dim], keys[h], values[h]) for h in range(heads)]
        context = torch.cat(parts)
        if method == "fpt":
            fused.append(linear(context, w, "fusion.out") + prompt)
        else:
            fused.append(linear(context + prompt, w, "fusion.out"))
    return torch.stack(fused)


def side_block(tokens: torch.Tensor, layer: int, heads: int, w: Weights) -> torch.Tensor:
    name, width = f"side.blocks.{layer}", tokens.shape[-1]
    dim = width // heads
    qkv = linear(layer_norm(tokens, w, f"{name}.norm1", 1e-12), w, f"{name}.attn.qkv")
    query, key, value = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    mixed = torch.stack(
        [
            torch.cat(
                [
                    attend(
                        row[h * dim : (h + 1) * dim], key[:, h * dim : (h + 1) * dim], value[:, h * dim : (h + 1) * dim]
                    )
                    for h in range(heads)
                ]
            )
            for row in query
        ]
    )
    tokens = tokens + linear(mixed, w, f"{name}.attn.proj")
    hidden = linear(layer_norm(tokens, w, f"{name}.norm2", 1e-12), w, f"{name}.mlp.0")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return tokens + linear(hidden, w, f"{name}.mlp.2")


def transcribe(
    network: PromptedSideNetwork,
    image: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (B, classes). mask: (L, B, P, width) of zeros and ones, the prompts' entries that dropout leaves."""
    spec = network.spec
    w = {name: value.detach().double() for name, value in network.state_dict().items()}
    logits = []
    for index, picture in enumerate(image.double()):
        tokens = [w["side.cls_token"][0, 0]]
        for top in range(0, spec.image_size, 16):
            for left in range(0, spec.image_size, 16):
                patch = picture[:, top : top + 16, left : left + 16]
                projected = (w["side.patch_embed.weight"] * patch).sum((1, 2, 3)) + w["side.patch_embed.bias"]
                tokens.append(projected)
        state = torch.stack(tokens) + w["side.pos_embed"][0]
        count = len(state)
        for layer in range(spec.layers):
            if spec.method != "side":
                prompts = fuse(spec.method, layer, keys[index, layer].double(), values[index, layer].double(), w)
                if mask is not None:
                    prompts = prompts * mask[layer, index] / (1 - spec.dropout)
                state = torch.cat([state, prompts])
            state = side_block(state, layer, spec.heads, w)[:count]
        logits.append(linear(layer_norm(state, w, "side.norm", 1e-12)[0], w, "side.head"))
    return torch.stack(logits)


@pytest.mark.parametrize("method", ["fpt", "fpt+", "side"])
def test_logits_are_those_of_the_equations(method: str) -> None:
    network = build(method).eval()
    batch = inputs()
    expected = transcribe(network, *batch)
    with torch.no_grad():
        found = logits_of(network, *batch)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fpt", "fpt+"])
def test_dropout_falls_on_the_fused_prompts_and_nowhere_else(method: str) -> None:
    network = build(method).train()
    batch = inputs()
    network.reseed(2, 5)
    drawn = torch.Generator().manual_seed(int(np.random.SeedSequence((2, 5)).generate_state(1)[0]))
    shape = (2, TINY["prompts"], TINY["width"])
    mask = torch.stack([torch.empty(shape).bernoulli_(1 - TINY["dropout"], generator=drawn) for _ in range(3)])
    assert 0.2 < float(mask.mean()) < 0.8
    # What the global generator draws must not matter.
    torch.manual_seed(11)
    with torch.no_grad():
        found = logits_of(network, *batch)
    torch.testing.assert_close(found.double(), transcribe(network, *batch, mask=mask.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "layers", "image_size", "count"), [("fpt+", 6, 128, 900_965), ("fpt", 12, 224, 1_602_341)]
)
def test_learnable_parameters_of_vit_base_are_the_published_ones(
    method: str, layers: int, image_size: int, count: int
) -> None:
    spec = SideNetworkSpec(
        method=method,
        classes=5,
        layers=layers,
        lpm_width=768,
        heads=12,
        width=96,
        image_size=image_size,
        prompts=16,
        dropout=0.5,
    )
    assert learnable_parameters(PromptedSideNetwork(spec)) == count


@pytest.mark.parametrize("method", ["fpt", "fpt+", "side"])
def test_gradient_reaches_every_parameter(method: str) -> None:
    network = build(method).train()
    torch.nn.functional.cross_entropy(logits_of(network, *inputs()), torch.tensor([0, 2])).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("method", ["fpt", "fpt+"])
def test_a_fresh_network_learns_from_its_first_step(method: str) -> None:
    """Prompts start near zero: the projections around them must pass a gradient all the same."""
    torch.manual_seed(0)
    network = PromptedSideNetwork(tiny(method)).train()
    torch.nn.functional.cross_entropy(logits_of(network, *inputs()), torch.tensor([0, 2])).backward()
    for name in ("fusion.prompts", "fusion.out.weight", "side.patch_embed.weight"):
        assert network.get_parameter(name).grad.abs().sum() > 0, name


@pytest.mark.parametrize("method", ["fpt", "fpt+", "side"])
def test_features_change_the_logits_unless_the_method_ignores_them(method: str) -> None:
    network = build(method).eval()
    image, keys, values = inputs()
    with torch.no_grad():
        base = logits_of(network, image, keys, values)
        moved_keys = logits_of(network, image, keys.flip(0), values)
        moved_values = logits_of(network, image, keys, values + 1.0)
    changes = [(moved - base).abs().max() for moved in (moved_keys, moved_values)]
    assert all(change == 0 for change in changes) if method == "side" else all(change > 1e-3 for change in changes)


@pytest.mark.parametrize("method", ["fpt", "fpt+"])
def test_half_precision_features_give_the_same_logits_within_rounding(method: str) -> None:
    network = build(method).eval()
    image, keys, values = inputs()
    halves = keys.half(), values.half()
    with torch.no_grad():
        stored = logits_of(network, image, *halves)
        exact = logits_of(network, image, *(half.float() for half in halves))
        single = logits_of(network, image, keys, values)
    torch.testing.assert_close(stored, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stored, single, rtol=2e-2, atol=2e-2)


def plain_context(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The formula in plain operations, whose gradient is autograd's."""
    heads, head_dim = keys.shape[1], keys.shape[3]
    split = query.view(-1, heads, head_dim).transpose(0, 1)
    weights = torch.softmax(torch.einsum("hpd,bhtd->bhpt", split, keys) / math.sqrt(head_dim), dim=-1)
    return torch.einsum("bhpt,bhtd->bphd", weights, values).flatten(2)


@pytest.mark.parametrize("batch", [1, 4, 6, 9])
def test_context_and_its_gradient(batch: int) -> None:
    """Also where the batch is no multiple of the images that are widened at a time."""
    _, keys, values = (part.double() for part in inputs(batch))
    keys, values = keys[:, 0], values[:, 0]
    query = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(context(query, CachedTokens(keys, values)), plain_context(query, keys, values))
    assert torch.autograd.gradcheck(lambda q: context(q, CachedTokens(keys, values)), (query,))
    upstream = torch.randn(batch, 5, 32, dtype=torch.float64)
    (mine,) = torch.autograd.grad(context(query, CachedTokens(keys, values)), query, upstream)
    (plain,) = torch.autograd.grad(plain_context(query, keys, values), query, upstream)
    torch.testing.assert_close(mine, plain)


def test_context_of_halves_has_the_gradient_of_the_widened() -> None:
    _, keys, values = (part[:, 0].half() if part.dim() == 5 else part for part in inputs(3))
    query = torch.randn(5, 32, requires_grad=True)
    (halves,) = torch.autograd.grad(context(query, CachedTokens(keys, values)).square().sum(), query)
    (wide,) = torch.autograd.grad(context(query, CachedTokens(keys.float(), values.float())).square().sum(), query)
    assert halves.dtype == torch.float32
    assert torch.equal(halves, wide)


def quantised(dtype: str, batch: int, head_dim: int = 16) -> tuple[CachedTokens, torch.Tensor, torch.Tensor]:
    """One layer as codes, and its dequantised keys and values in double precision."""
    lpm = LpmInfo(
        name="tiny", depth=1, width=2 * head_dim, heads=2, patch=16, prefix_tokens=1, has_class_token=True,
        image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", mlp_width=8,
    )  # fmt: skip
    spec = FeatureSpec(
        lpm=lpm, weights_sha256="0" * 64, layers=(0,), importance="global", kept=KEPT, dtype=dtype, side_image_size=16
    )
    generator = torch.Generator().manual_seed(2)
    shape = (batch, 1, 2, KEPT, head_dim)
    keys, values = (torch.randn(shape, generator=generator) + 3 * torch.randn(head_dim) for _ in range(2))
    arrays = {name: array.numpy() for name, array in encode(keys, values, spec).items()}
    cached = CachedTokens.of(arrays)
    assert cached is not None
    wide = [torch.from_numpy(array[:, 0]).double() for array in dequantise(arrays, spec)]
    return cached.layer(0), wide[0], wide[1]


@pytest.mark.parametrize("head_dim", [16, 5])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_context_of_codes_is_that_of_the_dequantised(dtype: str, batch: int, head_dim: int) -> None:
    cached, keys, values = quantised(dtype, batch, head_dim)
    query = torch.randn(5, 2 * head_dim, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(context(query, cached), plain_context(query, keys, values), rtol=0, atol=1e-5)
    assert torch.autograd.gradcheck(lambda q: context(q, cached), (query,))
    upstream = torch.randn(batch, 5, 2 * head_dim, dtype=torch.float64)
    (mine,) = torch.autograd.grad(context(query, cached), query, upstream)
    (plain,) = torch.autograd.grad(plain_context(query, keys, values), query, upstream)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    single = query.detach().float().requires_grad_()
    torch.testing.assert_close(context(single, cached).double(), plain_context(query, keys, values), rtol=0, atol=1e-5)
    (narrow,) = torch.autograd.grad(context(single, cached), single, upstream.float())
    torch.testing.assert_close(narrow.double(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fpt", "fpt+"])
def test_fresh_weights_are_those_of_the_recipe(method: str) -> None:
    torch.manual_seed(0)
    network = PromptedSideNetwork(tiny(method))
    prompts = network.get_parameter("fusion.prompts")
    assert prompts.std().item() == pytest.approx(1e-6, rel=0.2)
    assert network.get_parameter("side.blocks.0.attn.qkv.weight").std().item() == pytest.approx(0.02, rel=0.2)
    assert network.get_parameter("side.blocks.2.mlp.0.bias").abs().max() == 0
    patches = network.get_parameter("side.patch_embed.weight")
    assert patches.std().item() == pytest.approx(0.02, rel=0.1)
    assert patches.abs().max() <= 2.0
    assert network.get_parameter("side.patch_embed.bias").abs().max() == 0
    assert network.get_parameter("side.cls_token").std().item() == pytest.approx(0.02, rel=0.6)
    norms = [module for module in network.side.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-12}


def test_side_needs_no_features_and_the_presets_say_that_they_do() -> None:
    image, _, _ = inputs()
    assert logits_of(build("side"), image).shape == (2, TINY["classes"])
    with pytest.raises(ValueError, match="needs the input tokens"):
        logits_of(build("fpt+"), image)
