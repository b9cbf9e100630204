"""The page about the Python API: its code runs from top to bottom, and it names everything that is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from study import make_images, save_weights

import fpt

PAGE = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_every_public_name_is_on_the_page() -> None:
    assert [name for name in fpt.__all__ if f"fpt.{name}" not in PAGE] == []


def test_every_name_on_the_page_is_public() -> None:
    assert set(re.findall(r"\bfpt\.(\w+)", PAGE)) <= {*fpt.__all__, "__all__"}


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FPT_CACHE_DIR", raising=False)
    make_images(tmp_path / "images", per_class=8)
    make_images(tmp_path / "clinic", per_class=2, seed=1)
    lpm = {"name": "test_vit", "weights": save_weights(tmp_path / "lpm.safetensors")}
    features = {"image_size": 64, "shard_size": 16}
    train = {"epochs": 1, "side_image_size": 32, "side_reduction": 4}
    fpt.init("my-study", "images", version_control=False, method="fpt+", lpm=lpm, features=features, train=train)
    assert len(BLOCKS) > 6
    space: dict[str, object] = {}
    for number, block in enumerate(BLOCKS, start=1):
        exec(compile(block, f"block {number} of python-api.md", "exec"), space)
    assert (tmp_path / "predictions.csv").is_file()
    assert "train.lrr" not in capsys.readouterr().err
