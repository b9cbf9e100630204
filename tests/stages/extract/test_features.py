"""Selected keys, values and indices against a direct, unfused computation of the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from schemas.errors import DataError
from schemas.features import FeatureSpec, LpmInfo
from stages.extract.features import compute_features, to_pixels
from stages.extract.importance import QUERY_CHUNK, attend, select_tokens, token_importance
from stages.extract.taps import Taps
from stages.lpm.attention import Projected
from stages.lpm.loading import LoadedLpm, describe_lpm

# Class token; q/k norm and registers; no class token. At 272 pixels there are more queries than one chunk holds.
CASES = [("test_vit", "global"), ("test_vit", "class_token")]
CASES += [(name, "global") for name in ("test_vit2", "test_vit3", "test_vit4")]


def tiny(name: str, size: int) -> LoadedLpm:
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=size).eval()
    for parameter in model.parameters():
        # Timm's initialisation is so small that attention is nearly uniform; a trained model's is not.
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return LoadedLpm(model, describe_lpm(name, size), "0" * 64)


def spec_of(lpm: LpmInfo, layers: tuple[int, ...], importance: str, kept: int, dtype: str = "float32") -> FeatureSpec:
    fields = {"lpm": lpm, "layers": layers, "importance": importance, "kept": kept, "dtype": dtype}
    return FeatureSpec.model_validate({**fields, "weights_sha256": "0" * 64, "side_image_size": 32})


def direct(model: torch.nn.Module, pixels: torch.Tensor, layer: int, rule: str, kept: int):
    """The block's input by a plain forward pass, then the formulas, one head and one query at a time."""
    seen = {}
    handle = model.blocks[layer].register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    model.forward_features(pixels)
    handle.remove()
    block = model.blocks[layer]
    x = block.norm1(seen["x"])
    attention = block.attn
    batch, count, width = x.shape
    heads, d = attention.num_heads, width // attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q, k, v = (x @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width] for i in range(3))
    all_keys, all_values, all_indices = [], [], []
    for b in range(batch):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            qh, kh = attention.q_norm(q[b, :, part]), attention.k_norm(k[b, :, part])
            rows = torch.stack([torch.softmax(kh @ qh[i] / d**0.5, dim=0) for i in range(count)])
            s = rows.mean(dim=0) if rule == "global" else rows[0]
            order = sorted(range(count), key=lambda j, s=s: -float(s[j]))[:kept]
            all_indices.append(order)
            all_keys.append(kh[order])
            all_values.append(v[b, order][:, part])
    shape = (batch, heads, kept)
    return (
        torch.stack(all_keys).view(*shape, d),
        torch.stack(all_values).view(*shape, d),
        torch.tensor(all_indices).view(shape),
    )


@pytest.mark.parametrize(("name", "rule"), CASES)
@torch.inference_mode()
def test_selection_equals_the_formulas(name: str, rule: str) -> None:
    lpm = tiny(name, 272)
    assert lpm.info.tokens > QUERY_CHUNK
    layers = (0, lpm.info.depth - 1)
    kept = int(0.2 * lpm.info.tokens)
    spec = spec_of(lpm.info, layers, rule, kept)
    model = lpm.model.double()
    pixels = torch.randn(2, 3, 272, 272, dtype=torch.float64)
    with Taps(model, spec, lambda layer: layer) as taps:
        taps.run(pixels)
        tapped = taps.take()
    for layer, found in zip(layers, tapped, strict=True):
        keys, values, indices = direct(model, pixels, layer, rule, kept)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.keys, keys, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.values, values, rtol=0, atol=1e-9)


@torch.inference_mode()
def test_features_of_images_equal_the_formulas_in_single_precision() -> None:
    lpm = tiny("test_vit", 160)
    spec = spec_of(lpm.info, (2, 4), "global", 20)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)) for _ in range(3)]
    batch = compute_features(lpm, spec, [to_pixels(image, spec) for image in images])
    mean, std = torch.tensor(lpm.info.mean), torch.tensor(lpm.info.std)
    resized = [np.asarray(image.resize((160, 160), Image.Resampling.BICUBIC)) for image in images]
    pixels = torch.stack([((torch.tensor(x) / 255 - mean) / std).permute(2, 0, 1) for x in resized])
    for position, layer in enumerate(spec.layers):
        keys, values, indices = direct(lpm.model, pixels, layer, "global", 20)
        assert np.array_equal(batch["indices"][:, position], indices.numpy())
        np.testing.assert_allclose(batch["keys"][:, position], keys.numpy(), atol=1e-5, rtol=0)
        np.testing.assert_allclose(batch["values"][:, position], values.numpy(), atol=1e-5, rtol=0)
    tokens = lpm.model.forward_features(pixels)
    np.testing.assert_allclose(batch["pooled"][:, 0], tokens[:, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(batch["pooled"][:, 1], tokens[:, 1:].mean(1).numpy(), atol=1e-5)
    expected = np.asarray(images[1].resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(batch["side"][1], expected)


def test_a_batch_gives_what_single_images_give() -> None:
    lpm = tiny("test_vit", 160)
    spec = spec_of(lpm.info, (3,), "global", 20, dtype="float16")
    rng = np.random.default_rng(0)
    images = [to_pixels(Image.fromarray(rng.integers(0, 255, (160, 160, 3), dtype=np.uint8)), spec) for _ in range(3)]
    together = compute_features(lpm, spec, images)
    assert together["keys"].dtype == np.float16
    for row, image in enumerate(images):
        alone = compute_features(lpm, spec, [image])
        assert np.array_equal(alone["indices"][0], together["indices"][row])
        np.testing.assert_allclose(alone["keys"][0], together["keys"][row], atol=2e-3)


def test_importance_is_a_distribution_over_tokens() -> None:
    tokens = Projected(*(torch.randn(2, 3, 300, 8) for _ in range(3)))
    _, lse = attend(tokens, 0.3)
    for rule in ("global", "class_token"):
        found = token_importance(tokens, 0.3, rule, lse)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
        torch.testing.assert_close(found, token_importance(tokens, 0.3, rule))


def test_equal_importance_is_kept_in_order_of_the_tokens() -> None:
    importance = torch.tensor([[[1.0, 3.0, 1.0, 3.0, 1.0]]])
    assert select_tokens(importance, 4).tolist() == [[[1, 3, 0, 2]]]


def test_features_beyond_the_range_of_float16_are_refused() -> None:
    lpm = tiny("test_vit", 160)
    with torch.no_grad():
        lpm.model.blocks[3].attn.qkv.weight.mul_(1e6)
    spec = spec_of(lpm.info, (3,), "global", 20, dtype="float16")
    image = to_pixels(Image.fromarray(np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)), spec)
    with pytest.raises(DataError, match="float32"):
        compute_features(lpm, spec, [image])
