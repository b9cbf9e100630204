"""Files under other names than timm's: written out by hand here, loaded through the front door."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from layouts import TRANSFORMERS, State, hf_dinov2, hf_dinov3, hf_vit, prefixed
from safetensors.torch import save_file

from schemas.errors import WeightsError
from schemas.settings import LpmSettings
from stages.lpm.key_map import to_timm
from stages.lpm.loading import LoadedLpm, load_lpm

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SIZE = {14: 56, 16: 64}


def config(folder: Path, architecture: str, **args: Any) -> str:
    """A folder with timm's `config.json` of a tiny model; its name."""
    folder.mkdir(exist_ok=True)
    content = {
        "architecture": architecture,
        "pretrained_cfg": {"mean": [0.53, 0.53, 0.53], "std": [0.26, 0.26, 0.26], "interpolation": "bilinear"},
        "model_args": {**TINY, **args},
    }
    (folder / "config.json").write_text(json.dumps(content))
    return f"local-dir:{folder}"


def reference(architecture: str, **args: Any) -> Any:
    if not timm.is_model(architecture):
        pytest.skip(f"this timm has no {architecture}")
    torch.manual_seed(0)
    size = SIZE[14 if "patch14" in architecture else 16]
    model = timm.create_model(architecture, num_classes=0, img_size=size, **{**TINY, **args}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.1)
    return model


def load(name: str, path: Path, size: int) -> LoadedLpm:
    return load_lpm(LpmSettings(name=name, weights=str(path)), size, Path("/nowhere"))


@pytest.mark.parametrize("layout", TRANSFORMERS)
def test_transformers_names_become_timms(layout: str, tmp_path: Path) -> None:
    theirs, architecture, args = TRANSFORMERS[layout]
    model = reference(architecture, **args)
    full = reference("vit_base_patch16_siglip_224") if "siglip" in layout else model
    save_file({k: v.contiguous() for k, v in theirs(full.state_dict()).items()}, tmp_path / "w.safetensors")
    size = SIZE[14 if "patch14" in architecture else 16]
    loaded = load(config(tmp_path / "c", architecture, **args), tmp_path / "w.safetensors", size)
    mine, expected = loaded.model.state_dict(), (full if "siglip" in layout else model).state_dict()
    assert set(mine) <= set(expected)
    assert set(expected) - set(mine) == {name for name in expected if "attn_pool" in name and "gap" in architecture}
    for name, value in mine.items():
        torch.testing.assert_close(value, expected[name], msg=f"{name} differs")
    assert "state_dict" not in loaded.model.pretrained_cfg  # type: ignore[operator]


@pytest.mark.parametrize("layout", TRANSFORMERS)
def test_a_tensor_too_few_or_too_many_is_refused(layout: str, tmp_path: Path) -> None:
    theirs, architecture, args = TRANSFORMERS[layout]
    full = reference("vit_base_patch16_siglip_224" if "siglip" in layout else architecture, **args)
    weights = {k: v.contiguous() for k, v in theirs(full.state_dict()).items()}
    name, path = config(tmp_path / "c", architecture, **args), tmp_path / "w.safetensors"
    size = SIZE[14 if "patch14" in architecture else 16]
    norm = next(key for key in weights if ".1." in key and "norm1.weight" in key.replace("layernorm_before", "norm1")
                .replace("layer_norm1", "norm1"))  # fmt: skip
    save_file({key: value for key, value in weights.items() if key != norm}, path)
    with pytest.raises(WeightsError, match=r"not in the file: blocks\.1\.norm1\.weight"):
        load(name, path, size)
    save_file({**weights, norm.replace("weight", "surplus"): torch.ones(48)}, path)
    with pytest.raises(WeightsError, match=r"not in the model: blocks\.1\.norm1\.surplus"):
        load(name, path, size)


def mae(state: State) -> State:
    """MAE and RETFound before fine-tuning: the encoder, and a decoder beside it."""
    return {
        **state,
        "mask_token": torch.randn(1, 1, 24),
        "decoder_pos_embed": torch.randn(1, 17, 24),
        "decoder_embed.weight": torch.randn(24, 48),
        "decoder_blocks.0.norm1.weight": torch.randn(24),
        "decoder_pred.weight": torch.randn(9, 24),
    }


def chunked(state: State) -> State:
    """DINOv2's own training code: chunks of blocks, in which the inner number goes on counting."""
    out = {}
    for name, value in state.items():
        _, number, *rest = name.split(".") if name.startswith("blocks.") else ("", "")
        out[f"blocks.{int(number) // 1}.{number}.{'.'.join(rest)}" if number else name] = value
    return out


ORIGINAL: dict[str, tuple[str, Callable[[State], Any]]] = {
    "mae": ("vit_base_patch16_224", lambda s: {"model": mae(s), "optimizer": {"state": {}}, "args": Namespace(lr=1)}),
    "retfound, fine-tuned": (
        "vit_base_patch16_224",
        lambda s: {
            "model": {
                **{name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v for name, v in s.items()},
                "head.weight": torch.randn(5, 48),
                "head.bias": torch.randn(5),
            },
            "epoch": 3,
        },
    ),
    "dino": (
        "vit_base_patch16_224",
        lambda s: {
            "student": {f"module.backbone.{name}": v + 1 for name, v in s.items()},
            "teacher": {**prefixed(s, "backbone."), "head.mlp.0.weight": torch.randn(8, 48)},
            "dino_loss": {"center": torch.zeros(1, 8)},
            "epoch": 3,
        },
    ),
    "dinov2": (
        "vit_base_patch14_dinov2",
        lambda s: {
            "teacher": {
                **prefixed(chunked({**s, "mask_token": torch.randn(1, 48)}), "backbone."),
                "dino_head.mlp.0.weight": torch.randn(8, 48),
                "ibot_head.mlp.0.weight": torch.randn(8, 48),
            }
        },
    ),
    "dinov2, flat": (
        "vit_base_patch14_dinov2",
        lambda s: {
            "model": {
                **prefixed(chunked(s), "teacher.backbone."),
                **prefixed(chunked(s), "student.backbone."),
                "teacher.dino_head.last_layer.weight_g": torch.randn(8, 1),
            }
        },
    ),
    "uni": ("vit_base_patch16_224", lambda s: s),
}


@pytest.mark.parametrize("layout", ORIGINAL)
def test_training_checkpoints_give_their_encoder(layout: str, tmp_path: Path) -> None:
    architecture, wrapped = ORIGINAL[layout]
    model = reference(architecture, **({"init_values": 0.1} if layout == "uni" else {}))
    torch.save(wrapped(model.state_dict()), tmp_path / "w.pth")
    size = SIZE[14 if "patch14" in architecture else 16]
    loaded = load(config(tmp_path / "c", architecture), tmp_path / "w.pth", size)
    mine, expected = loaded.model.state_dict(), model.state_dict()
    assert set(mine) == set(expected)
    for name, value in mine.items():
        torch.testing.assert_close(value, expected[name], msg=f"{name} differs")


@pytest.mark.parametrize("layout", ORIGINAL)
def test_training_checkpoints_with_a_tensor_too_few_are_refused(layout: str, tmp_path: Path) -> None:
    architecture, wrapped = ORIGINAL[layout]
    state = reference(architecture, **({"init_values": 0.1} if layout == "uni" else {})).state_dict()
    del state["blocks.1.mlp.fc1.bias"]
    torch.save(wrapped(state), tmp_path / "w.pth")
    size = SIZE[14 if "patch14" in architecture else 16]
    with pytest.raises(WeightsError, match=r"not in the file: blocks\.1\.mlp\.fc1\.bias"):
        load(config(tmp_path / "c", architecture), tmp_path / "w.pth", size)


def test_positions_of_renamed_weights_are_resampled(tmp_path: Path) -> None:
    model = reference("vit_base_patch14_dinov2")
    save_file(hf_dinov2(model.state_dict()), tmp_path / "w.safetensors")
    loaded = load(config(tmp_path / "c", "vit_base_patch14_dinov2"), tmp_path / "w.safetensors", 100)
    assert loaded.info.image_size == 98
    features: Any = loaded.model
    assert features.forward_features(torch.rand(1, 3, 98, 98)).shape == (1, 50, 48)


def test_biases_that_the_model_has_no_place_for_are_refused_unless_they_are_zero(tmp_path: Path) -> None:
    weights = hf_dinov3(reference("vit_base_patch16_dinov3_qkvb").state_dict())
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not in the model: blocks\.0\.attn\.q_bias"):
        load(config(tmp_path / "c", "vit_base_patch16_dinov3"), tmp_path / "w.safetensors", 64)


def test_a_bias_of_keys_is_not_lost(tmp_path: Path) -> None:
    weights = hf_dinov3(reference("vit_base_patch16_dinov3_qkvb").state_dict())
    weights["layer.1.attention.k_proj.bias"] = torch.ones(48)
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not in the model: blocks\.1\.attn\.k_bias"):
        load(config(tmp_path / "c", "vit_base_patch16_dinov3_qkvb"), tmp_path / "w.safetensors", 64)


def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    weights = hf_vit(reference("vit_base_patch16_224").state_dict())
    del weights["encoder.layer.1.attention.attention.key.weight"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\. lacks a projection"):
        load(config(tmp_path / "c", "vit_base_patch16_224"), tmp_path / "w.safetensors", 64)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    state = reference("vit_base_patch16_224").state_dict()
    weights = {**prefixed(state, "backbone."), "norm.weight": torch.ones(48)}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"two tensors are both norm\.weight"):
        load(config(tmp_path / "c", "vit_base_patch16_224"), tmp_path / "w.safetensors", 64)


def test_what_lies_beside_the_backbone_is_refused_unless_it_is_known(tmp_path: Path) -> None:
    state = reference("vit_base_patch16_224").state_dict()
    save_file({**prefixed(state, "backbone."), "neck.conv.weight": torch.ones(4)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not in the model: neck\.conv\.weight"):
        load(config(tmp_path / "c", "vit_base_patch16_224"), tmp_path / "w.safetensors", 64)


def test_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    save_file(hf_vit(reference("vit_base_patch16_224", embed_dim=96).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"other shapes: cls_token is \(1, 1, 96\), not \(1, 1, 48\)"):
        load(config(tmp_path / "c", "vit_base_patch16_224"), tmp_path / "w.safetensors", 64)


def test_a_siglip_without_pool_takes_no_other_surplus(tmp_path: Path) -> None:
    state = reference("vit_base_patch16_siglip_224").state_dict()
    name = config(tmp_path / "c", "vit_base_patch16_siglip_gap_224")
    save_file(state, tmp_path / "w.safetensors")
    load(name, tmp_path / "w.safetensors", 64)
    save_file({**state, "blocks.2.norm1.weight": torch.ones(48)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not in the model: blocks\.2\.norm1\.weight"):
        load(name, tmp_path / "w.safetensors", 64)


def test_queries_keys_and_values_stay_apart_where_the_model_has_them_so() -> None:
    state = {"patch_embed.proj.weight": torch.zeros(1), "cls_token": torch.zeros(1, 1, 4)}
    parts = {f"encoder.layer.0.attention.{part}_proj.weight": torch.randn(4, 4) for part in "qkv"}
    stem_ = {"embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"]}
    found = to_timm({**stem_, **parts}, {f"blocks.0.attn.{part}_proj.weight" for part in "qkv"})
    for part in "qkv":
        assert found[f"blocks.0.attn.{part}_proj.weight"] is parts[f"encoder.layer.0.attention.{part}_proj.weight"]
