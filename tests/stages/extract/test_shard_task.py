"""The unit of work: memory that runs out, passes that end early, types that are narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study import Study, make_study

from schemas.errors import DeviceMemoryError, StorageError
from schemas.parse import parse_settings
from schemas.resolve import feature_spec, resolve
from schemas.views import IDENTITY
from stages.extract import precision, taps
from stages.extract.extractor import plan_tasks
from stages.extract.features import compute_features, to_pixels
from stages.extract.precision import choose_precision, fastest_precision, measure_precisions
from stages.extract.shard_task import ACCELERATOR_BATCH, CPU_BATCH, Extractor, batch_size
from stages.extract.taps import Taps
from stages.images import read_image
from stages.lpm.loading import load_lpm
from stages.store.array_layouts import array_layouts
from stages.store.layout import Store, create_store, open_store_layout
from stages.store.reader import open_store

TOO_MUCH = 2**60
"""Bytes that no allocator grants."""


@pytest.fixture
def made(tmp_path: Path) -> Study:
    return make_study(tmp_path, 4)


def extractor(study: Study) -> tuple[Store, Extractor, list[tuple[str, str, str]]]:
    lpm = load_lpm(study.settings.lpm, 64, study.root)
    store = create_store(study.cache, feature_spec(study.settings, lpm.info, lpm.weights_sha256), 4)
    images = {row.id: str(study.root / "images" / row.path) for row in study.manifest.rows}
    rows = [(image_id, path, IDENTITY) for image_id, path in images.items()]
    return store, Extractor(study.settings, study.root, store), rows


def greedy(worker: Extractor, most: int) -> list[int]:
    """From now on a batch of more than `most` images asks for more memory than there is; sizes that were tried."""
    tried: list[int] = []

    def ask(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > most:
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    worker._lpm.model.patch_embed.register_forward_pre_hook(ask)
    return tried


def test_a_batch_that_does_not_fit_is_halved_and_stays_small(made: Study) -> None:
    made.settings = made.changed(compute={"extract_batch_size": 4})
    store, worker, images = extractor(made)
    tried = greedy(worker, 1)
    done = list(worker.run(plan_tasks(store, images), lambda _: None))
    assert sum(result.rows for result in done) == len(images)
    assert tried[:3] == [4, 2, 1]
    assert worker.batch_size == 1
    assert set(tried[4:]) <= {1, 2}
    made.settings = made.changed(compute={"extract_batch_size": 1})
    rows = open_store(made.cache, made.extract()).read([images[1][0]], ["keys"])
    alone = compute_features(worker._lpm, store.spec, [to_pixels(read(images[1][1]), store.spec)])
    assert np.array_equal(rows["keys"], alone["keys"])


def test_one_image_that_does_not_fit_is_said(made: Study) -> None:
    store, worker, images = extractor(made)
    greedy(worker, 0)
    with pytest.raises(DeviceMemoryError, match=r"features\.image_size"):
        list(worker.run(plan_tasks(store, images), lambda _: None))
    assert store.finished_shards() == []


def test_another_error_of_the_model_is_not_taken_for_memory(made: Study) -> None:
    store, worker, images = extractor(made)

    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    worker._lpm.model.register_forward_pre_hook(fail)
    worker._lpm.model.patch_embed.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes"):
        list(worker.run(plan_tasks(store, images), lambda _: None))


def test_a_disk_that_cannot_be_written_stops_the_run(made: Study) -> None:
    store, worker, images = extractor(made)
    tasks = plan_tasks(store, images)
    results = worker.run(tasks, lambda _: None)
    assert next(results).rows == 4
    # In the place of a file that is to come there is a folder now.
    store.shard_file("keys", 2).mkdir()
    with pytest.raises(StorageError, match=str(store.path)):
        list(results)
    assert store.finished_shards() == [0, 1]


def read(path: str) -> Any:
    return read_image(Path(path), max_pixels=10**6)


def test_without_pooled_outputs_and_statistics_the_pass_ends_with_the_last_keys(made: Study) -> None:
    lpm = load_lpm(made.settings.lpm, 64, made.root)
    whole = feature_spec(made.settings, lpm.info, lpm.weights_sha256)
    short = feature_spec(made.changed(features={"pooled": False, "statistics": False}), lpm.info, lpm.weights_sha256)
    assert short.fingerprint != whole.fingerprint
    statistics = 2 * whole.segments[-1].stop
    assert short.bytes_per_image == whole.bytes_per_image - 8 * lpm.info.width - statistics
    images = [to_pixels(read(str(made.root / "images" / row.path)), short) for row in made.manifest.rows[:3]]
    full = compute_features(lpm, whole, images)
    ran: list[str] = []
    model: Any = lpm.model
    model.blocks[short.layers[-1]].mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    found = compute_features(lpm, short, images)
    assert ran == []
    assert set(found.arrays) == set(full.arrays) - {"pooled", "statistics"} == set(array_layouts(short)) - {"sha256"}
    for name in found.arrays:
        np.testing.assert_allclose(found[name], full[name], atol=2e-3)


def test_a_store_with_pooled_outputs_serves_a_run_without(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    full = made.extract()
    made.settings = made.changed(features={"pooled": False})

    def refuse(*_: object) -> None:
        raise AssertionError("the LPM was loaded")

    monkeypatch.setattr("stages.extract.shard_task.load_lpm", refuse)
    part = made.extract()
    assert part.spec.pooled is False
    assert not (open_store_layout(made.cache, part.spec).group / "pooled").exists()
    ids = made.manifest.ids()
    kept = ["keys", "values", "indices", "side"]
    left, right = open_store(made.cache, full).read(ids, kept), open_store(made.cache, part).read(ids, kept)
    assert all(np.array_equal(left[name], right[name]) for name in kept)


def test_the_model_is_as_before_when_the_taps_are_gone(made: Study) -> None:
    lpm = load_lpm(made.settings.lpm, 64, made.root)
    spec = feature_spec(made.settings, lpm.info, "")
    model: Any = lpm.model
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model.forward_features(pixels)
        with Taps(model, spec, lambda layer: layer) as tapped:
            inside = tapped.run(pixels)
            assert len(tapped.take()) == len(spec.layers)
        torch.testing.assert_close(inside, before)
        assert torch.equal(model.forward_features(pixels), before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_many_tokens_go_through_the_mlp_in_parts(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lpm = load_lpm(made.settings.lpm, 64, made.root)
    spec = feature_spec(made.settings, lpm.info, "")
    model: Any = lpm.model
    widths: list[int] = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _i, out: widths.append(out.shape[1]))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = model.forward_features(pixels)
        monkeypatch.setattr(taps, "MLP_CHUNK", 7)
        with Taps(model, spec, lambda layer: layer) as tapped:
            torch.testing.assert_close(tapped.run(pixels), before)
    assert widths[0] == spec.lpm.tokens
    assert max(widths[1:]) == 7
    assert sum(widths[1:]) == spec.lpm.tokens


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_bfloat16_is_near_and_another_store(made: Study, dtype: str) -> None:
    made.settings = made.changed(features={"dtype": dtype})
    exact = made.extract()
    made.settings = made.changed(features={"dtype": dtype, "precision": "bfloat16"})
    rough = made.extract()
    assert rough.fingerprint != exact.fingerprint
    ids = made.manifest.ids()
    left, right = (open_store(made.cache, receipt).read(ids, ["pooled"])["pooled"] for receipt in (exact, rough))
    error = np.linalg.norm(left - right) / np.linalg.norm(left)
    assert 0 < error < 0.02


def test_auto_goes_on_in_the_type_in_which_the_store_was_begun(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    lpm = made.lpm
    monkeypatch.setattr(precision, "WORTHWHILE", 0.0)
    for fastest, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
        times = {fastest: 1.0, other: 1.29 if fastest == "float32" else 1.31}
        monkeypatch.setattr(precision, "measure_precisions", lambda *_, t=times: t)
        assert fastest_precision(lpm, torch.device("cpu")) == fastest
        assert choose_precision(made.settings, lpm, made.cache) == fastest
    # A gain too small for features that are not exact.
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: {"bfloat16": 1.0, "float32": 1.29})
    assert choose_precision(made.settings, lpm, made.cache) == "float32"
    made.settings = made.changed(features={"precision": "bfloat16"})
    made.extract()
    assert choose_precision(made.settings, lpm, made.cache) == "bfloat16"
    assert choose_precision(made.changed(features={"ratio": 0.1}), lpm, made.cache) == "float32"


def test_a_small_lpm_is_not_measured(made: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "measure_precisions", lambda *_: {"bfloat16": 1.0, "float32": 9.0})
    assert fastest_precision(made.lpm, torch.device("cpu")) == "float32"
    base = made.lpm.model_copy(update={"width": 384, "image_size": 512})
    assert fastest_precision(base, torch.device("cpu")) == "bfloat16"


def test_types_are_really_timed(made: Study) -> None:
    seconds = measure_precisions(made.lpm, torch.device("cpu"))
    assert set(seconds) == {"float32", "bfloat16"}
    assert all(value > 0 for value in seconds.values())


def test_no_auto_survives(made: Study) -> None:
    settings = parse_settings({"lpm": {"name": "test_vit"}, "features": {"image_size": 64, "precision": "auto"}})
    settings = settings.model_copy(update={"train": made.settings.train})
    assert resolve(settings, made.lpm, lambda _: "bfloat16").features.precision == "bfloat16"
    assert resolve(settings, made.lpm).features.precision == "float32"


def test_the_batch_suits_the_device() -> None:
    compute = parse_settings({}).compute
    assert batch_size(compute, torch.device("cpu")) == CPU_BATCH
    assert batch_size(compute, torch.device("cuda")) == ACCELERATOR_BATCH
    assert batch_size(parse_settings({"compute": {"extract_batch_size": 3}}).compute, torch.device("cuda")) == 3
