"""Weights of timm's models written out under the names of transformers, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

State = dict[str, torch.Tensor]


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
