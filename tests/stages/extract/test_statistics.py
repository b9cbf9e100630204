"""Token statistics: against a direct computation on plain forward passes, and through the stages."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import zarr
from study import Study, make_study, predict, train_study

from schemas.errors import CacheMismatchError, DataError, SettingsError
from schemas.features import FeatureSpec, LpmInfo
from schemas.parse import parse_settings
from schemas.resolve import resolve
from schemas.statistics import middle
from stages.evaluate.evaluator import evaluate
from stages.extract.features import Pixels, compute_features
from stages.extract.statistics import DIRECTIONS, directions
from stages.lpm.attention import project
from stages.lpm.loading import LoadedLpm, describe_lpm
from stages.pixels import normalise
from stages.store.layout import open_store_layout
from stages.store.reader import open_store
from stages.train.bundle import load_bundle

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


def group_of(study: Study, spec: FeatureSpec) -> Any:
    return zarr.open_group(open_store_layout(study.cache, spec).path / "features.zarr", mode="r")


def test_a_store_lists_its_statistics(study: Study) -> None:
    receipt = study.extract()
    group = group_of(study, receipt.spec)
    listed = group.attrs["statistics"]
    assert listed == [[one.name, one.start, one.stop] for one in receipt.spec.segments]
    assert group["statistics"].shape[1] == listed[-1][2]
    assert group["statistics"].dtype == np.float16
    ids = study.manifest.ids()
    read = open_store(study.cache, receipt).read(ids, ["statistics", "keys"])
    last = receipt.spec.layers[-1]
    start, stop = next((start, stop) for name, start, stop in listed if name == f"kept keys of block {last}")
    keys = read["keys"][:, -1].astype(np.float32)
    expected = np.concatenate([moment(axis=2).reshape(len(ids), -1) for moment in (keys.mean, keys.std)], axis=1)
    # Of keys before they were rounded to the type of the store.
    assert_close(read["statistics"][:, start:stop], expected, 3e-3, "kept keys")


def test_stores_with_and_without_statistics_have_the_same_other_arrays(tmp_path: Path) -> None:
    read = {}
    for present in (True, False):
        study = make_study(tmp_path / str(present), features={"statistics": present})
        receipt = study.extract()
        assert ("statistics" in group_of(study, receipt.spec).attrs) == present
        names = ["keys", "values", "indices", "pooled", "side"]
        read[present] = open_store(study.cache, receipt).read(study.manifest.ids(), names)
    for name, array in read[False].items():
        assert np.array_equal(array, read[True][name]), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study without cached tokens."""
    return make_study(tmp_path_factory.mktemp("small"), method="linear", features={"tokens": False})


def test_without_tokens_a_store_has_only_what_closed_forms_and_side_networks_read(small: Study) -> None:
    receipt = small.extract()
    group = group_of(small, receipt.spec)
    assert set(group.array_keys()) == {"pooled", "statistics", "side", "sha256"}
    assert "dequantise" not in group.attrs
    assert all(not name.startswith("kept") for name, _, _ in group.attrs["statistics"])


@pytest.mark.parametrize("method", ["linear", "knn", "nearest-mean", "statistics", "side"])
def test_without_tokens_such_methods_train_evaluate_and_predict(small: Study, method: str) -> None:
    receipt = small.extract()
    settings = small.settings.model_copy(update={"method": method})
    output = f"model-{method}"
    train_study(small, receipt, output, settings)
    metrics = evaluate(small.files(receipt), small.root / output, small.root / f"evaluation-{method}", "train")
    if method != "side":
        assert metrics.accuracy > 0.7
    image = next((small.root / "images/stripe").iterdir())
    row = predict(small.root / output, [image], small.settings.lpm, small.root)[0]
    assert row.error is None
    assert row.predicted in load_bundle(small.root / output).spec.classes


TOKEN_METHODS = ("fpt", "fpt+", "fpt-x", "attentive")


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_without_tokens_methods_that_read_them_are_refused(small: Study, method: str) -> None:
    raw = {"method": method, "train": {"side_reduction": 4, "side_image_size": 32}}
    with pytest.raises(SettingsError, match=r"features\.tokens") as refused:
        resolve(parse_settings({**raw, "features": {"tokens": False}}), small.lpm)
    assert dict(refused.value.problems) == {"features.tokens": f"must be true: {method} reads cached tokens"}
    # The setting is right now, but the store was extracted without tokens.
    receipt = small.extract()
    features = {**small.settings.features.model_dump(), "tokens": True}
    wanted = resolve(parse_settings({**raw, "features": features}), small.lpm)
    settings = small.settings.model_copy(update={"method": method, "features": wanted.features, "train": wanted.train})
    with pytest.raises(CacheMismatchError, match=r"features\.tokens"):
        train_study(small, receipt, "refused", settings)


def test_without_statistics_only_the_probes_that_read_them_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, method="linear", features={"statistics": False})
    receipt = study.extract()
    assert "statistics" not in group_of(study, receipt.spec)
    train_study(study, receipt)
    for method in ("statistics", "fpt-x"):
        raw = {"method": method, "train": {"side_reduction": 4, "side_image_size": 32}}
        with pytest.raises(SettingsError, match=r"features\.statistics"):
            resolve(parse_settings({**raw, "features": {"statistics": False}}), study.lpm)
        wanted = resolve(
            parse_settings({**raw, "features": study.settings.features.model_dump() | {"statistics": True}}), study.lpm
        )
        changed = {"method": method, "features": wanted.features, "train": wanted.train}
        with pytest.raises(CacheMismatchError, match=r"features\.statistics"):
            train_study(study, receipt, "refused", study.settings.model_copy(update=changed))


def test_a_model_of_pooled_outputs_may_read_a_store_with_more(tmp_path: Path) -> None:
    """Trained with and without tokens and statistics in the store, the model is the same."""
    models = []
    for number, features in enumerate(({}, {"tokens": False}, {"statistics": False})):
        study = make_study(tmp_path / str(number), method="linear", features=features)
        train_study(study, study.extract())
        models.append((study.root / "model/model.safetensors").read_bytes())
    assert models[0] == models[1] == models[2]
