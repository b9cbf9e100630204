"""Parameters that belong to token positions, at another image size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_vit import TINY, adapted
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from schemas.errors import BundleError, UnsupportedModelError
from schemas.prompt_adaptations import EptSettings
from schemas.specs import AdaptationSpec, FinetuneSpec, LoffTaSpec, SideNetworkSpec
from stages.methods.base import Network, build_model
from stages.methods.ept import EmbeddedLogits, EmbeddedPrompts
from stages.methods.positions import resample_positions

SMALL, LARGE = 224 // 16, 512 // 16
"""Patches per side of ViT-B/16."""


def spec(size: int, method: str = "ept-lse", prefix: int = 1) -> AdaptationSpec:
    return AdaptationSpec(
        method=method, classes=3, lpm=TINY, image_size=size, depth=6, first_block=4, hidden=None, width=64, heads=2,
        mlp_width=192, patch=16, prefix_tokens=prefix, options={"prompts": 100} if method == "ept-lse" else {},
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_constant_map_stays_constant_and_the_prefix_is_kept(prefix: int) -> None:
    values = torch.full((2, prefix + SMALL**2, 3), 0.7)
    values[:, :prefix] = torch.randn(2, prefix, 3)
    found = resample_positions(values, SMALL, LARGE)
    assert found.shape == (2, prefix + LARGE**2, 3)
    assert torch.equal(found[:, :prefix], values[:, :prefix])
    torch.testing.assert_close(found[:, prefix:], torch.full((2, LARGE**2, 3), 0.7))


def test_it_is_how_timm_resamples_position_embeddings() -> None:
    values = torch.randn(3, 1 + SMALL**2, 8)
    for side in (LARGE, 7):
        found = resample_positions(values, SMALL, side)
        for row in range(3):
            expected = resample_abs_pos_embed(values[row : row + 1], [side, side], num_prefix_tokens=1)
            assert torch.equal(found[row : row + 1], expected)
    assert resample_positions(values, SMALL, SMALL) is values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grids_are_resampled_as_channels_of_one_image_are(dtype: torch.dtype) -> None:
    values = torch.randn(2, 3, 1 + 4**2, 5).to(dtype)
    grid = values[..., 1:, :].reshape(6, 4, 4, 5).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, (7, 7), mode="bicubic", antialias=True)
    expected = grid.permute(0, 2, 3, 1).reshape(2, 3, 49, 5).to(dtype)
    assert torch.equal(resample_positions(values, 4, 7)[..., 1:, :], expected)
    fewer = resample_positions(values, 4, 7, 0)
    assert fewer.dtype == dtype and torch.equal(fewer, expected)


def test_rows_and_columns_keep_their_places() -> None:
    row, column = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    grid = resample_positions(torch.stack([row, column], dim=-1).reshape(1, 196, 2), SMALL, LARGE).view(32, 32, 2)
    # Pixel i of 32 lies at (i + 0.5) 14 / 32 - 0.5 of 14; a bicubic kernel keeps straight lines away from the border.
    expected = ((torch.arange(32.0) + 0.5) * 14 / 32 - 0.5)[5:-5]
    torch.testing.assert_close(grid[5:-5, 9, 0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[9, 5:-5, 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [EmbeddedPrompts, EmbeddedLogits])
def test_ept_at_another_size_has_the_logits_of_its_places(form: Any) -> None:
    torch.manual_seed(0)
    trained, larger = (form(spec(size), EptSettings(prompts=3)) for size in (224, 512))
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(torch.randn_like(value))
    larger.load_state_dict(trained.resampled(trained.state_dict(), SMALL, LARGE))
    assert torch.equal(larger.logits()[:, 0], trained.logits()[:, 0])
    if form is EmbeddedLogits:
        grid = trained.logits()[:, None, 1:].unflatten(-1, (14, 14))
        expected = F.interpolate(grid, (32, 32), mode="bicubic", antialias=True).flatten(1)
        torch.testing.assert_close(larger.logits()[:, 1:], expected)
    else:
        assert larger.prompts.shape == (2, 1 + LARGE**2, 3)


def test_registers_without_a_trained_entry_get_no_offset() -> None:
    trained, other = EmbeddedLogits(spec(224), EptSettings()), EmbeddedLogits(spec(224, prefix=5), EptSettings())
    with torch.no_grad():
        trained.offsets.normal_()
    other.load_state_dict(other.resampled(trained.state_dict(), SMALL, SMALL))
    assert torch.equal(other.offsets[:, 0], trained.offsets[:, 0])
    assert other.offsets[:, 1:5].abs().max() == 0
    assert torch.equal(other.offsets[:, 5:], trained.offsets[:, 1:])


def test_a_factor_per_pair_of_tokens_refuses_another_size_by_name() -> None:
    small, large = (
        build_model(spec(size, "attn-scale-matrix").model_copy(update={"options": {}})) for size in (64, 96)
    )
    assert isinstance(large, Network)
    with pytest.raises(UnsupportedModelError, match=r"attn-scale-matrix for 4 x 4 patches do not fit 6 x 6"):
        large.continue_from(small.spec, small.state_dict())


def test_a_model_of_another_size_computes_with_resampled_logits() -> None:
    small, large = adapted("ept-lse", size=64), adapted("ept-lse", size=96)
    large.continue_from(small.spec, small.state_dict())
    assert torch.equal(large.lpm.head.weight, small.lpm.head.weight)
    expected = resample_positions(small.adaptation.offsets.detach()[..., None], 4, 6)[..., 0]
    assert torch.equal(large.adaptation.offsets, expected)


def test_fine_tuned_position_embeddings_are_resampled() -> None:
    small, large = (
        build_model(
            FinetuneSpec(classes=3, lpm=TINY, image_size=size, depth=6, first_block=0, everything=True, hidden=None)
        )
        for size in (64, 96)
    )
    assert isinstance(large, Network)
    large.continue_from(small.spec, small.state_dict())
    (name,) = [name for name, _ in small.named_parameters() if name.endswith("pos_embed")]
    old, new = dict(small.named_parameters())[name], dict(large.named_parameters())[name]
    assert (old.shape[1], new.shape[1]) == (4**2 + 1, 6**2 + 1)
    torch.testing.assert_close(new, resample_abs_pos_embed(old, [6, 6], num_prefix_tokens=1))


SIDE = {"classes": 3, "layers": 2, "lpm_width": 32, "heads": 2, "width": 8, "prompts": 4, "dropout": 0.5}


def side_network(method: str, size: int, members: int, seed: int) -> Network:
    torch.manual_seed(seed)
    spec = {**SIDE, "method": method, "image_size": size, "members": members}
    network = build_model(SideNetworkSpec.model_validate(spec))
    assert isinstance(network, Network)
    return network


@pytest.mark.parametrize(("method", "members"), [("fpt+", 1), ("fpt-x", 2), ("side", 1)])
def test_a_side_network_takes_a_larger_image(method: str, members: int) -> None:
    small, large = side_network(method, 32, members, 0), side_network(method, 64, members, 1)
    large.continue_from(small.spec, small.state_dict())
    before, after = dict(small.named_parameters()), dict(large.named_parameters())
    for name, value in before.items():
        expected = resample_positions(value, 2, 4) if name.endswith("pos_embed") else value
        assert torch.equal(after[name], expected), name


def test_further_members_start_from_new_weights() -> None:
    one, three, fresh = (side_network("fpt-x", 32, members, seed) for members, seed in ((2, 0), (3, 1), (3, 1)))
    three.continue_from(one.spec, one.state_dict())
    found, ours, new = (dict(network.named_parameters()) for network in (three, one, fresh))
    for name, value in found.items():
        assert torch.equal(value, new[name] if name.startswith("networks.2.") else ours[name]), name


def test_a_classifier_of_hidden_tokens_takes_a_larger_grid() -> None:
    small, large = (
        build_model(
            LoffTaSpec(
                classes=3,
                hidden=4,
                lpm_width=64,
                grid=grid,
                prefix_tokens=1,
                pooled_grid=min(grid, 6),
                width=192,
                blocks=1,
                heads=3,
            )
        )
        for grid in (4, 8)
    )
    assert isinstance(large, Network)
    large.continue_from(small.spec, small.state_dict())
    old, new = (dict(network.named_parameters())["pos_embed"] for network in (small, large))
    assert torch.equal(new, resample_positions(old, 4, 6))


def test_weights_of_another_shape_are_refused_by_name() -> None:
    small = side_network("fpt+", 32, 1, 0)
    state = small.state_dict()
    with pytest.raises(BundleError, match=r"side\.head\.bias has \(5,\) instead of \(3,\)"):
        small.continue_from(small.spec, {**state, "side.head.bias": torch.zeros(5)})
    del state["side.cls_token"]
    with pytest.raises(BundleError, match=r"lacks 1 of \d+ trained parameters, such as side\.cls_token"):
        small.continue_from(small.spec, state)
