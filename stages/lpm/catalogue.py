"""Models that can be an LPM: names from timm's list, repositories of the hub, and folders."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from schemas.base import digest
from schemas.errors import UnsupportedModelError
from schemas.methods import METHODS
from stages.files import read_small
from stages.lpm.attention import obstacle
from stages.lpm.feature_maps import gives_maps
from stages.lpm.hub import fetch
from stages.vision import compiler_left_out

EXAMPLES = "vit_base_patch16_384.orig_in21k_ft_in1k or vit_small_patch14_dinov2.lvd142m"
WORKS = "ViT, DeiT, MAE, DINO, DINOv2, CLIP, SigLIP, BEiT, EVA, EVA-02, DINOv3, RoPE-ViT, PE"

_WINDOWS = "Its blocks attend within windows: no token is seen by all queries."
_NO_ATTENTION = "It is a convolutional network: it has no attention, so no keys and values."
_REASONS = {
    "VisionTransformerSAM": "Most of its blocks attend within windows: no token is seen by all queries.",
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "MaxxVit": "Its blocks attend within windows and grids: no token is seen by all queries.",
    "Hiera": "It halves its tokens from stage to stage, and most blocks attend within units.",
    "MultiScaleVit": "It pools keys and values: they belong to no token.",
    "Xcit": "Its attention is between channels, not between tokens.",
    "ConvNeXt": _NO_ATTENTION,
    "ResNet": _NO_ATTENTION,
    "EfficientNet": _NO_ATTENTION,
    "NaFlexVit": "It takes images as sequences of patches of any shape; that is not supported.",
}
_ANY = "Its blocks do not attend over all tokens of a plain vision transformer."
_BLOCKS = {
    "ParallelThingsBlock": "Its blocks hold several attentions side by side.",
    "ParallelScalingBlock": "Attention and MLP of its blocks share one projection.",
    "DiffParallelScalingBlock": "Attention and MLP of its blocks share one projection.",
}
_SET_BY_STUDY = ("img_size", "num_classes", "pretrained", "pretrained_cfg")
"""Arguments of a configuration that a study sets itself."""


@dataclass(frozen=True)
class ModelEntry:
    """An architecture and the source of its weights."""

    name: str
    """Name in results and fingerprints: with tag, never a path."""
    architecture: str
    """Argument of `timm.create_model`; with the tag, if the name is from timm's list."""
    cfg: Any
    """timm's `PretrainedCfg`: preprocessing, source of the weights, name of the classifier."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture, from a `config.json`."""
    folder: Path | None = None
    """Folder of the weights, for `local-dir:`."""
    is_repository: bool = False
    """Whether the name is `hf-hub:`."""

    def build(self, num_classes: int = 0, **options: Any) -> nn.Module:
        """Build timm's model; `options` are timm's and override those of the configuration.

        Raises:
            UnsupportedModelError: The architecture does not accept the arguments of the configuration.
        """
        import timm

        arguments: dict[str, Any] = {**self.args, **options}
        if self.folder is not None or self.is_repository:
            arguments["pretrained_cfg"] = self.cfg.to_dict()
        try:
            model: nn.Module = timm.create_model(self.architecture, num_classes=num_classes, **arguments)
        except (TypeError, AssertionError) as error:
            if not self.args:
                raise
            raise UnsupportedModelError(
                f"{self.architecture} cannot be built with the model_args of its config.json.",
                f"{self.args}: {type(error).__name__}: {error}",
                "Correct the config.json.",
            ) from error
        return model

    def build_on_meta(self, num_classes: int = 0, **options: Any) -> nn.Module:
        """Build the model without weights and, if timm allows it, without memory."""
        try:
            with torch.device("meta"), _NoInitialisation():
                return self.build(num_classes, pretrained=False, **options)
        except (NotImplementedError, RuntimeError):  # some versions of timm read a number from a tensor while building
            return self.build(num_classes, pretrained=False, **options)


class _NoInitialisation(TorchFunctionMode):
    """Skip the steps of a random initialisation for which torch imports its compiler on the meta device."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func in _STEPS or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else keywords["tensor"]
        return func(*args, **keywords)


_STEPS = (torch.Tensor.erfinv_, torch.Tensor.clamp_, torch.Tensor.normal_, torch.Tensor.uniform_)


def find_model(name: str, root: Path | None = None) -> ModelEntry:
    """Return the architecture and the source of the weights that `lpm.name` stands for.

    Args:
        name: A name from timm's list, with or without the tag of its weights; `hf-hub:organisation/name` (also with
            `@revision`); or `local-dir:folder`. The last two need a `config.json` in timm's format.
        root: Folder that a relative folder starts at; None: the working directory.

    Raises:
        UnsupportedModelError: No such model exists (the nearest names are listed), or no usable `config.json`.
        WeightsError: The `config.json` of the repository cannot be fetched.
        StorageError: The hub's cache cannot be written.
    """
    with compiler_left_out():
        import timm  # noqa: F401  (any part of it that is used below)
    source, colon, place = name.partition(":")
    if colon and source in ("hf-hub", "hf_hub"):
        path = fetch(place, ["config.json"], f"The settings of {name}", f"set lpm.name to {EXAMPLES}")
        architecture, cfg, args = _read_config(path, name)
        cfg = dataclasses.replace(cfg, hf_hub_id=place)
        return ModelEntry(f"hf-hub:{place}", architecture, cfg, args, is_repository=True)
    if colon and source == "local-dir":
        folder = (root or Path()) / Path(place).expanduser()
        architecture, cfg, args = _read_config(folder / "config.json", name)
        content = digest({"architecture": architecture, "args": args})[:8]
        return ModelEntry(f"local-dir:{architecture}@{content}", architecture, cfg, args, folder=folder)
    cfg = pretrained_cfg(name)
    full = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture or name
    return ModelEntry(full, full, cfg)


def _read_config(path: Path, name: str) -> tuple[str, Any, dict[str, Any]]:
    """Read architecture, `PretrainedCfg` and arguments from a `config.json` as timm writes it."""
    from timm.models import PretrainedCfg, get_pretrained_cfg, is_model

    repair = (
        "Set lpm.name to the architecture in timm and lpm.weights to the file, or write a config.json with "
        '"architecture", "pretrained_cfg" (mean, std, interpolation) and "model_args".'
    )
    try:
        content = json.loads(read_small(path, 2**20))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{name} has no readable config.json.", f"{path}: {type(error).__name__}: {error}", repair
        ) from error
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or not is_model(architecture):
        is_transformers = isinstance(content, dict) and "model_type" in content
        raise UnsupportedModelError(
            f"The config.json of {name} names no architecture of timm.",
            "It is the one of Hugging Face transformers." if is_transformers else f"architecture is {architecture!r}.",
            repair,
        )
    values = content.get("pretrained_cfg", content)
    fields = {item.name for item in dataclasses.fields(PretrainedCfg)} - {"source", "file", "url", "state_dict"}
    default: Any = get_pretrained_cfg(architecture)
    cfg = {"classifier": default.classifier, "first_conv": default.first_conv} if default is not None else {}
    cfg |= {key: value for key, value in values.items() if key in fields} | {"architecture": architecture}
    args = {key: value for key, value in content.get("model_args", {}).items() if key not in _SET_BY_STUDY}
    return architecture, PretrainedCfg(**cfg), args


def pretrained_cfg(name: str) -> Any:
    """Return timm's entry of a name: preprocessing, source of the weights, name of the classifier.

    Args:
        name: timm model name, with or without the tag of its weights.

    Returns:
        timm's `PretrainedCfg`.

    Raises:
        UnsupportedModelError: timm has no such name, or not with this tag; the nearest names are listed.
    """
    with compiler_left_out():
        from timm.models import get_deprecated_models, get_pretrained_cfg, is_model, list_models, split_model_name_tag

    try:
        cfg = get_pretrained_cfg(name) if is_model(name) else None
    except RuntimeError:  # raised for an unknown tag
        cfg = None
    if cfg is not None:
        return cfg
    base, _ = split_model_name_tag(name)
    tagged = list_models(f"{base}.*", pretrained=True, include_tags=True) if is_model(base) else []
    if ":" in name or "/" in name:
        raise UnsupportedModelError(
            f"{name!r} is not a name from timm's list.",
            "Repositories of the hub begin with hf-hub:, folders with local-dir:.",
            f"Set lpm.name to hf-hub:organisation/name, local-dir:folder, or a name such as {EXAMPLES}.",
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
        f"timm has no model named {name!r}.",
        f"{'Its name is now' if renamed else 'The nearest names are'}: {', '.join(near)}." if near else "",
        f"Set lpm.name to a vision transformer of timm, such as {EXAMPLES}.",
    )


def _nearest(name: str, names: list[str]) -> list[str]:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return near or difflib.get_close_matches(name.partition(".")[0], names, n=3, cutoff=0.4)


def build_on_meta(name: str, num_classes: int = 0, root: Path | None = None, **options: Any) -> nn.Module:
    """Build the model of a name without weights and, if timm allows it, without memory; `options` are timm's."""
    return find_model(name, root).build_on_meta(num_classes, **options)


def check_supported(model: Any, name: str) -> None:
    """Refuse models without keys and values of global attention.

    Raises:
        UnsupportedModelError: With the reason.
    """
    reason = obstacle_to_tokens(model)
    if reason is not None:
        closed = ", ".join(row.name for row in METHODS.values() if row.closed_form)
        repair = f"Set lpm.name to a vision transformer of timm ({WORKS}), such as {EXAMPLES}."
        if gives_maps(model):
            repair += (
                "\nOr keep no tokens: --set features.tokens=false --set method=statistics, without features.hidden,"
                f" opens it for the methods that are fitted in closed form ({closed})."
            )
        raise UnsupportedModelError(f"{name} ({type(model).__name__}) cannot be the LPM.", reason, repair)


def obstacle_to_tokens(model: Any) -> str | None:
    """Return why keys and values of global attention cannot be taken from a model, or None if they can."""
    from timm import layers
    from timm.models import beit, eva, vision_transformer, vision_transformer_relpos

    plain: Any = (
        vision_transformer.VisionTransformer,
        vision_transformer_relpos.VisionTransformerRelPos,
        beit.Beit,
        eva.Eva,
    )
    if not isinstance(model, plain):
        family = next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _REASONS), "")
        return _REASONS.get(family, _ANY)
    if type(model.patch_embed) is not vars(layers)["PatchEmbed"]:
        return "Its patches come from a convolutional network; that is not supported."
    height, width = model.patch_embed.patch_size
    if height != width:
        return "Its patches are not square."
    if model.patch_embed.proj.in_channels != 3:
        return "It does not take RGB images."
    for block in model.blocks:
        attention: Any = getattr(block, "attn", None)
        if attention is None:
            return _BLOCKS.get(type(block).__name__, _ANY)
        if (reason := obstacle(attention)) is not None:
            return reason
        if attention.proj.in_features != model.embed_dim or model.embed_dim % attention.num_heads:
            return "The width of its heads is not its width divided by their number."
        if attention.num_heads != model.blocks[0].attn.num_heads:
            return "Its blocks have different numbers of heads."
    return None
