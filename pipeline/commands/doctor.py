"""`fpt doctor`: find what would fail on this machine and in this study, with repairs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pipeline.console import say, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from pipeline.params import PARAMS
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.doctor import Finding, Health
    from schemas.features import LpmInfo
    from schemas.resolved import ResolvedSettings
    from schemas.settings import Settings

WEIGHTS_SECONDS = 600.0
"""Time limit of checks that may read gigabytes from a slow disk."""


def doctor(params: Params = PARAMS_FILE, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Check versions, device, threads, cache, hub, and in a study its settings, weights and store.

    Changes nothing. Exits with 1 if a command would fail, otherwise with 0; warnings do not count.
    """
    from pipeline.project import cache_root
    from schemas.doctor import Health

    settings, finding = _settings(params, assignments or [])
    root = params.absolute().parent
    cache = cache_root(root)
    study = _study(settings, root, cache, finding.status, _options(params, assignments or []))
    findings = [*_packages(), *_machine(settings, cache), finding, *study]
    health = Health(findings=tuple(findings))
    if as_json:
        show_json({"healthy": health.healthy, **health.model_dump(mode="json")})
    else:
        _show(health)
    if not health.healthy:
        raise typer.Exit(1)


def _options(params: Path, assignments: list[str]) -> str:
    """Return the options of this command that the command in a repair needs as well."""
    given = [*(("--params", str(params)) if params != Path(PARAMS) else ()), *(f"--set={each}" for each in assignments)]
    return "".join(f" {shlex.quote(option)}" for option in given)


def _settings(params: Path, assignments: list[str]) -> tuple[Settings | None, Finding]:
    """Return the settings, or None if they are missing or invalid, and the finding about them."""
    from pipeline.params import load_settings
    from schemas.doctor import Finding
    from schemas.errors import FptError
    from stages.doctor.guard import failed

    if params == Path(PARAMS) and not params.exists():
        return None, Finding(name="settings", status="skipped", detail=f"no {PARAMS} here: not a study")
    try:
        return load_settings(params, assignments), Finding(name="settings", status="ok", detail=f"{params} is valid")
    except FptError as error:
        if not params.exists():  # a file named with --params
            raise
        return None, failed("settings", error)


def _packages() -> list[Finding]:
    from stages.doctor.guard import run_check
    from stages.doctor.versions import (
        SHOWN,
        check_other_packages,
        check_package,
        check_python,
        installed,
        required_ranges,
    )

    here, ranges = installed(), required_ranges()
    return [
        run_check("Python", check_python),
        *(run_check(name, check_package, name, here, ranges) for name in SHOWN),
        run_check("other packages", check_other_packages, here, ranges),
    ]


def _machine(settings: Settings | None, cache: Path) -> list[Finding]:
    from schemas.machine import ComputeSettings
    from stages.doctor.disk import check_file_system, check_locks, check_space, check_writable
    from stages.doctor.guard import run_check
    from stages.doctor.machine import check_device, check_threads

    compute = ComputeSettings() if settings is None else settings.compute
    return [
        run_check("device", check_device, compute.device),
        run_check("threads", check_threads, compute.threads),
        run_check("cache root", check_writable, cache),
        run_check("file locks", check_locks, cache),
        run_check("free space", check_space, cache),
        run_check("file system", check_file_system, cache),
    ]


def _study(settings: Settings | None, root: Path, cache: Path, status: str, options: str) -> list[Finding]:
    """Check model, hub, weights and store, each as far as possible if an earlier check failed."""
    from pipeline.project import remote_store
    from schemas.doctor import Finding
    from schemas.settings import OUTPUTS
    from stages.doctor.guard import run_check
    from stages.doctor.study import check_hub, check_store, check_weights
    from stages.lpm.weights import need_hub

    if settings is None:
        detail = "not in a study" if status == "skipped" else "the settings are not valid"
        skipped = [Finding(name=name, status="skipped", detail=detail) for name in ("model", "weights", "store")]
        return [run_check("model hub", check_hub, None), *skipped]
    resolutions: list[tuple[ResolvedSettings, LpmInfo]] = []
    model = run_check("model", _resolve, settings, root, cache, resolutions)
    remote = remote_store(settings, root)
    receipt = root / OUTPUTS / "features" / "receipt.json"
    if not resolutions:
        weights = Finding(name="weights", status="skipped", detail="the model is not known")
        return [
            model,
            run_check("model hub", check_hub, None),
            weights,
            run_check("store", check_store, cache, receipt, remote, limit=WEIGHTS_SECONDS),
        ]
    resolved, _ = resolutions[0]
    hub = run_check("model hub", lambda: check_hub(need_hub(resolved.lpm, root)))
    weights = run_check("weights", check_weights, resolved, root, limit=WEIGHTS_SECONDS)
    # Without valid weights the fingerprint of the settings is unknown, so the store is not compared with them.
    comparison = (resolved, root, f"fpt extract{options}") if weights.status == "ok" else ()
    store = run_check("store", check_store, cache, receipt, remote, *comparison, limit=WEIGHTS_SECONDS)
    return [model, hub, weights, store]


def _resolve(
    settings: Settings, root: Path, cache: Path, resolutions: list[tuple[ResolvedSettings, LpmInfo]]
) -> Finding:
    """Resolve the settings, append the result to `resolutions`, and return the finding about the model."""
    from schemas.doctor import Finding
    from schemas.resolve import feature_spec, resolve
    from stages.extract.precision import stored_precision
    from stages.lpm.loading import describe_lpm

    features = settings.features
    lpm = describe_lpm(settings.lpm.name, features.image_size, root, features.with_tokens)
    # As in an extraction, "auto" is the precision of the store; without a store the value does not matter here, so
    # nothing is measured.
    resolved = resolve(
        settings, lpm, lambda partly: stored_precision(cache, feature_spec(partly, lpm, "")) or "float32"
    )
    resolutions.append((resolved, lpm))
    shape = lpm.architecture if lpm.map_widths else f"{lpm.tokens:,} tokens"
    return Finding(name="model", status="ok", detail=f"{lpm.name}: {shape} at {lpm.image_size} pixels")


def _show(health: Health) -> None:
    rows = []
    for finding in health.findings:
        status = finding.status.upper() if finding.status in ("warn", "fail") else finding.status
        detail = f"{finding.detail}\n-> {finding.repair}" if finding.repair else finding.detail
        rows.append((finding.name, status, detail))
    show_table("What fpt finds on this machine", ("Check", "Status", "Detail -> repair"), rows, words=True)
    failing = [finding.name for finding in health.findings if finding.status == "fail"]
    warned = sum(finding.status == "warn" for finding in health.findings)
    warnings = f" ({counted(warned, 'warning')})" if warned else ""
    passed = f"All checks passed{warnings}."
    say(f"{len(failing)} of {counted(len(rows), 'check')} failed: {', '.join(failing)}." if failing else passed)
