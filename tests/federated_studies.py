"""A tiny study dealt to sites, and its federated training in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from study import Study

from schemas.features import ExtractionReceipt
from schemas.federated import FederatedPlan, FederatedResult
from schemas.manifest import Manifest
from schemas.resolved import ResolvedSettings
from stages.federate.messages import Exchange
from stages.federate.server import Server, federate
from stages.federate.site import Site, in_process


def sites_at(
    study: Study, receipt: ExtractionReceipt | None, manifests: Mapping[str, Manifest], settings: ResolvedSettings
) -> dict[str, Site]:
    """The sites of manifests, on the shared store of a study."""
    files = study.files(receipt)
    return {
        name: Site(name, settings, replace(files, manifest=manifest), study.root / "sites" / name)
        for name, manifest in manifests.items()
    }


def run(
    study: Study,
    receipt: ExtractionReceipt | None,
    manifests: Mapping[str, Manifest],
    plan: FederatedPlan,
    output: str = "federated",
    settings: ResolvedSettings | None = None,
    exchange: Exchange | None = None,
    **watch: Any,
) -> FederatedResult:
    """Train at these sites; the checkpoint is next to the output."""
    chosen = settings or study.settings
    sites = sites_at(study, receipt, manifests, chosen)
    server = Server(
        settings=chosen,
        files=study.files(receipt),
        exchange=exchange or in_process(sites),
        output=study.root / output,
        checkpoints=study.root / "server",
        **watch,
    )
    try:
        return federate(server, tuple(manifests), plan)
    finally:
        for site in sites.values():
            site.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a bundle."""
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> None:
    """Compare all tensors bit by bit."""
    assert one.keys() == two.keys() and one
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
