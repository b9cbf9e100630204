from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import _create_vision_transformer

from schemas.errors import UnsupportedModelError, WeightsError
from schemas.settings import LpmSettings
from stages.lpm.checkpoint import _Written
from stages.lpm.loading import LoadedLpm, load_lpm

MODELS = ["test_vit", "test_vit2", "test_vit3", "test_vit4"]


def state(name: str, classes: int = 1000, size: int = 160, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of which none has the value that initialisation would give it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=classes, img_size=size)
    return {key: torch.randn_like(value) * 0.05 + 0.2 for key, value in model.state_dict().items()}


def load(name: str, weights: Path, size: int = 160) -> LoadedLpm:
    return load_lpm(LpmSettings(name=name, weights=str(weights)), size, Path("/nowhere"))


def assert_from(loaded: LoadedLpm, weights: dict[str, torch.Tensor]) -> None:
    mine = loaded.model.state_dict()
    assert set(mine) == {key for key in weights if not key.startswith("head.")}
    for key, value in mine.items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [1000, 7, 0])
def test_every_parameter_comes_from_the_file(name: str, suffix: str, classes: int, tmp_path: Path) -> None:
    weights, path = state(name, classes), tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    loaded = load(name, path)
    assert_from(loaded, weights)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.num_classes == 0
    assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_loads_are_the_same_and_keep_the_preprocessing_of_the_name(tmp_path: Path) -> None:
    save_file(state("test_vit"), tmp_path / "w.safetensors")
    first, second = (load("test_vit.r160_in1k", tmp_path / "w.safetensors") for _ in range(2))
    images = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(first.model(images), second.model(images), rtol=0, atol=0)
    assert (first.info.mean, first.info.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_position_embeddings_are_resampled_to_the_input(tmp_path: Path) -> None:
    weights = state("test_vit3")
    save_file(weights, tmp_path / "w.safetensors")
    loaded = load("test_vit3", tmp_path / "w.safetensors", size=250)
    assert loaded.info.image_size == 256
    assert loaded.model.state_dict()["pos_embed"].shape == (1, 16 * 16 + 1, 96)
    assert loaded.model.forward_features(torch.rand(1, 3, 256, 256)).shape == (1, loaded.info.tokens, 96)
    # the register's part is not resampled
    torch.testing.assert_close(loaded.model.state_dict()["pos_embed"][:, 0], weights["pos_embed"][:, 0])


def test_a_relative_path_starts_at_the_study(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    save_file(state("test_vit"), tmp_path / "weights" / "w.safetensors")
    settings = LpmSettings(name="test_vit", weights="weights/w.safetensors")
    assert load_lpm(settings, 160, tmp_path).info.depth == 6


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_training_checkpoints_are_unwrapped(wrapper: str, tmp_path: Path) -> None:
    from argparse import Namespace

    weights = state("test_vit")
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    torch.save({wrapper: wrapped, "epoch": 3, "args": Namespace(lr=1.0)}, tmp_path / "w.pth")
    assert_from(load("test_vit", tmp_path / "w.pth"), weights)


def test_half_precision_files_are_read(tmp_path: Path) -> None:
    weights = {key: value.half() for key, value in state("test_vit").items()}
    save_file(weights, tmp_path / "w.safetensors")
    assert_from(load("test_vit", tmp_path / "w.safetensors"), {key: value.float() for key, value in weights.items()})


def test_dinov2_checkpoints_lose_their_mask_token(tmp_path: Path) -> None:
    weights = state("test_vit", classes=0)
    save_file({**weights, "mask_token": torch.zeros(1, 64)}, tmp_path / "w.safetensors")
    assert_from(load("test_vit", tmp_path / "w.safetensors"), weights)


def jax_arrays(weights: dict[str, torch.Tensor], heads: int, depth: int) -> dict[str, np.ndarray[Any, Any]]:
    """The layout in which the original ViT weights were published."""
    arrays = {key: value.numpy() for key, value in weights.items()}
    width = arrays["cls_token"].shape[-1]
    out = {
        "embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": arrays["patch_embed.proj.bias"],
        "cls": arrays["cls_token"],
        "Transformer/posembed_input/pos_embedding": arrays["pos_embed"],
        "Transformer/encoder_norm/scale": arrays["norm.weight"],
        "Transformer/encoder_norm/bias": arrays["norm.bias"],
        "head/kernel": arrays["head.weight"].T,
        "head/bias": arrays["head.bias"],
    }
    for layer in range(depth):
        ours, theirs = f"blocks.{layer}", f"Transformer/encoderblock_{layer}"
        for norm, target in ((1, 0), (2, 2)):
            out[f"{theirs}/LayerNorm_{target}/scale"] = arrays[f"{ours}.norm{norm}.weight"]
            out[f"{theirs}/LayerNorm_{target}/bias"] = arrays[f"{ours}.norm{norm}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for index, part in enumerate(("query", "key", "value")):
            rows = slice(index * width, (index + 1) * width)
            kernel = arrays[f"{ours}.attn.qkv.weight"][rows].T
            out[f"{attention}/{part}/kernel"] = kernel.reshape(width, heads, -1)
            out[f"{attention}/{part}/bias"] = arrays[f"{ours}.attn.qkv.bias"][rows].reshape(heads, -1)
        out[f"{attention}/out/kernel"] = arrays[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}/out/bias"] = arrays[f"{ours}.attn.proj.bias"]
        for index in (0, 1):
            out[f"{theirs}/MlpBlock_3/Dense_{index}/kernel"] = arrays[f"{ours}.mlp.fc{index + 1}.weight"].T
            out[f"{theirs}/MlpBlock_3/Dense_{index}/bias"] = arrays[f"{ours}.mlp.fc{index + 1}.bias"]
    return out


def test_jax_npz_files_are_read(tmp_path: Path) -> None:
    weights = state("test_vit")
    np.savez(tmp_path / "w.npz", **jax_arrays(weights, heads=2, depth=6))
    assert_from(load("test_vit", tmp_path / "w.npz"), weights)


def test_a_deeper_npz_is_refused(tmp_path: Path) -> None:
    weights = state("test_vit")
    arrays = jax_arrays(weights, heads=2, depth=6)
    arrays["Transformer/encoderblock_6/LayerNorm_0/scale"] = arrays["Transformer/encoderblock_5/LayerNorm_0/scale"]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(WeightsError, match="the file has 7, the model 6"):
        load("test_vit", tmp_path / "w.npz")


def test_an_npz_of_another_layout_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{key: value.numpy() for key, value in state("test_vit").items()})
    with pytest.raises(WeightsError, match="are not those of test_vit"):
        load("test_vit", tmp_path / "w.npz")


def test_weights_of_another_model_are_refused_with_the_differences(tmp_path: Path) -> None:
    save_file(state("test_vit4"), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        load("test_vit", tmp_path / "w.safetensors")
    text = str(caught.value)
    assert "not those of test_vit" in text
    assert "not in the file: cls_token" in text
    assert "not in the model: reg_token" in text
    assert "belongs to another model" in text
    assert "Set lpm.weights" in text
    assert len(text) < 1500


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_missing_parameter_is_never_left_random(suffix: str, tmp_path: Path) -> None:
    weights = state("test_vit", classes=7)  # other than the 1000 classes of the name: timm would load leniently
    del weights["blocks.3.norm1.bias"]
    path = tmp_path / f"w{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    with pytest.raises(WeightsError, match=r"not in the file: blocks\.3\.norm1\.bias"):
        load("test_vit", path)


def test_an_additional_parameter_is_refused(tmp_path: Path) -> None:
    save_file({**state("test_vit", classes=7), "blocks.6.norm1.bias": torch.zeros(64)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not in the model: blocks\.6\.norm1\.bias"):
        load("test_vit", tmp_path / "w.safetensors")


def test_patches_of_another_size_are_not_resampled(tmp_path: Path) -> None:
    weights = state("test_vit")
    weights["patch_embed.proj.weight"] = torch.randn(64, 3, 32, 32)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="patches are 32 pixels wide"):
        load("test_vit", tmp_path / "w.safetensors")


def test_what_is_not_overwritten_is_noticed() -> None:
    weights = state("test_vit", classes=0)
    del weights["norm.bias"]
    with _Written() as written:
        model = timm.create_model("test_vit", pretrained=False, num_classes=0)
        model.load_state_dict(weights, strict=False)
    assert [key for key, value in model.named_parameters() if id(value) not in written.ids] == ["norm.bias"]


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code_are_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    content = {**state("test_vit"), "evil": Malicious(tmp_path / "was-run")}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"run code[\s\S]*safetensors"):
        load("test_vit", tmp_path / "w.pth")
    assert not (tmp_path / "was-run").exists()


def test_plain_pickles_with_code_are_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "was-run")))
    with pytest.raises(WeightsError):
        load("test_vit", tmp_path / "w.pth")
    assert not (tmp_path / "was-run").exists()


def test_npz_files_with_objects_are_refused_and_not_run(tmp_path: Path) -> None:
    objects = np.array([Malicious(tmp_path / "was-run")], dtype=object)
    np.savez(tmp_path / "w.npz", **{"embedding/kernel": objects})
    with pytest.raises(WeightsError):
        load("test_vit", tmp_path / "w.npz")
    assert not (tmp_path / "was-run").exists()


def test_whole_models_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit"), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="saved as a complete model"):
        load("test_vit", tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b"\x13\x37" * 500, "cut off, damaged"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_garbage_is_refused(suffix: str, content: bytes, cause: str, tmp_path: Path) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(WeightsError, match=rf"not a readable {suffix}[\s\S]*{cause}"):
        load("test_vit", tmp_path / f"w{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_cut_off_files_are_refused(suffix: str, tmp_path: Path) -> None:
    weights, path = state("test_vit"), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    elif suffix == ".pth":
        torch.save(weights, path)
    else:
        np.savez(path, **jax_arrays(weights, heads=2, depth=6))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match="cut off"):
        load("test_vit", path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no tensors"):
        load("test_vit", tmp_path / "w.pth")


def test_the_name_is_checked_before_the_file() -> None:
    with pytest.raises(UnsupportedModelError):
        load("swin_tiny_patch4_window7_224", Path("/does/not/exist.safetensors"))


def test_the_file_is_left_as_it_was(tmp_path: Path) -> None:
    weights = state("test_vit")
    save_file(weights, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    load("test_vit", tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert load_file(tmp_path / "w.safetensors").keys() == weights.keys()


default_cfgs = generate_default_cfgs({"tiny_siglip_vit": {"input_size": (3, 32, 32), "classifier": "head"}})


def tiny_siglip_vit(pretrained: bool = False, **options: Any) -> torch.nn.Module:
    """timm loads models of this kind leniently: parameters that the file lacks stay random, with a line in its log."""
    shape = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    model: torch.nn.Module = _create_vision_transformer(
        "tiny_siglip_vit", pretrained=pretrained, **{**shape, **options}
    )
    return model


def test_a_parameter_that_timm_leaves_random_is_refused(tmp_path: Path) -> None:
    register_model(tiny_siglip_vit)
    weights = state("tiny_siglip_vit", size=32)
    save_file(weights, tmp_path / "whole.safetensors")
    assert_from(load("tiny_siglip_vit", tmp_path / "whole.safetensors", size=32), weights)
    del weights["blocks.1.mlp.fc1.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"not in the file: blocks\.1\.mlp\.fc1\.bias\n"):
        load("tiny_siglip_vit", tmp_path / "w.safetensors", size=32)
