"""What a study relies on outside of its folder: the model hub, the weights of the LPM, the store of its features."""

from __future__ import annotations

from pathlib import Path

from schemas.doctor import Finding
from schemas.resolved import ResolvedSettings
from schemas.text import counted

HUB_SECONDS = 3.0
"""For the hub's answer."""


def check_hub(needed: bool | None) -> Finding:
    """Whether the model hub answers.

    Args:
        needed: Whether weights have to come from it; None: nobody knows, outside of a study.
    """
    from huggingface_hub import constants

    from stages.lpm.weights import hub_reachable

    if hub_reachable(HUB_SECONDS):
        return Finding(name="model hub", status="ok", detail=f"{constants.ENDPOINT} answers")
    if constants.HF_HUB_OFFLINE:
        detail, repair = "HF_HUB_OFFLINE forbids to ask", "unset HF_HUB_OFFLINE"
    else:
        detail = f"{constants.ENDPOINT} does not answer within {HUB_SECONDS:.0f} seconds"
        repair = "set HF_ENDPOINT to a mirror"
    if needed is False:
        return Finding(name="model hub", status="ok", detail=f"{detail}; this study does not need it")
    return Finding(
        name="model hub",
        status="fail" if needed else "warn",
        detail=f"{detail}; weights that are not on this machine cannot be fetched",
        repair=f"Check the network, {repair}, or set lpm.weights to a local file.",
    )


def check_weights(settings: ResolvedSettings, root: Path) -> Finding:
    """Whether the weights are on this machine and fill the model that the settings name, down to the last tensor.

    Args:
        settings: Resolved.
        root: Folder that a relative path starts at.

    Raises:
        WeightsError: They are missing or those of another model.
    """
    from stages.lpm.loading import load_lpm
    from stages.lpm.weights import locate_weights, need_hub

    lpm = settings.lpm
    if need_hub(lpm, root):
        detail = f"not on this machine yet: `fpt extract` fetches those of {lpm.name} from the hub"
        return Finding(name="weights", status="skipped", detail=detail)
    path = locate_weights(lpm, root)
    loaded = load_lpm(lpm, settings.features.image_size, root)
    return Finding(name="weights", status="ok", detail=f"{path} fits {loaded.info.name} ({loaded.weights_sha256[:16]})")


def check_store(
    cache_root: Path,
    receipt: Path,
    remote: str | None = None,
    settings: ResolvedSettings | None = None,
    root: Path | None = None,
    repair: str = "fpt extract",
) -> Finding:
    """Whether the store behind a study's extraction receipt is there, complete as far as lengths and receipts tell.

    Args:
        cache_root: Folder of all stores.
        receipt: The study's extraction receipt.
        remote: `store.remote`, from which training reads what the cache lacks.
        settings: Resolved, with the precision of the store for "auto"; None where they or the weights are not known.
        root: Folder of `params.yaml`, with `settings`.
        repair: Command that extracts under these settings.

    Raises:
        CacheIncompleteError: The store or shards of it are gone.
        CacheCorruptError: It is damaged.
    """
    from stages.extract.plan import requested_spec
    from stages.store.extraction_receipt import read_extraction_receipt
    from stages.store.remote_rows import open_rows

    if not receipt.exists():
        return Finding(name="store", status="skipped", detail="no features were extracted yet")
    found = read_extraction_receipt(receipt)
    reader = open_rows(cache_root, found, remote)
    try:
        reader.require_complete()
    finally:
        reader.close()
    detail = f"{found.fingerprint[:16]}: {counted(found.images, 'image')} in {counted(len(found.shards), 'shard')}"
    differing = {} if settings is None or root is None else requested_spec(settings, root).differing(found.spec)
    if differing:
        detail += f", of other settings than now: {', '.join(differing)}"
        return Finding(name="store", status="warn", detail=detail, repair=repair)
    return Finding(name="store", status="ok", detail=detail)
