"""Tiny models of timm without global attention, as folders that `lpm.name: local-dir:` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

STAGES = {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "embed_dim": 24}
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "convnext": ("test_convnext", 64, {}),
    "byobnet": ("test_byobnet", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "resnet": ("test_resnet", 64, {}),
    "swin": ("swin_tiny_patch4_window7_224", 96, STAGES),
    "swinv2": ("swinv2_tiny_window8_256", 128, STAGES),
    "hiera": ("hiera_tiny_224", 224, {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1]}),
    "sam": (
        "samvit_base_patch16",
        64,
        {"embed_dim": 48, "depth": 4, "num_heads": 3, "global_attn_indexes": [1], "neck_chans": 32},
    ),
    "maxvit": ("test_maxvit", 64, {}),
    "parallel": ("vit_small_patch16_18x2_224", 64, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
}
"""Architecture, input size and arguments of a model of each kind."""


def save_model(folder: Path, family: str) -> Path:
    """Write `config.json` and `model.safetensors` with weights of which few are zero or one."""
    name, _, arguments = FAMILIES[family]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False, **arguments).state_dict()
    for key, value in state.items():
        if value.is_floating_point() and "running_var" not in key:
            value += 0.02 * torch.randn_like(value)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    cfg = {"mean": [0.5, 0.4, 0.5], "std": [0.5, 0.5, 0.4], "interpolation": "bicubic"}
    config = {"architecture": name, "pretrained_cfg": cfg, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
