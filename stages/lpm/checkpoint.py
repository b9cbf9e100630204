"""Load a timm model from one weights file: every parameter comes from the file, or loading fails."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from schemas.errors import FptError, WeightsError
from stages.lpm.catalogue import ModelEntry
from stages.lpm.feature_maps import runs_at, size_options
from stages.lpm.key_map import is_foreign, to_timm

Shapes = dict[str, tuple[int, ...]]

_OTHER_FILE = "Set lpm.weights to the file of this model, or to hub."


def build_with_weights(entry: ModelEntry, image_size: int, path: Path) -> nn.Module:
    """Build a model of timm without classifier whose every parameter comes from the file.

    Args:
        entry: Architecture and preprocessing.
        image_size: Side of the input, in pixels; position embeddings and tables are resampled to it.
        path: A safetensors file, a PyTorch file of tensors, or a JAX `.npz` file, with timm's names or with names that
            `stages.lpm.key_map` translates.

    Raises:
        WeightsError: The file is unreadable, would run code, or does not match the model.
    """
    shapes = read_shapes(path)
    written = _Written()
    try:
        source, shapes, options = _source(entry, path, shapes, image_size)
        # timm loads strictly only where the classifier of the model and of the file have as many rows.
        rows = 0 if path.suffix.lower() == ".npz" else _classifier_rows(entry.cfg, shapes)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {**source, "num_classes": rows}}
        with written:
            model: Any = _filled(entry, rows, options, path, written)
    except (MemoryError, FptError):
        raise
    except Exception as error:  # timm and torch raise nearly every kind for a foreign file
        raise _mismatch(entry.name, path, shapes, error) from error
    # timm keeps the source of the weights in the model, here a second copy of all tensors.
    model.pretrained_cfg.pop("state_dict", None)
    patch, expected = (_patch_in(named) for named in (shapes, _shapes_in(model.state_dict())))
    if None not in (patch, expected) and patch != expected and not entry.architecture.startswith("flexivit"):
        # timm silently resamples patches of another size.
        raise _mismatch(entry.name, path, shapes, ValueError(f"its patches are {patch} pixels wide"))
    random = [key for key, value in model.named_parameters() if id(value) not in written.ids]
    if path.suffix.lower() == ".npz" and hasattr(model, "blocks") and _blocks_in_npz(shapes) != len(model.blocks):
        random.append(f"blocks: the file has {_blocks_in_npz(shapes)}, the model {len(model.blocks)}")
    unused = _unused(entry, shapes, model)
    if random or unused:
        raise _mismatch(entry.name, path, shapes, missing=random, unused=unused)
    model.reset_classifier(0)
    return model  # type: ignore[no-any-return]


def _filled(entry: ModelEntry, rows: int, options: dict[str, Any], path: Path, written: _Written) -> Any:
    """Build the model for the input size, or for that of its weights if it resamples positions in its forward pass.

    Raises:
        WeightsError: The weights fit only the input size of their pretraining.
    """
    try:
        return entry.build(rows, **options)
    except RuntimeError as error:
        plain = {name: value for name, value in options.items() if name != "img_size"}
        written.ids.clear()
        try:
            model: Any = entry.build(rows, **plain)
        except Exception:
            raise error from None
        size, default = options.get("img_size"), model.pretrained_cfg["input_size"][-1]
        if size is None or runs_at(entry.build_on_meta(), size):
            return model
        raise WeightsError(
            f"The weights in {path} fit {entry.name} only at {default} pixels, not at {size}.",
            "It has tables of positions for one input size, which timm does not resample.",
            f"Set features.image_size to {default}.",
        ) from error


def _source(
    entry: ModelEntry, path: Path, shapes: Shapes, image_size: int
) -> tuple[dict[str, Any], Shapes, dict[str, Any]]:
    """Return timm's source of the weights, the shapes in it, and the options that the model must be built with."""
    from timm.models.vision_transformer import VisionTransformer

    plain = entry.build_on_meta()
    expected: set[str] = set(plain.state_dict())
    options: dict[str, Any] = dict(size_options(plain, image_size))
    if isinstance(plain, VisionTransformer):
        if type(plain) is VisionTransformer:
            options["weight_init"] = "skip"  # saves the seconds of an initialisation that is overwritten
        if any(key.endswith(".ls1.gamma") for key in shapes) and "blocks.0.ls1.gamma" not in expected:
            # Layer scale is not part of the architecture's name (UNI): the file decides.
            options["init_values"] = 1e-5
    if path.suffix.lower() == ".npz":
        return {"file": str(path), "custom_load": True}, shapes, options
    if not is_foreign(shapes, expected):
        return {"file": str(path), "custom_load": False}, shapes, options
    state = to_timm(_read_tensors(path), expected)
    return {"state_dict": state}, _shapes_in(state), options


def _shapes_in(state: Mapping[str, torch.Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def _unused(entry: ModelEntry, shapes: Shapes, model: nn.Module) -> list[str]:
    """Return tensors that timm drops silently: it loads SigLIP without its attention pool leniently."""
    if "siglip" not in entry.architecture:
        return []
    prefix = "visual.trunk." if any(key.startswith("visual.trunk.") for key in shapes) else ""
    names = {key.removeprefix(prefix) for key in shapes if key.startswith(prefix)}
    return sorted(name for name in names - set(model.state_dict()) if not name.startswith(("attn_pool.", "head.")))


class _Written(TorchFunctionMode):
    """Record which tensors are overwritten by a tensor of the same shape: loading does that, initialisation never.

    timm only logs a parameter that keeps its random initialisation; this detects it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], _types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.copy_ and args[0].shape == args[1].shape:
            self.ids.add(id(args[0]))
        return func(*args, **(kwargs or {}))


def read_shapes(path: Path) -> Shapes:
    """Return names and shapes of the tensors in a weights file, without reading tensors if the format allows it.

    Raises:
        WeightsError: The file does not fit its suffix, is cut off, or holds objects that would run code.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: tuple(file[key].shape) for key in file.files}
        return _pickled_shapes(path)
    except WeightsError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # zip, pickle, JSON and header errors of three readers
        raise WeightsError(
            f"{path} is not a readable {suffix} file of weights.",
            f"{_likely_content(path)} ({type(error).__name__}: {_first_line(error)})",
            "Fetch the file again, or set lpm.weights to another one.",
        ) from error


def _pickled_shapes(path: Path) -> Shapes:
    try:
        # Tensors and plain containers only; argparse.Namespace is data and common in training checkpoints.
        with torch.serialization.safe_globals([argparse.Namespace]):
            torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        imported = re.search(r"GLOBAL ([\w.]+)", str(error))
        # torch's text, which advises to switch the protection off, is not passed on.
        if imported is None:
            raise ValueError("not a PyTorch file of tensors") from error
        raise WeightsError(
            f"{path} holds more than tensors: loading it would run code from the file ({imported.group(1)}).",
            "It was probably saved as a complete model, not as its state_dict.",
            "Save the state_dict of a model that you trust as .safetensors, and set lpm.weights to that file.",
        ) from error
    shapes = _shapes_in(_read_tensors(path, "meta"))
    if not shapes:
        raise WeightsError(f"{path} holds no tensors.", "", _OTHER_FILE)
    return shapes


def _read_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read all tensors of a file that holds nothing else; `state_dict`, `model` and EMA are unwrapped as timm does."""
    from timm.models import load_state_dict

    with torch.serialization.safe_globals([argparse.Namespace]):  # older versions of timm do not allow it themselves
        return dict(_tensors(load_state_dict(str(path), device=device, weights_only=True)))


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a dictionary and of those inside it: some checkpoints hold a teacher and a student."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{k}", v) for k, v in value.items() if isinstance(v, torch.Tensor))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no details"


def _likely_content(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "The file is empty."
    if head.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer: the content was not fetched."
    if head.lstrip()[:1] == b"<":
        return "It is a web page, probably the error message of a download."
    return "It is cut off, damaged, or of another format."


def _classifier_rows(cfg: Any, shapes: Shapes) -> int:
    classifier = cfg.classifier
    names: Iterable[str] = (classifier,) if isinstance(classifier, str) else classifier or ()
    return next((shapes[f"{item}.weight"][0] for item in names if f"{item}.weight" in shapes), 0)


def _patch_in(shapes: Shapes) -> int | None:
    for key, shape in shapes.items():
        if len(shape) == 4 and key.endswith("patch_embed.proj.weight"):
            return shape[-1]
        if len(shape) == 4 and key.endswith("embedding/kernel"):
            return shape[0]
    return None


def _blocks_in_npz(shapes: Shapes) -> int:
    numbered = {match[1] for key in shapes if (match := re.search(r"/encoderblock_(\d+)/", f"/{key}"))}
    stacked = [shape[0] for key, shape in shapes.items() if key.endswith("encoderblock/LayerNorm_0/scale")]
    return stacked[0] if stacked else len(numbered)


def _mismatch(
    name: str,
    path: Path,
    shapes: Shapes,
    error: Exception | None = None,
    missing: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> WeightsError:
    lines = [f"  not in the file: {_some(missing)}"] if missing else []
    lines += [f"  not in the model: {_some(unused)}"] if unused else []
    lines += _differences(error) if error is not None else []
    return WeightsError(
        f"The weights in {path} are not those of {name}.",
        "\n".join([*lines, f"  the file begins with: {_some([f'{key} {shapes[key]}' for key in shapes])}"])
        + "\nThe file belongs to another model, or was saved with other names.",
        _OTHER_FILE,
    )


def _differences(error: Exception) -> list[str]:
    """Return the differences that torch lists, some of each kind, or else the error itself."""
    text = str(error)
    lines = []
    for label, start in (("not in the file", "Missing key"), ("not in the model", "Unexpected key")):
        for listed in re.findall(rf"{start}\(s\) in state_dict: (.*)", text):
            keys = re.findall(r'"([^"]+)"', listed)
            lines.append(f"  {label}: {_some(keys)}")
    pattern = r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
    sizes = [f"{key} is ({theirs}), not ({ours})" for key, theirs, ours in re.findall(pattern, text)]
    if sizes:
        lines.append(f"  other shapes: {_some(sizes)}")
    return lines or [f"  {type(error).__name__}: {_first_line(error)}"]


def _some(items: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
