"""No "auto" is left, and what does not fit the LPM is said at once."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.errors import SettingsError
from schemas.features import LpmInfo
from schemas.resolve import SIDE_PATCH, feature_spec, resolve, stored_side_size
from schemas.settings import Settings
from schemas.specs import SideNetworkSpec
from stages.methods.base import gradient_method

VIT_B = LpmInfo(
    name="vit_base_patch16_384.orig_in21k_ft_in1k",
    depth=12,
    width=768,
    heads=12,
    patch=16,
    prefix_tokens=1,
    has_class_token=True,
    image_size=512,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    mlp_width=3072,
)


def made(**raw: Any) -> Settings:
    return Settings.model_validate(raw)


def problems(settings: Settings, lpm: LpmInfo = VIT_B) -> dict[str, str]:
    with pytest.raises(SettingsError) as caught:
        resolve(settings, lpm)
    return dict(caught.value.problems)


@pytest.mark.parametrize(
    ("method", "layers", "side", "stored"),
    [("fpt", range(12), 224, 256), ("fpt+", range(6, 12), 128, 144), ("side", range(6, 12), 128, 144)],
)
def test_presets(method: str, layers: range, side: int, stored: int) -> None:
    resolved = resolve(made(method=method), VIT_B)
    assert resolved.features.layers == tuple(layers)
    assert resolved.train.side_image_size == side
    assert resolved.features.side_image_size == stored
    spec = gradient_method(method).spec(resolved, VIT_B, 5)
    assert isinstance(spec, SideNetworkSpec)
    assert (spec.layers, spec.width, spec.image_size, spec.heads) == (len(layers), 96, side, 12)
    assert feature_spec(resolved, VIT_B, "0" * 64).kept == int(0.2 * 1025)


def test_no_auto_survives() -> None:
    def autos(value: Any) -> bool:
        return value == "auto" or (isinstance(value, dict) and any(autos(item) for item in value.values()))

    dumped = resolve(made(), VIT_B).model_dump(mode="json")
    # `data.group_column` and `data.split_column` are resolved by `prepare`, against the header of the table.
    assert not autos({name: dumped[name] for name in ("method", "lpm", "features", "train")})


def test_resolving_again_changes_nothing() -> None:
    once = resolve(made(), VIT_B)
    assert resolve(once, VIT_B) == once


def test_image_size_is_that_of_the_patch_grid() -> None:
    dino = VIT_B.model_copy(update={"patch": 14, "image_size": 518})
    assert resolve(made(), dino).features.image_size == 518


def test_values_of_the_user_stay() -> None:
    raw = {"features": {"layers": [0, 11], "side_image_size": 300}, "train": {"side_image_size": 96}}
    resolved = resolve(made(**raw), VIT_B)
    assert resolved.features.layers == (0, 11)
    assert (resolved.features.side_image_size, resolved.train.side_image_size) == (300, 96)


@pytest.mark.parametrize(("depth", "first"), [(12, 6), (7, 3), (1, 0)])
def test_upper_half_of_any_depth(depth: int, first: int) -> None:
    lpm = VIT_B.model_copy(update={"depth": depth})
    assert resolve(made(), lpm).features.layers == tuple(range(first, depth))


@pytest.mark.parametrize("side", [16, 96, 128, 224, 512])
def test_stored_side_image_leaves_room_for_a_crop(side: int) -> None:
    stored = stored_side_size(side)
    assert stored % SIDE_PATCH == 0
    assert side * 0.8**-0.5 <= stored < side * 1.125 + SIDE_PATCH


@pytest.mark.parametrize(
    ("raw", "lpm", "path", "words"),
    [
        ({"features": {"layers": [3, 12]}}, {}, "features.layers", "0 to 11"),
        ({"features": {"hidden": 12}}, {}, "features.hidden", "0 to 11"),
        ({"features": {"importance": "class_token"}}, {"has_class_token": False}, "features.importance", "class token"),
        ({"features": {"ratio": 0.0005}}, {}, "features.ratio", "1025"),
        ({"method": "fpt", "features": {"tokens": False}}, {}, "features.tokens", "fpt reads cached tokens"),
        ({"method": "attentive", "features": {"tokens": False}}, {}, "features.tokens", "attentive reads"),
        ({"method": "statistics", "features": {"statistics": False}}, {}, "features.statistics", "token statistics"),
        (
            {"method": "fpt+", "features": {"statistics": False}, "train": {"probe_weight": 0.5}},
            {},
            "features.statistics",
            "linear probes",
        ),
        (
            {"method": "side", "features": {"tokens": False, "statistics": False, "pooled": False}},
            {},
            "features.tokens",
            "without features.statistics and features.pooled",
        ),
        ({"train": {"side_reduction": 7}}, {}, "train.side_reduction", "12 heads"),
        ({"train": {"side_reduction": 16}}, {"heads": 16}, "train.side_reduction", None),
        ({"train": {"side_reduction": 128}}, {}, "train.side_reduction", "heads"),
        (
            {"data": {"classes": ["a", "b"]}, "train": {"class_weights": [1, 1, 1]}},
            {},
            "train.class_weights",
            "3 weights for 2",
        ),
    ],
)
def test_what_does_not_fit(raw: dict[str, Any], lpm: dict[str, Any], path: str, words: str | None) -> None:
    shape = VIT_B.model_copy(update=lpm)
    if words is None:
        assert resolve(made(**raw), shape)
        return
    found = problems(made(**raw), shape)
    assert set(found) == {path}
    assert words in found[path]


@pytest.mark.parametrize("method", ["linear", "knn", "nearest-mean", "statistics", "side"])
def test_without_tokens_no_layer_is_tapped(method: str) -> None:
    # A ratio that keeps no token does not matter then.
    resolved = resolve(made(method=method, features={"tokens": False, "ratio": 0.0005}), VIT_B)
    spec = feature_spec(resolved, VIT_B, "0" * 64)
    assert (spec.layers, spec.kept, spec.statistics) == ((), 0, True)


def test_all_misfits_at_once() -> None:
    raw = {"features": {"layers": [12], "ratio": 0.0005}, "train": {"side_reduction": 7}}
    assert set(problems(made(**raw))) == {"features.layers", "features.ratio", "train.side_reduction"}
