"""The fingerprint: it names a store, so it must never change by accident nor stay when a feature changes."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.features import FeatureSpec, LpmInfo

LPM: dict[str, Any] = {
    "name": "vit_base_patch16_384.orig_in21k_ft_in1k",
    "depth": 12,
    "width": 768,
    "heads": 12,
    "patch": 16,
    "prefix_tokens": 1,
    "has_class_token": True,
    "image_size": 512,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
}
OTHER_LPM: dict[str, Any] = {
    "name": "vit_base_patch16_384.augreg_in21k_ft_in1k",
    "depth": 24,
    "width": 1024,
    "heads": 16,
    "patch": 14,
    "prefix_tokens": 5,
    "has_class_token": False,
    "image_size": 518,
    "mean": (0.485, 0.5, 0.5),
    "std": (0.5, 0.5, 0.225),
    "interpolation": "bilinear",
}
SPEC: dict[str, Any] = {
    "feature_version": 1,
    "store_version": 1,
    "weights_sha256": "ab" * 32,
    "layers": (6, 7, 8, 9, 10, 11),
    "importance": "global",
    "kept": 205,
    "dtype": "float16",
    "side_image_size": 144,
    "codec": "none",
    "bitround": None,
    "pooled": True,
    "precision": "float32",
    "resize": "squash",
    "filter": None,
    "normalisation": "lpm",
    "hidden": None,
}
OTHER_SPEC: dict[str, Any] = {
    "feature_version": 2,
    "store_version": 2,
    "weights_sha256": "cd" * 32,
    "layers": (6, 7, 8, 9, 10),
    "importance": "class_token",
    "kept": 204,
    "dtype": "float32",
    "side_image_size": 160,
    "codec": "zstd",
    "bitround": 7,
    "pooled": False,
    "precision": "bfloat16",
    "resize": "letterbox",
    "filter": "lanczos",
    "normalisation": "dataset",
    "hidden": 6,
}


def spec(lpm: dict[str, Any] | None = None, **changes: Any) -> FeatureSpec:
    return FeatureSpec(lpm=LpmInfo(**{**LPM, **(lpm or {})}), **{**SPEC, **changes})


def test_fingerprint_is_pinned() -> None:
    """Stores that exist are found under this name: a change here orphans them all."""
    assert spec().fingerprint == "2d7833ee52c696c104fdb7b8fd19a65948d5829ef5b2d90132cb70333481dd3d"


def test_every_field_is_varied_here() -> None:
    assert set(LPM) == set(OTHER_LPM) == set(LpmInfo.model_fields)
    assert set(SPEC) == set(OTHER_SPEC) == set(FeatureSpec.model_fields) - {"lpm"}


@pytest.mark.parametrize("name", SPEC)
def test_each_field_changes_the_fingerprint_and_is_named(name: str) -> None:
    changed = spec(**{name: OTHER_SPEC[name]})
    assert changed.fingerprint != spec().fingerprint
    differing = spec().differing(changed)
    assert set(differing) == {name}
    mine, found = differing[name]
    as_json = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    assert (mine, found) == (as_json(SPEC[name]), as_json(OTHER_SPEC[name]))


@pytest.mark.parametrize("name", LPM)
def test_each_field_of_the_lpm_changes_the_fingerprint_and_is_named(name: str) -> None:
    changed = spec({name: OTHER_LPM[name]})
    assert changed.fingerprint != spec().fingerprint
    assert set(spec().differing(changed)) == {f"lpm.{name}"}


def test_equal_specs_do_not_differ_also_after_json() -> None:
    again = FeatureSpec.model_validate_json(spec().model_dump_json())
    assert again == spec()
    assert again.fingerprint == spec().fingerprint
    assert spec().differing(again) == {}


def test_several_differences_are_all_named() -> None:
    assert set(spec().differing(spec({"patch": 14}, kept=1))) == {"lpm.patch", "kept"}


def test_tokens_and_heads() -> None:
    assert spec().lpm.tokens == 32 * 32 + 1
    assert spec({"patch": 14, "image_size": 518, "prefix_tokens": 5}).lpm.tokens == 37 * 37 + 5
    assert spec().lpm.head_dim == 64


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4)])
def test_bytes_of_a_row(dtype: str, size: int) -> None:
    keys = 6 * 12 * 205 * 64 * size
    indices = 6 * 12 * 205 * 2
    assert spec(dtype=dtype).bytes_per_image == 2 * keys + indices + 2 * 768 * 4 + 3 * 144 * 144 + 32
