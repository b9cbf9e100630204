"""Flower over loopback: one SuperLink, three SuperNodes, and the weights of the rounds in one process."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from command_line import Fpt
from safetensors.torch import load_file
from study_tools import draw_images

from pipeline.flower import site_of, write_app
from schemas.errors import PlatformError, SettingsError

PYTHON_VARIABLE = "FPT_FLWR_PYTHON"
"""Python of an environment with flwr and the dependencies of fpt, where flwr is not in the one of the tests."""
HAS_FLOWER = importlib.util.find_spec("flwr") is not None
PYTHON = os.environ.get(PYTHON_VARIABLE) or (sys.executable if HAS_FLOWER else "")
SECONDS = 1800
"""Most of the time processes start: one per message and node, each of which imports torch."""


@pytest.fixture
def prepared(tmp_path: Path, weights: Path, fpt: Fpt) -> Path:
    """A study of 40 images with features."""
    draw_images(tmp_path / "images")
    params = {
        "method": "fpt+",
        "data": {"images": "images"},
        "lpm": {"name": "test_vit", "weights": str(weights)},
        "features": {"image_size": 64, "shard_size": 8, "precision": "float32", "side_image_size": 48},
        "train": {"epochs": 2, "batch_size": 8, "side_reduction": 2, "side_image_size": 32},
        "compute": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    fpt("prepare", cwd=tmp_path)
    fpt("extract", cwd=tmp_path)
    return tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(words: list[str], cwd: Path, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.skipif(not PYTHON, reason=f"flwr is not installed here, nor named by {PYTHON_VARIABLE}")
def test_three_nodes_over_loopback_give_the_weights_of_one_process(prepared: Path, tmp_path: Path, fpt: Fpt) -> None:
    options = ["--sites", "3", "--partition", "dirichlet:1", "--rounds", "2"]
    fpt("federate", *options, "--output", "here", cwd=prepared)
    app, logs, scripts = write_app(tmp_path / "app"), tmp_path / "logs", Path(PYTHON).parent
    logs.mkdir()
    port, root = free_port(), Path(__file__).parents[2]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("FLWR")},
        "PYTHONPATH": str(root),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "OMP_NUM_THREADS": "1",
    }
    address = f"127.0.0.1:{port}"
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr/config.toml").write_text(
        f'[superlink]\ndefault = "l"\n\n[superlink.l]\naddress = "{address}"\ninsecure = true\n'
    )
    link = [str(scripts / "flower-superlink"), "--insecure", "--disable-runtime-dependency-installation"]
    node = [str(scripts / "flower-supernode"), "--insecure", "--superlink", address, "--host", "127.0.0.1"]
    with running([*link, "--host", "127.0.0.1", "--port", str(port)], tmp_path, environment, logs / "link"):
        nodes = []
        for number in (1, 2, 3):
            config = f'params="{prepared / "params.yaml"}" site="site-{number}" sites=3 partition="dirichlet:1"'
            words = [*node, "--port", str(free_port()), "--node-config", config]
            nodes.append(running(words, tmp_path, environment, logs / f"node-{number}"))
        with nodes[0], nodes[1], nodes[2]:
            values = f'params="{prepared / "params.yaml"}" output="{tmp_path / "there"}" sites=3 rounds=2'
            started = None
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not (tmp_path / "there/summary.json").exists():
                if started is None or started.returncode:
                    words = [str(scripts / "flwr"), "run", str(app), "l", "--run-config", values]
                    started = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
                time.sleep(1)
    texts = "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(logs.iterdir()))
    assert (tmp_path / "there/summary.json").exists(), f"{started}{texts}"
    here, there = (load_file(tmp_path / name / "model/model.safetensors") for name in ("here", "there"))
    assert here.keys() == there.keys()
    assert all((here[name] == there[name]).all() for name in here)


def test_the_app_names_the_functions_of_this_module(tmp_path: Path, fpt: Fpt) -> None:
    fpt("federate", "--flower", "app", cwd=tmp_path)
    app = tomllib.loads((tmp_path / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"]
    module = app["components"]["clientapp"].partition(":")[0]
    assert module == app["components"]["serverapp"].partition(":")[0] == write_app.__module__
    assert {"params", "sites", "rounds", "local-epochs", "mu", "wait-seconds"} <= app["config"].keys()


def test_a_node_names_its_site_and_study(prepared: Path) -> None:
    params = {"params": str(prepared / "params.yaml")}
    with pytest.raises(SettingsError, match="site"):
        site_of(params)
    alone = site_of({**params, "site": "A"})
    first = site_of({**params, "site": "site-1", "sites": 2, "partition": "iid"})
    assert alone.name == "A" and 0 < first.examples < alone.examples
    with pytest.raises(SettingsError, match="no site 'B'"):
        site_of({**params, "site": "B", "sites": 2})


@pytest.mark.skipif(HAS_FLOWER, reason="flwr is installed")
def test_without_flower_an_error_names_the_extra() -> None:
    import pipeline.flower

    with pytest.raises(PlatformError, match=r"fpt-vit\[federated\]"):
        _ = pipeline.flower.client_app
