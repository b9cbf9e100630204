"""Try a method before it is trained: the time that a row takes on this machine, and the memory of its device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from schemas.manifest import Manifest, ManifestRow
from schemas.methods import METHODS
from schemas.resolved import ResolvedSettings
from schemas.results import EpochLog
from stages.store.memory_rows import available_memory
from stages.train.inputs import StudyFiles
from stages.train.job import SPLITS, Watch
from stages.train.trainer import train_together

SECONDS = 1.5
"""Steps are repeated for this long; the first always ends."""
MOST_STEPS = 1000
"""Steps at most."""
FITTED = 48
"""Training rows that closed forms are fitted to."""


class _EnoughError(Exception):
    """Ends a trial from its callback."""


def device_memory(device: torch.device) -> int:
    """Return the bytes that a training can allocate: all memory of an accelerator, what is free of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return available_memory()


def seconds_per_row(settings: ResolvedSettings, files: StudyFiles, folder: Path) -> float:
    """Measure a training step with a validation batch on real inputs, or a fit to a few rows.

    Args:
        settings: Settings of a run.
        files: Manifest, LPM and features of the study.
        folder: Folder in which a temporary folder is made.

    Returns:
        Seconds per training row and epoch, with as many validation rows. The first step counts only without another.

    Raises:
        FptError: As `train_together`.
    """
    trial = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": MOST_STEPS})})
    closed_form = METHODS[settings.method].closed_form
    manifest = _few(files.manifest, FITTED if closed_form else settings.train.batch_size)
    rows = sum(1 for _ in manifest.of("train"))
    times: list[float] = []
    start = time.perf_counter()

    def follow(_: int, log: EpochLog) -> None:
        times.append(log.seconds)
        if time.perf_counter() - start > SECONDS:
            raise _EnoughError

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        watch = Watch(on_epoch=follow)
        with suppress(_EnoughError):
            train_together([trial], replace(files, manifest=manifest), [place / "model"], place, watch)
    return min(times[1:] or times) / rows


def _few(manifest: Manifest, count: int) -> Manifest:
    """Return a manifest of about `count` training and `count` validation images, with and without every class."""
    rows = [row for split in SPLITS for row in _covering(list(manifest.of(split)), manifest, count)]
    return manifest.model_copy(update={"rows": tuple(sorted(rows, key=lambda row: row.path))})


def _covering(rows: Sequence[ManifestRow], manifest: Manifest, count: int) -> list[ManifestRow]:
    """Return some rows: those that bring the first image with or without a class, then others."""
    missing = {(name, has) for name in manifest.classes for has in (True, False)}
    first: list[ManifestRow] = []
    others: list[ManifestRow] = []
    for row in rows:
        names = manifest.names(row)
        brings = missing & {(name, name in names) for name in manifest.classes}
        missing -= brings
        (first if brings else others).append(row)
    return first + others[: max(0, count - len(first))]
