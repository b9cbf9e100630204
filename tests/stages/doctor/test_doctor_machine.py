from __future__ import annotations

import os
from pathlib import Path

import pytest

from schemas.errors import SettingsError
from stages.doctor import machine
from stages.doctor.machine import check_device, check_threads, cpu_quota, has_nvidia_card


def cores(monkeypatch: pytest.MonkeyPatch, allowed: int, quota: float | None) -> None:
    monkeypatch.setattr(machine, "allowed_cores", lambda: allowed)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)


@pytest.mark.parametrize(
    ("allowed", "quota", "wanted", "variables", "status", "words"),
    [
        (8, None, 0, {}, "ok", "8 threads"),
        (8, None, 0, {"OMP_NUM_THREADS": "8"}, "ok", "8 threads"),
        (8, None, 0, {"OMP_NUM_THREADS": "16"}, "warn", "OMP_NUM_THREADS: more threads than cores"),
        (8, None, 0, {"OMP_NUM_THREADS": "1"}, "warn", "1 thread from OMP_NUM_THREADS"),
        (8, 2.5, 0, {}, "warn", "a quota of 2.5"),
        (8, 2.5, 3, {"OMP_NUM_THREADS": "8"}, "ok", "3 of"),
        (8, None, 9, {}, "warn", "compute.threads"),
        (8, None, 0, {"OMP_WAIT_POLICY": "ACTIVE"}, "warn", "OMP_WAIT_POLICY"),
        (8, None, 0, {"OMP_WAIT_POLICY": "passive"}, "ok", "8 threads"),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
    quota: float | None,
    wanted: int,
    variables: dict[str, str],
    status: str,
    words: str,
) -> None:
    cores(monkeypatch, allowed, quota)
    finding = check_threads(wanted, variables)
    assert finding.status == status
    assert words in finding.detail
    assert bool(finding.repair) == (status != "ok")


def test_the_affinity_of_this_process_counts() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.allowed_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_lowest_quota_up_to_the_root_counts(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("0::/user.slice/job\n")
    root = tmp_path / "cgroup"
    (root / "user.slice" / "job").mkdir(parents=True)
    assert cpu_quota(root, groups) is None
    (root / "user.slice" / "job" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(root, groups) is None
    (root / "user.slice" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(root, groups) == 1.5
    (root / "user.slice" / "job" / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(root, groups) == 1.5


def test_a_quota_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("5:memory:/job\n4:cpu,cpuacct:/docker/abc\n")
    folder = tmp_path / "cgroup" / "cpu,cpuacct"
    folder.mkdir(parents=True)  # a container sees its own group as the root
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path / "cgroup", groups) == 2.0
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(tmp_path / "cgroup", groups) is None
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "none") is None


def test_a_card_without_a_driver_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_nvidia_card(tmp_path / "none")
    for number, (vendor, kind) in enumerate([("0x8086", "0x030000"), ("0x10de", "0x040300")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(number) / "class").write_text(f"{kind}\n")
    assert not has_nvidia_card(tmp_path), "Intel graphics, and the sound of an NVIDIA card"
    (tmp_path / "1" / "class").write_text("0x030200\n")
    assert has_nvidia_card(tmp_path)
    import torch

    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        monkeypatch.setattr(machine, "has_nvidia_card", lambda: True)
        finding = check_device()
        assert finding.status == "warn"
        assert "NVIDIA card" in finding.detail


def test_a_device_that_is_not_here() -> None:
    import torch

    assert check_device("cpu").detail.startswith("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match=r"compute\.device is cuda"):
            check_device("cuda")


@pytest.mark.gpu
def test_the_names_of_the_cards() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    finding = check_device()
    assert finding.status == "ok"
    assert torch.cuda.get_device_name(0) in finding.detail
