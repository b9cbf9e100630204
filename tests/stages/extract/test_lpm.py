from __future__ import annotations

import time

import pytest
import timm
import torch

from schemas.errors import UnsupportedModelError
from schemas.features import LpmInfo
from stages.extract.lpm import describe_lpm, nearest_multiple


def test_describe_gives_shape_and_preprocessing_of_the_published_model() -> None:
    assert describe_lpm("vit_base_patch16_384.orig_in21k_ft_in1k", 512) == LpmInfo(
        name="vit_base_patch16_384.orig_in21k_ft_in1k",
        depth=12,
        width=768,
        heads=12,
        patch=16,
        prefix_tokens=1,
        has_class_token=True,
        image_size=512,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
    )


def test_describe_takes_the_preprocessing_of_the_weights_not_of_the_architecture() -> None:
    info = describe_lpm("vit_base_patch16_clip_224.openai", 224)
    assert info.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert info.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))


def test_describe_counts_registers_and_knows_that_there_is_no_class_token() -> None:
    registers = describe_lpm("vit_small_patch14_reg4_dinov2.lvd142m", 518)
    assert (registers.prefix_tokens, registers.has_class_token, registers.tokens) == (5, True, 37 * 37 + 5)
    none = describe_lpm("test_vit2", 64)
    assert (none.prefix_tokens, none.has_class_token) == (1, False)


def test_describe_names_the_default_weights() -> None:
    assert describe_lpm("vit_base_patch16_384", 384).name == "vit_base_patch16_384.augreg_in21k_ft_in1k"


@pytest.mark.parametrize(
    ("size", "patch", "nearest"),
    [(512, 16, 512), (512, 14, 518), (511, 14, 518), (510, 14, 504), (21, 14, 28), (504, 16, 512), (3, 14, 14)],
)
def test_nearest_multiple_ties_go_up(size: int, patch: int, nearest: int) -> None:
    assert nearest_multiple(size, patch) == nearest


def test_describe_takes_no_memory_and_no_time() -> None:
    describe_lpm("test_vit", 64)  # imports
    start = time.perf_counter()
    info = describe_lpm("vit_giant_patch14_dinov2.lvd142m", 512)  # 1.1 billion parameters
    assert time.perf_counter() - start < 5
    assert info.image_size == 518


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"vit_base_patch16_38'[\s\S]*vit_base_patch16_384"):
        describe_lpm("vit_base_patch16_38", 384)


def test_an_unknown_tag_gets_the_tags_of_this_architecture() -> None:
    with pytest.raises(UnsupportedModelError, match=r"orig_in21k_ft_in1k[\s\S]*Set lpm.name to one of them"):
        describe_lpm("vit_base_patch16_384.imagenet", 384)


def test_a_renamed_model_gets_its_new_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"now: vit_base_patch16_224\.augreg_in21k\."):
        describe_lpm("vit_base_patch16_224_in21k", 224)


def test_a_hub_repository_is_no_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"lpm\.weights to a local file"):
        describe_lpm("hf-hub:timm/vit_base_patch16_384.augreg_in1k", 384)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "within windows"),
        ("convnext_tiny", "no attention"),
        ("resnet18", "no attention"),
        ("eva02_tiny_patch14_224", "rotary embedding.*not supported yet"),
        ("vit_small_patch16_dinov3", "rotary embedding.*not supported yet"),
        ("beit_base_patch16_224", "relative position bias"),
        ("vit_relpos_small_patch16_224", "relative position bias"),
        ("samvit_base_patch16", "within windows"),
        ("vit_small_r26_s32_224", "convolutional network"),
        ("vit_small_patch16_18x2_224", "one fused qkv"),
        ("xcit_nano_12_p8_224", "one fused qkv"),
    ],
)
def test_models_without_plain_global_attention_are_refused_by_name_with_what_works(name: str, reason: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"{name} \(.*\) cannot be the LPM\.\n.*{reason}.*\n.*such as vit_"
    ):
        describe_lpm(name, 224)


@pytest.mark.slow
def test_plain_vision_transformers_of_timm_are_described_or_refused() -> None:
    described = 0
    for name in timm.list_models(module=["vision_transformer", "deit"])[::12]:
        try:
            info = describe_lpm(name, 224)
        except UnsupportedModelError:
            continue
        described += 1
        assert info.width == info.heads * info.head_dim
        assert info.image_size % info.patch == 0
    assert described > 10


def test_the_default_device_is_left_alone() -> None:
    describe_lpm("test_vit", 64)
    assert torch.empty(1).device.type == "cpu"
