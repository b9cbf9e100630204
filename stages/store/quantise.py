"""Keys, values and hidden tokens in the type of the store, and back.

    int8    x = s * code + offset             s per token and head, code in -127..127, offset: channel mean
    int4    x = s * (code - 7.5) + offset     s per channel and head, code in 0..15, offset: centre of the channel
    s = 2 ** (scale / 8 - 24)

`scale` is one byte, `offset` is float16; codes are computed from their stored values, so that their rounding adds no
error. Hidden tokens are encoded as one head of width D.

Int4 codes have a scale per channel: on keys and values of DINOv2 the relative error is 4.2% and 6.6%, with a scale per
token 4.5% and 6.8%, and more side data. The scale is the best of a few, because a range that clips nothing (4.7% and
7.4%) is coarse except at its extremes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import DataError
from schemas.features import FeatureSpec

FLOATS = {"float16": torch.float16, "float32": torch.float32}
STEPS, LOWEST = 8, -24
"""Scale codes per octave, and the exponent of code 0."""
LARGEST = 2.0 ** (255 / STEPS + LOWEST)
"""Largest scale."""
CENTRE = 7.5
"""Middle of the int4 codes."""
NARROWER = 7
"""Int4 scales that are tried below the one that clips nothing, down to 2^(-7/8) = 0.55 of it."""

HIDDEN_ARRAYS = ("hidden", "hidden_scale", "hidden_offset")
"""Arrays with the tokens that enter block `spec.hidden`, for `decode_hidden`; the last two only for int8 and int4."""


def encode(keys: torch.Tensor, values: torch.Tensor, spec: FeatureSpec) -> dict[str, torch.Tensor]:
    """Encode keys and values as arrays of the store.

    Args:
        keys: (B, L, H, T, d) floats, on any device.
        values: (B, L, H, T, d).
        spec: Gives the dtype.

    Returns:
        keys, values, and for int8 and int4 also scale and offset, (B, ...) as in `array_layouts`.

    Raises:
        DataError: If a number is not finite, or too large for the type.
    """
    key, value = _encoded("keys", keys, spec), _encoded("values", values, spec)
    arrays = {"keys": key.codes, "values": value.codes}
    if key.scale is not None and value.scale is not None:
        arrays["scale"] = torch.stack([key.scale, value.scale], dim=2)
    if key.offset is not None and value.offset is not None:
        arrays["offset"] = torch.stack([key.offset, value.offset], dim=2)
    return arrays


def encode_hidden(tokens: torch.Tensor, spec: FeatureSpec) -> dict[str, torch.Tensor]:
    """Encode hidden tokens as one head of width D.

    Args:
        tokens: (B, N, D) floats, on any device.
        spec: Gives the dtype.

    Returns:
        Those of `HIDDEN_ARRAYS` that the dtype has, (B, ...) as in `array_layouts`.

    Raises:
        DataError: If a number is not finite, or too large for the type.
    """
    encoded = _encoded("hidden tokens", tokens, spec)
    arrays = zip(HIDDEN_ARRAYS, encoded, strict=True)
    return {name: array for name, array in arrays if array is not None}


def decode_hidden(arrays: Mapping[str, torch.Tensor], spec: FeatureSpec) -> torch.Tensor:
    """Decode hidden tokens.

    Args:
        arrays: Those of `HIDDEN_ARRAYS` that the store has, (B, ...) each, on one device; others are ignored.
        spec: Of the store.

    Returns:
        (B, N, D) float32: the tokens that enter block `spec.hidden`, class and register tokens first.
    """
    codes = arrays["hidden"]
    if spec.dtype in FLOATS:
        return codes.float()
    scale = scale_of(arrays["hidden_scale"], torch.float32)
    if spec.dtype == "int4":
        tokens = unpack(codes, spec.lpm.width, torch.float32).sub_(CENTRE).mul_(scale.unsqueeze(-2))
    else:
        tokens = codes.float().mul_(scale.unsqueeze(-1))
    return tokens.add_(arrays["hidden_offset"].float().unsqueeze(-2))


class _Encoded(NamedTuple):
    """Tokens in the type of the store; floats have neither scale nor offset."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def _encoded(name: str, tokens: torch.Tensor, spec: FeatureSpec) -> _Encoded:
    """(..., T, d) in `spec.dtype`; `name` is for the error."""
    if spec.dtype in FLOATS:
        exact = tokens.to(FLOATS[spec.dtype])
        _require_finite(name, exact, spec)
        rounded = round_mantissa(exact, spec.bitround)
        # The largest numbers of a type are rounded to infinity.
        _require_finite(name, rounded, spec)
        return _Encoded(rounded)
    _require_finite(name, tokens, spec)
    codes, scale, offset, largest = (_to_int8 if spec.dtype == "int8" else _to_int4)(tokens.float())
    # An infinite offset or a difference beyond the largest scale.
    if not bool(torch.isfinite(offset).all()) or float(largest) > LARGEST:
        raise _not_representable(name, spec)
    return _Encoded(codes, scale, offset)


def dequantise(arrays: dict[str, NDArray[Any]], spec: FeatureSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Decode keys and values to float32, (B, L, H, T, d) each; for inspection, since training reads the codes."""
    decoded = []
    for position, name in enumerate(("keys", "values")):
        codes = arrays[name].astype(np.float32)
        if spec.dtype in FLOATS:
            decoded.append(codes)
            continue
        scale = np.exp2(arrays["scale"][:, :, position].astype(np.float32) / STEPS + LOWEST)
        if spec.dtype == "int4":
            halves = (arrays[name] & 15, arrays[name] >> 4)
            codes = np.concatenate(halves, axis=-1)[..., : spec.lpm.head_dim].astype(np.float32) - CENTRE
            codes *= scale[..., None, :]
        else:
            codes *= scale[..., None]
        decoded.append(codes + arrays["offset"][:, :, position, :, None].astype(np.float32))
    return decoded[0], decoded[1]


def scale_of(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode scales."""
    return torch.exp2(codes.to(dtype) / STEPS + LOWEST)


def unpack(packed: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack int4 codes 0..15 from their bytes: (..., ceil(d / 2)) uint8 -> (..., d) in `dtype`."""
    pairs = packed.shape[-1]
    wide = torch.empty((*packed.shape[:-1], 2 * pairs), dtype=dtype, device=packed.device)
    wide[..., :pairs] = packed & 15
    wide[..., pairs:] = packed >> 4
    return wide[..., :head_dim]


def round_mantissa(x: torch.Tensor, keep: int | None) -> torch.Tensor:
    """Round floats to `keep` bits of mantissa, half to even; None: leave them as they are."""
    if keep is None:
        return x
    kind, bits = (torch.int16, 10) if x.dtype == torch.float16 else (torch.int32, 23)
    drop = bits - keep
    if drop <= 0:
        return x
    # IEEE floats store sign and magnitude: adding to the bits of a negative number rounds its magnitude, too.
    bits_of_x = x.contiguous().view(kind)
    half = (1 << (drop - 1)) - 1
    rounded = bits_of_x + half + ((bits_of_x >> drop) & 1)
    return (rounded & -(1 << drop)).view(x.dtype)


def _scale_code(largest: torch.Tensor) -> torch.Tensor:
    """Return the smallest code whose scale is at least `largest`, as a float."""
    return torch.ceil((torch.log2(largest) - LOWEST) * STEPS).clamp(0, 255)


_Quantised = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _to_int8(x: torch.Tensor) -> _Quantised:
    """Quantise (..., T, d) -> codes (..., T, d), scale codes (..., T), offset (..., d), largest scale needed ()."""
    offset = x.mean(dim=-2).half()
    y = x - offset.float().unsqueeze(-2)
    needed = y.abs().amax(dim=-1) / 127
    scale = _scale_code(needed)
    codes = y.div_(scale_of(scale, x.dtype).unsqueeze(-1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale.to(torch.uint8), offset, needed.amax()


def _to_int4(x: torch.Tensor) -> _Quantised:
    """Quantise (..., T, d) -> packed codes (..., T, ceil(d / 2)), scale codes (..., d), offset (..., d), largest ()."""
    low, high = torch.aminmax(x, dim=-2)
    offset = (low / 2 + high / 2).half()
    y = x - offset.float().unsqueeze(-2)
    needed = y.abs().amax(dim=-2) / CENTRE
    widest = _scale_code(needed)
    best, least = widest, torch.full_like(widest, torch.inf)
    for narrower in range(NARROWER + 1):
        scale = (widest - narrower).clamp(min=0)
        step = scale_of(scale, x.dtype).unsqueeze(-2)
        error = (_int4_codes(y, step).sub_(CENTRE).mul_(step) - y).square_().sum(dim=-2)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    codes = _int4_codes(y, scale_of(best, x.dtype).unsqueeze(-2)).to(torch.uint8)
    pairs = -(-codes.shape[-1] // 2)
    upper = torch.nn.functional.pad(codes[..., pairs:], (0, 2 * pairs - codes.shape[-1]))
    return codes[..., :pairs] | (upper << 4), best.to(torch.uint8), offset, needed.amax()


def _int4_codes(y: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return y.div(step).add_(CENTRE).round_().clamp_(0, 15)


def _require_finite(name: str, tensor: torch.Tensor, spec: FeatureSpec) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise _not_representable(name, spec)


def _not_representable(name: str, spec: FeatureSpec) -> DataError:
    return DataError(
        f"The {name} of the LPM are not finite in {spec.dtype}.",
        "Its activations exceed the range of the type, or the weights are damaged.",
        "Set features.dtype to float32, or check lpm.weights.",
    )
