"""Hidden tokens: what the store holds is what enters the block, and every command of the store works with it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from study import Study, make_study

from pipeline.cluster.executor import on_cluster
from schemas.features import FeatureSpec
from schemas.parse import parse_settings
from schemas.resolve import feature_spec
from stages.extract.extractor import ExtractProgress
from stages.extract.features import compute_features, to_pixels
from stages.extract.plan import plan_extraction
from stages.lpm.loading import LoadedLpm, describe_lpm, load_lpm
from stages.store.array_layouts import array_layouts
from stages.store.layout import impossible, open_store_layout
from stages.store.manage.reuse import serves
from stages.store.manage.transfer import pull, push
from stages.store.manage.verify import verify_store
from stages.store.quantise import HIDDEN_ARRAYS, decode_hidden, encode_hidden
from stages.store.reader import open_store, read_receipt
from stages.store.remote import open_remote, remote_stores
from stages.store.remote_rows import open_rows

# Class token; q/k norm and registers; rotary positions; relative positions.
MODELS = ("test_vit", "test_vit3", "vit_tiny_rope", "beit_tiny")
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_tiny_rope": ("eva02_tiny_patch14_224", {"depth": 4, "embed_dim": 48, "num_heads": 3}),
    "beit_tiny": ("beit_base_patch16_224", {"depth": 4, "embed_dim": 48, "num_heads": 3}),
}


def tiny(name: str) -> LoadedLpm:
    torch.manual_seed(1)
    architecture, options = BUILDS.get(name, (name, {}))
    info = describe_lpm(architecture, 64)
    model = timm.create_model(architecture, pretrained=False, num_classes=0, img_size=info.image_size, **options).eval()
    shape = {"depth": len(model.blocks), "width": model.embed_dim, "heads": model.blocks[0].attn.num_heads}
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return LoadedLpm(model, info.model_copy(update=shape), "0" * 64)


def spec_of(lpm: LoadedLpm, hidden: int | None, **changes: Any) -> FeatureSpec:
    fields = {"lpm": lpm.info, "layers": (1,), "importance": "global", "kept": 3, "dtype": "float32", "hidden": hidden}
    return FeatureSpec(**{**fields, "weights_sha256": "0" * 64, "side_image_size": 32, **changes})


def images(spec: FeatureSpec, count: int = 2) -> list[Any]:
    rng = np.random.default_rng(0)
    return [to_pixels(Image.fromarray(rng.integers(0, 255, (90, 80, 3), np.uint8)), spec) for _ in range(count)]


def decoded(arrays: Any, spec: FeatureSpec) -> torch.Tensor:
    return decode_hidden({name: torch.from_numpy(arrays[name]) for name in HIDDEN_ARRAYS if name in arrays}, spec)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hidden", [0, 1, 3])
def test_float32_tokens_are_exactly_those_that_enter_the_block(name: str, hidden: int) -> None:
    lpm = tiny(name)
    spec = spec_of(lpm, hidden)
    entered: list[torch.Tensor] = []
    block = lpm.model.blocks[hidden]
    handle = block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].clone()))
    batch = compute_features(lpm, spec, images(spec))
    handle.remove()
    found = decoded(batch.arrays, spec)
    assert found.shape == (2, lpm.info.tokens, lpm.info.width)
    assert torch.equal(found, entered[0])
    assert not block._forward_pre_hooks, "the hook is removed"


@torch.inference_mode()
def test_the_blocks_above_give_the_final_tokens() -> None:
    """What a method that trains the last blocks relies on."""
    lpm = tiny("test_vit")
    spec = spec_of(lpm, 4)
    batch = compute_features(lpm, spec, images(spec))
    tokens = decoded(batch.arrays, spec)
    for block in lpm.model.blocks[4:]:
        tokens = block(tokens)
    np.testing.assert_allclose(batch["pooled"][:, 0], lpm.model.norm(tokens)[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_hidden_block_changes_no_other_array(precision: str) -> None:
    lpm = tiny("test_vit")
    without, with_hidden = (spec_of(lpm, hidden, precision=precision) for hidden in (None, 3))
    expected = compute_features(lpm, without, images(without))
    found = compute_features(lpm, with_hidden, images(with_hidden))
    assert set(found.arrays) == set(expected.arrays) | {"hidden"}
    for name, array in expected.arrays.items():
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize(("hidden", "last"), [(0, 1), (1, 1), (3, 2), (None, 1)])
def test_no_block_runs_that_is_not_needed(hidden: int | None, last: int) -> None:
    """Without pooled outputs the pass ends in the highest block that is tapped, or before the one that is entered."""
    lpm = tiny("test_vit")
    spec = spec_of(lpm, hidden, pooled=False)
    complete = compute_features(lpm, spec_of(lpm, hidden), images(spec))
    ran: list[int] = []
    for number, block in enumerate(lpm.model.blocks):
        block.norm1.register_forward_pre_hook(lambda _, __, number=number: ran.append(number))
    found = compute_features(lpm, spec, images(spec))
    assert ran == list(range(last + 1))
    assert set(found.arrays) == set(array_layouts(spec)) - {"sha256"}
    for name, array in found.arrays.items():
        assert np.array_equal(array, complete[name]), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_the_decoded_tokens_are_within_the_bound_of_their_dtype(dtype: str) -> None:
    lpm = tiny("test_vit")
    spec = spec_of(lpm, 3, dtype=dtype)
    exact = decoded(compute_features(lpm, spec_of(lpm, 3), images(spec)).arrays, spec_of(lpm, 3))
    batch = compute_features(lpm, spec, images(spec))
    layouts = array_layouts(spec)
    for name in HIDDEN_ARRAYS:
        assert (name in batch.arrays) == (name in layouts)
        if name in layouts:
            assert (batch[name].shape[1:], batch[name].dtype.name) == (layouts[name].shape, layouts[name].dtype)
    error = (decoded(batch.arrays, spec) - exact).abs()
    offset = exact.mean(dim=1, keepdim=True).half().float()
    largest = (exact - offset).abs()
    bound = {
        "float32": torch.zeros(()),
        "float16": exact.abs() * 2**-11 + 2**-25,
        # Half a step of the token; its scale is at most an eighth of an octave above the one that just fits.
        "int8": 0.5001 * 2 ** (1 / 8) * largest.amax(dim=2, keepdim=True) / 127 + 1e-6,
        # Scales that clip are taken only where they lower the squared error of the channel.
        "int4": 0.5001 * 2 ** (1 / 8) * largest.amax(dim=1, keepdim=True) / 7.5 * exact.shape[1] ** 0.5,
    }[dtype]
    assert (error <= bound).all()
    assert error.max() > 0 or dtype == "float32"


def test_int8_tokens_of_vit_base_at_512_take_0_8_megabytes() -> None:
    lpm = describe_lpm("vit_base_patch16_384.orig_in21k_ft_in1k", 512)
    fields = {"lpm": lpm, "layers": (11,), "importance": "global", "kept": 205, "dtype": "int8", "side_image_size": 144}
    plain = FeatureSpec(**fields, weights_sha256="0" * 64)
    extra = plain.model_copy(update={"hidden": 9}).bytes_per_image - plain.bytes_per_image
    assert extra == 1025 * 768 + 1025 + 2 * 768
    assert extra < 0.8e6


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_bytes_per_image_are_those_of_the_arrays(dtype: str) -> None:
    spec = spec_of(tiny("test_vit"), 3, dtype=dtype)
    arrays = sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in array_layouts(spec).values())
    assert spec.bytes_per_image == spec.bytes_by_dtype[dtype] == arrays


def test_tokens_that_are_not_finite_are_refused() -> None:
    spec = spec_of(tiny("test_vit"), 3, dtype="float16")
    with pytest.raises(ValueError, match="hidden tokens"):
        encode_hidden(torch.full((1, 2, 3), 1e30), spec)


def hidden_study(folder: Path, **features: Any) -> Study:
    return make_study(folder, per_class=5, features={"hidden": 4, **features})


@pytest.mark.parametrize(
    ("features", "error"),
    [({"dtype": "int8"}, 0.01), ({"dtype": "int4", "codec": "zstd"}, 0.15), ({"dtype": "float32"}, 0.0)],
)
def test_a_store_holds_what_prediction_computes(tmp_path: Path, features: dict[str, Any], error: float) -> None:
    study = hidden_study(tmp_path, **features)
    receipt = study.extract()
    store = open_store_layout(study.cache, receipt.spec)
    assert verify_store(store).damages == ()
    ids = read_receipt(store, 0).rows
    stored = open_store(study.cache, receipt).read(ids, array_layouts(receipt.spec))
    paths = {row.id: study.root / "images" / row.path for row in study.manifest.rows}
    pixels = [to_pixels(Image.open(paths[row_id]).convert("RGB"), receipt.spec) for row_id in ids]
    lpm = load_lpm(study.settings.lpm, 64, study.root)
    computed = compute_features(lpm, receipt.spec, pixels)
    for name in computed.arrays:
        assert np.array_equal(stored[name], computed[name]), name
    exact = decoded(compute_features(lpm, spec_of(lpm, 4), pixels).arrays, spec_of(lpm, 4))
    left = decoded(stored, receipt.spec)
    assert float((left - exact).norm() / exact.norm()) <= error


def test_a_second_extraction_computes_nothing(tmp_path: Path) -> None:
    study = hidden_study(tmp_path, dtype="int8")
    first = study.extract()
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.cached, plan.to_compute, plan.fingerprint) == (15, 0, first.fingerprint)
    seen: list[ExtractProgress] = []
    assert study.extract(progress=seen.append) == first
    assert seen[0].cached == 15


def test_a_store_with_hidden_tokens_serves_a_study_without(tmp_path: Path) -> None:
    study = hidden_study(tmp_path)
    full = study.extract()
    for changes, reused in (({"hidden": None}, 15), ({"hidden": 3}, 0), ({"hidden": 4, "pooled": False}, 15)):
        settings = study.changed(features=changes)
        plan = plan_extraction(settings, study.root, study.cache, study.manifest)
        assert (plan.reused, plan.to_compute) == (reused, 15 - reused), changes
        assert serves(feature_spec(settings, study.lpm, full.spec.weights_sha256), full.spec) == bool(reused)
    study.settings = study.changed(features={"layers": (5,), "pooled": False})
    fewer = study.extract()
    ids = study.manifest.ids()
    left, right = (open_store(study.cache, receipt).read(ids, ["hidden"])["hidden"] for receipt in (full, fewer))
    assert np.array_equal(left, right)
    study.settings = study.changed(features={"hidden": None})
    plain = study.extract()
    assert "hidden" not in open_store(study.cache, plain).layouts
    assert not serves(full.spec, plain.spec)


def test_a_damaged_file_of_hidden_tokens_is_found(tmp_path: Path) -> None:
    study = hidden_study(tmp_path, dtype="int8")
    receipt = study.extract()
    store = open_store_layout(study.cache, receipt.spec)
    path = store.shard_file("hidden_scale", 1)
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert [damage.shard for damage in verify_store(store).damages] == [1]
    seen: list[ExtractProgress] = []
    study.extract(check=True, progress=seen.append)
    assert seen[-1].repaired == 1
    assert verify_store(store).damages == ()


def test_hidden_tokens_travel_with_their_store(tmp_path: Path) -> None:
    study = hidden_study(tmp_path, dtype="int8")
    receipt = study.extract()
    ids = study.manifest.ids()
    with closing(open_store(study.cache, receipt)) as reader:
        expected = reader.read(ids, HIDDEN_ARRAYS)
    remote = open_remote(str(tmp_path / "remote"))
    assert push(open_store_layout(study.cache, receipt.spec), remote).failures == ()
    with closing(open_rows(tmp_path / "empty", receipt, str(tmp_path / "remote"))) as reader:
        in_place = reader.read(ids, HIDDEN_ARRAYS)
    (offered,) = remote_stores(remote)
    assert pull(offered, tmp_path / "pulled").failures == ()
    with closing(open_store(tmp_path / "pulled", receipt)) as reader:
        pulled = reader.read(ids, HIDDEN_ARRAYS)
    for name in HIDDEN_ARRAYS:
        assert np.array_equal(in_place[name], expected[name]), name
        assert np.array_equal(pulled[name], expected[name]), name


@pytest.mark.timeout(300)
def test_workers_of_a_cluster_write_the_same_rows(tmp_path: Path) -> None:
    """Also with the statistics of the training images and another filter: workers take the spec of the store."""
    features = {"dtype": "int8", "normalisation": "dataset", "filter": "bilinear"}
    alone, shared = hidden_study(tmp_path / "a", **features), hidden_study(tmp_path / "b", **features)
    expected = alone.extract()
    cluster = parse_settings({"cluster": {"kind": "local", "workers": 2}}).cluster
    shared.settings = shared.settings.model_copy(update={"cluster": cluster})
    receipt = shared.extract(execute=on_cluster)
    assert receipt.spec == expected.spec
    ids, names = alone.manifest.ids(), [name for name in array_layouts(receipt.spec) if name != "pooled"]
    left, right = open_store(alone.cache, expected).read(ids, names), open_store(shared.cache, receipt).read(ids, names)
    for name in names:
        assert np.array_equal(left[name], right[name]), name


def test_a_spec_with_an_impossible_block_is_refused() -> None:
    lpm = tiny("test_vit")
    assert impossible(spec_of(lpm, lpm.info.depth - 1)) is None
    assert "hidden" in str(impossible(spec_of(lpm, lpm.info.depth)))
