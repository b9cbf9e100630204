from __future__ import annotations

import sys
import time

import pytest
from packaging.specifiers import SpecifierSet

from schemas.doctor import Finding
from schemas.errors import StorageError
from stages.doctor import versions
from stages.doctor.guard import run_check
from stages.doctor.versions import (
    SHOWN,
    check_other_packages,
    check_package,
    check_python,
    installed,
    required_ranges,
)


def test_this_environment_is_healthy() -> None:
    here, ranges = installed(), required_ranges()
    assert set(SHOWN) <= set(ranges)
    for name in SHOWN:
        finding = check_package(name, here, ranges)
        assert (finding.status, finding.detail) == ("ok", here[name]), finding
    assert check_other_packages(here, ranges).status == "ok"
    assert check_python().status == "ok"


def test_an_old_python() -> None:
    finding = check_python((3, 10, 4))
    assert finding.status == "fail"
    assert "3.10.4" in finding.detail and ">=3.11" in finding.detail


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("zarr", "3.0.5", "mode 'a' deletes"),
        ("zarr", "3.0.3", "wrong rows"),
        ("zarr", "2.18.6", "numcodecs 0.16"),
        ("zarr", "3.0.9", "fpt needs >=3.1"),
        ("torch", "2.5.1", "fpt needs >=2.6"),
        ("timm", "1.0.11", "fpt needs"),
    ],
)
def test_versions_that_do_harm_or_are_too_old(name: str, version: str, words: str) -> None:
    finding = check_package(name, {**installed(), name: version}, required_ranges())
    assert finding.status == "fail"
    assert words in finding.detail and version in finding.detail
    assert finding.repair.startswith("pip install --upgrade")


def test_a_known_fault_of_two_needs_both() -> None:
    old = {**installed(), "zarr": "2.18.6", "numcodecs": "0.15.1"}
    assert "numcodecs 0.16" not in check_package("zarr", old, required_ranges()).detail


def test_torchvision_of_another_torch() -> None:
    finding = check_package("torchvision", {**installed(), "torch": "2.6.0"}, required_ranges())
    assert finding.status == "fail"
    assert "needs torch" in finding.detail
    assert "torch>=" in finding.repair and "torchvision>=" in finding.repair


def test_a_missing_operator_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.ops

    def fail(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(torchvision.ops, "nms", fail)
    finding = check_package("torchvision", installed(), required_ranges())
    assert finding.status == "fail"
    assert finding.detail.endswith("RuntimeError: operator torchvision::nms does not exist")


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    finding = check_package("numcodecs", installed(), required_ranges())
    assert finding.status == "fail"
    assert "cannot be used" in finding.detail


def test_packages_that_are_missing_or_old() -> None:
    here, ranges = installed(), required_ranges()
    without = {name: version for name, version in here.items() if name not in ("timm", "pillow")}
    assert check_package("timm", without, ranges).detail == "is not installed"
    finding = check_other_packages({**without, "pydantic": "1.10.0"}, ranges)
    assert finding.status == "fail"
    assert "pillow is missing" in finding.detail and "pydantic 1.10.0" in finding.detail
    assert "'pillow>=" in finding.repair and "'pydantic>=" in finding.repair


def test_development_builds_are_in_range() -> None:
    ranges = {"torch": SpecifierSet(">=2.6")}
    assert versions.check_package("torch", {"torch": "2.99.0.dev20260101+cu132"}, ranges).status == "ok"


def test_a_check_that_hangs_or_raises_is_a_finding() -> None:
    def slow() -> Finding:
        time.sleep(30)
        return Finding(name="slow", status="ok", detail="")

    def broken(error: Exception) -> Finding:
        raise error

    assert run_check("slow", slow, limit=0.05).detail == "no answer within 0.05 seconds"
    finding = run_check("broken", broken, OSError("libtorch.so: undefined symbol\nmore"))
    assert (finding.status, finding.detail) == ("fail", "OSError: libtorch.so: undefined symbol")
    finding = run_check("disk", broken, StorageError("State.", "Cause.", "Repair."))
    assert (finding.name, finding.detail, finding.repair) == ("disk", "State.\nCause.", "Repair.")
