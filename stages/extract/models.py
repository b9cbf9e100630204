"""Which timm models can be an LPM, and what else timm knows about a name."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from schemas.errors import UnsupportedModelError

EXAMPLES = "vit_base_patch16_384.orig_in21k_ft_in1k or vit_small_patch14_dinov2.lvd142m"

_REASONS = {
    "Eva": "Its queries and keys are rotated by position (rotary embedding); that is not supported yet.",
    "Beit": "Its attention has a relative position bias that the importance of a token would have to include; "
    "that is not supported yet.",
    "VisionTransformerRelPos": "Its attention has a relative position bias that the importance of a token would have "
    "to include; that is not supported yet.",
    "VisionTransformerSAM": "Most of its blocks attend within windows: no token is seen by all queries.",
    "SwinTransformer": "Its blocks attend within windows: no token is seen by all queries.",
    "SwinTransformerV2": "Its blocks attend within windows: no token is seen by all queries.",
    "ConvNeXt": "It is a convolutional network: it has no attention, so no keys and values.",
    "ResNet": "It is a convolutional network: it has no attention, so no keys and values.",
    "NaFlexVit": "It takes images as sequences of patches of any shape; that is not supported yet.",
}
_ANY = "Keys and values are taken from attention over all tokens with one fused qkv projection in every block."


def pretrained_cfg(name: str) -> Any:
    """What timm keeps about a name: preprocessing, source of the weights, name of the classifier.

    Args:
        name: timm model name, with or without the tag of its weights.

    Returns:
        timm's `PretrainedCfg`.

    Raises:
        UnsupportedModelError: timm does not know the name, or not this tag of it; the nearest names are given.
    """
    from timm.models import get_deprecated_models, get_pretrained_cfg, is_model, list_models, split_model_name_tag

    try:
        known = get_pretrained_cfg(name) if is_model(name) else None
    except RuntimeError:  # timm's answer to a tag that it does not know
        known = None
    if known is not None:
        return known
    base, _ = split_model_name_tag(name)
    tagged = list_models(f"{base}.*", pretrained=True, include_tags=True) if is_model(base) else []
    if ":" in name or "/" in name:
        raise UnsupportedModelError(
            f"{name!r} is not a name from timm's list.",
            "Folders and repositories of the hub are not read as models.",
            "Set lpm.name to the architecture in timm, and lpm.weights to a local file of its weights.",
        )
    renamed = get_deprecated_models().get(base)
    if tagged:
        raise UnsupportedModelError(
            f"timm has no weights named {name!r}.",
            f"The tags of {base} are: {', '.join(tagged)}.",
            "Set lpm.name to one of them.",
        )
    near = [renamed] if renamed else _nearest(name, [*list_models(include_tags=True), *list_models()])
    raise UnsupportedModelError(
        f"timm knows no model named {name!r}.",
        f"{'Its name is now' if renamed else 'The nearest names are'}: {', '.join(near)}." if near else "",
        f"Set lpm.name to a plain vision transformer of timm, such as {EXAMPLES}.",
    )


def _nearest(name: str, names: list[str]) -> list[str]:
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return found or difflib.get_close_matches(name.partition(".")[0], names, n=3, cutoff=0.4)


def build_on_meta(name: str, num_classes: int = 0, **options: Any) -> nn.Module:
    """The model without weights and, where timm allows it, without memory; options are timm's."""
    import timm

    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except (NotImplementedError, RuntimeError):  # some versions of timm read a number from a tensor while building
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    return model


def check_supported(model: Any, name: str) -> None:
    """Refuse what keys and values of global attention cannot be taken from.

    Raises:
        UnsupportedModelError: With the reason.
    """
    reason = _obstacle(model)
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) cannot be the LPM.",
            reason,
            f"Set lpm.name to a plain vision transformer of timm, such as {EXAMPLES}.",
        )


def _obstacle(model: Any) -> str | None:
    from timm.models import vision_transformer

    timm: Any = vision_transformer
    if not isinstance(model, timm.VisionTransformer):
        family = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _REASONS), "")
        return _REASONS.get(family, _ANY)
    if type(model.patch_embed) is not timm.PatchEmbed:
        return "Its patches come from a convolutional network; that is not supported yet."
    height, width = model.patch_embed.patch_size
    if height != width:
        return "Its patches are not square."
    if model.patch_embed.proj.in_channels != 3:
        return "It does not take RGB images."
    for block in model.blocks:
        attention: Any = getattr(block, "attn", None)
        # Exactly this class: subclasses and look-alikes change what attention is.
        if type(attention) is not timm.Attention or not isinstance(attention.qkv, nn.Linear):
            return _ANY
        if attention.qkv.out_features != 3 * model.embed_dim or model.embed_dim % attention.num_heads:
            return "The width of its heads is not its width divided by their number."
    return None
