"""Translate the names of tensors in weights files to timm's names.

A checkpoint is translated in three steps:

1. `PREFIXES`: the backbone within a training checkpoint or a larger model.
2. `RULES`: one name for another, for the original DINO, DINOv2 and MAE code and for Hugging Face transformers.
3. `_Fit`: tensors that are fused on one side and separate on the other (queries, keys and values; gated MLPs;
   registers).

Only tensors that `IGNORED` lists are left out; every other tensor keeps a name, and a name that the model does not
have is an error when the weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch

State = dict[str, torch.Tensor]

PREFIXES = (
    "teacher.backbone.",
    "teacher.module.backbone.",
    "teacher.",
    "backbone.",
    "dinov2_with_registers.",
    "dinov2.",
    "dinov3_vit.",
    "dinov3.",
    "vit.",
    "deit.",
    "vision_model.",
    "vision_tower.vision_model.",
    "",
)
"""Prefixes of a backbone's names; the teacher comes before the student."""

IGNORED = (
    r"mask_token",
    r"decoder(_\w+)?(\..*)?",  # MAE's decoder, with its position embedding
    r"(head|head_dist|classifier|cls_classifier|distillation_classifier|pooler)\..*",
    r"(dino|ibot|teacher|student|optimizer)\w*\..*",  # heads, losses and the other network next to the teacher
    r"text_model\..*",
    r"(visual|text)_projection\.weight",
    r"logit_scale|logit_bias",
    r"(.*\.)?position_ids",
    r"(.*\.)?rope_embed(dings)?\.(periods|inv_freq)",  # fixed, computed from the size of the input
)
"""Tensors that stage one never reads: regular expressions of the full name, with or without the prefix."""

_STEM = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
)
"""Names of the patch projection, which locate the backbone; all but the first are transformers' names."""

_RULES_ORIGINAL = (
    (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 in chunks: the inner number counts all blocks
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
)
_RULES_TRANSFORMERS = (
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embedding(s|s\.projection)?\.(weight|bias)$", r"patch_embed.proj.\2"),
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.(attention|self_attn)\.([qkv])_proj\.", r".attn.\2."),
    (r"\.attn\.(q|k|v)(uery|ey|alue)\.", r".attn.\1."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^pre_layrnorm\.", "norm_pre."),  # as transformers spells it
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.(in_proj_\w+)$", r"attn_pool.\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)


def is_foreign(names: Collection[str], expected: Collection[str]) -> bool:
    """Return whether a file with these names must go through `to_timm`, because timm cannot read it by itself."""
    prefix, transformers = _layout(names)
    if prefix is None:
        return False
    if prefix or transformers:
        return True
    fits = set(expected)
    chunked = any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names)
    decoder = any(name.startswith("decoder") for name in names)
    other_norm = ("norm.weight" in names) != ("norm.weight" in fits) and "fc_norm.weight" in fits | set(names)
    return chunked or decoder or (other_norm and "mask_token" not in names)


def to_timm(state: Mapping[str, torch.Tensor], expected: Collection[str]) -> State:
    """Rename, fuse and split until the names are those of the model.

    Args:
        state: All tensors of the file.
        expected: Names of the model's tensors.

    Returns:
        New names -> tensors; names that the model lacks stay, so that loading refuses them.

    Raises:
        ValueError: Two tensors get one name, or parts of a fused tensor are missing.
    """
    prefix, transformers = _layout(state)
    rules = _RULES_TRANSFORMERS if transformers else _RULES_ORIGINAL
    renamed: State = {}
    for name, value in state.items():
        inner = name.removeprefix(prefix or "")
        if (prefix and not name.startswith(prefix)) and _ignored(name):
            continue
        for pattern, target in rules:
            inner = re.sub(pattern, target, inner)
        if inner in renamed:
            raise ValueError(f"two tensors are both {inner}: {name} is the second")
        if not _ignored(inner):
            renamed[inner] = value
    return _Fit(renamed, set(expected)).state


def _layout(names: Collection[str]) -> tuple[str | None, bool]:
    """Return the backbone's prefix (None: the file has no ViT) and whether the names are transformers'."""
    for prefix in PREFIXES:
        for position, stem in enumerate(_STEM):
            if prefix + stem in names:
                return prefix, position > 0
    return None, False


def _ignored(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in IGNORED)


class _Fit:
    """Tensors with timm's names, split and fused as in this model."""

    def __init__(self, state: State, expected: set[str]) -> None:
        self.state, self._expected = state, expected
        self._tokens()
        blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        for block in sorted(blocks):
            self._attention(f"blocks.{block}.attn.")
            self._gated_mlp(f"blocks.{block}.mlp.")
            for scale in (1, 2):
                self._move(f"blocks.{block}.ls{scale}.gamma", f"blocks.{block}.gamma_{scale}")
        self._pool()
        for kind in ("weight", "bias"):
            # Averaging models normalise after the average, others before; the parameters are the same.
            self._move(f"norm.{kind}", f"fc_norm.{kind}")
            self._move(f"fc_norm.{kind}", f"norm.{kind}")

    def _move(self, old: str, new: str) -> None:
        """Rename a tensor if the model has the new name and not the old one."""
        if old in self.state and old not in self._expected and new in self._expected:
            self.state[new] = self.state.pop(old)

    def _take(self, names: Iterable[str]) -> list[torch.Tensor | None]:
        return [self.state.pop(name, None) for name in names]

    def _tokens(self) -> None:
        state = self.state
        if "cls_token" in state:
            state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
        if "pos_embed" in state and state["pos_embed"].dim() == 2:
            state["pos_embed"] = state["pos_embed"].unsqueeze(0)
        if {"reg_token", "cls_token", "pos_embed"} <= state.keys():
            # DINOv2 adds the first position to the class token and none to the registers; timm has that sum.
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]

    def _attention(self, at: str) -> None:
        projections = [f"{at}{letter}" for letter in "qkv"]
        if f"{projections[0]}.weight" not in self.state:
            return
        if f"{at}q_proj.weight" in self._expected:
            for name in projections:
                for kind in ("weight", "bias"):
                    self._move(f"{name}.{kind}", f"{name}_proj.{kind}")
            return
        weights = [value for value in self._take(f"{name}.weight" for name in projections) if value is not None]
        if len(weights) != len(projections):
            raise ValueError(f"{at} lacks a projection of queries, keys or values")
        self.state[f"{at}qkv.weight"] = torch.cat(weights)
        query, key, value = self._take(f"{name}.bias" for name in projections)
        if query is None or value is None:
            return
        if f"{at}qkv.bias" in self._expected:
            self.state[f"{at}qkv.bias"] = torch.cat([query, torch.zeros_like(query) if key is None else key, value])
        elif f"{at}q_bias" in self._expected or any(bool(bias.any()) for bias in (query, value)):
            self.state |= {f"{at}q_bias": query, f"{at}v_bias": value}
            # Such a model has no bias of keys: one that is not zero keeps its name, so that loading refuses it.
            if key is not None and bool(key.any()):
                self.state[f"{at}k_bias"] = key

    def _gated_mlp(self, at: str) -> None:
        for kind in ("weight", "bias"):
            gate, up = self._take([f"{at}gate_proj.{kind}", f"{at}up_proj.{kind}"])
            if up is None:
                continue
            if gate is None:
                self.state[f"{at}fc1.{kind}"] = up
            elif f"{at}fc1_g.{kind}" in self._expected:
                self.state |= {f"{at}fc1_g.{kind}": gate, f"{at}fc1_x.{kind}": up}
            else:
                self.state[f"{at}fc1.{kind}"] = torch.cat([gate, up])

    def _pool(self) -> None:
        """Rename SigLIP's attention pool, or drop it if the model has none: stage one does not run it."""
        if "attn_pool.latent" not in self._expected:
            for name in [name for name in self.state if name.startswith("attn_pool.")]:
                del self.state[name]
            return
        for kind in ("weight", "bias"):
            (fused,) = self._take([f"attn_pool.in_proj_{kind}"])
            if fused is not None:
                third = len(fused) // 3
                self.state |= {f"attn_pool.q.{kind}": fused[:third], f"attn_pool.kv.{kind}": fused[third:]}
