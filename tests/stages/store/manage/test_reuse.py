"""A store that holds more per row serves a run that needs less; and a study registers with the stores it uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from study import Study, make_study

from schemas.features import FeatureSpec
from stages.extract.extractor import ExtractProgress
from stages.extract.plan import plan_extraction
from stages.store.layout import array_layouts, open_store_layout
from stages.store.manage.inventory import list_stores
from stages.store.manage.reuse import donors, serves
from stages.store.manage.usage import live_uses
from stages.store.manage.verify import verify_store
from stages.store.reader import open_store


def no_lpm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the LPM was loaded")

    monkeypatch.setattr("stages.extract.shard_task.load_lpm", refuse)


def fewer(study: Study, **more: object) -> None:
    """Tap only the last layer."""
    layers = study.settings.features.layers
    study.settings = study.changed(features={"layers": layers[-1:], **more})


def columns(donor: FeatureSpec, target: FeatureSpec) -> list[int]:
    """Positions in the donor's rows of the statistics of the target, number by number."""
    names = {one.name for one in target.segments}
    assert names <= {one.name for one in donor.segments}
    return [column for one in donor.segments if one.name in names for column in range(one.start, one.stop)]


def test_rows_of_fewer_layers_are_copied_not_computed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    full = study.extract()
    assert len(full.spec.layers) > 1
    fewer(study)
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.cached, plan.reused, plan.to_compute, plan.seconds) == (24, 24, 0, 0.0)
    assert plan.bytes == 24 * plan.bytes_per_image
    no_lpm(monkeypatch)
    seen: list[ExtractProgress] = []
    part = study.extract(progress=seen.append)
    assert (seen[-1].cached, seen[-1].reused, seen[-1].done) == (24, 24, 24)
    ids = study.manifest.ids()
    layouts = array_layouts(part.spec)
    names = [name for name in layouts if name != "sha256"]
    large, small = open_store(study.cache, full).read(ids, names), open_store(study.cache, part).read(ids, names)
    assert part.spec.segments[-1].stop < full.spec.segments[-1].stop
    for name in names:
        expected = large[name][:, -1:] if layouts[name].dims[0] == "layer" else large[name]
        if name == "statistics":
            expected = large[name][:, columns(full.spec, part.spec)]
        assert np.array_equal(small[name], expected), name
    assert plan_extraction(study.settings, study.root, study.cache, study.manifest).reused == 0
    assert verify_store(open_store_layout(study.cache, part.spec)).damages == ()


def test_copied_statistics_are_those_that_the_lpm_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Middle layers are kept and others dropped: each kept segment must land on its own layer."""
    computed = make_study(tmp_path / "computed", features={"layers": [1, 4]})
    expected = computed.extract()
    copied = make_study(tmp_path / "copied", features={"layers": [0, 1, 3, 4]})
    copied.extract()
    copied.settings = copied.changed(features={"layers": (1, 4)})
    no_lpm(monkeypatch)
    found = copied.extract()
    assert found.spec == expected.spec
    ids = copied.manifest.ids()
    rows = [
        open_store(study.cache, receipt).read(ids, ["statistics", "keys"])
        for study, receipt in ((computed, expected), (copied, found))
    ]
    for name in ("statistics", "keys"):
        mine, other = (part[name].astype(np.float64) for part in rows)
        # A tapped block computes its attention by another kernel: equal up to rounding.
        np.testing.assert_allclose(mine, other, atol=5e-3, err_msg=name)


SMALLER = {
    "no tokens": {"tokens": False},
    "no statistics": {"statistics": False},
    "only pooled outputs": {"tokens": False, "statistics": False},
    "only statistics": {"tokens": False, "pooled": False},
}


@pytest.mark.parametrize("form", SMALLER)
def test_a_store_with_everything_serves_one_with_less(study: Study, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = study.extract()
    study.settings = study.changed(features=SMALLER[form])
    no_lpm(monkeypatch)
    part = study.extract()
    assert serves(part.spec, full.spec)
    assert not serves(full.spec, part.spec)
    ids, names = study.manifest.ids(), [name for name in array_layouts(part.spec) if name != "sha256"]
    large, small = open_store(study.cache, full).read(ids, names), open_store(study.cache, part).read(ids, names)
    for name in names:
        expected = large[name][:, columns(full.spec, part.spec)] if name == "statistics" else large[name]
        assert np.array_equal(small[name], expected), name
    assert ("keys" in names, "statistics" in names) == (bool(part.spec.layers), part.spec.statistics)
    assert verify_store(open_store_layout(study.cache, part.spec)).damages == ()


@pytest.mark.parametrize("form", SMALLER)
def test_a_store_with_less_does_not_serve_one_with_everything(study: Study, form: str) -> None:
    settings = study.settings
    study.settings = study.changed(features=SMALLER[form])
    study.extract()
    study.settings = settings
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.reused, plan.to_compute) == (0, 24)


def test_without_tokens_other_kept_tokens_do_not_matter(study: Study) -> None:
    """The ratio only decides how many tokens are kept."""
    full = study.extract().spec
    target = full.model_copy(update={"layers": (), "kept": 0})
    assert serves(target, full.model_copy(update={"kept": full.kept - 1}))
    assert not serves(target, full.model_copy(update={"precision": "bfloat16"}))
    fewer_layers = full.model_copy(update={"layers": full.layers[-1:]})
    assert not serves(fewer_layers, full.model_copy(update={"kept": full.kept - 1}))


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"ratio": 0.1}, {"side_image_size": 48}])
def test_any_other_difference_forbids_the_copy(study: Study, change: dict[str, object]) -> None:
    full = study.extract()
    fewer(study, **change)
    plan = plan_extraction(study.settings, study.root, study.cache, study.manifest)
    assert (plan.reused, plan.to_compute) == (0, 24)
    assert not serves(full.spec, full.spec)


def test_rows_that_the_other_store_lacks_or_lost_are_computed(study: Study) -> None:
    full = study.extract()
    store = open_store_layout(study.cache, full.spec)
    store.receipt(0).unlink()
    path = store.shard_file("keys", 1)
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    fewer(study)
    seen: list[ExtractProgress] = []
    part = study.extract(progress=seen.append)
    assert seen[-1].reused == 24 - 4 - 1, "a shard is gone, a row is damaged"
    assert seen[-1].done == 24
    assert verify_store(open_store_layout(study.cache, part.spec)).rows == 24


def test_the_smallest_fitting_store_comes_first(study: Study) -> None:
    last = study.lpm.depth - 1
    stores = []
    for layers in ((0, 1, last), (1, last)):
        study.settings = study.changed(features={"layers": layers})
        stores.append(study.extract().spec)
    fewer(study)
    wanted = stores[0].model_copy(update={"layers": (last,)})
    assert [donor.spec for donor in donors(study.cache, wanted)] == stores[::-1]


def test_an_extraction_registers_its_study(study: Study) -> None:
    receipt = study.extract()
    (listed,) = list_stores(study.cache)
    assert listed.studies == (str(study.root),)
    (live,) = live_uses(study.cache / receipt.fingerprint[:16])
    assert live.use.finished
    assert live.shards == frozenset(map(int, receipt.shards))
    assert not list((study.cache / receipt.fingerprint[:16] / "locks").glob("at-work-*"))


def test_a_stopped_extraction_leaves_an_unfinished_note(study: Study) -> None:
    def stop(progress: ExtractProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.extract(progress=stop)
    (listed,) = list_stores(study.cache)
    (live,) = live_uses(study.cache / listed.fingerprint[:16])
    assert (live.use.finished, live.shards) == (False, None)
