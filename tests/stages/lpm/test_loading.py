from __future__ import annotations

import time

import pytest
import timm
import torch

from schemas.errors import UnsupportedModelError
from schemas.features import LpmInfo
from stages.lpm.loading import describe_lpm, nearest_multiple


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
        mlp_width=3072,
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


@pytest.mark.parametrize("name", ["timm/vit_base_patch16_384.augreg_in1k", "models/uni", "s3:bucket/uni"])
def test_a_repository_or_a_folder_says_what_it_is(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not a name from timm's list[\s\S]*hf-hub:[\s\S]*local-dir:"):
        describe_lpm(name, 384)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "within windows"),
        ("convnext_tiny", "no attention"),
        ("resnet18", "no attention"),
        ("samvit_base_patch16", "within windows"),
        ("vit_small_r26_s32_224", "convolutional network"),
        ("vit_small_patch16_18x2_224", "several attentions side by side"),
        ("vit_base_patch16_xp_224", "share one projection"),
        ("vit_dwee_patch16_reg1_gap_256", "difference of two softmax maps"),
        ("xcit_nano_12_p8_224", "between channels"),
        ("mvitv2_tiny", "pools keys and values"),
        ("hiera_tiny_224", "halves its tokens"),
        ("maxvit_tiny_tf_224", "windows and grids"),
        ("mixer_s16_224", "do not attend over all tokens"),
    ],
)
def test_models_without_plain_global_attention_are_refused_by_name_with_what_works(name: str, reason: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"{name} \(.*\) cannot be the LPM\.\n.*{reason}.*\n.*SigLIP, BEiT.*such as vit_"
    ):
        describe_lpm(name, 224)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # depth, width, heads, patch, prefix tokens, class token, size, tokens
        ("deit_tiny_distilled_patch16_224", 224, (12, 192, 3, 16, 2, True, 224, 198)),
        ("vit_base_patch16_siglip_512", 512, (12, 768, 12, 16, 0, False, 512, 1024)),
        ("beit_base_patch16_224", 512, (12, 768, 12, 16, 1, True, 512, 1025)),
        ("eva02_base_patch14_448", 512, (12, 768, 12, 14, 1, True, 518, 1370)),
        ("vit_small_patch16_dinov3", 512, (12, 384, 6, 16, 5, True, 512, 1029)),
        ("vit_pe_core_base_patch16_224", 512, (12, 768, 12, 16, 1, True, 512, 1025)),
        ("vit_relpos_small_patch16_224", 250, (12, 384, 6, 16, 0, False, 256, 256)),
    ],
)
def test_describe_knows_the_tokens_of_every_family(name: str, size: int, expected: tuple[object, ...]) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    info = describe_lpm(name, size)
    found = (info.depth, info.width, info.heads, info.patch, info.prefix_tokens, info.has_class_token, info.image_size)
    assert (*found, info.tokens) == expected


@pytest.mark.slow
def test_plain_vision_transformers_of_timm_are_described_or_refused() -> None:
    described = 0
    for name in timm.list_models(module=["vision_transformer", "deit", "eva", "beit"])[::16]:
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
