"""Which device and how many threads a stage uses."""

from __future__ import annotations

import os

import torch

from schemas.errors import SettingsError
from schemas.machine import ComputeSettings


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
    """Set torch's threads and pick the device."""
    if compute.threads:
        torch.set_num_threads(compute.threads)
    elif "OMP_NUM_THREADS" not in os.environ and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return pick_device(compute.device)
