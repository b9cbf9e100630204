"""Checks of the devices and CPU cores that this process can use."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from schemas.doctor import Finding
from schemas.text import counted

NVIDIA = "0x10de"
"""PCI vendor id."""


def check_device(setting: str = "auto") -> Finding:
    """Check the device that `compute.device` selects by computing a matrix product on it.

    Args:
        setting: Value of `compute.device`.
    """
    import torch

    from stages.device import pick_device

    device = pick_device(setting)
    if device.type == "cuda":
        # A build without kernels for this card counts as available until something runs.
        float((torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum())
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        return Finding(name="device", status="ok", detail=f"cuda {torch.version.cuda}: {names}")
    if device.type == "mps":
        float((torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum())
        return Finding(name="device", status="ok", detail="mps")
    if setting == "auto" and has_nvidia_card():
        built = torch.version.cuda
        if built is None:
            cause, repair = (
                "torch was built without CUDA",
                "Install a CUDA build of torch, or set compute.device to cpu.",
            )
        else:
            cause = f"torch was built for CUDA {built} and finds no driver for it"
            repair = "Install the NVIDIA driver for that CUDA version, or set compute.device to cpu."
        detail = f"cpu: this machine has an NVIDIA card, but {cause}"
        return Finding(name="device", status="warn", detail=detail, repair=repair)
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding(name="device", status="ok", detail=f"cpu ({capability})")


def has_nvidia_card(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA display or compute device is on the PCI bus, with or without a driver (Linux)."""
    for device in devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(("0x0300", "0x0302")):
            return True
    return False


def check_threads(setting: int = 0, environment: Mapping[str, str] | None = None) -> Finding:
    """Compare the number of torch threads with the cores available to this process.

    Args:
        setting: Value of `compute.threads`; 0 means one thread per core.
        environment: Variables; by default those of the process.
    """
    variables = os.environ if environment is None else environment
    allowed, quota = allowed_cores(), cpu_quota()
    cores = allowed if quota is None else max(1, min(allowed, math.ceil(quota)))
    detail = f"{cores} of {counted(os.cpu_count() or 1, 'core')}"
    if quota is not None and quota < allowed:
        detail += f" (a quota of {quota:g})"
    named = variables.get("OMP_NUM_THREADS", "")
    used = setting or (int(named) if named.isdecimal() else allowed)
    detail += f", {counted(used, 'thread')}"
    policy = variables.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "active":
        return Finding(
            name="threads",
            status="warn",
            detail=f"{detail}; OMP_WAIT_POLICY={policy}: waiting threads occupy cores that loaders and workers need",
            repair="unset OMP_WAIT_POLICY, or OMP_WAIT_POLICY=passive",
        )
    source = "compute.threads" if setting else "OMP_NUM_THREADS" if named.isdecimal() else "the affinity"
    # compute.threads exists only within a study.
    knob = "compute.threads" if setting else "OMP_NUM_THREADS or, in a study, compute.threads"
    if used > cores:
        return Finding(
            name="threads",
            status="warn",
            detail=f"{detail} from {source}: more threads than cores, so they wait for each other",
            repair=f"Set {knob} to {cores}.",
        )
    if used < cores:
        repair = f"Set {knob} to {cores}, unless other processes need the cores."
        return Finding(name="threads", status="warn", detail=f"{detail} from {source}", repair=repair)
    return Finding(name="threads", status="ok", detail=detail)


def allowed_cores() -> int:
    """Return the number of cores on which the scheduler may run this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPU quota of the control groups in cores (Linux containers), or None if unlimited.

    The quota is the lowest limit from the group of this process up to the root of the hierarchy.
    """
    limits = []
    for folder in _group_folders(root, groups):
        try:
            if (folder / "cpu.max").exists():
                granted, period = (folder / "cpu.max").read_text().split()
            else:
                granted = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            if granted != "max" and int(granted) > 0:
                limits.append(int(granted) / int(period))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def _group_folders(root: Path, groups: Path) -> list[Path]:
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        group = base / path.lstrip("/")
        # Within a container the path may be that of the host, of which only the root is visible.
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return folders
