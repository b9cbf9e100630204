"""Checks of package versions against the requirements of fpt and of each other, and against known faults."""

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
"""Packages with a separate finding; all others share one."""

IMPORTED = {"torch", "torchvision", "timm", "zarr", "numcodecs"}
"""Packages that are actually imported, because compiled parts or a mismatched partner can break them."""


@dataclass(frozen=True)
class KnownFault:
    """Versions of a package, or of two packages together, with a known fault."""

    package: str
    """Package that the finding is about."""
    versions: str
    """Specifier of the faulty versions."""
    harm: str
    """Consequence, and where it is described."""
    partner: str = ""
    """Second package, if the fault needs two."""
    partner_versions: str = ""
    """Specifier of the partner's versions."""


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
        "it cannot be imported with numcodecs 0.16 (zarr-python issue 2963)",
        "numcodecs",
        ">=0.16",
    ),
)
"""Includes versions below our minimum, to show why the minimum exists."""


def check_python(version: tuple[int, int, int] | None = None) -> Finding:
    """Check the interpreter against the range that fpt requires."""
    running = version or (sys.version_info.major, sys.version_info.minor, sys.version_info.micro)
    text = ".".join(map(str, running))
    required = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if text not in SpecifierSet(required):
        return Finding(
            name="Python", status="fail", detail=f"{text}; fpt needs {required}", repair="make setup PYTHON=python3.12"
        )
    return Finding(name="Python", status="ok", detail=f"{text} ({sys.executable})")


def installed() -> dict[str, str]:
    """Return canonical name -> version of every installed package."""
    versions: dict[str, str] = {}
    for item in metadata.distributions():
        # Remains of a broken installation have no name; of duplicates, the first on the path is the one imported.
        if name := item.metadata["Name"]:
            versions.setdefault(canonicalize_name(name), item.version)
    return versions


def check_package(name: str, versions: Mapping[str, str], ranges: Mapping[str, SpecifierSet]) -> Finding:
    """Check that a package is installed, in range, without a known fault, satisfied by the others, and importable.

    Args:
        name: Canonical name.
        versions: Result of `installed`.
        ranges: Result of `required_ranges`.
    """
    version = versions.get(name)
    if version is None:
        return Finding(name=name, status="fail", detail="is not installed", repair=_install(name, ranges))
    problems = _faults(name, versions)
    if not ranges.get(name, SpecifierSet()).contains(version, prereleases=True):
        problems.append(f"fpt needs {ranges[name]}")
    problems += _unmet_requirements(name, versions)
    if not problems and name in IMPORTED:
        problems += _import_problem(name)
    if problems:
        detail = f"{version}: {'; '.join(problems)}"
        return Finding(name=name, status="fail", detail=detail, repair=_install(name, ranges))
    return Finding(name=name, status="ok", detail=version)


def check_other_packages(versions: Mapping[str, str], ranges: Mapping[str, SpecifierSet]) -> Finding:
    """Check the packages without a separate finding against their ranges."""
    others = {name: required for name, required in ranges.items() if name not in SHOWN}
    wrong = {}
    for name, required in sorted(others.items()):
        if name not in versions:
            wrong[name] = f"{name} is missing"
        elif not required.contains(versions[name], prereleases=True):
            wrong[name] = f"{name} {versions[name]} (fpt needs {required})"
    if wrong:
        repair = "pip install --upgrade " + " ".join(f"'{name}{ranges[name]}'" for name in wrong)
        return Finding(name="other packages", status="fail", detail="; ".join(wrong.values()), repair=repair)
    return Finding(name="other packages", status="ok", detail=f"{len(others)} in their ranges")


def required_ranges() -> dict[str, SpecifierSet]:
    """Return canonical name -> range of versions that fpt requires, without the packages of extras."""
    ranges = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            ranges[canonicalize_name(requirement.name)] = requirement.specifier
    # distributed is released together with dask and required as its extra.
    ranges.setdefault(canonicalize_name("distributed"), ranges.get(canonicalize_name("dask"), SpecifierSet()))
    return {str(name): required for name, required in ranges.items()}


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


def _unmet_requirements(name: str, versions: Mapping[str, str]) -> list[str]:
    """Return the requirements of a package that installed packages violate, as a later pip command may cause."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    unmet = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        partner = versions.get(canonicalize_name(requirement.name))
        if partner is not None and not requirement.specifier.contains(partner, prereleases=True):
            unmet.append(f"it needs {requirement.name}{requirement.specifier}, but {partner} is installed")
    return unmet


def _import_problem(name: str) -> list[str]:
    try:
        importlib.import_module(name)
        if name == "torchvision":
            # Operators compiled for another torch fail only when they are called.
            import torch
            from torchvision.ops import nms

            nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except Exception as error:  # ImportError, OSError of a library, RuntimeError of a missing operator
        lines = str(error).strip().splitlines()
        return [f"cannot be used: {type(error).__name__}: {lines[0] if lines else ''}".strip()]
    return []


def _install(name: str, ranges: Mapping[str, SpecifierSet]) -> str:
    # Installed as a pair: upgrading only one would break the other.
    names = ("torch", "torchvision") if name in ("torch", "torchvision") else (name,)
    return "pip install --upgrade " + " ".join(f"'{each}{ranges.get(each, '')}'" for each in names)
