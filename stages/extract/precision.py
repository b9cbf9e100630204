"""Resolve `features.precision: auto`, the type in which the LPM computes."""

from __future__ import annotations

import statistics
import time
from operator import itemgetter
from pathlib import Path

import torch
from torch.nn import functional as F

from schemas.features import FeatureSpec, LpmInfo
from schemas.resolve import feature_spec
from schemas.resolved import ResolvedSettings
from schemas.settings import Precision
from stages.device import in_precision, pick_device
from stages.store.manage.inventory import find_stores

GAIN = 1.3
"""A narrower type has to be this much faster: below it, exact features are worth more than the time."""
ROUNDS = 3
WORTHWHILE = 1e9
"""Floating-point operations of a block below which nothing is measured: a small LPM takes no time in any type."""
TRIED: dict[str, tuple[Precision, ...]] = {
    # float16 on a CPU is emulated, and ten times slower than float32 where that was measured.
    "cpu": ("float32", "bfloat16"),
    "cuda": ("float32", "bfloat16", "float16"),
    "mps": ("float32", "float16"),
}


def choose_precision(settings: ResolvedSettings, lpm: LpmInfo, cache_root: Path) -> Precision:
    """Return what "auto" means for resolved settings: the precision of an existing store, else the fastest here."""
    # The digest of the weights is not known yet, and irrelevant here.
    stored = stored_precision(cache_root, feature_spec(settings, lpm, ""))
    return stored or fastest_precision(lpm, pick_device(settings.compute.device))


def stored_precision(cache_root: Path, spec: FeatureSpec) -> Precision | None:
    """Return the precision of the store of `spec`, whatever its weights; the store with most shards decides.

    A store keeps the precision it was started with, on every machine.
    """
    ignored = {"precision", "weights_sha256"}
    if spec.normalisation == "dataset":
        # The training images determine them, and may not be measured yet.
        ignored |= {"lpm.mean", "lpm.std"}
    shards: dict[Precision, int] = {}
    for store in (found_store.store for found_store in find_stores(cache_root)):
        if store is not None and not spec.differing(store.spec).keys() - ignored:
            precision = store.spec.precision
            shards[precision] = max(shards.get(precision, 0), len(store.finished_shards()))
    return max(shards.items(), key=itemgetter(1))[0] if shards else None


def fastest_precision(lpm: LpmInfo, device: torch.device) -> Precision:
    """Time one block's matrix products and attention in each type that suits the device; float32 for small LPMs."""
    if 24 * lpm.tokens * lpm.width**2 + 4 * lpm.tokens**2 * lpm.width < WORTHWHILE:
        return "float32"
    seconds = measure_precisions(lpm, device)
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds["float32"] >= GAIN * seconds[best] else "float32"


@torch.inference_mode()
def measure_precisions(lpm: LpmInfo, device: torch.device) -> dict[Precision, float]:
    """Median seconds of the large operations of one block, by type; types take turns."""
    tokens = torch.randn(1, lpm.tokens, lpm.width, device=device)
    wide = torch.randn(4 * lpm.width, lpm.width, device=device)
    times: dict[Precision, list[float]] = {name: [] for name in TRIED[device.type]}
    for attempt in range(ROUNDS + 1):
        for name, seconds in times.items():
            _wait(device)
            start = time.perf_counter()
            with in_precision(name, device):
                hidden = F.linear(F.linear(tokens, wide), wide.T)
                heads = hidden.view(1, lpm.tokens, lpm.heads, -1).transpose(1, 2)
                F.scaled_dot_product_attention(heads, heads, heads)
            _wait(device)
            if attempt:  # the first round includes one-time set-up costs
                seconds.append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
