"""Members in several threads learn what they learn in one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from study import Study, make_study

from schemas.results import TrainResult
from stages.threads import CALLING_THREAD, open_threads
from stages.train.bundle import load_bundle
from stages.train.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def seen(items: Sequence[int], together: threading.Barrier | None = None) -> list[tuple[int, str, int]]:
    if together is not None:
        together.wait(30)
    return [(item, threading.current_thread().name, torch.get_num_threads()) for item in items]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("members", "shares"), [(2, [2] * 2), (3, [1] * 3), (4, [1] * 4), (9, [1] * 4)])
def test_every_thread_has_its_share_of_the_threads(members: int, shares: list[int]) -> None:
    with open_threads(members, CPU) as threads:
        # All parts at once, as with work that takes its time.
        found = threads.map(partial(seen, together=threading.Barrier(len(shares))), range(7))
        assert [item for item, _, _ in found] == list(range(7))
    counts = {name: count for _, name, count in found}
    assert list(counts.values()) == shares
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_one_member_or_an_accelerator_has_one_thread() -> None:
    for members, device in ((1, CPU), (8, torch.device("cuda"))):
        with open_threads(members, device) as threads:
            assert threads is CALLING_THREAD
            assert [name for _, name, _ in threads.map(seen, range(3))] == [threading.current_thread().name] * 3


@pytest.mark.usefixtures("four_threads")
def test_what_fails_in_a_thread_is_raised() -> None:
    def fail(items: Sequence[int]) -> list[int]:
        if 2 in items:
            raise ValueError("two")
        return list(items)

    with open_threads(3, CPU) as threads, pytest.raises(ValueError, match="two"):
        threads.map(fail, range(5))


def run(study: Study, output: str, **keys: Any) -> TrainResult:
    settings = study.changed(train=keys)
    place = study.root / output
    return train(settings, study.files(study.extract()), place, place / "checkpoints")


@pytest.mark.parametrize("keys", [{}, {"checkpointing": True, "accumulate": 2}])
def test_threads_do_not_change_what_is_learned(tmp_path: Path, keys: dict[str, Any]) -> None:
    study = make_study(tmp_path, method="fpt-x", train={"epochs": 2})
    before = torch.get_num_threads()
    try:
        for threads, name in ((1, "one"), (3, "three")):
            study.settings = study.changed(compute={"threads": threads})
            result = run(study, name, **keys)
            assert len(result.epochs) == 2
    finally:
        torch.set_num_threads(before)
    left, right = (load_bundle(study.root / name) for name in ("one", "three"))
    assert left.spec.best_epoch == right.spec.best_epoch
    other = right.network.state_dict()
    for name, value in left.network.state_dict().items():
        # The gradient of a bias of keys is rounding alone.
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)
