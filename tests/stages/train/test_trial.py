"""Trials: a few steps on real inputs, every class among few images, nothing left behind."""

from __future__ import annotations

import pytest
from study import Study
from task_studies import task_study

from stages.device import set_up
from stages.train import trial
from stages.train.trial import device_memory, seconds_per_row


@pytest.mark.parametrize("method", ["fpt+", "linear", "ept-lse"])
def test_steps_are_timed_and_leave_nothing(study: Study, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 0.05)
    receipt = study.extract()
    folder = study.root / "trials"
    settings = study.settings.model_copy(update={"method": method})
    assert 0 < seconds_per_row(settings, study.files(receipt), folder) < 10
    assert not list(folder.iterdir())
    assert not (study.root / "model").exists()


def test_few_images_have_every_class_with_and_without(tmp_path) -> None:  # type: ignore[no-untyped-def]
    study = task_study(tmp_path, "multilabel")
    few = trial._few(study.manifest, 4)
    for split in ("train", "val"):
        rows = list(few.of(split))
        assert len(rows) <= 2 * len(few.classes)
        for name in few.classes:
            assert {name in few.names(row) for row in rows} == {True, False}
    assert not list(few.of("test"))
    assert sum(1 for _ in trial._few(study.manifest, 20).of("train")) == 20


def test_the_memory_of_this_machine(study: Study) -> None:
    assert device_memory(set_up(study.settings.compute)) > 2**26
