"""Statistics and pooled outputs of feature maps, against a plain computation on timm's own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from map_models import FAMILIES, save_model

from schemas.errors import DataError
from schemas.features import FeatureSpec, LpmInfo
from schemas.settings import LpmSettings
from stages.extract.features import Pixels, compute_features
from stages.extract.statistics import DIRECTIONS, directions
from stages.lpm.loading import LoadedLpm, load_lpm
from stages.pixels import normalise


def loaded(folder: Path, family: str) -> LoadedLpm:
    save_model(folder, family)
    return load_lpm(LpmSettings(name=f"local-dir:{folder}"), FAMILIES[family][1], folder, with_tokens=False)


def spec_of(lpm: LpmInfo, **changes: Any) -> FeatureSpec:
    raw = {"lpm": lpm, "layers": (), "importance": "global", "kept": 0, "dtype": "float32"}
    raw |= {"weights_sha256": "0" * 64, "side_image_size": 32, "statistics": True}
    return FeatureSpec.model_validate({**raw, **changes})


def pixels_of(lpm: LpmInfo, count: int = 3) -> list[Pixels]:
    rng = np.random.default_rng(0)
    shapes = (lpm.image_size, lpm.image_size, 3), (3, 32, 32)
    return [Pixels(*(rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)) for _ in range(count)]


def triangle(tokens: Any) -> Any:
    """Signed roots of the covariances of (N, C) positions in the fixed directions, row by row of the upper triangle."""
    matrix = np.cov((tokens @ directions(tokens.shape[1]).numpy().astype(np.float64)).T, bias=True)
    values = [matrix[row, column] for row in range(DIRECTIONS) for column in range(row, DIRECTIONS)]
    return np.sign(values) * np.sqrt(np.abs(values))


@torch.inference_mode()
def plain(folder: Path, family: str, info: LpmInfo, images: list[Pixels]) -> tuple[Any, Any]:
    """(B, F) statistics and (B, D) pooled outputs of timm's model, image by image."""
    name, size, arguments = FAMILIES[family]
    # SAM is built for its pretraining, and resamples positions itself.
    at = {"img_size": size} if family in ("swin", "swinv2", "hiera", "maxvit", "parallel") else {}
    model: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(folder / "model.safetensors")}, **arguments, **at
    ).eval()
    rows, pooled = [], []
    for image in images:
        pixels = normalise(torch.from_numpy(image.lpm[None]).permute(0, 3, 1, 2), info.mean, info.std)
        maps = model.forward_intermediates(pixels, intermediates_only=True)[-info.depth :]
        parts = []
        for one in maps:
            tokens = one[0].flatten(1).T.double().numpy()
            parts += [tokens.mean(axis=0), tokens.std(axis=0), triangle(tokens)]
        rows.append(np.concatenate(parts))
        pooled.append(model.forward_head(model.forward_features(pixels), pre_logits=True)[0].numpy())
    return np.stack(rows), np.stack(pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_those_of_plain_forward_passes(tmp_path: Path, family: str) -> None:
    lpm = loaded(tmp_path, family)
    spec, images = spec_of(lpm.info), pixels_of(lpm.info)
    batch = compute_features(lpm, spec, images)
    assert set(batch.arrays) == {"statistics", "pooled", "side"}
    statistics, pooled = plain(tmp_path, family, lpm.info, images)
    assert batch["statistics"].dtype == np.float16
    assert batch["statistics"].shape == statistics.shape == (3, spec.segments[-1].stop)
    for one in spec.segments:
        expected = statistics[:, one.start : one.stop]
        assert expected.std() > 1e-3, "equal numbers would prove nothing"
        limit = 2e-3 * np.abs(expected).max()
        np.testing.assert_allclose(
            batch["statistics"][:, one.start : one.stop], expected, 2e-3, limit, err_msg=one.name
        )
    assert batch["pooled"].shape == (3, 2, lpm.info.width)
    assert pooled.std() > 1e-3
    for output in range(2):
        np.testing.assert_allclose(batch["pooled"][:, output], pooled, rtol=1e-4, atol=1e-4)
    # The digest of the image is added by the writer.
    stored = sum(array.nbytes for array in batch.arrays.values()) // 3
    assert stored + 32 == spec.bytes_per_image


@pytest.mark.parametrize("family", ["convnext", "swin", "sam"])
def test_in_bfloat16_they_are_roughly_the_same(tmp_path: Path, family: str) -> None:
    lpm = loaded(tmp_path, family)
    images = pixels_of(lpm.info)
    rough, exact = (
        compute_features(lpm, spec_of(lpm.info, precision=kind), images) for kind in ("bfloat16", "float32")
    )
    for name in ("statistics", "pooled"):
        mine, other = rough[name].astype(np.float64), exact[name].astype(np.float64)
        assert not np.array_equal(mine, other)
        assert np.sqrt(((mine - other) ** 2).mean()) < 0.05 * np.sqrt((other**2).mean()), name


def test_only_what_the_spec_names_is_computed(tmp_path: Path) -> None:
    lpm = loaded(tmp_path, "convnext")
    images = pixels_of(lpm.info, 1)
    assert set(compute_features(lpm, spec_of(lpm.info, statistics=False), images).arrays) == {"pooled", "side"}
    assert set(compute_features(lpm, spec_of(lpm.info, pooled=False), images).arrays) == {"statistics", "side"}


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, value: float) -> None:
    lpm = loaded(tmp_path, "convnext")
    model: Any = lpm.model
    with torch.no_grad():
        model.stages[-1].blocks[-1].mlp.fc2.bias[0] = value
        model.stages[-1].blocks[-1].gamma[0] = 1.0
    with pytest.raises(DataError, match="token statistics"):
        compute_features(lpm, spec_of(lpm.info), pixels_of(lpm.info, 1))
