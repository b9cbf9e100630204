"""VPT and VFPT: the equations with prompts as tokens, initial values, and what is computed once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapted_models import assert_same_with_gradients, load_families, pixels, spec_of, tiny_vit, written_out

from schemas.errors import UnsupportedModelError
from schemas.features import LpmInfo
from schemas.parse import parse_settings
from schemas.prompt_adaptations import VfptSettings, VptSettings
from schemas.resolve import resolve
from stages.lpm.adaptation import install
from stages.methods import vfpt, vpt
from stages.methods.base import gradient_method
from stages.methods.vfpt import FourierPrompts, even_numbers, transform
from stages.methods.vpt import DeepPrompts, ShallowPrompts, initial_prompts

families = load_families()
VIT_B = LpmInfo(
    name="vit_base_patch16_224", depth=12, width=768, heads=12, patch=16, prefix_tokens=1, has_class_token=True,
    image_size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=3072,
)  # fmt: skip


def leaves(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().clone().requires_grad_()


def test_shallow_prompts_are_tokens_of_all_blocks() -> None:
    model = tiny_vit()
    adaptation = ShallowPrompts(spec_of(model, "vpt-shallow"), VptSettings(prompts=4)).double()
    prompts = leaves(adaptation.prompts)
    expected = written_out(model, pixels(), shallow=prompts)
    install(model, adaptation)
    assert_same_with_gradients(model(pixels()), expected, [adaptation.prompts], [prompts])


def test_deep_prompts_are_tokens_that_every_block_replaces() -> None:
    model = tiny_vit()
    adaptation = DeepPrompts(spec_of(model, "vpt-deep"), 4).double()
    prompts = leaves(adaptation.prompts)
    expected = written_out(model, pixels(), deep=list(prompts))
    plain = written_out(model, pixels())
    install(model, adaptation)
    found = model(pixels())
    assert_same_with_gradients(found, expected, [adaptation.prompts], [prompts])
    assert float((found - plain).detach().abs().max()) > 1e-5


def test_initial_prompts_are_the_published_ones() -> None:
    model = tiny_vit()
    spec = spec_of(model, "vpt-deep").model_copy(update={"width": 768})
    torch.manual_seed(0)
    prompts = initial_prompts(spec, 12, 10).detach()
    assert prompts.shape == (12, 10, 768)
    assert float(prompts.abs().max()) == pytest.approx(0.0625, abs=1e-4)
    assert float(prompts.std()) == pytest.approx(0.0625 / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("family", ["beit", "beit_shared_bias", "relpos_mlp", "relpos_shared", "relpos_table"])
def test_more_tokens_are_refused_where_positions_are_biases(family: str) -> None:
    model = families.tiny(family)
    with pytest.raises(UnsupportedModelError, match="vpt-deep"):
        install(model, ShallowPrompts(spec_of(model, "vpt-shallow"), VptSettings()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "family", ["vit_no_class_token", "vit_registers_average", "dinov2", "dinov3", "eva02_separate", "pe", "aimv2"]
)
def test_shallow_prompts_work_in_every_family_without_such_biases(family: str, checkpointing: bool) -> None:
    model = families.tiny(family)
    adaptation = ShallowPrompts(spec_of(model, "vpt-shallow"), VptSettings(prompts=3)).double()
    before = model.forward_features(families.images(model))
    install(model, adaptation)
    model.requires_grad_(False).set_grad_checkpointing(checkpointing)
    after = model.forward_features(families.images(model))
    assert after.shape == before.shape
    assert float((after - before).detach().abs().max()) > 1e-6
    (gradient,) = torch.autograd.grad(after.square().sum(), [adaptation.prompts])
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("family", ["vit_qk_norm", "dinov2_registers", "eva02_fused", "dinov3", "beit", "relpos_mlp"])
@pytest.mark.parametrize("kind", ["deep", "fourier"])
def test_keys_and_values_are_computed_once_for_prediction(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.tiny(family)
    spec = spec_of(model, "vpt-deep")
    adaptation = DeepPrompts(spec, 4) if kind == "deep" else FourierPrompts(spec, VfptSettings(prompts=4))
    install(model, adaptation.double())
    names = set(adaptation.state_dict())
    with torch.no_grad():
        live = model(families.images(model))
        adaptation.fold(model)

        def refuse(*_: Any) -> None:
            raise AssertionError("keys and values are computed again")

        monkeypatch.setattr(vpt, "keys_values", refuse)
        families.assert_same(model(families.images(model)), live)
    assert set(adaptation.state_dict()) == names == {"prompts"}


def real_dft(prompts: torch.Tensor) -> torch.Tensor:
    """Re of the double sum over both axes, from the definition."""
    count, width = prompts.shape
    rows, columns = (torch.arange(size, dtype=torch.double) for size in (count, width))
    result = torch.zeros_like(prompts)
    for i in range(count):
        for j in range(width):
            phase = i * rows[:, None] / count + j * columns[None] / width
            result[i, j] = (prompts * torch.cos(2 * math.pi * phase)).sum()
    return result


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.3, 1), (1.0, 5), (0.0, 0)])
def test_fourier_prompts_are_those_of_the_definition_baked_in(share: float, count: int) -> None:
    model = tiny_vit()
    spec = spec_of(model, "vfpt")
    adaptation = FourierPrompts(spec, VfptSettings(prompts=5, fourier_share=share)).double()
    assert adaptation.transformed == count
    with torch.no_grad():
        baked = [torch.cat([real_dft(one[:count]), one[count:]]) for one in adaptation.prompts]
    expected = written_out(model, pixels(), deep=baked)
    install(model, adaptation)
    torch.testing.assert_close(model(pixels()), expected, rtol=0, atol=1e-10)
    adaptation.fold(model)
    torch.testing.assert_close(model(pixels()), expected, rtol=0, atol=1e-10)


def test_only_the_even_part_of_fourier_prompts_learns() -> None:
    model = tiny_vit()
    adaptation = FourierPrompts(spec_of(model, "vfpt"), VfptSettings(prompts=6)).double()
    install(model, adaptation)
    output = model(pixels())
    (gradient,) = torch.autograd.grad(output.square().sum(), [adaptation.prompts])

    def mirrored(prompts: torch.Tensor) -> torch.Tensor:
        """P[-i, -j]."""
        return prompts.roll((-1, -1), (-2, -1)).flip(-2, -1)

    transformed = gradient[:, :3]
    odd = transformed - mirrored(transformed)
    assert float(odd.abs().max()) < 1e-12 * float(transformed.abs().max())
    assert float((gradient[:, 3:] - mirrored(gradient[:, 3:])).abs().max()) > 1e-2 * float(gradient[:, 3:].abs().max())
    with torch.no_grad():
        noise = torch.randn(2, 3, 48, dtype=torch.double)
        adaptation.prompts[:, :3] += noise - mirrored(noise)
        torch.testing.assert_close(model(pixels()), output, rtol=0, atol=1e-12)
        adaptation.prompts[:, :3] += noise + mirrored(noise)
        assert float((model(pixels()) - output).abs().max()) > 1e-6


@pytest.mark.parametrize(("count", "width"), [(5, 8), (4, 8), (1, 8), (5, 7), (4, 7), (1, 7)])
def test_the_rank_of_the_transform(count: int, width: int) -> None:
    units = torch.eye(count * width, dtype=torch.double).reshape(-1, count, width)
    images = torch.stack([transform(unit, count).flatten() for unit in units])
    assert int(torch.linalg.matrix_rank(images)) == even_numbers(count, width)


def test_the_published_numbers_of_fourier_prompts() -> None:
    torch.manual_seed(0)
    prompts = torch.randn(5, 768)
    assert float(transform(prompts, 5).std() / prompts.std()) == pytest.approx(math.sqrt(5 * 768 / 2), rel=0.03)
    raw = {"method": "vfpt", "lpm": {"name": VIT_B.name}, "features": {"image_size": 224}}
    spec = gradient_method("vfpt").spec(resolve(parse_settings(raw), VIT_B), VIT_B, 5)
    assert dict(vfpt.METHOD.describe(spec))["Parameters of prompts with an effect"] == "69,132"
