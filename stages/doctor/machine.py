"""Devices and cores that this process may really use."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from schemas.doctor import Finding
from schemas.text import counted

NVIDIA = "0x10de"
"""Vendor of a PCI device."""


def check_device(wanted: str = "auto") -> Finding:
    """The device that `compute.device` picks, with a product computed on it.

    Args:
        wanted: The setting.
    """
    import torch

    from stages.device import pick_device

    device = pick_device(wanted)
    if device.type == "cuda":
        # A build without code for this card is "available" until something runs.
        float((torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum())
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        return Finding(name="device", status="ok", detail=f"cuda {torch.version.cuda}: {names}")
    if device.type == "mps":
        float((torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum())
        return Finding(name="device", status="ok", detail="mps")
    if wanted == "auto" and has_nvidia_card():
        built = torch.version.cuda
        if built is None:
            cause, repair = "torch has no CUDA in it", "Install a CUDA build of torch, or set compute.device to cpu."
        else:
            cause = f"torch is built for CUDA {built} and finds no driver for it"
            repair = "Install the NVIDIA driver for that CUDA version, or set compute.device to cpu."
        return Finding(name="device", status="warn", detail=f"cpu: there is an NVIDIA card, but {cause}", repair=repair)
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding(name="device", status="ok", detail=f"cpu ({capability})")


def has_nvidia_card(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA display or compute device is on the bus, driver or not (Linux)."""
    for device in devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(("0x0300", "0x0302")):
            return True
    return False


def check_threads(wanted: int = 0, environment: Mapping[str, str] | None = None) -> Finding:
    """Threads that torch will use, against the cores that this process gets.

    Args:
        wanted: `compute.threads`; 0: as many as there are.
        environment: Variables; None: those of the process.
    """
    variables = os.environ if environment is None else environment
    allowed, quota = allowed_cores(), cpu_quota()
    cores = allowed if quota is None else max(1, min(allowed, math.ceil(quota)))
    detail = f"{cores} of {counted(os.cpu_count() or 1, 'core')}"
    if quota is not None and quota < allowed:
        detail += f" (a quota of {quota:g})"
    named = variables.get("OMP_NUM_THREADS", "")
    used = wanted or (int(named) if named.isdecimal() else allowed)
    detail += f", {counted(used, 'thread')}"
    policy = variables.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "active":
        return Finding(
            name="threads",
            status="warn",
            detail=f"{detail}; OMP_WAIT_POLICY={policy}: threads that wait keep their cores from loaders and workers",
            repair="unset OMP_WAIT_POLICY, or OMP_WAIT_POLICY=passive",
        )
    source = "compute.threads" if wanted else "OMP_NUM_THREADS" if named.isdecimal() else "the affinity"
    # Outside of a study there is no compute.threads.
    setting = "compute.threads" if wanted else "OMP_NUM_THREADS or, in a study, compute.threads"
    if used > cores:
        return Finding(
            name="threads",
            status="warn",
            detail=f"{detail} from {source}: more than cores, so that they wait for each other",
            repair=f"Set {setting} to {cores}.",
        )
    if used < cores:
        repair = f"Set {setting} to {cores}, unless other processes need the cores."
        return Finding(name="threads", status="warn", detail=f"{detail} from {source}", repair=repair)
    return Finding(name="threads", status="ok", detail=detail)


def allowed_cores() -> int:
    """Cores that the scheduler may put this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control groups grant (Linux; containers); None: no limit.

    The lowest limit from the process's own group up to the root of the hierarchy.
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
        own = base / path.lstrip("/")
        # Within a container the path may be the host's, of which only the root can be seen.
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return folders
