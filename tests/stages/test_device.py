"""What a stage asks of the machine."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from schemas.machine import ComputeSettings
from stages import device


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    library = SimpleNamespace(mallopt=lambda *option: asked.append(option))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    device.set_up(ComputeSettings())
    assert asked == [(-1, device.KEPT_BYTES), (-3, device.MAPPED_BYTES)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    device.keep_freed_memory()
