"""A password in a URL reaches no output and no file; credentials come from the environment."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from command_line import Fpt
from fsspec.config import set_conf_env
from stores import filled, image_id, receipt_of
from web import SECRET, refusing_ftp, served

from schemas.errors import FptError
from stages.store.remote_rows import open_remote_rows

pytestmark = pytest.mark.timeout(120)


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.fixture
def refusing() -> Iterator[str]:
    """An FTP server that quotes the password that it refuses."""
    with refusing_ftp(b"220 hello\r\n", f"530 no entry with {SECRET}\r\n".encode()) as url:
        yield url


@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.parametrize("more", [[], ["--debug"], ["--json"]])
def test_push_and_pull_hide_the_password_of_a_url(
    tmp_path: Path, fpt: Fpt, refusing: str, verb: str, more: list[str]
) -> None:
    filled(tmp_path / ".fpt/cache")
    out, err = fpt("cache", verb, refusing, *more, cwd=tmp_path, code=2)
    assert SECRET not in out + err
    assert "me:***@127.0.0.1" in err
    assert "error_perm" in err
    assert files_with(SECRET, tmp_path) == []


def test_a_password_in_the_arguments_is_not_in_the_report(tmp_path: Path, fpt: Fpt) -> None:
    filled(tmp_path / ".fpt/cache")
    url = f"memory://caches/mine?token={SECRET}"
    try:
        out, err = fpt("cache", "push", url, "--json", cwd=tmp_path)
        assert json.loads(out)["url"] == "memory://caches/mine?token=***"
        assert SECRET not in out + err
        out, err = fpt("cache", "pull", url, cwd=tmp_path)
        assert SECRET not in out + err
    finally:
        fs = fsspec.filesystem("memory")
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("given", ["file", "--set", "malformed --set"])
def test_a_password_in_the_settings_is_refused(tmp_path: Path, fpt: Fpt, given: str, debug: list[str]) -> None:
    url = f"https://me:{SECRET}@host/caches"
    params = f"store:\n  remote: {url}\n" if given == "file" else ""
    (tmp_path / "params.yaml").write_text(params)
    words = {"file": [], "--set": ["--set", f"store.remote={url}"], "malformed --set": ["--set", url]}[given]
    for verb in ("train", "evaluate", "prepare", "extract"):
        out, err = fpt(verb, *words, *debug, cwd=tmp_path, code=2)
        assert SECRET not in out + err
        assert "FSSPEC_FTP_PASSWORD" in err or given == "malformed --set"
    assert [path.name for path in files_with(SECRET, tmp_path)] == (["params.yaml"] if given == "file" else [])


def test_credentials_of_a_web_server_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    store, rows = filled(tmp_path / "a")
    receipt = receipt_of(store)
    header = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
    with served(tmp_path / "a", authorization=header) as (url, _):
        with pytest.raises(FptError):
            open_remote_rows(url, receipt)
        configuration: dict[str, dict[str, object]] = {}
        value = json.dumps({"client_kwargs": {"headers": {"Authorization": header}}})
        set_conf_env(configuration, {"FSSPEC_HTTP": value})
        for name, options in configuration.items():
            monkeypatch.setitem(fsspec.config.conf, name, options)
        reader = open_remote_rows(url, receipt)
        reader.require_complete()
        assert np.array_equal(reader.read([image_id(6)], ["keys"])["keys"][0], rows["keys"][5])
