"""LPMs that give feature maps: described, loaded and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from map_models import FAMILIES, save_model
from safetensors.torch import load_file, save_file

from schemas.errors import UnsupportedModelError, WeightsError
from schemas.settings import LpmSettings
from stages.lpm import feature_maps
from stages.lpm.loading import describe_lpm, load_lpm

WIDTHS = {
    "convnext": ((24, 32, 48, 64), 64),
    "byobnet": ((24, 32, 64, 128, 256), 256),
    "efficientnet": ((16, 24, 32, 48, 64), 256),
    "swin": ((24, 48, 96, 192), 192),
    "hiera": ((16, 32, 64, 128), 128),
    "sam": ((48,) * 4, 32),
    "parallel": ((48,) * 2, 48),
}


@pytest.mark.parametrize("family", WIDTHS)
def test_describe_lists_the_width_of_every_map(tmp_path: Path, family: str) -> None:
    folder, size = save_model(tmp_path, family), FAMILIES[family][1]
    info = describe_lpm(f"local-dir:{folder}", size, with_tokens=False)
    assert (info.map_widths, info.width) == WIDTHS[family]
    assert (info.depth, info.heads, info.has_class_token) == (len(info.map_widths), 1, False)
    assert (info.image_size, info.mean, info.interpolation) == (size, (0.5, 0.4, 0.5), "bicubic")
    assert info.mlp_width is None


def test_a_plain_vision_transformer_is_described_as_before() -> None:
    assert describe_lpm("test_vit", 64, with_tokens=False) == describe_lpm("test_vit", 64)
    assert describe_lpm("test_vit", 64).map_widths == ()


@pytest.mark.parametrize(("name", "size", "nearest"), [("test_convnext", 100, 96), ("samvit_base_patch16", 100, 96)])
def test_the_size_moves_to_the_grid_of_the_coarsest_map(name: str, size: int, nearest: int) -> None:
    assert describe_lpm(name, size, with_tokens=False).image_size == nearest


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "resnet18"])
def test_with_tokens_the_message_names_the_setting_that_opens_it(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"features\.tokens=false[\s\S]*\(statistics, .*linear, knn"):
        describe_lpm(name, 224)


def test_a_model_without_feature_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.convnext import ConvNeXt

    monkeypatch.delattr(ConvNeXt, "forward_intermediates")
    with pytest.raises(UnsupportedModelError, match=r"no forward_intermediates\)\.\nInstall a newer timm"):
        describe_lpm("test_convnext", 64, with_tokens=False)
    with pytest.raises(UnsupportedModelError) as refused:
        describe_lpm("test_convnext", 64)
    assert "features.tokens" not in str(refused.value)


def test_a_size_that_the_model_does_not_take_is_refused() -> None:
    from timm.models.inception_v3 import InceptionV3

    if not hasattr(InceptionV3, "forward_intermediates"):
        pytest.skip("this timm has no feature maps of inception_v3")
    with pytest.raises(UnsupportedModelError, match=r"no images of 32 pixels[\s\S]*features\.image_size to 299"):
        describe_lpm("inception_v3", 32, with_tokens=False)


@pytest.mark.parametrize("family", ["byobnet", "swin", "sam"])
def test_the_weights_are_those_of_the_file(tmp_path: Path, family: str) -> None:
    folder, size = save_model(tmp_path, family), FAMILIES[family][1]
    lpm = load_lpm(LpmSettings(name=f"local-dir:{folder}"), size, tmp_path, with_tokens=False)
    state, file = lpm.model.state_dict(), load_file(folder / "model.safetensors")
    compared = [key for key in state if key in file and state[key].shape == file[key].shape]
    assert len(compared) > 0.8 * len(state)
    assert all(torch.equal(state[key], file[key]) for key in compared)


def test_a_file_with_another_or_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "convnext")
    state = load_file(folder / "model.safetensors")
    key = next(iter(state))
    for changed in ({**state, "other": torch.zeros(1)}, {k: v for k, v in state.items() if k != key}):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(WeightsError, match="are not those of"):
            load_lpm(LpmSettings(name=f"local-dir:{folder}"), 64, tmp_path, with_tokens=False)


def test_tables_of_positions_that_timm_does_not_resample_name_the_size_that_fits(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "hiera")
    with pytest.raises(WeightsError, match=r"only at 224 pixels, not at 64\.[\s\S]*features\.image_size to 224"):
        load_lpm(LpmSettings(name=f"local-dir:{folder}"), 64, tmp_path, with_tokens=False)


def test_the_operations_of_a_pass_are_counted() -> None:
    from stages.lpm.catalogue import find_model

    counted = feature_maps.map_operations(find_model("test_resnet"), 64)
    model: Any = timm.create_model("test_resnet", num_classes=0)
    convolutions = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda one, _inputs, output: convolutions.append(
                    2 * output[0].numel() * one.weight[0].numel()  # multiplications and additions
                )
            )
    model(torch.zeros(1, 3, 64, 64))
    assert counted == pytest.approx(sum(convolutions), rel=0.01)
