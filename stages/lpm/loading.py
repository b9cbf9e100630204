"""The LPM: its shape and preprocessing at an input size, and the frozen model with its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from schemas.errors import UnsupportedModelError
from schemas.features import LpmInfo
from schemas.settings import LpmSettings
from stages.files import sha256_file
from stages.lpm.catalogue import ModelEntry, check_supported, find_model, obstacle_to_tokens
from stages.lpm.checkpoint import build_with_weights
from stages.lpm.feature_maps import map_shapes
from stages.lpm.weights import locate_weights

_INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")


@dataclass(frozen=True)
class LoadedLpm:
    """A frozen model, with its shape and the digest of its weights."""

    model: nn.Module
    """In eval mode on the CPU, no parameter requires a gradient, no classifier."""
    info: LpmInfo
    """Its shape and preprocessing."""
    weights_sha256: str
    """Sha256 of the weights file."""


def describe_lpm(name: str, image_size: int, root: Path | None = None, with_tokens: bool = True) -> LpmInfo:
    """Return shape and preprocessing of a model, without its weights.

    Args:
        name: timm model name, `hf-hub:organisation/name` or `local-dir:folder`. The name in the result has timm's
            default tag if `name` has none, and the content of a folder instead of its path.
        image_size: Side of the input, in pixels; the result has the nearest multiple of the patch, upward if two are
            equally near.
        root: Folder that a relative folder in the name starts at; None: the working directory.
        with_tokens: Whether keys, values or hidden tokens are taken from it. Without them a model that has no global
            attention is described by its feature maps.

    Raises:
        UnsupportedModelError: timm has no such name, the model has no global attention to tap or no feature maps, or it
            takes no images of this size.
        WeightsError: The `config.json` of a repository cannot be fetched.
    """
    entry = find_model(name, root)
    model: Any = entry.build_on_meta()
    if with_tokens:
        check_supported(model, name)
    preprocessing = _preprocessing(model, name)
    if not with_tokens and obstacle_to_tokens(model) is not None:
        return LpmInfo(name=entry.name, **_map_fields(entry, name, image_size), **preprocessing)
    patch = int(model.patch_embed.patch_size[0])
    return LpmInfo(
        name=entry.name,
        depth=len(model.blocks),
        width=model.embed_dim,
        heads=model.blocks[0].attn.num_heads,
        patch=patch,
        prefix_tokens=model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        image_size=nearest_multiple(image_size, patch),
        mlp_width=_mlp_width(model),
        **preprocessing,
    )


def _map_fields(entry: ModelEntry, name: str, image_size: int) -> dict[str, Any]:
    """Return the fields of the shape of a model that gives feature maps."""
    shapes = map_shapes(entry, name, image_size)
    return {
        "depth": len(shapes.widths),
        "width": shapes.pooled_width,
        "heads": 1,
        "patch": shapes.stride,
        "prefix_tokens": 0,
        "has_class_token": False,
        "image_size": shapes.image_size,
        "map_widths": shapes.widths,
    }


def _mlp_width(model: Any) -> int | None:
    """Return the width of the activations that the MLP of a block projects back."""
    projection = getattr(model.blocks[0].mlp, "fc2", None)
    return None if projection is None else int(projection.in_features)


def _preprocessing(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the fields of the preprocessing.

    Raises:
        UnsupportedModelError: Its resize has another filter than those of Pillow.
    """
    from timm import data

    tools: Any = data
    found = tools.resolve_model_data_config(model)
    if found["interpolation"] not in _INTERPOLATIONS:
        raise UnsupportedModelError(
            f"{name} resizes its input with {found['interpolation']!r}, which is not supported."
        )
    return {
        "mean": tuple(float(value) for value in found["mean"]),
        "std": tuple(float(value) for value in found["std"]),
        "interpolation": found["interpolation"],
    }


def nearest_multiple(size: int, patch: int) -> int:
    """Return the multiple of `patch` nearest to `size`, at least one patch; of two equally near ones the larger."""
    return max(1, (2 * size + patch) // (2 * patch)) * patch


def load_lpm(lpm: LpmSettings, image_size: int, root: Path, with_tokens: bool = True) -> LoadedLpm:
    """Build the frozen model with its weights.

    Args:
        lpm: Name and source of the weights; the preprocessing depends only on the name.
        image_size: Side of the input, in pixels; position embeddings are resampled to it.
        root: Folder that a relative `lpm.weights` or `local-dir:` starts at.
        with_tokens: As of `describe_lpm`.

    Raises:
        UnsupportedModelError: As for `describe_lpm`.
        WeightsError: The weights cannot be found or read, run code, or belong to another model.
    """
    info = describe_lpm(lpm.name, image_size, root, with_tokens)
    path = locate_weights(lpm, root)
    model = build_with_weights(find_model(lpm.name, root), info.image_size, path)
    return LoadedLpm(model.eval().requires_grad_(False), info, sha256_file(path))
