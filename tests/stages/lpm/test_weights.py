from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import timm
from huggingface_hub import constants
from safetensors.torch import save_file

from schemas.errors import UnsupportedModelError, WeightsError
from schemas.settings import LpmSettings
from stages.lpm.loading import describe_lpm, load_lpm
from stages.lpm.weights import hub_reachable, locate_weights

REPO = "timm/test_vit.r160_in1k"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs; `files` maps an address to its content."""

    files: ClassVar[dict[str, bytes]] = {}
    status = 404

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else self.status)
        self.send_header("X-Repo-Commit", "0" * 40)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if "model" in self.path else "RepoNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if content is not None and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    handler = type("OneHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def test_a_local_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    assert locate_weights(LpmSettings(name="test_vit", weights=path.name), tmp_path) == path
    assert locate_weights(LpmSettings(name="test_vit", weights=str(path)), Path("/elsewhere")) == path


@pytest.mark.parametrize(
    ("weights", "reason"),
    [("gone.safetensors", "does not exist"), ("folder.pth", "is a folder"), ("weights.onnx", "suffix is '.onnx'")],
)
def test_a_local_file_that_cannot_be_one(weights: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(WeightsError, match=reason):
        locate_weights(LpmSettings(name="test_vit", weights=weights), tmp_path)


def test_the_hub_cache_is_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--timm--test_vit.r160_in1k"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    path = weights_file(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert locate_weights(LpmSettings(name="test_vit"), tmp_path) == path
    assert load_lpm(LpmSettings(name="test_vit.r160_in1k"), 160, tmp_path).info.name == "test_vit.r160_in1k"


def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(WeightsError, match=r"cannot be reached[\s\S]*et lpm\.weights to a local file"):
        locate_weights(LpmSettings(name="test_vit"), tmp_path)


def test_offline_mode_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        locate_weights(LpmSettings(name="test_vit"), tmp_path)
    assert not hub_reachable()


def test_a_name_without_published_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no pretrained weights for test_vit4"):
        locate_weights(LpmSettings(name="test_vit4"), tmp_path)


def test_reachable_means_that_the_hub_answers(
    hub: tuple[type[Hub], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handler, address = hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert hub_reachable()
    handler.status = 503
    assert not hub_reachable()


def test_a_server_that_stays_silent_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not hub_reachable(0.3)
        assert time.monotonic() - start < 2


def test_a_name_server_that_hangs_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: list(range(0 * hang.wait(30))))
    start = time.monotonic()
    assert not hub_reachable(0.3)
    assert time.monotonic() - start < 2
    hang.set()


LOCATE = """
import json, sys
from pathlib import Path
from typing import ClassVar
from schemas.errors import UnsupportedModelError, WeightsError
from schemas.settings import LpmSettings
from stages.lpm.weights import locate_weights
try:
    print(json.dumps([True, str(locate_weights(LpmSettings(name=sys.argv[1]), Path()))]))
except WeightsError as error:
    print(json.dumps([False, str(error)]))
"""


def locate_in_a_fresh_process(address: str, home: Path, name: str = "test_vit") -> tuple[bool, str]:
    # The hub's client reads its endpoint and its cache when it is imported.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, name], env=environment, capture_output=True, text=True, check=True
    )
    found, text = json.loads(done.stdout)
    return found, text


@pytest.mark.slow
@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_fetched_from_a_mirror_once(filename: str, hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    handler, address = hub
    content = weights_file(tmp_path).read_bytes()
    handler.files[f"/{REPO}/resolve/main/{filename}"] = content
    found, path = locate_in_a_fresh_process(address, tmp_path / "home")
    assert found, path
    assert Path(path).name == filename
    assert Path(path).read_bytes() == content
    handler.files.clear()
    assert locate_in_a_fresh_process(address, tmp_path / "home") == (True, path)


@pytest.mark.slow
def test_a_hub_without_the_weights_is_one_clear_error(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    found, text = locate_in_a_fresh_process(hub[1], tmp_path / "home")
    assert not found
    assert "holds none of model.safetensors, pytorch_model.bin" in text


def configuration(**changes: object) -> bytes:
    content = {
        "architecture": "test_vit",
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
    }
    return json.dumps(content | changes).encode()


def test_a_repository_is_read_from_the_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--someone--retina"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_bytes(configuration())
    path = weights_file(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    settings = LpmSettings(name="hf-hub:someone/retina")
    assert locate_weights(settings, tmp_path) == path
    info = load_lpm(settings, 160, tmp_path).info
    assert (info.name, info.mean, info.interpolation) == ("hf-hub:someone/retina", (0.1, 0.2, 0.3), "bilinear")


def test_a_repository_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(WeightsError, match=r"settings of hf-hub:someone/retina are not on this machine"):
        describe_lpm("hf-hub:someone/retina", 160)


def test_a_repository_name_that_cannot_be_one(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a b is not a repository"):
        describe_lpm("hf-hub:a b", 160)


@pytest.mark.slow
def test_a_repository_is_fetched_from_a_mirror(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    handler, address = hub
    content = weights_file(tmp_path).read_bytes()
    handler.files["/someone/retina/resolve/v2/config.json"] = configuration()
    handler.files["/someone/retina/resolve/v2/pytorch_model.bin"] = content
    found, path = locate_in_a_fresh_process(address, tmp_path / "home", "hf-hub:someone/retina@v2")
    assert found, path
    assert Path(path).read_bytes() == content


def folder_of(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "retina"
    folder.mkdir()
    (folder / "config.json").write_bytes(configuration(**changes))
    return folder


def test_a_folder_gives_architecture_preprocessing_and_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    path = weights_file(folder)
    for name, root in ((f"local-dir:{folder}", Path("/elsewhere")), ("local-dir:retina", tmp_path)):
        assert locate_weights(LpmSettings(name=name), root) == path
        loaded = load_lpm(LpmSettings(name=name), 160, root)
        assert (loaded.info.mean, loaded.info.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert loaded.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_name_of_a_folder_is_its_content_not_its_path(tmp_path: Path) -> None:
    first = folder_of(tmp_path)
    name = describe_lpm(f"local-dir:{first}", 160).name
    assert name.startswith("local-dir:test_vit@")
    moved = first.rename(tmp_path / "moved")
    assert describe_lpm(f"local-dir:{moved}", 160).name == name
    (moved / "config.json").write_bytes(configuration(model_args={"qk_norm": True, "img_size": 99}))
    assert describe_lpm(f"local-dir:{moved}", 160).name != name


def test_model_args_of_a_folder_change_the_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, model_args={"depth": 3, "reg_tokens": 2, "num_classes": 7})
    info = describe_lpm(f"local-dir:{folder}", 160)
    assert (info.depth, info.prefix_tokens) == (3, 3)
    weights = timm.create_model("test_vit", depth=3, reg_tokens=2, num_classes=7).state_dict()
    save_file(weights, folder / "model.safetensors")
    loaded = load_lpm(LpmSettings(name=f"local-dir:{folder}"), 160, tmp_path)
    assert loaded.model.state_dict().keys() == weights.keys() - {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no readable config.json"),
        (b"{", "no readable config.json"),
        (b"[]", "names no architecture of timm"),
        (b'{"model_type": "dinov2"}', r"Hugging Face transformers\.[\s\S]*lpm\.weights"),
        (b'{"architecture": "vit_of_the_moon"}', "architecture is 'vit_of_the_moon'"),
        (b'{"architecture": "test_vit", "model_args": {"moons": 3}}', "cannot be built[\\s\\S]*moons"),
        (b'{"architecture": "resnet18"}', "no attention"),
    ],
)
def test_a_folder_that_describes_no_model(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=reason):
        describe_lpm(f"local-dir:{tmp_path}", 160)


def test_weights_of_a_folder_are_unambiguous(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    settings = LpmSettings(name=f"local-dir:{folder}")
    with pytest.raises(WeightsError, match="holds no file of weights"):
        locate_weights(settings, tmp_path)
    weights_file(folder).rename(folder / "first.safetensors")
    assert locate_weights(settings, tmp_path).name == "first.safetensors"
    (folder / "second.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"several files of weights: first\.safetensors, second\.pth"):
        locate_weights(settings, tmp_path)
    weights_file(folder)
    assert locate_weights(settings, tmp_path).name == "model.safetensors"


def test_a_local_file_goes_before_the_weights_of_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    weights_file(folder)
    other = weights_file(tmp_path)
    assert locate_weights(LpmSettings(name=f"local-dir:{folder}", weights=str(other)), tmp_path) == other
