"""Arrays of a store: shapes, types and names of axes, and the formulas that decode quantised ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.features import FeatureSpec

DEQUANTISE = {
    "int8": (
        "x[layer, head, token, channel] = 2 ** (scale[layer, part, head, token] / 8 - 24) * code"
        " + offset[layer, part, head, channel]; part 0: keys, 1: values"
    ),
    "int4": (
        "x[layer, head, token, channel] = 2 ** (scale[layer, part, head, channel] / 8 - 24) * (code - 7.5)"
        " + offset[layer, part, head, channel]; part 0: keys, 1: values; the byte of channel pair j holds the codes of"
        " channel j (low four bits) and of channel j + number of pairs (high four bits)"
    ),
}
"""Attribute of quantised groups: the formula that decodes keys and values."""

DEQUANTISE_HIDDEN = {
    "int8": "x[token, channel] = 2 ** (hidden_scale[token] / 8 - 24) * code + hidden_offset[channel]",
    "int4": (
        "x[token, channel] = 2 ** (hidden_scale[channel] / 8 - 24) * (code - 7.5) + hidden_offset[channel];"
        " codes are packed as those of keys and values"
    ),
}
"""The same for hidden tokens."""


@dataclass(frozen=True)
class ArrayLayout:
    """One array of the store, without its row axis."""

    shape: tuple[int, ...]
    """Shape of one row."""
    dtype: str
    """numpy name; little endian on disk."""
    dims: tuple[str, ...]
    """Names of the axes of one row."""


CACHED = ("keys", "values", "scale", "offset")
"""Arrays that hold the cached tokens; the last two only in quantised stores."""


def array_layouts(spec: FeatureSpec) -> dict[str, ArrayLayout]:
    """Return every array of a store of this spec, by name."""
    side = spec.side_image_size
    lpm, layers = spec.lpm, len(spec.layers)
    pooled = {"pooled": ArrayLayout((2, lpm.width), "float32", ("output", "width"))} if spec.pooled else {}
    indices = {"indices": ArrayLayout((layers, lpm.heads, spec.kept), "uint16", ("layer", "head", "token"))}
    segments = spec.segments
    return {
        **(_cached_layouts(spec) if layers else {}),
        **(_hidden_layouts(spec) if spec.hidden is not None else {}),
        **(indices if layers else {}),
        **pooled,
        **({"statistics": ArrayLayout((segments[-1].stop,), "float16", ("statistic",))} if segments else {}),
        "side": ArrayLayout((3, side, side), "uint8", ("rgb", "y", "x")),
        "sha256": ArrayLayout((32,), "uint8", ("byte",)),
    }


def _cached_layouts(spec: FeatureSpec) -> dict[str, ArrayLayout]:
    layers, heads, count, dim = len(spec.layers), spec.lpm.heads, spec.kept, spec.lpm.head_dim
    packed = spec.dtype == "int4"
    codes = ArrayLayout(
        (layers, heads, count, -(-dim // 2) if packed else dim),
        "uint8" if packed else spec.dtype,
        ("layer", "head", "token", "channel_pair" if packed else "channel"),
    )
    layouts = {"keys": codes, "values": codes}
    if spec.dtype in ("int8", "int4"):
        axis, length = ("channel", dim) if packed else ("token", count)
        # One array for keys and values, with the layer first as in every other array.
        layouts["scale"] = ArrayLayout((layers, 2, heads, length), "uint8", ("layer", "part", "head", axis))
        layouts["offset"] = ArrayLayout((layers, 2, heads, dim), "float16", ("layer", "part", "head", "channel"))
    return layouts


def _hidden_layouts(spec: FeatureSpec) -> dict[str, ArrayLayout]:
    tokens, width = spec.lpm.tokens, spec.lpm.width
    if spec.dtype not in ("int8", "int4"):
        return {"hidden": ArrayLayout((tokens, width), spec.dtype, ("token", "channel"))}
    if spec.dtype == "int8":
        codes = ArrayLayout((tokens, width), "int8", ("token", "channel"))
        scale = ArrayLayout((tokens,), "uint8", ("token",))
    else:
        codes = ArrayLayout((tokens, -(-width // 2)), "uint8", ("token", "channel_pair"))
        scale = ArrayLayout((width,), "uint8", ("channel",))
    offset = ArrayLayout((width,), "float16", ("channel",))
    return {"hidden": codes, "hidden_scale": scale, "hidden_offset": offset}


def decoding_attributes(spec: FeatureSpec) -> dict[str, Any]:
    """Return the attributes of the Zarr group with the formulas that decode quantised arrays, and the statistics."""
    attributes: dict[str, Any] = {}
    if spec.segments:
        attributes["statistics"] = [[one.name, one.start, one.stop] for one in spec.segments]
    if spec.dtype in DEQUANTISE and spec.layers:
        attributes["dequantise"] = DEQUANTISE[spec.dtype]
    if spec.dtype in DEQUANTISE and spec.hidden is not None:
        attributes["dequantise_hidden"] = DEQUANTISE_HIDDEN[spec.dtype]
    return attributes
