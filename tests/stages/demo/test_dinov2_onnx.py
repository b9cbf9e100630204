from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from timm.models.vision_transformer import VisionTransformer

from schemas.errors import WeightsError
from stages.demo.dinov2_onnx import timm_weights

WIDTH, DEPTH, GRID, PATCH = 8, 2, 3, 14
TOKENS = 1 + GRID * GRID


class Export:
    """Build a runnable graph with the names of an exported Hugging Face DINOv2 backbone and random weights."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.number = 1000
        embeddings = "backbone.embeddings"
        self.add(f"{embeddings}.cls_token", 1, 1, WIDTH)
        self.add(f"{embeddings}.patch_embeddings.projection.weight", WIDTH, 3, PATCH, PATCH)
        self.add(f"{embeddings}.patch_embeddings.projection.bias", WIDTH)
        self.position()
        for layer in range(DEPTH):
            self.layer(layer)
        self.add("backbone.layernorm.weight", WIDTH)
        self.add("backbone.layernorm.bias", WIDTH)
        self.add("decoder.final_conv.weight", 1, WIDTH, 1, 1)

    def add(self, name: str, *shape: int) -> str:
        self.initializers[name] = self.random.standard_normal(shape).astype(np.float32)
        return name

    def nameless(self, kind: str, *shape: int) -> str:
        self.number += 3
        return self.add(f"onnx::{kind}_{self.number}", *shape)

    def node(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_output_0"], name=name, **attributes))
        return f"{name}_output_0"

    def position(self) -> None:
        place = "/backbone/embeddings"
        self.initializers["grid"] = np.array([1, GRID, GRID, WIDTH])
        self.initializers["flat"] = np.array([1, GRID * GRID, WIDTH])
        grid = self.node("Reshape", f"{place}/Reshape_1", [self.nameless("Reshape", 1, GRID * GRID, WIDTH), "grid"])
        flat = self.node("Reshape", f"{place}/Reshape_2", [grid, "flat"])
        both = self.node("Concat", f"{place}/Concat_6", [self.nameless("Concat", 1, 1, WIDTH), flat], axis=1)
        self.node("Add", f"{place}/Add", ["tokens", both])

    def layer(self, layer: int) -> None:
        theirs = f"backbone.encoder.layer.{layer}"
        # The exporter does not number them in the order query, key, value.
        for place, wide in (
            ("attention.attention.key", (WIDTH, WIDTH)),
            ("attention.attention.value", (WIDTH, WIDTH)),
            ("attention.attention.query", (WIDTH, WIDTH)),
            ("attention.output.dense", (WIDTH, WIDTH)),
            ("mlp.fc1", (WIDTH, 4 * WIDTH)),
            ("mlp.fc2", (4 * WIDTH, WIDTH)),
        ):
            name = f"/{theirs}/{place}".replace(".", "/").replace("layer/", "layer.")
            source = "hidden" if place == "mlp.fc2" else "tokens"
            product = self.node("MatMul", f"{name}/MatMul", [source, self.nameless("MatMul", *wide)])
            self.node("Add", f"{name}/Add", [self.add(f"{theirs}.{place}.bias", wide[1]), product])
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            self.add(f"{theirs}.{name}", WIDTH)
        for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            self.add(f"{theirs}.{name}", WIDTH)

    def model(self) -> Any:
        graph = helper.make_graph(
            self.nodes,
            "backbone",
            [
                helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [1, TOKENS, WIDTH]),
                helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, TOKENS, 4 * WIDTH]),
            ],
            [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in self.nodes],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)

    def run(self, tokens: np.ndarray, hidden: np.ndarray) -> dict[str, np.ndarray]:
        values = ReferenceEvaluator(self.model()).run(None, {"tokens": tokens, "hidden": hidden})
        return {node.name: value for node, value in zip(self.nodes, values, strict=True)}


def vit(weights: dict[str, torch.Tensor]) -> VisionTransformer:
    model = VisionTransformer(
        img_size=GRID * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        num_classes=0,
        init_values=1e-5,
    )
    model.load_state_dict(weights, strict=True)
    return model.eval()


@torch.no_grad()
def test_every_linear_layer_computes_what_the_graph_computes() -> None:
    export = Export()
    model = vit(timm_weights(export.model().SerializeToString()))
    random = np.random.default_rng(1)
    tokens = random.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    hidden = random.standard_normal((1, TOKENS, 4 * WIDTH)).astype(np.float32)
    expected = export.run(tokens, hidden)
    x, h = torch.from_numpy(tokens), torch.from_numpy(hidden)
    for layer, block in enumerate(model.blocks):
        place = f"/backbone/encoder/layer.{layer}"
        parts = [expected[f"{place}/attention/attention/{part}/Add"] for part in ("query", "key", "value")]
        np.testing.assert_allclose(block.attn.qkv(x).numpy(), np.concatenate(parts, axis=2), atol=1e-5)
        np.testing.assert_allclose(block.attn.proj(x), expected[f"{place}/attention/output/dense/Add"], atol=1e-5)
        np.testing.assert_allclose(block.mlp.fc1(x), expected[f"{place}/mlp/fc1/Add"], atol=1e-5)
        np.testing.assert_allclose(block.mlp.fc2(h), expected[f"{place}/mlp/fc2/Add"], atol=1e-5)
    np.testing.assert_allclose(x + model.pos_embed, expected["/backbone/embeddings/Add"], atol=1e-6)


def test_vectors_keep_their_meaning() -> None:
    export = Export()
    weights = timm_weights(export.model().SerializeToString())
    for ours, theirs in {
        "cls_token": "embeddings.cls_token",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        "blocks.1.norm1.weight": "encoder.layer.1.norm1.weight",
        "blocks.1.norm2.bias": "encoder.layer.1.norm2.bias",
        "blocks.1.ls1.gamma": "encoder.layer.1.layer_scale1.lambda1",
        "blocks.0.ls2.gamma": "encoder.layer.0.layer_scale2.lambda1",
    }.items():
        np.testing.assert_array_equal(weights[ours].numpy(), export.initializers[f"backbone.{theirs}"])


def test_the_rest_of_the_network_is_left_out() -> None:
    assert not [key for key in timm_weights(Export().model().SerializeToString()) if "decoder" in key]


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("backbone.encoder.layer.0.norm2.bias", "norm2.bias"),
        ("backbone.embeddings.cls_token", "cls_token"),
        ("onnx::Concat_1006", "position embedding"),
        ("onnx::MatMul_1009", "key with one weight"),
    ],
)
def test_an_incomplete_backbone_is_refused(lost: str, reason: str) -> None:
    model = Export().model()
    kept = [item for item in model.graph.initializer if item.name != lost]
    assert len(kept) == len(model.graph.initializer) - 1
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    with pytest.raises(WeightsError, match=reason):
        timm_weights(model.SerializeToString())


def test_another_model_is_refused() -> None:
    graph = helper.make_graph([], "empty", [], [], [])
    with pytest.raises(WeightsError, match="not contain a DINOv2 backbone"):
        timm_weights(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("content", [b"", b"\x13\x37" * 100, b"PK\x03\x04 not onnx"])
def test_garbage_is_refused(content: bytes) -> None:
    with pytest.raises(WeightsError, match=r"not an ONNX model|not contain a DINOv2 backbone"):
        timm_weights(content)
