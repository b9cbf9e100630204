"""Sites, rounds and bytes of a federated training, for the report of its model."""

from __future__ import annotations

from pathlib import Path

from schemas.federated import SUMMARY, FederatedResult
from schemas.results import BundleSpec
from schemas.text import counted
from stages.files import read_regular


def read_federated(bundle_dir: Path, spec: BundleSpec) -> FederatedResult | None:
    """Read the summary of the federated training of a bundle; None if it was trained in another way.

    The summary is a file next to the bundle's folder. One that another training left there is ignored.
    """
    try:
        result = FederatedResult.model_validate_json(read_regular(bundle_dir.parent / SUMMARY))
    except (OSError, ValueError):
        return None
    # The server has no predictions of validation images, and so no AUC.
    described = (result.method, result.learnable, result.plan.epochs_of(result.best)[1], None)
    return result if described == (spec.network.method, spec.learnable, spec.best_epoch, spec.val_auc) else None


def federated_text(result: FederatedResult) -> str:
    """Return text such as `3 sites, 10 rounds, 0.52 MiB up per site and round`."""
    sites, rounds = counted(len(result.sites), "site"), counted(len(result.rounds), "round")
    return f"{sites}, {rounds}, {result.up_bytes / 2**20:,.2f} MiB up per site and round"
