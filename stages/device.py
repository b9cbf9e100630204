"""Which device and how many threads a stage uses."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from schemas.errors import SettingsError
from schemas.machine import ComputeSettings
from schemas.settings import Precision

KEPT_BYTES = 2**28
"""Freed memory that a process keeps for what it allocates next."""
MAPPED_BYTES = 2**25
"""Size of an allocation that is mapped by itself, and given back when it is freed; the largest that glibc takes."""


def pick_device(name: str) -> torch.device:
    """The device of a setting; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        SettingsError: If the named device is not here.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if here["cuda"] else "mps" if here["mps"] else "cpu")
    if not here.get(name, False):
        raise SettingsError(
            f"compute.device is {name}, but this machine has none that torch {torch.__version__} can use.",
            repair="Set compute.device to auto, or install a torch build for the device.",
        )
    return torch.device(name)


def set_up(compute: ComputeSettings) -> torch.device:
    """Set torch's threads, keep freed memory, and pick the device."""
    keep_freed_memory()
    if compute.threads:
        torch.set_num_threads(compute.threads)
    elif "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return pick_device(compute.device)


def keep_freed_memory() -> None:
    """Have glibc keep up to `KEPT_BYTES` that are freed; elsewhere nothing.

    It gives back what is free at the end of the heap after each step of training, and each page of the next step's
    activations is a fault again.
    """
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    trim_threshold, mmap_threshold = -1, -3
    set_option(trim_threshold, KEPT_BYTES)
    set_option(mmap_threshold, MAPPED_BYTES)


def in_precision(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Context in which matrix products are computed in a type; weights stay as they are."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))
