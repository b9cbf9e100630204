"""The fingerprint: it names a store, so it must never change by accident nor stay when a feature changes."""

from __future__ import annotations

from itertools import pairwise
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
    "mlp_width": 3072,
    "map_widths": (),
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
    "mlp_width": 4096,
    "map_widths": (96, 192),
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
    "window": "stored",
    "frame": "middle",
    "hidden": None,
    "statistics": False,
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
    "window": (40.0, 400.0),
    "frame": 3,
    "hidden": 6,
    "statistics": True,
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


@pytest.mark.parametrize("name", sorted(LPM.keys() - {"mlp_width"}))
def test_each_field_of_the_lpm_changes_the_fingerprint_and_is_named(name: str) -> None:
    changed = spec({name: OTHER_LPM[name]})
    assert changed.fingerprint != spec().fingerprint
    assert set(spec().differing(changed)) == {f"lpm.{name}"}


def test_the_width_of_the_mlp_matters_only_to_statistics() -> None:
    assert spec({"mlp_width": 4096}).fingerprint == spec().fingerprint == spec({"mlp_width": None}).fingerprint
    assert spec({"mlp_width": 4096}, statistics=True).fingerprint != spec(statistics=True).fingerprint
    # Stores of earlier versions do not state it.
    assert spec().differing(spec({"mlp_width": None})) == {}


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
    others = 2 * 768 * 4 + 3 * 144 * 144 + 32
    assert spec(dtype=dtype).bytes_per_image == 2 * keys + indices + others
    assert spec(dtype=dtype, layers=(), kept=0).bytes_per_image == others
    # Outputs and value means of 12 blocks, two covariances and the MLP of the six in the middle, kept tokens of six.
    numbers = 12 * 4 * 768 + 6 * (2 * 64 * 65 // 2 + 2 * 3072) + 6 * 4 * 768
    statistics = spec(dtype=dtype, statistics=True)
    assert statistics.bytes_per_image == spec(dtype=dtype).bytes_per_image + 2 * numbers
    assert statistics.segments[-1].stop == numbers


def test_statistics_are_segments_one_after_the_other() -> None:
    found = spec(statistics=True).segments
    assert found[0].start == 0
    assert all(one.stop == following.start for one, following in pairwise(found))
    every, inner = ["outputs", "value means"], ["output covariance", "value covariance", "MLP activations"]
    expected = [(kind, block) for block in range(12) for kind in (*every, *(inner if 3 <= block < 9 else []))]
    kept = [(kind, layer) for layer in SPEC["layers"] for kind in ("kept keys", "kept values")]
    assert [(one.kind, one.block) for one in found] == [*expected, *kept]
    assert spec().segments == ()
    without = spec({"has_class_token": False}, statistics=True, layers=(), kept=0).segments
    assert without[0].stop == 2 * 768
    assert [(one.kind, one.block) for one in without] == expected


def test_probes_read_the_middle_blocks_or_what_is_kept() -> None:
    """Each span lies on the segment that its name names, behind the pooled outputs."""
    of = spec(statistics=True)
    place = {one.name: (2 * 768 + one.start, 2 * 768 + one.stop) for one in of.segments}
    pooled, *sources = of.probe_sources("all")
    assert (pooled.name, pooled.spans) == ("pooled outputs", ((0, 2 * 768),))
    named = {source.name: source.spans for source in sources}
    assert len(named) == len(sources)
    for kind in ("outputs", "value means", "output covariance", "value covariance"):
        spans = tuple(place[f"{kind} of block {block}"] for block in range(3, 9))
        assert named.pop(f"{kind} of blocks 3 to 8") == spans
    activations = [place[f"MLP activations of block {block}"] for block in range(3, 9)]
    assert named.pop("MLP means of blocks 3 to 8") == tuple((start, start + 3072) for start, _ in activations)
    assert named.pop("MLP deviations of blocks 3 to 8") == tuple((start + 3072, stop) for start, stop in activations)
    kept = {
        block: tuple(place[f"kept {array} of block {block}"] for array in ("keys", "values")) for block in (6, 7, 8)
    }
    assert named.pop("kept tokens of blocks 3 to 8") == sum(kept.values(), ())
    for block, spans in kept.items():
        assert named.pop(f"kept tokens of block {block}") == spans
    assert named == {
        f"{kind} of block {block}": (place[f"{kind} of block {block}"],)
        for block in (5, 6, 7)
        for kind in ("outputs", "value means", "value covariance", "MLP activations")
    }
    covariances = [source.name for source in of.probe_sources("covariance")]
    assert covariances == [f"output covariance of block {block}" for block in range(3, 9)]
    (linear,) = of.probe_sources("every block")
    assert linear.width == 12 * 2 * 768
    assert {span[0] for span in linear.spans} == {place[f"outputs of block {block}"][0] for block in range(12)}
    assert [source.name for source in of.probe_sources("kept")] == [
        "pooled outputs",
        *(f"kept {array} of block {layer}" for layer in SPEC["layers"] for array in ("keys", "values")),
    ]
    assert [source.name for source in spec().probe_sources("all")] == ["pooled outputs"]
    (first,) = (one for one in of.segments if (one.kind, one.block) == ("outputs", 3))
    assert spec(statistics=True, pooled=False).probe_sources("all")[0].spans[0] == (first.start, first.stop)
