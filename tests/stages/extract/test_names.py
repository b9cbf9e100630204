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
from safetensors.torch import save_file

from schemas.errors import WeightsError
from schemas.settings import LpmSettings
from stages.extract.lpm import LoadedLpm, load_lpm
from stages.extract.names import to_timm

State = dict[str, torch.Tensor]
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


def blocks(state: State, to: str, names: dict[str, str], query: str) -> State:
    """Blocks of a timm state under other names, qkv apart; `query` has {} for query, key or value."""
    out: State = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        at = to.format(number)
        if rest.startswith("attn.qkv."):
            kind = rest.rpartition(".")[2]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[f"{at}.{query.format(letter)}.{kind}"] = part.clone()
        elif rest in ("attn.q_bias", "attn.v_bias"):
            out[f"{at}.{query.format(rest[5])}.bias"] = value
        else:
            out[f"{at}.{_renamed(rest, names)}"] = value
    return out


def _renamed(rest: str, names: dict[str, str]) -> str:
    stem = max((stem for stem in names if rest.startswith(stem)), key=len)
    return names[stem] + rest.removeprefix(stem)


LEGACY = {
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
NEW = {**LEGACY, "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
DINOV2 = {
    "attn.proj": "attention.output.dense",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
CLIP = {
    "attn.proj": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
DINOV3 = {
    "attn.proj": "attention.o_proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1_x": "mlp.up_proj",
    "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1",
}


def stem(state: State, **more: str) -> State:
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        **more,
    }
    return {theirs: state[ours] for ours, theirs in names.items() if ours in state}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def hf_vit(state: State) -> State:
    query = "attention.attention.{}"
    moved = blocks(state, "encoder.layer.{}", LEGACY, query)
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        moved = {name.replace(query.format(letter) + ".", query.format(word) + "."): v for name, v in moved.items()}
    pooler = {"pooler.dense.weight": torch.randn(48, 48), "pooler.dense.bias": torch.randn(48)}
    return {**stem(state), **moved, **pooler}


def hf_vit_new(state: State) -> State:
    return {**stem(state), **blocks(state, "layers.{}", NEW, "attention.{}_proj")}


def hf_classifier(state: State) -> State:
    head = {"classifier.weight": torch.randn(7, 48), "classifier.bias": torch.randn(7)}
    return {**prefixed(hf_vit_new(state), "vit."), **head}


def hf_deit(state: State) -> State:
    token = {"embeddings.distillation_token": state["dist_token"]}
    return prefixed({**hf_vit(state), **token}, "deit.")


def hf_mae(state: State) -> State:
    decoder = {"decoder.mask_token": torch.randn(1, 1, 24), "decoder.decoder_pos_embed": torch.randn(1, 17, 24)}
    return {**prefixed(hf_vit_new(state), "vit."), **decoder}


def hf_dinov2(state: State) -> State:
    moved = blocks(state, "encoder.layer.{}", DINOV2, "attention.{}_proj")
    return {**stem(state), **moved, "embeddings.mask_token": torch.randn(1, 48)}


def hf_rad_dino(state: State) -> State:
    """As older versions of transformers write it: query, key, value; the file of RAD-DINO is one of them."""
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    out = {}
    for name, value in hf_dinov2(state).items():
        for new, old in names.items():
            name = name.replace(f"attention.{new}", f"attention.{old}")
        out[name] = value
    return out


def hf_dinov2_registers(state: State) -> State:
    first = torch.randn(1, 1, 48)
    moved = {
        **state,
        "cls_token": state["cls_token"] - first,
        "pos_embed": torch.cat([first, state["pos_embed"]], dim=1),
    }
    return {**hf_dinov2(moved), "embeddings.register_tokens": state["reg_token"]}


def hf_dinov2_swiglu(state: State) -> State:
    return {name.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out"): v
            for name, v in hf_dinov2(state).items()}  # fmt: skip


def hf_dinov2_gated(state: State) -> State:
    out = {}
    for name, value in hf_dinov2(state).items():
        if "mlp.fc1" in name:
            gate, up = value.chunk(2)
            out |= {name.replace("fc1", "gate_proj"): gate.clone(), name.replace("fc1", "up_proj"): up.clone()}
        else:
            out[name.replace("mlp.fc2", "mlp.down_proj")] = value
    return out


def hf_clip(state: State) -> State:
    moved = {
        "embeddings.class_embedding": state["cls_token"].flatten(),
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "embeddings.position_ids": torch.arange(17).unsqueeze(0),
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "pre_layrnorm.weight": state["norm_pre.weight"],
        "pre_layrnorm.bias": state["norm_pre.bias"],
        "post_layernorm.weight": state["norm.weight"],
        "post_layernorm.bias": state["norm.bias"],
        **blocks(state, "encoder.layers.{}", CLIP, "self_attn.{}_proj"),
    }
    towers = {"text_model.embeddings.token_embedding.weight": torch.randn(9, 5), "logit_scale": torch.tensor(1.0)}
    return {**prefixed(moved, "vision_model."), **towers, "visual_projection.weight": torch.randn(5, 48)}


def hf_siglip(state: State) -> State:
    pool = {
        "head.probe": state["attn_pool.latent"],
        "head.attention.in_proj_weight": torch.cat([state["attn_pool.q.weight"], state["attn_pool.kv.weight"]]),
        "head.attention.in_proj_bias": torch.cat([state["attn_pool.q.bias"], state["attn_pool.kv.bias"]]),
    }
    for ours, theirs in (("proj", "attention.out_proj"), ("norm", "layernorm"), ("mlp.fc1", "mlp.fc1")):
        pool |= {f"head.{theirs}.{kind}": state[f"attn_pool.{ours}.{kind}"] for kind in ("weight", "bias")}
    pool |= {f"head.mlp.fc2.{kind}": state[f"attn_pool.mlp.fc2.{kind}"] for kind in ("weight", "bias")}
    moved = {
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": state["patch_embed.proj.bias"],
        "post_layernorm.weight": state["norm.weight"],
        "post_layernorm.bias": state["norm.bias"],
        **blocks(state, "encoder.layers.{}", CLIP, "self_attn.{}_proj"),
        **pool,
    }
    return {**prefixed(moved, "vision_model."), "logit_bias": torch.tensor(1.0)}


def hf_dinov3(state: State) -> State:
    moved = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.randn(1, 1, 48),
        "embeddings.register_tokens": state["reg_token"],
        "embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": state["patch_embed.proj.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
        **blocks(state, "layer.{}", DINOV3, "attention.{}_proj"),
    }
    for number in range(2):
        # The published distilled models have biases in the file, all of them zero.
        for letter in "qv":
            moved.setdefault(f"layer.{number}.attention.{letter}_proj.bias", torch.zeros(48))
    return moved


TRANSFORMERS: dict[str, tuple[Callable[[State], State], str, dict[str, Any]]] = {
    "vit": (hf_vit, "vit_base_patch16_224", {}),
    "vit, new names": (hf_vit_new, "vit_base_patch16_224", {}),
    "vit with a classifier": (hf_classifier, "vit_base_patch16_224", {}),
    "deit": (hf_deit, "deit_base_distilled_patch16_224", {}),
    "mae": (hf_mae, "vit_base_patch16_224", {}),
    "dinov2": (hf_dinov2, "vit_base_patch14_dinov2", {}),
    "rad-dino": (hf_rad_dino, "vit_base_patch14_dinov2", {}),
    "dinov2 with registers": (hf_dinov2_registers, "vit_base_patch14_reg4_dinov2", {}),
    "dinov2 giant": (hf_dinov2_swiglu, "vit_giant_patch14_dinov2", {}),
    "dinov2 giant, new names": (hf_dinov2_gated, "vit_giant_patch14_dinov2", {}),
    "clip": (hf_clip, "vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": (hf_siglip, "vit_base_patch16_siglip_224", {}),
    "siglip without pool": (hf_siglip, "vit_base_patch16_siglip_gap_224", {}),
    "dinov3": (hf_dinov3, "vit_base_patch16_dinov3", {}),
    "dinov3 with biases": (hf_dinov3, "vit_base_patch16_dinov3_qkvb", {}),
    "dinov3, gated": (hf_dinov3, "vit_huge_plus_patch16_dinov3_qkvb", {"swiglu_align_to": 16}),
}


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
