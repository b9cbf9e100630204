"""Feature maps: what any model of timm with `forward_intermediates` gives, with or without attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from schemas.errors import UnsupportedModelError

if TYPE_CHECKING:
    from stages.lpm.catalogue import ModelEntry


@dataclass(frozen=True)
class MapPass:
    """One forward pass of a batch."""

    maps: tuple[torch.Tensor, ...]
    """(B, C, y, x) of each stage or block, before the final norm."""
    pooled: torch.Tensor
    """(B, D): what the model's classifier reads."""


@dataclass(frozen=True)
class MapShapes:
    """Shapes of the feature maps of a model at one input size."""

    image_size: int
    """Side of the square input, in pixels."""
    widths: tuple[int, ...]
    """Channels of each map."""
    pooled_width: int
    """D of the pooled outputs."""
    stride: int
    """Pixels between the positions of the coarsest map."""


def gives_maps(model: Any) -> bool:
    """Return whether this version of timm gives the model's feature maps and its pooled outputs."""
    return hasattr(model, "forward_intermediates") and hasattr(model, "forward_head")


def run_maps(model: Any, pixels: torch.Tensor) -> MapPass:
    """Run one forward pass.

    Args:
        model: Without classifier; `gives_maps`.
        pixels: (B, 3, S, S), normalised.
    """
    final, maps = model.forward_intermediates(pixels)
    # Older versions of timm list ConvNeXt's stem as a map of its own, but not in `feature_info`.
    count = len(getattr(model, "feature_info", ()))
    return MapPass(tuple(maps[-count:]), model.forward_head(final, pre_logits=True))


def takes_size(model: nn.Module) -> bool:
    """Return whether timm builds the model for an input size; others take any size, or only one."""
    return any("img_size" in inspect.signature(kind.__init__).parameters for kind in type(model).__mro__)  # type: ignore[misc]


def size_options(model: nn.Module, image_size: int) -> dict[str, int]:
    """Return timm's options that build the model for an input size."""
    return {"img_size": image_size} if takes_size(model) else {}


def map_shapes(entry: ModelEntry, name: str, image_size: int) -> MapShapes:
    """Return the shapes of the feature maps, from a forward pass without numbers.

    Args:
        entry: Architecture.
        name: As the user wrote it.
        image_size: Side of the input, in pixels; the result has the nearest multiple of the coarsest stride.

    Raises:
        UnsupportedModelError: The model gives no feature maps, or takes no images of this size.
    """
    model: Any = entry.build_on_meta()
    if not gives_maps(model):
        import timm

        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) cannot be the LPM.",
            f"timm {timm.__version__} gives neither its tokens nor its feature maps (no forward_intermediates).",
            "Install a newer timm, or set lpm.name to another model, such as convnext_tiny.fb_in22k.",
        )
    stride = max((int(info["reduction"]) for info in getattr(model, "feature_info", ())), default=1)
    size = max(1, (2 * image_size + stride) // (2 * stride)) * stride
    try:
        shaped = run_on_meta(entry, size)
        widths = tuple(_channels(one) for one in shaped.maps)
        _, pooled_width = shaped.pooled.shape
    except Exception as error:  # timm and torch raise nearly every kind for a size that does not fit
        default = model.pretrained_cfg["input_size"][-1]
        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) takes no images of {size} pixels.",
            f"Its windows or tables of positions do not fit this size: {' '.join(str(error).split())[:200]}",
            f"Set features.image_size to {default}, the size of its pretraining, or to another one that fits.",
        ) from error
    return MapShapes(size, widths, int(pooled_width), stride)


def _channels(feature_map: torch.Tensor) -> int:
    _, channels, _, _ = feature_map.shape
    return int(channels)


def run_on_meta(entry: ModelEntry, image_size: int) -> MapPass:
    """Run a forward pass of one image by the model for this input size."""
    return _run_on_meta(entry.build_on_meta(**size_options(entry.build_on_meta(), image_size)), image_size)


def runs_at(model: nn.Module, image_size: int) -> bool:
    """Return whether a model takes images of another size than it was built for."""
    try:
        _run_on_meta(model, image_size)
    except Exception:  # timm and torch raise nearly every kind for a size that does not fit
        return False
    return True


def _run_on_meta(model: nn.Module, image_size: int) -> MapPass:
    """Run a forward pass of one image on the meta device: shapes only, no weights, no memory."""
    with torch.inference_mode():
        return run_maps(model.eval().to("meta"), torch.empty(1, 3, image_size, image_size, device="meta"))


def map_operations(entry: ModelEntry, image_size: int) -> float:
    """Return the floating-point operations of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run_on_meta(entry, image_size)
    return float(counter.get_total_flops())
