"""Training and evaluation that read the store where it was pushed to give what the local store gives."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from study import Study, make_study
from web import served

from schemas.cost import StoreMemory
from schemas.errors import CacheCorruptError, CacheIncompleteError
from schemas.features import ExtractionReceipt
from stages.evaluate.evaluator import evaluate
from stages.store.layout import open_store_layout
from stages.store.manage.transfer import push
from stages.store.remote import open_remote
from stages.train.job import Watch
from stages.train.trainer import train

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "int8"},
    "float16": {"dtype": "float16"},
    "zstd": {"dtype": "float16", "codec": "zstd"},
}


@contextmanager
def pushed(study: Study, receipt: ExtractionReceipt, protocol: str, folder: Path) -> Iterator[str]:
    """Push the study's store, and give the URL at which it can be read."""
    store = open_store_layout(study.cache, receipt.spec)
    if protocol == "memory":
        assert not push(store, open_remote("memory://caches")).failures
        yield "memory://caches"
        fs = fsspec.filesystem("memory")
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]
        return
    assert not push(store, open_remote(f"file://{folder}")).failures
    if protocol == "file":
        yield f"file://{folder}"
        return
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    with served(folder) as (url, _):
        yield url


def outcome(
    study: Study, receipt: ExtractionReceipt, cache: Path, folder: Path, remote: str | None = None, **settings: Any
) -> tuple[Any, ...]:
    """Everything about a training and an evaluation but their times."""
    told: list[StoreMemory] = []
    changed = study.changed(**settings)
    files = study.files(receipt, cache_root=cache, remote=remote)
    result = train(changed, files, folder / "model", folder / "checkpoints", Watch(on_memory=told.append))
    assert [bool(memory.remote) for memory in told] == [remote is not None and not remote.startswith("file")]
    metrics = evaluate(files, folder / "model", folder / "evaluation")
    epochs = [epoch.model_dump(exclude={"seconds"}) for epoch in result.epochs]
    report = (folder / "evaluation/report.html").read_bytes()
    return epochs, (folder / "model/model.safetensors").read_bytes(), metrics, report.count(b"data:image")


@pytest.mark.parametrize(
    ("form", "protocol", "workers", "budget"),
    [
        ("int8", "http", 0, 0),
        ("int8", "http", 1, 0),
        ("int8", "memory", 1, "auto"),
        ("float16", "http", 0, "auto"),
        ("float16", "memory", 0, 0),
        ("zstd", "http", 0, 0),
        ("zstd", "file", 0, 0),
    ],
)
def test_the_result_is_that_of_the_local_store(
    tmp_path: Path, form: str, protocol: str, workers: int, budget: int | str
) -> None:
    study = make_study(tmp_path, features=FORMS[form])
    receipt = study.extract()
    compute = {"loader_workers": workers}
    expected = outcome(study, receipt, study.cache, tmp_path / "local", compute=compute)
    with pushed(study, receipt, protocol, tmp_path / "there") as url:
        shutil.rmtree(study.cache)
        with pytest.raises(CacheIncompleteError, match=r"store\.remote"):
            outcome(study, receipt, study.cache, tmp_path / "none")
        found = outcome(
            study, receipt, study.cache, tmp_path / "remote", url,
            store={"memory_budget": budget}, compute=compute,
        )  # fmt: skip
    assert found == expected
    assert not study.cache.exists(), "nothing was copied"


def test_damage_stops_the_training(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    receipt = study.extract()
    with pushed(study, receipt, "http", tmp_path / "there") as url:
        shutil.rmtree(study.cache)
        (path,) = tmp_path.glob("there/*/features.zarr/keys/c.1.*")
        content = bytearray(path.read_bytes())
        content[100] ^= 4
        path.write_bytes(content)
        for budget, workers in ((0, 0), (0, 1), ("auto", 0)):
            with pytest.raises(CacheCorruptError, match=r"features.zarr/keys cannot be read"):
                outcome(
                    study, receipt, study.cache, tmp_path / "out", url,
                    store={"memory_budget": budget}, compute={"loader_workers": workers},
                )  # fmt: skip
