"""Quantised keys and values: what comes back is as near as the form allows, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import LPM, numpy, spec

from schemas.base import digest
from schemas.errors import DataError
from schemas.features import LATER_FIELDS, FeatureSpec
from schemas.settings import FeatureSettings
from stages.store.array_layouts import array_layouts
from stages.store.layout import create_store
from stages.store.quantise import dequantise, encode, round_mantissa
from stages.store.writer import claim_shard, write_shard

DTYPES = ("float32", "float16", "int8", "int4")


def features(seed: int, head_dim: int = 6, low: float = -6, high: float = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of 3 images: each channel has its own centre and width, each token its own size."""
    draw = torch.Generator().manual_seed(seed)

    def part() -> torch.Tensor:
        shape = (3, 2, 2, 9, head_dim)
        sizes = 10.0 ** torch.empty(3, 2, 2, 9, 1).uniform_(low, high, generator=draw)
        centre = torch.randn(3, 2, 2, 1, head_dim, generator=draw) * 10.0 ** torch.empty(1).uniform_(
            low, high, generator=draw
        )
        return torch.randn(shape, generator=draw) * sizes + centre

    return part(), part()


def round_trip(keys: torch.Tensor, values: torch.Tensor, of: FeatureSpec) -> list[torch.Tensor]:
    arrays = numpy(encode(keys, values, of))
    layouts = array_layouts(of)
    assert arrays.keys() == layouts.keys() & {"keys", "values", "scale", "offset"}
    for name, array in arrays.items():
        assert (array.shape[1:], array.dtype.name) == (layouts[name].shape, layouts[name].dtype)
    return [torch.from_numpy(array) for array in dequantise(arrays, of)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), head_dim=st.sampled_from([1, 5, 6]))
def test_int8_errs_by_half_a_step_of_the_token(seed: int, head_dim: int) -> None:
    exacts = features(seed, head_dim, high=3)
    for exact, found in zip(exacts, round_trip(*exacts, spec("int8", head_dim)), strict=True):
        offset = exact.mean(dim=-2, keepdim=True).half().float()
        largest = (exact - offset).abs().amax(dim=-1, keepdim=True)
        # The scale is at most an eighth of an octave above the one that just fits, and at least 2^-24.
        step = torch.maximum(largest / 127 * 2 ** (1 / 8), torch.tensor(2.0**-24))
        assert ((found - exact).abs() <= 0.5001 * step + 2e-7 * exact.abs()).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), head_dim=st.sampled_from([1, 5, 6]))
def test_int4_is_no_worse_than_the_scale_that_clips_nothing(seed: int, head_dim: int) -> None:
    exacts = features(seed, head_dim, high=2)
    for exact, found in zip(exacts, round_trip(*exacts, spec("int4", head_dim)), strict=True):
        low, high = exact.amin(dim=-2, keepdim=True), exact.amax(dim=-2, keepdim=True)
        offset = ((low + high) / 2).half().float()
        step = (exact - offset).abs().amax(dim=-2, keepdim=True) / 7.5 * 2 ** (1 / 8)
        step = torch.maximum(step, torch.tensor(2.0**-24))
        error = (found - exact).square().sum(dim=-2)
        bound = (0.5001 * step + 2e-7 * exact.abs()).square().expand_as(exact).sum(dim=-2)
        assert (error <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_constants_constants(dtype: str) -> None:
    zeros = torch.zeros(2, 2, 2, 9, 6)
    keys, values = round_trip(zeros, zeros + 1.5, spec(dtype))
    # An even number of levels does not hold the centre itself: half of the smallest step.
    assert keys.abs().max() <= 2.0**-24
    assert (values - 1.5).abs().max() <= 2.0**-24


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_image_has_the_same_codes_in_any_batch(dtype: str) -> None:
    keys, values = features(0)
    together = encode(keys, values, spec(dtype))
    alone = encode(keys[1:2], values[1:2], spec(dtype))
    assert all(torch.equal(alone[name][0], together[name][1]) for name in alone)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_channel_far_from_zero_costs_no_precision(dtype: str) -> None:
    keys, values = features(1, low=-1, high=0)
    far = keys.clone()
    far[..., 2] += 512.0
    near, moved = (round_trip(x, values, spec(dtype))[0] - x for x in (keys, far))
    assert moved.square().mean() < 1.2 * near.square().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_is_not_finite_is_refused(dtype: str, bad: float, name: str) -> None:
    tensors = dict(zip(("keys", "values"), features(0), strict=True))
    tensors[name][1, 1, 1, 4, 0] = bad
    with pytest.raises(DataError, match=f"{name} of the LPM are not finite in {dtype}"):
        encode(**tensors, spec=spec(dtype))


@pytest.mark.parametrize(("dtype", "fits"), [("float16", 6e4), ("int8", 2.5e4), ("int4", 1.5e3)])
def test_what_is_too_large_for_the_type_is_refused(dtype: str, fits: float) -> None:
    x = torch.zeros(1, 2, 2, 9, 6)
    x[0, 0, 0, 0, 0], x[0, 0, 0, 1, 0] = fits, -fits
    found = round_trip(x, x, spec(dtype))[1]
    assert abs(float(found[0, 0, 0, 0, 0]) - fits) <= {"float16": 20, "int8": fits / 200, "int4": fits / 10}[dtype]
    with pytest.raises(DataError, match="Set features"):
        encode(x, x * 1.3, spec(dtype))
    with pytest.raises(DataError):
        encode(x, torch.full_like(x, 1e5), spec(dtype))


@pytest.mark.parametrize(("dtype", "keep", "bits"), [("float16", 4, 10), ("float32", 7, 23)])
def test_bitround_keeps_the_nearest(dtype: str, keep: int, bits: int) -> None:
    x = features(2, low=-2, high=2)[0].to(getattr(torch, dtype))
    found = round_mantissa(x, keep)
    assert ((found.double() - x.double()).abs() <= 2.0 ** -(keep + 1) * x.double().abs()).all()
    whole = found.view(torch.int16 if dtype == "float16" else torch.int32)
    assert (whole & ((1 << (bits - keep)) - 1) == 0).all()
    assert torch.equal(round_mantissa(x, bits), x)
    ties = torch.tensor([1 + 2.0**-5, 1 + 3 * 2.0**-5, -1 - 2.0**-5]).to(x.dtype)
    assert round_mantissa(ties, 4).tolist() == [1.0, 1.125, -1.0]
    with pytest.raises(DataError):
        largest = torch.full((1, 2, 2, 9, 6), torch.finfo(x.dtype).max)
        encode(largest, largest, spec(dtype, bitround=keep))


@pytest.mark.parametrize("keys", [{"dtype": "int8", "bitround": 4}, {"dtype": "float16", "bitround": 11}])
def test_bitround_only_where_there_are_bits(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bitround"):
        FeatureSettings(**keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_a_row_are_those_of_its_arrays(dtype: str) -> None:
    for head_dim in (5, 6):
        of = spec(dtype, head_dim)
        arrays = sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in array_layouts(of).values())
        assert of.bytes_per_image == of.bytes_by_dtype[dtype] == arrays


def write(cache: Path, of: FeatureSpec, rows: int, shard_size: int, encoded: dict[str, torch.Tensor]) -> Any:
    arrays = numpy(encoded)
    rng = np.random.default_rng(0)
    for name, layout in array_layouts(of).items():
        if name not in arrays and name != "sha256":
            arrays[name] = rng.integers(0, 200, (rows, *layout.shape)).astype(layout.dtype)
    store = create_store(cache, of, shard_size)
    with claim_shard(store) as shard:
        return store, arrays, write_shard(store, shard, [f"{n:064x}" for n in range(1, rows + 1)], arrays, 1.0)


def test_int8_rows_of_vit_base_at_512_are_as_small_as_promised(tmp_path: Path) -> None:
    of = spec("int8").model_copy(
        update={"lpm": LPM, "layers": tuple(range(6, 12)), "kept": 205, "side_image_size": 144}
    )
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 6, 12, 205, 64, generator=draw) for _ in range(2))
    _, _, receipt = write(tmp_path, of, 2, 2, encode(keys, values, of))
    disk = {name: file.bytes / 2 for name, file in receipt.files.items()}
    assert sum(disk[name] for name in ("keys", "values", "scale", "offset")) <= 1_960_000
    assert sum(disk.values()) <= 2_050_000
    assert of.bytes_by_dtype["int4"] < 0.54 * of.bytes_by_dtype["int8"]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_plain_zarr_gives_the_keys_and_values(tmp_path: Path, dtype: str) -> None:
    """With the formula in the attributes of the group."""
    keys, values = features(3, low=-1, high=1)
    of = spec(dtype)
    store, arrays, _ = write(tmp_path, of, 3, 4, encode(keys, values, of))
    group = zarr.open_group(store.group, mode="r")
    middle = {"int8": "* code", "int4": "* (code - 7.5)"}[dtype]
    assert f"2 ** (scale[layer, part, head, {'token' if dtype == 'int8' else 'channel'}] / 8 - 24) {middle}" in str(
        group.attrs["dequantise"]
    )
    assert group["scale"].metadata.dimension_names[:4] == ("row", "layer", "part", "head")
    for part, (name, exact) in enumerate((("keys", keys), ("values", values))):
        codes, scale = group[name][:3], 2 ** (group["scale"][:3, :, part].astype("f8") / 8 - 24)
        offset = group["offset"][:3, :, part].astype("f8")
        if dtype == "int8":
            x = scale[..., None] * codes + offset[..., None, :]
        else:
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
            x = scale[..., None, :] * (codes - 7.5) + offset[..., None, :]
        np.testing.assert_allclose(x, dequantise(arrays, of)[part], rtol=1e-5, atol=1e-6)
        assert np.linalg.norm(x - exact.numpy()) < {"int8": 0.01, "int4": 0.2}[dtype] * np.linalg.norm(exact.numpy())


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_compressed_stores_hold_the_same_rows(tmp_path: Path, codec: str, dtype: str) -> None:
    keys, values = (torch.randn(4, 2, 2, 1, 64).expand(-1, -1, -1, 9, -1) for _ in range(2))
    plain, packed = spec(dtype, 64), spec(dtype, 64, codec=codec)
    assert plain.fingerprint != packed.fingerprint
    _, _, raw = write(tmp_path, plain, 4, 4, encode(keys, values, plain))
    store, arrays, small = write(tmp_path, packed, 4, 4, encode(keys, values, packed))
    group = zarr.open_group(store.group, mode="r")
    for name, array in arrays.items():
        assert np.array_equal(group[name][:4], array)
    codecs = [c.to_dict()["name"] for c in group["keys"].metadata.codecs[0].codecs]
    assert codecs == ["bytes", codec, "crc32c"]
    assert small.files["values"].bytes < raw.files["values"].bytes


def test_bitround_makes_floats_compress(tmp_path: Path) -> None:
    keys, values = (torch.randn(4, 2, 2, 9, 64) for _ in range(2))
    sizes = []
    for keep in (None, 5):
        of = spec("float32", 64, codec="blosc", bitround=keep)
        sizes.append(write(tmp_path, of, 4, 4, encode(keys, values, of))[2].files["keys"].bytes)
    assert sizes[1] < 0.5 * sizes[0]


def test_stores_from_before_there_were_later_fields_keep_their_names() -> None:
    old = spec("float16").model_dump(mode="json", exclude=set(LATER_FIELDS))
    del old["lpm"]["mlp_width"], old["lpm"]["map_widths"]
    assert spec("float16").fingerprint == digest(old)
    assert FeatureSpec.model_validate(old).differing(spec("float16")) == {}
    assert spec("float16", bitround=4).fingerprint != digest(old)
