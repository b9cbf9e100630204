"""Convert an ONNX export of a Hugging Face DINOv2 backbone to weights with timm's names.

The exporter keeps the names of biases and norms, but stores the transposed matrix of each linear layer and the two
parts of the position embedding as constants with generated names (`onnx::MatMul_1966`). They are identified by the
node that reads them, never by their number.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from schemas.errors import WeightsError

_LINEAR = {
    "attention/output/dense": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
_VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
_QKV = ("query", "key", "value")


def timm_weights(content: bytes) -> dict[str, torch.Tensor]:
    """Read the backbone of an ONNX file; other parts of its network are ignored.

    Args:
        content: The ONNX file. Protobuf contains only data, so nothing is executed.

    Returns:
        timm's names of a DINOv2 vision transformer without registers -> float32 tensors; `pos_embed` is
        (1, 1 + patches, D) with the class token first.

    Raises:
        WeightsError: The file is not ONNX, `onnx` is not installed, or the graph has no such backbone.
    """
    try:
        import onnx
    except ImportError as error:
        raise WeightsError(
            "The package onnx is not installed.",
            "It reads the weights of the demo if the hub cannot be reached.",
            "Run: pip install onnx",
        ) from error
    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # protobuf's DecodeError has no public, stable home
        raise WeightsError("The file is not an ONNX model.", f"{type(error).__name__}: {error}") from error
    return _Backbone(graph).weights()


class _Backbone:
    """Look-ups in one ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self.initializers = {item.name: item for item in graph.initializer}
        self.nodes = list(graph.node)
        self.by_name = {node.name: node for node in self.nodes}
        pattern = re.compile(r"backbone\.encoder\.layer\.(\d+)\.norm1\.weight")
        self.depth = sum(bool(pattern.fullmatch(name)) for name in self.initializers)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return all weights under timm's names."""
        if not self.depth:
            raise _foreign("it has no backbone.encoder.layer.0.norm1.weight")
        weights = {
            "cls_token": self.tensor("backbone.embeddings.cls_token"),
            "pos_embed": self.position_embedding(),
            "patch_embed.proj.weight": self.tensor("backbone.embeddings.patch_embeddings.projection.weight"),
            "patch_embed.proj.bias": self.tensor("backbone.embeddings.patch_embeddings.projection.bias"),
            "norm.weight": self.tensor("backbone.layernorm.weight"),
            "norm.bias": self.tensor("backbone.layernorm.bias"),
        }
        for layer in range(self.depth):
            theirs, ours = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
            attention = f"{theirs}.attention.attention"
            for source, target in _VECTORS.items():
                weights[f"{ours}.{target}"] = self.tensor(f"{theirs}.{source}")
            for place, target in _LINEAR.items():
                weights[f"{ours}.{target}.weight"] = self.matrix(layer, place)
            weights[f"{ours}.attn.qkv.weight"] = torch.cat(
                [self.matrix(layer, f"attention/attention/{name}") for name in _QKV]
            )
            weights[f"{ours}.attn.qkv.bias"] = torch.cat([self.tensor(f"{attention}.{name}.bias") for name in _QKV])
        return weights

    def tensor(self, name: str) -> torch.Tensor:
        """Return a copy of an initializer as a float32 tensor."""
        from onnx import numpy_helper

        if name not in self.initializers:
            raise _foreign(f"it has no {name}")
        return torch.from_numpy(numpy_helper.to_array(self.initializers[name]).copy()).float()

    def matrix(self, layer: int, place: str) -> torch.Tensor:
        """Return the weight (out, in) of a linear layer; the constant that its MatMul reads is (in, out)."""
        node = self.by_name.get(f"/backbone/encoder/layer.{layer}/{place}/MatMul")
        constants = [name for name in node.input if name in self.initializers] if node is not None else []
        if len(constants) != 1:
            raise _foreign(f"layer {layer} has no {place} with one weight")
        return self.tensor(constants[0]).T.contiguous()

    def position_embedding(self) -> torch.Tensor:
        """Return class and patch position embeddings, (1, 1 + patches, D).

        The graph adds Concat(class position, Resize(Reshape(patch positions))) to Concat(cls_token, patches). So the
        class position is the constant input of a Concat other than the class token, and the patch positions are the
        constant input of a Reshape.
        """
        width = tuple(self.initializers["backbone.embeddings.cls_token"].dims)[-1]
        constants: dict[str, list[str]] = {"Concat": [], "Reshape": []}
        for node in self.nodes:
            if node.op_type in constants and node.name.startswith("/backbone/embeddings/"):
                constants[node.op_type] += [
                    n for n in node.input if n in self.initializers and self._is_tokens(n, width)
                ]
        if len(constants["Concat"]) != 1 or len(constants["Reshape"]) != 1:
            raise _foreign("its position embedding is ambiguous")
        token, patches = self.tensor(constants["Concat"][0]), self.tensor(constants["Reshape"][0])
        if token.shape[1] != 1 or math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
            raise _foreign("its position embedding does not consist of one class token and a square of patches")
        return torch.cat([token, patches], dim=1)

    def _is_tokens(self, name: str, width: int) -> bool:
        dims = tuple(self.initializers[name].dims)
        return len(dims) == 3 and dims[0] == 1 and dims[2] == width and name != "backbone.embeddings.cls_token"


def _foreign(reason: str) -> WeightsError:
    return WeightsError(
        "The ONNX model does not contain a DINOv2 backbone in the expected layout.",
        f"The export differs: {reason}.",
        "Set lpm.weights to a local file (.safetensors, .pth, .npz).",
    )
