"""Every supported family, tiny: taken apart and put together again, against timm's own forward pass."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from schemas.errors import UnsupportedModelError
from schemas.features import FeatureSpec, LpmInfo
from stages.extract.taps import Taps
from stages.lpm.attention import Projected, finish, obstacle, project, scale_of
from stages.lpm.catalogue import check_supported, find_model

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {}),
    "vit_layer_scale": ("vit_base_patch16_224", {"init_values": 0.1}),
    "vit_qk_norm": ("vit_base_patch16_224", {"qk_norm": True}),
    "vit_no_class_token": ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "vit_registers_average": ("vit_medium_patch16_reg4_gap_256", {}),
    "vit_res_post_norm": ("vit_base_patch16_rpn_224", {}),
    "vit_scale_norm": ("vit_so150m2_patch16_reg1_gap_256", {"scale_attn_norm": True}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_base_patch16_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2_giant_swiglu": ("vit_giant_patch14_dinov2", {}),
    "aimv2": ("aimv2_large_patch14_224", {}),
    "eva_first": ("eva_large_patch14_196", {}),
    "eva_first_giant": ("eva_giant_patch14_224", {}),
    "eva02_separate": ("eva02_base_patch14_224", {}),
    "eva02_fused": ("eva02_tiny_patch14_224", {}),
    "eva02_clip": ("eva02_large_patch14_clip_224", {}),
    "eva02_sub_norm": ("eva02_base_patch16_clip_224", {}),
    "eva_rope_attention": ("vit_small_patch16_rope_224", {}),
    "eva_rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "eva_rope_no_position": ("vit_small_patch16_rope_ape_224", {}),
    "pe": ("vit_pe_core_tiny_patch16_384", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3_bias": ("vit_small_patch16_dinov3_qkvb", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "beit_shared_bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit_both_biases": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    "beit3": ("beit3_base_patch16_224", {}),
    "relpos_mlp": ("vit_relpos_small_patch16_224", {}),
    "relpos_shared": ("vit_srelpos_small_patch16_224", {}),
    "relpos_table": ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias"}),
}
Call = tuple[Any, tuple[Any, ...], dict[str, Any], torch.Tensor]


def tiny(family: str, patches: int = 4) -> Any:
    """A model of that family with weights of which none is zero or one."""
    if not timm.is_model(FAMILIES[family][0]):
        pytest.skip(f"this timm has no {FAMILIES[family][0]}")
    name, options = FAMILIES[family]
    patch = 14 if "patch14" in name else 16
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=patches * patch, **{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return model if family == "eva_rope_mixed" else model.double()  # some versions rotate in float32 alone


def images(model: Any) -> torch.Tensor:
    kind = model.patch_embed.proj.weight.dtype
    return torch.randn(2, 3, *model.patch_embed.img_size, dtype=kind, generator=torch.manual_seed(1))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the precision of the type, relative to the largest value."""
    loss = 1e-11 if found.dtype == torch.double else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=loss * float(expected.detach().abs().max()))


def run(model: Any) -> tuple[list[Call], torch.Tensor]:
    """What each attention was called with and gave, and the output of the model."""
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, args, kwargs, output))

    handles = [block.attn.register_forward_hook(note, with_kwargs=True) for block in model.blocks]
    with torch.no_grad():
        tokens = model.forward_features(images(model))
    for handle in handles:
        handle.remove()
    return calls, tokens


def attention_matrices(model: Any) -> list[torch.Tensor]:
    """softmax(q k^T * scale + bias) of every block, as timm itself computes it without fused attention."""
    matrices: list[torch.Tensor] = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(
            block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _out: matrices.append(inputs[0]))
        )
    with torch.no_grad():
        model.forward_features(images(model))
    for handle, block in zip(handles, model.blocks, strict=True):
        handle.remove()
        block.attn.fused_attn = True
    return matrices


def explicit(projected: Projected, attention: Any) -> torch.Tensor:
    scores = projected.query @ projected.key.transpose(-2, -1) * scale_of(attention)
    return (scores if projected.bias is None else scores + projected.bias).softmax(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_taken_apart_and_put_together_again(family: str) -> None:
    model = tiny(family)
    check_supported(model, family)
    calls, tokens = run(model)
    matrices = attention_matrices(model)
    assert len(calls) == len(matrices) == 2
    assert tokens.shape == (2, model.num_prefix_tokens + 16, 48)
    for (attention, args, kwargs, output), matrix in zip(calls, matrices, strict=True):
        with torch.no_grad():
            projected = project(attention, *args, **kwargs)
            mixed = F.scaled_dot_product_attention(
                projected.query, projected.key, projected.value, projected.bias, scale=scale_of(attention)
            )
            again = finish(attention, mixed, projected.gate)
        assert projected.query.shape == projected.key.shape == projected.value.shape == (2, 3, tokens.shape[1], 16)
        assert_same(again, output)
        importance, direct = explicit(projected, attention).mean(dim=-2), matrix.mean(dim=-2)
        assert_same(importance, direct)
        assert matrix.std() > 1e-4  # uniform attention would prove nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_may_be_replaced(family: str) -> None:
    model = tiny(family)
    expected = model.forward_features(images(model))

    def replaced(attention: Any) -> Any:
        def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            taken = project(attention, tokens, *args, **kwargs)
            return finish(attention, explicit(taken, attention) @ taken.value, taken.gate)

        return forward

    for block in model.blocks:
        block.attn.forward = replaced(block.attn)
    assert_same(model.forward_features(images(model)), expected)


@pytest.mark.parametrize("family", ["eva02_fused", "eva02_separate", "dinov3", "eva_rope_mixed", "pe"])
def test_keys_are_rotated_by_their_place_and_prefix_tokens_are_not(family: str) -> None:
    model = tiny(family)
    attention, (tokens, *rest), kwargs, _ = run(model)[0][-1]
    same = tokens[:, -1:].expand_as(tokens)
    with torch.no_grad():
        rotated = project(attention, same, *rest, **kwargs)
        plain = project(attention, same, *rest, **{**kwargs, "rope": None})
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(rotated.key[:, :, :prefix], plain.key[:, :, :prefix])
    torch.testing.assert_close(rotated.key.norm(dim=-1), plain.key.norm(dim=-1))
    assert (rotated.key[:, :, -1] - rotated.key[:, :, -2]).abs().max() > 1e-3
    assert (plain.key[:, :, -1] - plain.key[:, :, -2]).abs().max() < 1e-12
    torch.testing.assert_close(rotated.value, plain.value)


@pytest.mark.parametrize("family", ["beit", "beit_shared_bias", "beit_both_biases", "relpos_mlp", "relpos_shared"])
def test_the_bias_of_relative_positions_is_part_of_the_attention(family: str) -> None:
    attention, args, kwargs, _ = run(tiny(family))[0][-1]
    with torch.no_grad():
        bias = project(attention, *args, **kwargs).bias
    count = args[0].shape[1]
    assert bias is not None
    assert bias.shape == (1, 3, count, count)
    assert bias.std() > 0.01


def test_normalised_queries_and_keys() -> None:
    attention, args, kwargs, _ = run(tiny("vit_qk_norm"))[0][0]
    taken = project(attention, *args, **kwargs)
    attention.k_norm.weight.data.mul_(2)
    attention.k_norm.bias.data.mul_(2)
    torch.testing.assert_close(project(attention, *args, **kwargs).key, 2 * taken.key)


def built(name: str, *args: Any, **options: Any) -> Any:
    from timm import layers

    torch.manual_seed(0)
    try:
        return getattr(layers, name)(*args, **options).eval()
    except (AttributeError, TypeError):
        pytest.skip(f"this timm has no {name} with {options}")


def test_gated_attention_needs_its_gate() -> None:
    attention = built("Attention", 48, 3, gated=True)
    tokens = torch.randn(2, 9, 48)
    taken = project(attention, tokens)
    mixed = F.scaled_dot_product_attention(taken.query, taken.key, taken.value)
    torch.testing.assert_close(finish(attention, mixed, taken.gate), attention(tokens))
    with pytest.raises(ValueError, match="gated"):
        finish(attention, mixed)


def test_grouped_keys_are_repeated_for_their_heads() -> None:
    attention = built("AttentionRope", 48, 4, qkv_fused=False, num_kv_heads=2)
    tokens = torch.randn(2, 9, 48)
    taken = project(attention, tokens)
    assert taken.key.shape == (2, 4, 9, 12)
    mixed = F.scaled_dot_product_attention(taken.query, taken.key, taken.value)
    torch.testing.assert_close(finish(attention, mixed), attention(tokens))


def takes(attention: Any, option: str) -> bool:
    return option in inspect.signature(type(attention).forward).parameters


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_become_a_bias(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    attention: Any = timm.create_model("test_vit").blocks[0].attn.eval()
    if not takes(attention, "attn_mask"):
        pytest.skip("this timm has no masks")
    tokens = torch.randn(2, 5, 64)
    keep = torch.rand(5, 5) > 0.4
    keep.fill_diagonal_(True)
    mask = keep if kind == torch.bool else torch.randn(5, 5)
    taken = project(attention, tokens, attn_mask=mask)
    mixed = explicit(taken, attention) @ taken.value
    torch.testing.assert_close(finish(attention, mixed), attention(tokens, attn_mask=mask))


def test_causal_attention_is_refused() -> None:
    attention: Any = timm.create_model("test_vit").blocks[0].attn
    if not takes(attention, "is_causal"):
        pytest.skip("this timm has no causal attention")
    with pytest.raises(UnsupportedModelError, match="causal"):
        project(attention, torch.randn(1, 5, 64), is_causal=True)


def test_subclasses_and_look_alikes_are_not_taken() -> None:
    attention: Any = timm.create_model("test_vit").blocks[0].attn

    class Other(type(attention)):  # type: ignore[misc]
        pass

    assert obstacle(attention) is None
    attention.__class__ = Other
    assert "Other" in str(obstacle(attention))


@pytest.mark.slow
def test_every_supported_architecture_gives_its_tokens_at_another_size() -> None:
    """Of all that timm lists: the number of tokens is the grid and the prefix, at a size that is not the default."""
    modules = ["vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos"]
    checked = 0
    for name in timm.list_models(module=modules)[::7]:
        found = find_model(name)
        try:
            check_supported(found.build_on_meta(), name)
        except UnsupportedModelError:
            continue
        model: Any = found.build_on_meta(depth=2)
        patch = model.patch_embed.patch_size[0]
        model = found.build_on_meta(depth=2, img_size=7 * patch)
        with torch.device("meta"), torch.no_grad():
            tokens = model.forward_features(torch.empty(1, 3, 7 * patch, 7 * patch))
        assert tokens.shape == (1, 49 + model.num_prefix_tokens, model.embed_dim), name
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_tapped_tokens_are_those_of_the_direct_importance(family: str) -> None:
    model = tiny(family)
    matrices = attention_matrices(model)
    calls, tokens = run(model)
    count = tokens.shape[1]
    info = LpmInfo(
        name=family, depth=2, width=48, heads=3, patch=16, prefix_tokens=count - 16, has_class_token=count > 16,
        image_size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=192,
    )  # fmt: skip
    spec = FeatureSpec(
        lpm=info, weights_sha256="", layers=(0, 1), importance="global", kept=5, dtype="float32", side_image_size=32
    )
    with Taps(model, spec, lambda layer: layer) as taps, torch.no_grad():
        assert_same(taps.run(images(model)), tokens)
        tapped = taps.take()
    for found, (attention, args, kwargs, _), matrix in zip(tapped, calls, matrices, strict=True):
        with torch.no_grad():
            projected = project(attention, *args, **kwargs)
        importance = matrix.mean(dim=-2)
        order = importance.argsort(dim=-1, descending=True)[..., :5]
        # Tokens that are equally important to the last digits may change places.
        assert_same(importance.gather(-1, found.indices), importance.gather(-1, order))
        rows = found.indices.unsqueeze(-1).expand(-1, -1, -1, 16)
        assert_same(found.keys, projected.key.gather(2, rows))
        assert_same(found.values, projected.value.gather(2, rows))
