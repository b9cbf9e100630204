"""Versions: against what this package and the packages among themselves ask for, and against known faults."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from schemas.doctor import Finding
from schemas.version import DISTRIBUTION

SHOWN = ("torch", "torchvision", "timm", "zarr", "numcodecs", "dask", "distributed", "dvc")
"""Packages with a finding of their own; all others share one."""

IMPORTED = {"torch", "torchvision", "timm", "zarr", "numcodecs"}
"""Packages with compiled parts or with a partner that they may not fit: they are really imported."""


@dataclass(frozen=True)
class KnownFault:
    """Versions, alone or together, that are known to do harm."""

    package: str
    """Of the finding."""
    versions: str
    """Specifier."""
    harm: str
    """What happens, and where it is described."""
    partner: str = ""
    """Package that it takes two for."""
    partner_versions: str = ""
    """Specifier."""


KNOWN_FAULTS = (
    KnownFault(
        "zarr",
        "==3.0.3",
        "slices that end at the end of an array give wrong rows (zarr-python issue 2849, withdrawn by issue 2852)",
    ),
    KnownFault(
        "zarr",
        ">=3.0.0,<3.0.8",
        "opening with mode 'a' deletes what is there (zarr-python release notes, 3.0.8)",
    ),
    KnownFault(
        "zarr",
        "<3",
        "it cannot be imported beside numcodecs 0.16 (zarr-python issue 2963)",
        "numcodecs",
        ">=0.16",
    ),
)
"""Below our own minimum too: who goes under it should read why it is there."""


def check_python(version: tuple[int, int, int] | None = None) -> Finding:
    """The interpreter, against the range that this package asks for."""
    here = version or (sys.version_info.major, sys.version_info.minor, sys.version_info.micro)
    text = ".".join(map(str, here))
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if text not in SpecifierSet(wanted):
        return Finding(
            name="Python", status="fail", detail=f"{text}; fpt needs {wanted}", repair="make setup PYTHON=python3.12"
        )
    return Finding(name="Python", status="ok", detail=f"{text} ({sys.executable})")


def installed() -> dict[str, str]:
    """Canonical name -> version of every installed package."""
    found: dict[str, str] = {}
    for item in metadata.distributions():
        # A broken leftover of an installation has no name; of two the first on the path is the one that is imported.
        if name := item.metadata["Name"]:
            found.setdefault(canonicalize_name(name), item.version)
    return found


def check_package(name: str, versions: Mapping[str, str], ranges: Mapping[str, SpecifierSet]) -> Finding:
    """One package: present, in range, without a known fault, what it asks of others, and importable.

    Args:
        name: Canonical name.
        versions: From `installed`.
        ranges: From `wanted_ranges`.
    """
    here = versions.get(name)
    if here is None:
        return Finding(name=name, status="fail", detail="is not installed", repair=_install(name, ranges))
    problems = _faults(name, versions)
    if not ranges.get(name, SpecifierSet()).contains(here, prereleases=True):
        problems.append(f"fpt needs {ranges[name]}")
    problems += _broken_wishes(name, versions)
    if not problems and name in IMPORTED:
        problems += _import_problem(name)
    if problems:
        return Finding(name=name, status="fail", detail=f"{here}: {'; '.join(problems)}", repair=_install(name, ranges))
    return Finding(name=name, status="ok", detail=here)


def check_other_packages(versions: Mapping[str, str], ranges: Mapping[str, SpecifierSet]) -> Finding:
    """All packages without a finding of their own, against their ranges."""
    others = {name: wanted for name, wanted in ranges.items() if name not in SHOWN}
    wrong = {}
    for name, wanted in sorted(others.items()):
        if name not in versions:
            wrong[name] = f"{name} is missing"
        elif not wanted.contains(versions[name], prereleases=True):
            wrong[name] = f"{name} {versions[name]} (fpt needs {wanted})"
    if wrong:
        repair = "pip install --upgrade " + " ".join(f"'{name}{ranges[name]}'" for name in wrong)
        return Finding(name="other packages", status="fail", detail="; ".join(wrong.values()), repair=repair)
    return Finding(name="other packages", status="ok", detail=f"{len(others)} in their ranges")


def wanted_ranges() -> dict[str, SpecifierSet]:
    """Canonical name -> versions that this package asks for; packages of extras are left out."""
    ranges = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        wish = Requirement(line)
        if wish.marker is None or wish.marker.evaluate({"extra": ""}):
            ranges[canonicalize_name(wish.name)] = wish.specifier
    # Released together with dask, and asked for as its extra.
    ranges.setdefault(canonicalize_name("distributed"), ranges.get(canonicalize_name("dask"), SpecifierSet()))
    return {str(name): wanted for name, wanted in ranges.items()}


def _faults(name: str, versions: Mapping[str, str]) -> list[str]:
    faults = []
    for fault in KNOWN_FAULTS:
        partner = versions.get(fault.partner, "")
        if (
            fault.package == name
            and SpecifierSet(fault.versions).contains(versions[name], prereleases=True)
            and (not fault.partner or (partner and partner in SpecifierSet(fault.partner_versions)))
        ):
            faults.append(fault.harm)
    return faults


def _broken_wishes(name: str, versions: Mapping[str, str]) -> list[str]:
    """What a package asks of the packages here and does not get: pip lets a later command break it."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    broken = []
    for line in lines:
        wish = Requirement(line)
        if wish.marker is not None and not wish.marker.evaluate({"extra": ""}):
            continue
        partner = versions.get(canonicalize_name(wish.name))
        if partner is not None and not wish.specifier.contains(partner, prereleases=True):
            broken.append(f"it needs {wish.name}{wish.specifier}, here is {partner}")
    return broken


def _import_problem(name: str) -> list[str]:
    try:
        importlib.import_module(name)
        if name == "torchvision":
            # Its compiled half fails only when an operator is called, if it was built for another torch.
            import torch
            from torchvision.ops import nms

            nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except Exception as error:  # ImportError, OSError of a library, RuntimeError of a missing operator
        lines = str(error).strip().splitlines()
        return [f"cannot be used: {type(error).__name__}: {lines[0] if lines else ''}".strip()]
    return []


def _install(name: str, ranges: Mapping[str, SpecifierSet]) -> str:
    # The two come as a pair: one alone would take the other's build away from it.
    names = ("torch", "torchvision") if name in ("torch", "torchvision") else (name,)
    return "pip install --upgrade " + " ".join(f"'{each}{ranges.get(each, '')}'" for each in names)
