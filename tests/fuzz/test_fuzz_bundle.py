"""Every edit of a model bundle is refused or has no effect."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from study import make_study

from schemas.errors import BundleError
from stages.train.bundle import load_bundle
from stages.train.bundle_spec import read_spec
from stages.train.trainer import train

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "500"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one study, with the same shapes."""
    root = tmp_path_factory.mktemp("bundles")
    study = make_study(root, per_class=5, train={"epochs": 1})
    receipt = study.extract()
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        settings = study.changed(train={"lr": lr})
        train(settings, study.files(receipt), root / name, root / "checkpoints")
    return root / "a", root / "b"


@pytest.fixture
def folder(bundles: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles[0], tmp_path / "model"))


def edits(value: Any) -> Iterator[Any]:
    """Yield variants of a tree with one leaf, key or item changed, for each of them."""
    if isinstance(value, dict):
        for name in value:
            rest = {key: item for key, item in value.items() if key != name}
            yield rest
            yield {**rest, f"{name}x": value[name]}
            yield from ({**value, name: other} for other in edits(value[name]))
        yield {**value, "more": 1}
    elif isinstance(value, list):
        yield value[::-1]
        yield [*value, *value[:1]]
        for at, item in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in edits(item))
    else:
        others = [None, True, "", "x", 0, 1, -1, 0.5, 10**30, [], {}]
        if isinstance(value, int | float):
            others += [value + 1, -value, value * 2]
        if isinstance(value, str):
            others += [value + " ", value[::-1], value.upper()]
        yield from others


def test_every_edit_of_a_field(bundles: tuple[Path, Path], folder: Path) -> None:
    intact = read_spec(bundles[0])
    path = folder / "model.json"
    content, count = json.loads(path.read_text()), 0
    for edited in edits(content):
        # 1 and 1.0 and True are equal in Python, but not in JSON.
        if json.dumps(edited, sort_keys=True) == json.dumps(content, sort_keys=True):
            continue
        path.write_text(json.dumps(edited))
        with pytest.raises(BundleError, match="fpt train"):
            read_spec(folder)
        count += 1
    assert count > 500
    path.write_text(json.dumps(content, sort_keys=True))  # order and spaces have no effect
    assert read_spec(folder) == intact


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_random_damage(bundles: tuple[Path, Path], folder: Path, name: str) -> None:
    intact, path = read_spec(bundles[0]), folder / name
    data = path.read_bytes()
    for case in range(CASES if name == "model.json" else CASES // 10):
        random = Random(SEED * 1_000_003 + case)
        at, bit = random.randrange(len(data)), random.randrange(9)
        cut = data[:at] if bit == 8 else data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        path.write_bytes(cut)
        try:
            found = read_spec(folder) if name == "model.json" else load_bundle(folder).spec
        except BundleError:
            continue
        # Spaces between fields are irrelevant.
        assert name == "model.json"
        assert found == intact


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_files_of_two_bundles_do_not_go_together(bundles: tuple[Path, Path], folder: Path, name: str) -> None:
    shutil.copy(bundles[1] / name, folder / name)
    with pytest.raises(BundleError, match="is not the file that"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"sha256": "", "a": ' + b"[" * 700 + b"]" * 700 + b"}",
        b"\xff\xfe",
        b"{}",
        b'{"sha256": NaN}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"3",
    ],
)
def test_what_is_no_bundle_at_all(folder: Path, data: bytes) -> None:
    (folder / "model.json").write_bytes(data)
    with pytest.raises(BundleError, match="fpt train"):
        load_bundle(folder)
