"""Statistics of feature maps: their order in a row, and what probes read of them."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.features import FeatureSpec, LpmInfo
from schemas.statistics import COVARIANCES, ProbeRule, map_segments
from stages.store.layout import impossible

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
}
STAGES: dict[str, Any] = {
    "depth": 4,
    "width": 128,
    "heads": 1,
    "patch": 32,
    "prefix_tokens": 0,
    "has_class_token": False,
}
STAGES |= {"map_widths": (16, 32, 64, 128), "mlp_width": None}
BLOCKS = {**STAGES, "depth": 12, "width": 64, "map_widths": (48,) * 12}


def spec_of(lpm: dict[str, Any], **changes: Any) -> FeatureSpec:
    raw = {"weights_sha256": "ab" * 32, "layers": (), "importance": "global", "kept": 0, "dtype": "float16"}
    raw |= {"side_image_size": 144, "statistics": True, "feature_version": 1, "lpm": LpmInfo(**{**LPM, **lpm})}
    return FeatureSpec.model_validate({**raw, **changes})


def test_each_map_has_its_own_width() -> None:
    found = map_segments((16, 32))
    assert [(one.name, one.width) for one in found] == [
        ("outputs of stage 0", 32),
        ("output covariance of stage 0", COVARIANCES),
        ("outputs of stage 1", 64),
        ("output covariance of stage 1", COVARIANCES),
    ]
    assert [one.start for one in found] == [0, *(one.stop for one in found[:-1])]


def test_maps_of_one_width_are_those_of_blocks() -> None:
    assert [one.name for one in map_segments((16, 16))][::2] == ["outputs of block 0", "outputs of block 1"]


def test_probes_read_every_stage() -> None:
    of = spec_of(STAGES)
    place = {one.name: (256 + one.start, 256 + one.stop) for one in of.segments}
    named = {source.name: source.spans for source in of.probe_sources("all")}
    assert named.pop("pooled outputs") == ((0, 256),)
    for kind in ("outputs", "output covariance"):
        assert named.pop(f"{kind} of stages 0 to 3") == tuple(place[f"{kind} of stage {n}"] for n in range(4))
    assert named == {name: (span,) for name, span in place.items()}
    (linear,) = of.probe_sources("every block")
    assert (linear.name, linear.width) == ("mean of every stage", 16 + 32 + 64 + 128)
    assert [source.name for source in of.probe_sources("kept")] == ["pooled outputs"]


def test_probes_read_the_middle_blocks() -> None:
    of = spec_of(BLOCKS)
    assert [source.name for source in of.probe_sources("all")] == [
        "pooled outputs",
        "outputs of blocks 3 to 8",
        "output covariance of blocks 3 to 8",
        *(f"{kind} of block {n}" for n in (5, 6, 7) for kind in ("outputs", "output covariance")),
    ]
    covariances = [source.name for source in of.probe_sources("covariance", with_pooled=False)]
    assert covariances == [f"output covariance of block {block}" for block in range(3, 9)]
    assert of.probe_sources("every block")[0].width == 12 * 48


@pytest.mark.parametrize("lpm", [{}, STAGES])
@pytest.mark.parametrize("rule", ["covariance", "every block"])
def test_rows_without_pooled_outputs_begin_with_the_statistics(lpm: dict[str, Any], rule: ProbeRule) -> None:
    of = spec_of(lpm)
    behind, first = of.probe_sources(rule), of.probe_sources(rule, with_pooled=False)
    moved = 2 * of.lpm.width
    for one, other in zip(behind, first, strict=True):
        assert one.spans == tuple((start + moved, stop + moved) for start, stop in other.spans)


def test_fingerprints_of_token_stores_are_those_of_before() -> None:
    """Of commit 62acb18; that without statistics is pinned with the other fields."""
    whole = "f04b981c519344606cd0238bc991b02cffe848b2990247294e0211acf50bffed"
    assert spec_of({}, layers=(6, 7, 8, 9, 10, 11), kept=205).fingerprint == whole
    assert spec_of({}).fingerprint == "8bea8335f0558a55accd8d3ff490da9639d14067f5bfa92f46ec655d7acdd72b"
    assert spec_of(STAGES).fingerprint != spec_of({**STAGES, "map_widths": (16, 32, 64, 129)}).fingerprint


def test_an_impossible_spec_is_named() -> None:
    assert impossible(spec_of(STAGES)) is None
    assert "map_widths" in str(impossible(spec_of({**STAGES, "depth": 5})))
    assert "map_widths" in str(impossible(spec_of({**STAGES, "map_widths": (16, 32, 64, 0)})))
    assert "tokens" in str(impossible(spec_of(STAGES, layers=(1,), kept=4)))
