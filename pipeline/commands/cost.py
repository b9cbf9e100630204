"""`fpt cost`: what a setting costs, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import show_json, show_pairs, show_sizes, size
from pipeline.options import METHOD_NAMES, PARAMS_FILE, AsJson, Assignments, Params

if TYPE_CHECKING:
    from schemas.cost import CostReport, FitCost
    from schemas.manifest import Manifest
    from schemas.resolved import ResolvedSettings

CLASSES = 2
"""Number of classes if no flag, setting or manifest gives it."""


def cost(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    lpm: Annotated[str | None, typer.Option("--lpm", help="timm model name.", show_default=False)] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Input of the LPM, in pixels.", show_default=False)
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help=f"{METHOD_NAMES}.", show_default=False)] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Dtype of the cached features: float32, float16, int8, int4.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images per training step.", show_default=False)
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=2, help="Outputs; else those of the study.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Learnable parameters, memory of a training step or size of a fit, and cache size. Needs no images and no weights.

    Inside a study the options override params.yaml; outside of one they override the defaults.
    """
    from pipeline.params import override, read_optional_params
    from pipeline.project import resolve_aloud
    from schemas.parse import parse_settings
    from stages.train.cost import estimate_cost
    from stages.train.fit_cost import count_rows

    flags = {
        "lpm.name": lpm,
        "features.image_size": image_size,
        "method": method,
        "features.dtype": dtype,
        "train.batch_size": batch_size,
    }
    raw = read_optional_params(params)
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    root = params.absolute().parent
    asked = parse_settings(override(raw, [*(assignments or []), *given]), source=params.name)
    settings, info = resolve_aloud(asked, root)
    manifest = study_manifest(params)
    counts = None if manifest is None else count_rows(manifest, settings.features)
    report = estimate_cost(settings, info, classes or count_classes(settings, manifest), root, counts)
    if as_json:
        show_json(report.model_dump(mode="json"))
    else:
        _show(report)


def study_manifest(params: Path) -> Manifest | None:
    """Return the manifest of the study, if it was prepared."""
    from schemas.settings import OUTPUTS
    from stages.manifest import read_manifest

    path = params.absolute().parent / OUTPUTS / "manifest" / "manifest.parquet"
    return read_manifest(path) if path.exists() else None


def count_classes(settings: ResolvedSettings, manifest: Manifest | None) -> int:
    """Return the classes of the settings or of the manifest, else `CLASSES`."""
    if settings.data.classes is not None:
        return len(settings.data.classes)
    return CLASSES if manifest is None else len(manifest.classes)


def _show(report: CostReport) -> None:
    parts = f" in {report.accumulate} parts" if report.accumulate > 1 else ""
    again = ", checkpointing" if report.checkpointing else ""
    steps = f"batch {report.batch_size}{parts}, " if report.train_tensor_mib is not None else ""
    show_pairs(
        f"{report.method} on {report.lpm}: {report.image_size} pixels, {report.classes} classes, "
        f"{steps}{report.dtype}{again}",
        [
            ("Learnable parameters", f"{report.learnable:,}"),
            ("Full fine-tuning", f"{report.lpm_parameters:,} ({report.learnable_share:.2%} are learnable)"),
            *_memory(report),
            *(() if report.fit is None else _fitted(report, report.fit)),
            ("PPE is the score times", f"{report.ppe_factor:.4f}"),
            *(() if report.pme_factor is None else (("PME is the score times", f"{report.pme_factor:.4f}"),)),
            ("Cache", f"{size(report.cache_bytes_per_image)} an image"),
        ],
    )
    show_sizes(report.cache_bytes_by_dtype, report.dtype)


def _memory(report: CostReport) -> list[tuple[str, str]]:
    """Return the rows about the memory of a training step."""
    full = f"{report.full_finetune_tensor_mib:,.1f} MiB"
    if report.train_tensor_mib is None:
        return [("Memory of a training step", "no gradient: one fit in closed form"), ("Full fine-tuning", full)]
    frozen = f", of which frozen weights {report.train_frozen_mib:,.1f}" if report.train_frozen_mib else ""
    states = f"parameters and their states {report.train_states_mib:,.1f}{frozen}"
    fixed = f"the batch {report.train_batch_mib:,.1f}, {states}"
    needed = report.train_tensor_mib / report.full_finetune_tensor_mib
    return [
        ("Memory of a training step", f"{report.train_tensor_mib:,.1f} MiB ({fixed})"),
        ("Full fine-tuning", f"{full} ({needed:.2%} are needed)"),
    ]


def _fitted(report: CostReport, fit: FitCost) -> list[tuple[str, str]]:
    """Return the rows about what is fitted in closed form."""
    of_images = f"{fit.width:,} numbers per image"
    if fit.rows is not None:
        of_images += f", {fit.rows:,} of training and validation: {fit.read_mib:,.1f} MiB"
    name = "Fit reads" if report.train_tensor_mib is None else "Linear probes read"
    rows = [(name, of_images)]
    if fit.coefficients != report.learnable:
        rows.append(("Their coefficients", f"{fit.coefficients:,}"))
    if fit.kept_mib is not None:
        rows.append(("Bundle keeps of the fit", f"{fit.kept_mib:,.2f} MiB"))
    return rows
