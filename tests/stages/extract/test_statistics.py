"""Token statistics: against a direct computation on plain forward passes, and through the stages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from study import make_study, predict, train_study

from schemas.errors import DataError
from schemas.features import FeatureSpec, LpmInfo
from schemas.statistics import middle
from stages.extract import taps
from stages.extract.features import Pixels, compute_features
from stages.extract.statistics import DIRECTIONS, directions, moments
from stages.lpm.attention import project
from stages.lpm.loading import LoadedLpm, describe_lpm
from stages.pixels import normalise
from stages.predict import classifier

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
NAMED = ("test_vit", "test_vit2", "test_vit3", "test_vit4")
"""timm's test models: class token; q/k norm and registers; without a class token."""
BUILT = (
    "vit_base_patch16_rpn_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "eva02_base_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_relpos_base_patch16_cls_224",
)
"""Families with projections of their own: separate or fused, with and without bias, norms in other places."""


def tiny(name: str) -> LoadedLpm:
    """A model of 4 x 4 patches with weights of which none is zero or one."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    size = 4 * (14 if "patch14" in name else 16)
    if name in NAMED:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=size).eval()
        info = describe_lpm(name, size)
    else:
        model = timm.create_model(name, pretrained=False, img_size=size, **TINY).eval()
        info = LpmInfo(
            name=name, depth=2, width=48, heads=3, patch=size // 4, prefix_tokens=model.num_prefix_tokens,
            has_class_token=getattr(model, "cls_token", None) is not None, image_size=size,
            mean=(0.5, 0.4, 0.5), std=(0.5, 0.5, 0.4), interpolation="bicubic",
            mlp_width=model.blocks[0].mlp.fc2.in_features,
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.05)
    return LoadedLpm(model, info, "0" * 64)


def spec_of(lpm: LpmInfo, **changes: Any) -> FeatureSpec:
    raw = {"lpm": lpm, "layers": (0, lpm.depth - 1), "importance": "global", "kept": 5, "dtype": "float32"}
    raw |= {"weights_sha256": "0" * 64, "side_image_size": 32, "statistics": True}
    return FeatureSpec.model_validate({**raw, **changes})


def pixels_of(lpm: LpmInfo, count: int = 3, seed: int = 0) -> list[Pixels]:
    rng = np.random.default_rng(seed)
    shapes = (lpm.image_size, lpm.image_size, 3), (3, 32, 32)
    return [Pixels(*(rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)) for _ in range(count)]


def triangle(tokens: Any) -> Any:
    """Signed roots of the covariances of (N, D) tokens in the fixed directions, row by row of the upper triangle."""
    axes = directions(tokens.shape[1]).numpy().astype(np.float64)
    matrix = np.cov((tokens @ axes).T, bias=True)
    values = [matrix[row, column] for row in range(DIRECTIONS) for column in range(row, DIRECTIONS)]
    return np.sign(values) * np.sqrt(np.abs(values))


@torch.inference_mode()
def direct(lpm: LoadedLpm, images: list[Pixels]) -> dict[str, Any]:
    """Name of a segment -> (B, numbers), of plain forward passes in double precision, image by image."""
    model: Any = lpm.model
    info = lpm.info
    inputs: dict[int, Any] = {}
    outputs: dict[int, torch.Tensor] = {}
    activations: dict[int, torch.Tensor] = {}
    handles = []
    for number, block in enumerate(model.blocks):
        handles += [
            block.attn.register_forward_hook(
                lambda module, args, kwargs, _out, number=number: inputs.update({number: (module, args, kwargs)}),
                with_kwargs=True,
            ),
            block.register_forward_hook(lambda _module, _args, out, number=number: outputs.update({number: out})),
            block.mlp.fc2.register_forward_pre_hook(
                lambda _module, args, number=number: activations.update({number: args[0]})
            ),
        ]
    found: dict[str, list[Any]] = {}
    for image in images:
        stacked = torch.from_numpy(image.lpm[None]).permute(0, 3, 1, 2)
        model.forward_features(normalise(stacked, info.mean, info.std))
        for number, tokens in outputs.items():
            wide = tokens[0].double().numpy()
            patches = wide[info.prefix_tokens :]
            first = [wide[0]] if info.has_class_token else []
            module, (entering, *rest), kwargs = inputs[number]
            value, constant = (
                project(module, some, *rest, **kwargs).value[0].transpose(0, 1).flatten(1).double().numpy()
                for some in (entering, torch.zeros_like(entering))
            )
            values = (value - constant)[info.prefix_tokens :]
            active = activations[number][0].double().numpy()[info.prefix_tokens :]
            parts = {
                "outputs": np.concatenate([*first, patches.mean(axis=0), patches.std(axis=0)]),
                "value means": values.mean(axis=0),
                "output covariance": triangle(patches),
                "value covariance": triangle(values),
                "MLP activations": np.concatenate([active.mean(axis=0), active.std(axis=0)]),
            }
            for kind, part in parts.items() if number in middle(info.depth) else list(parts.items())[:2]:
                found.setdefault(f"{kind} of block {number}", []).append(part)
    for handle in handles:
        handle.remove()
    return {name: np.stack(rows) for name, rows in found.items()}


def assert_close(found: Any, expected: Any, loss: float, name: str) -> None:
    """To a share of the largest number of a segment."""
    np.testing.assert_allclose(found, expected, rtol=loss, atol=loss * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("name", [*NAMED, *BUILT])
def test_statistics_equal_those_of_plain_forward_passes(name: str) -> None:
    lpm = tiny(name)
    spec, images = spec_of(lpm.info), pixels_of(lpm.info)
    batch = compute_features(lpm, spec, images)
    row = batch["statistics"]
    assert row.dtype == np.float16
    assert row.shape == (3, spec.segments[-1].stop)
    expected = direct(lpm, images)
    for position, layer in enumerate(spec.layers):
        for array in ("keys", "values"):
            tokens = batch[array][:, position].astype(np.float64)
            moments = [tokens.mean(axis=2).reshape(3, -1), tokens.std(axis=2).reshape(3, -1)]
            expected[f"kept {array} of block {layer}"] = np.concatenate(moments, axis=1)
    assert list(expected) == [one.name for one in spec.segments]
    for one in spec.segments:
        assert expected[one.name].std() > 1e-3, "equal numbers would prove nothing"
        assert_close(row[:, one.start : one.stop], expected[one.name], 2e-3, one.name)


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_in_bfloat16_they_are_roughly_the_same(name: str) -> None:
    lpm = tiny(name)
    images = pixels_of(lpm.info)
    row = compute_features(lpm, spec_of(lpm.info, precision="bfloat16"), images)["statistics"].astype(np.float64)
    exact = compute_features(lpm, spec_of(lpm.info), images)["statistics"].astype(np.float64)
    assert not np.array_equal(row, exact)
    for one in spec_of(lpm.info, layers=(), kept=0).segments:
        mine, other = row[:, one.start : one.stop], exact[:, one.start : one.stop]
        assert np.sqrt(((mine - other) ** 2).mean()) < 0.1 * np.sqrt((other**2).mean()), one.name


def test_a_batch_gives_what_single_images_give() -> None:
    lpm = tiny("test_vit")
    spec, images = spec_of(lpm.info), pixels_of(lpm.info)
    together = compute_features(lpm, spec, images)["statistics"]
    assert not np.array_equal(together[0], together[1])
    for position, image in enumerate(images):
        single = compute_features(lpm, spec, [image])["statistics"][0]
        assert_close(together[position], single.astype(np.float64), 2e-3, f"image {position}")


def test_a_large_common_offset_does_not_change_deviations() -> None:
    lpm = tiny("test_vit")
    spec, images = spec_of(lpm.info, layers=(), kept=0), pixels_of(lpm.info)
    last = next(one for one in spec.segments if one.name == f"outputs of block {lpm.info.depth - 1}")
    deviations = slice(last.stop - lpm.info.width, last.stop)
    plain = compute_features(lpm, spec, images)["statistics"][:, deviations].astype(np.float64)
    model: Any = lpm.model
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.bias += 2.0**12
    moved = compute_features(lpm, spec, images)["statistics"]
    assert moved[:, last.stop - 2 * lpm.info.width : deviations.start].min() > 2.0**11
    assert_close(moved[:, deviations], plain, 2e-3, "deviations")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_moments_do_not_depend_on_the_batch_or_the_size_of_a_step(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    tokens = torch.randn(3, 100, 40, generator=torch.manual_seed(0)).to(dtype)
    monkeypatch.setattr("stages.extract.statistics.CACHED", rows * 40)
    found = moments(list(tokens))
    wide = tokens.double()
    torch.testing.assert_close(found.mean.double(), wide.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.deviation.double(), wide.std(dim=1, correction=0), rtol=1e-5, atol=1e-6)
    for position, image in enumerate(tokens):
        single = moments([image])
        assert torch.equal(single.mean[0], found.mean[position])
        assert torch.equal(single.deviation[0], found.deviation[position])


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_an_mlp_that_runs_in_chunks_gives_the_same_statistics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of very many tokens pass through the MLP in chunks, of which only the first has the prefix tokens."""
    lpm = tiny(name)
    spec, images = spec_of(lpm.info), pixels_of(lpm.info)
    at_once = compute_features(lpm, spec, images)["statistics"].astype(np.float64)
    monkeypatch.setattr(taps, "MLP_CHUNK", 7)
    in_chunks = compute_features(lpm, spec, images)["statistics"]
    for one in spec.segments:
        assert_close(in_chunks[:, one.start : one.stop], at_once[:, one.start : one.stop], 2e-3, one.name)


@pytest.mark.parametrize(("method", "reads"), [("linear", False), ("statistics", True)])
def test_prediction_computes_them_only_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, reads: bool
) -> None:
    study = make_study(tmp_path, method=method)
    train_study(study, study.extract())
    computed: list[bool] = []
    monkeypatch.setattr(
        classifier, "compute_features", lambda *args: computed.append(args[1].statistics) or compute_features(*args)
    )
    images = [study.root / "images" / row.path for row in study.manifest.of("test")]
    rows = predict(study.root / "model", images, study.settings.lpm, study.root)
    assert all(row.predicted for row in rows)
    assert set(computed) == {reads}


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "vit_small_patch14_reg4_dinov2"])
def test_a_class_token_and_registers_are_not_among_the_patches(name: str) -> None:
    """Their outputs may be anything: only the class token's own numbers change."""
    lpm = tiny(name)
    assert lpm.info.prefix_tokens > 0
    spec, images = spec_of(lpm.info, layers=(), kept=0), pixels_of(lpm.info)
    plain = compute_features(lpm, spec, images)["statistics"]

    def shifted(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output[:, : lpm.info.prefix_tokens] += 3.0
        return output

    last: Any = lpm.model.blocks[-1]  # type: ignore[index]
    handle = last.register_forward_hook(shifted)
    changed = compute_features(lpm, spec, images)["statistics"]
    handle.remove()
    outputs = next(one for one in spec.segments if one.name == f"outputs of block {lpm.info.depth - 1}")
    width = lpm.info.width if lpm.info.has_class_token else 0
    assert outputs.stop - outputs.start == 2 * lpm.info.width + width
    differing = np.flatnonzero((plain != changed).any(axis=0))
    assert set(differing) <= set(range(outputs.start, outputs.start + width))
    assert len(differing) >= 0.9 * width


def test_directions_are_fixed() -> None:
    """Stores hold covariances in these directions: another choice needs another `FEATURE_VERSION`."""
    found = directions(48)
    assert found.shape == (48, DIRECTIONS)
    assert torch.equal(found.abs(), torch.full((48, DIRECTIONS), 48**-0.5))
    assert torch.equal(found, directions(48))
    assert hashlib.sha256((found > 0).numpy().tobytes()).hexdigest()[:16] == "860880de4c07cdd3"
    # Inner products survive the projection.
    tokens = torch.randn(50, 384, generator=torch.manual_seed(0))
    projected = tokens @ directions(384) * (384 / DIRECTIONS) ** 0.5
    exact, found = tokens.square().sum(dim=1), projected.square().sum(dim=1)
    assert float((found / exact - 1).abs().mean()) < 0.25


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_statistics_beyond_the_range_of_float16_are_refused(value: float) -> None:
    lpm = tiny("test_vit")
    model: Any = lpm.model
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.bias[0] = value
    spec = spec_of(lpm.info, layers=(0,), pooled=False)
    with pytest.raises(DataError, match="token statistics") as caught:
        compute_features(lpm, spec, pixels_of(lpm.info))
    assert "features.statistics" in str(caught.value)
    without = compute_features(lpm, spec.model_copy(update={"statistics": False}), pixels_of(lpm.info))
    assert np.isfinite(without["keys"]).all()


def test_kept_moments_beyond_the_range_of_float16_are_refused() -> None:
    lpm = tiny("test_vit")
    model: Any = lpm.model
    width = lpm.info.width
    with torch.no_grad():
        # The bias of keys is in no statistic but theirs.
        model.blocks[-1].attn.qkv.bias[width] = 1e6
    with pytest.raises(DataError, match="token statistics"):
        compute_features(lpm, spec_of(lpm.info), pixels_of(lpm.info))
    assert compute_features(lpm, spec_of(lpm.info, layers=(0,)), pixels_of(lpm.info))


def test_hooks_leave_nothing_behind() -> None:
    lpm = tiny("test_vit")
    compute_features(lpm, spec_of(lpm.info), pixels_of(lpm.info))
    for module in lpm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "hidden": {"dtype": "float16", "hidden": 2},
    "bfloat16": {"dtype": "float16", "precision": "bfloat16"},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_arrays_are_the_same_bits_with_and_without_statistics(form: str) -> None:
    lpm = tiny("test_vit")
    images = pixels_of(lpm.info)
    with_them, without = (
        compute_features(lpm, spec_of(lpm.info, statistics=present, **FORMS[form]), images).arrays
        for present in (True, False)
    )
    assert set(with_them) - set(without) == {"statistics"}
    assert {"keys", "values", "indices", "pooled", "side"} <= set(without)
    for name, array in without.items():
        assert array.tobytes() == with_them[name].tobytes(), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_the_bytes_of_a_row(form: str, statistics: bool, tokens: bool, pooled: bool) -> None:
    lpm = tiny("test_vit")
    changes = {**FORMS[form], "statistics": statistics, "pooled": pooled}
    if not tokens:
        changes |= {"layers": (), "kept": 0}
    spec = spec_of(lpm.info, **changes)
    arrays = compute_features(lpm, spec, pixels_of(lpm.info, 1)).arrays
    # The digest of the image is added by the writer.
    assert sum(array.nbytes for array in arrays.values()) + 32 == spec.bytes_per_image
    assert ("keys" in arrays, "statistics" in arrays, "pooled" in arrays) == (tokens, statistics, pooled)
