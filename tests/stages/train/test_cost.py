"""The cost estimate: published counts, memory that follows from shapes, and nothing read."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn

from schemas.cost import CostReport
from schemas.errors import PlatformError
from schemas.resolve import resolve
from schemas.settings import FeatureSettings, LpmSettings, Settings, TrainSettings
from stages.lpm.loading import describe_lpm
from stages.train.cost import efficiency_factor, estimate_cost

MIB = 2**20


def cost(name: str, size: int, classes: int, train: dict[str, Any] | None = None, **features: Any) -> CostReport:
    method = features.pop("method", "fpt+")
    settings = Settings(
        method=method,
        lpm=LpmSettings(name=name),
        features=FeatureSettings(image_size=size, **features),
        train=TrainSettings(**train or {}),
    )
    lpm = describe_lpm(name, size)
    return estimate_cost(resolve(settings, lpm), lpm, classes)


@cache
def tiny(batch_size: int = 16, prompts: int = 16, **features: Any) -> CostReport:
    return cost("test_vit", 96, 3, train={"batch_size": batch_size, "prompts": prompts}, **features)


@pytest.fixture(scope="module")
def published() -> dict[str, CostReport]:
    """The published setting: ViT-B at 512 pixels, batch 16, 5 classes; features of float16."""
    return {method: cost("vit_base_patch16_384", 512, 5, method=method, dtype="float16") for method in ("fpt+", "fpt")}


@pytest.mark.parametrize(("method", "learnable"), [("fpt+", 900_965), ("fpt", 1_602_341)])
def test_learnable_parameters_are_the_published_ones(
    published: dict[str, CostReport], method: str, learnable: int
) -> None:
    report = published[method]
    assert report.learnable == learnable
    # ViT-B/16 with 1025 positions and a head of 5 outputs.
    assert report.lpm_parameters == 86_438_405
    assert report.learnable_share == learnable / 86_438_405


def test_full_fine_tuning_takes_what_it_takes_with_fused_attention(published: dict[str, CostReport]) -> None:
    assert published["fpt+"].full_finetune_tensor_mib == pytest.approx(10_524, abs=2)
    assert published["fpt"].full_finetune_tensor_mib == published["fpt+"].full_finetune_tensor_mib


@pytest.mark.parametrize(("method", "bound"), [("fpt+", 114.0), ("fpt", 330.0)])
def test_training_takes_half_the_memory_of_the_published_code(
    published: dict[str, CostReport], method: str, bound: float
) -> None:
    """The published code's step takes 228.3 MiB (FPT+) and 992.8 MiB (FPT)."""
    report = published[method]
    batch = 16 * 2 * {"fpt+": 6, "fpt": 12}[method] * 12 * 205 * 64 * 2
    states = 3 * 4 * report.learnable
    assert (batch + states) / MIB < report.train_tensor_mib <= bound
    assert report.pme_factor > 0.98


@pytest.fixture(scope="module")
def saving() -> dict[str, CostReport]:
    """The same on int8 features with checkpointing."""
    train = {"checkpointing": True}
    return {m: cost("vit_base_patch16_384", 512, 5, train, method=m, dtype="int8") for m in ("fpt+", "fpt")}


@pytest.mark.parametrize(("method", "bound"), [("fpt+", 57.0), ("fpt", 170.0)])
def test_checkpointing_on_codes_halves_that_again(
    published: dict[str, CostReport], saving: dict[str, CostReport], method: str, bound: float
) -> None:
    report = saving[method]
    assert report.checkpointing
    assert report.train_batch_mib + report.train_states_mib < report.train_tensor_mib <= bound
    # Codes, a byte of scale per token and head, a half of offset per channel; the small images and the labels.
    layers, side = {"fpt+": (6, 128), "fpt": (12, 224)}[method]
    batch = 16 * (2 * layers * 12 * (205 * 64 + 205 + 2 * 64) + 3 * side**2 + 8)
    assert report.train_batch_mib == pytest.approx(batch / MIB)
    assert report.train_states_mib == pytest.approx(4 * 4 * report.learnable / MIB)
    assert published[method].train_states_mib == report.train_states_mib


def test_a_batch_in_parts_takes_less_beside_the_batch_itself() -> None:
    whole, parts = tiny(), cost("test_vit", 96, 3, {"accumulate": 4})
    assert (whole.accumulate, parts.accumulate) == (1, 4)
    assert parts.train_batch_mib == whole.train_batch_mib
    fixed = whole.train_batch_mib + whole.train_states_mib
    assert parts.train_tensor_mib - fixed < 0.5 * (whole.train_tensor_mib - fixed)


STATISTICS = 2 * (12 * 4 * 768 + 6 * (2 * 64 * 65 // 2 + 2 * 3072) + 6 * 4 * 768)
"""Bytes of the statistics of 12 blocks, of covariances and MLPs of 6, and of the kept tokens of 6 layers."""


def test_one_row_of_the_store(published: dict[str, CostReport]) -> None:
    # 6 layers, 12 heads, 205 tokens: keys and values of 64 halves and an index; two pooled outputs, side image, id.
    row = 6 * 12 * 205 * (2 * 64 * 2 + 2) + 2 * 768 * 4 + 3 * 144**2 + 32 + STATISTICS
    assert published["fpt+"].cache_bytes_per_image == row


def test_factors_are_those_of_the_paper() -> None:
    assert efficiency_factor(0.0) == 1.0
    assert efficiency_factor(9.0) == pytest.approx(math.exp(-1))
    report = tiny()
    assert report.ppe_factor == efficiency_factor(report.learnable / report.lpm_parameters)
    assert report.pme_factor == efficiency_factor(report.train_tensor_mib / report.full_finetune_tensor_mib)


def test_features_count_in_the_type_of_the_store() -> None:
    half, single = tiny(dtype="float16"), tiny(dtype="float32")
    # test_vit: 64 wide, 2 heads of 32; at 96 pixels 37 tokens, 7 kept; 16 images; the upper half of its 6 blocks.
    values = 16 * 3 * 2 * 7 * 32
    assert single.train_tensor_mib - half.train_tensor_mib >= 2 * values * 2 / MIB
    assert single.cache_bytes_per_image - half.cache_bytes_per_image == 2 * (values // 16) * 2


def test_codes_take_a_half_and_a_quarter_of_the_batch_of_float16(published: dict[str, CostReport]) -> None:
    half, int8, int4 = tiny(dtype="float16"), tiny(dtype="int8"), tiny(dtype="int4")
    assert half.train_tensor_mib > int8.train_tensor_mib > int4.train_tensor_mib
    by_dtype = published["fpt+"].cache_bytes_by_dtype
    assert list(by_dtype) == ["float32", "float16", "int8", "int4"]
    assert by_dtype["float16"] == published["fpt+"].cache_bytes_per_image
    # Codes, a byte of scale per token and head, a half of offset per channel, and what is beside keys and values.
    beside = 6 * 12 * 205 * 2 + 2 * 768 * 4 + 3 * 144**2 + 32 + STATISTICS
    assert by_dtype["int8"] == 2 * 6 * 12 * (205 * 64 + 205 + 64 * 2) + beside
    assert by_dtype["int4"] == 2 * 6 * 12 * (205 * 32 + 64 + 64 * 2) + beside


def test_side_network_alone_holds_no_features() -> None:
    alone, fused = tiny(method="side"), tiny(method="fpt+")
    assert alone.learnable < fused.learnable
    assert alone.train_tensor_mib < fused.train_tensor_mib


def test_memory_grows_with_the_batch_by_the_batch() -> None:
    small, large = tiny(), tiny(batch_size=32)
    assert small.train_tensor_mib < large.train_tensor_mib < 2 * small.train_tensor_mib
    assert small.learnable == large.learnable


def test_it_is_deterministic_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert tiny.__wrapped__(ratio=0.3) == tiny.__wrapped__(ratio=0.3)
    assert torch.equal(state, torch.get_rng_state())


def test_settings_count() -> None:
    base = tiny()
    assert tiny(prompts=8).learnable == base.learnable - 8 * 3 * 64
    assert tiny(ratio=0.5).train_tensor_mib > base.train_tensor_mib
    assert tiny(layers=(5,)).learnable < base.learnable


def test_full_fine_tuning_is_measured_with_fused_attention_whatever_timm_is_told() -> None:
    set_fused_attn(False)
    try:
        assert tiny.__wrapped__() == tiny()
    finally:
        set_fused_attn(True)


def test_a_build_of_torch_without_distributed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(PlatformError, match="Install a regular build"):
        tiny.__wrapped__()
