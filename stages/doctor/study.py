"""Checks of what a study relies on outside of its folder: model hub, weights of the LPM, and feature store."""

from __future__ import annotations

from pathlib import Path

from schemas.doctor import Finding
from schemas.resolved import ResolvedSettings
from schemas.text import counted

HUB_SECONDS = 3.0
"""Timeout of the model hub in seconds."""


def check_hub(needed: bool | None) -> Finding:
    """Check whether the model hub answers.

    Args:
        needed: Whether weights must be downloaded from it; None outside of a study, where this is unknown.
    """
    from huggingface_hub import constants

    from stages.lpm.weights import hub_reachable

    if hub_reachable(HUB_SECONDS):
        return Finding(name="model hub", status="ok", detail=f"{constants.ENDPOINT} answers")
    if constants.HF_HUB_OFFLINE:
        detail, repair = "HF_HUB_OFFLINE prevents the request", "unset HF_HUB_OFFLINE"
    else:
        detail = f"{constants.ENDPOINT} does not answer within {HUB_SECONDS:.0f} seconds"
        repair = "set HF_ENDPOINT to a mirror"
    if needed is False:
        return Finding(name="model hub", status="ok", detail=f"{detail}; this study does not need it")
    return Finding(
        name="model hub",
        status="fail" if needed else "warn",
        detail=f"{detail}; weights that are not on this machine cannot be downloaded",
        repair=f"Check the network, {repair}, or set lpm.weights to a local file.",
    )


def check_weights(settings: ResolvedSettings, root: Path) -> Finding:
    """Check that the weights are on this machine and match every tensor of the model in the settings.

    Args:
        settings: Resolved settings.
        root: Folder for relative paths.

    Raises:
        WeightsError: They are missing or belong to another model.
    """
    from stages.lpm.loading import load_lpm
    from stages.lpm.weights import locate_weights, need_hub

    lpm, features = settings.lpm, settings.features
    if need_hub(lpm, root):
        detail = f"not on this machine yet: `fpt extract` downloads those of {lpm.name} from the hub"
        return Finding(name="weights", status="skipped", detail=detail)
    path = locate_weights(lpm, root)
    loaded = load_lpm(lpm, features.image_size, root, features.with_tokens)
    return Finding(name="weights", status="ok", detail=f"{path} fits {loaded.info.name} ({loaded.weights_sha256[:16]})")


def check_store(
    cache_root: Path,
    receipt: Path,
    remote: str | None = None,
    settings: ResolvedSettings | None = None,
    root: Path | None = None,
    repair: str = "fpt extract",
) -> Finding:
    """Check that the store of a study's extraction receipt exists, with all receipts and files of the right length.

    Args:
        cache_root: Folder of all stores.
        receipt: Path of the study's extraction receipt.
        remote: `store.remote`, from which training reads what the cache lacks.
        settings: Resolved, with the precision of the store for "auto"; None if these or the weights are unknown.
        root: Folder of `params.yaml`; required with `settings`.
        repair: Command that extracts with these settings.

    Raises:
        CacheIncompleteError: The store or some of its shards are gone.
        CacheCorruptError: It is damaged.
    """
    from stages.extract.plan import requested_spec
    from stages.store.extraction_receipt import read_extraction_receipt
    from stages.store.remote_rows import open_rows

    if not receipt.exists():
        return Finding(name="store", status="skipped", detail="no features were extracted yet")
    extraction = read_extraction_receipt(receipt)
    reader = open_rows(cache_root, extraction, remote)
    try:
        reader.require_complete()
    finally:
        reader.close()
    images, shards = counted(extraction.images, "image"), counted(len(extraction.shards), "shard")
    detail = f"{extraction.fingerprint[:16]}: {images} in {shards}"
    spec, differing = extraction.spec, {}
    if settings is not None and root is not None:
        differing = requested_spec(settings, root, spec.lpm).differing(spec)
    if differing:
        detail += f", extracted with other settings: {', '.join(differing)}"
        return Finding(name="store", status="warn", detail=detail, repair=repair)
    return Finding(name="store", status="ok", detail=detail)
