"""`fpt extract`: stage one, the LPM's features of every image that the cache does not hold yet."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import duration, say, say_next, show_json, show_pairs, show_sizes, size
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.errors import InterruptedRunError
from schemas.text import counted

if TYPE_CHECKING:
    from schemas.features import ExtractionPlan
    from stages.extract.extractor import ExtractProgress


def extract(
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be computed, and compute nothing.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every byte of the store with its receipts first.")
    ] = False,
    all_views: Annotated[
        bool,
        typer.Option("--all-views", help="Also views of images that are not trained on now: for other splits."),
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="KIND", help="inline, local, cuda, slurm, or a scheduler's tcp://host:8786."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the LPM once over every image that the cache does not hold yet."""
    from pipeline.api import extract as run
    from pipeline.interrupt import stop_gently
    from pipeline.progress import ImageBar
    from pipeline.project import open_study, remind_to_watch
    from stages.extract.extractor import Execute
    from stages.extract.plan import plan_extraction
    from stages.extract.shard_task import inline
    from stages.manifest import read_manifest
    from stages.prepare.folds import all_to_train

    study = open_study(params, [*(assignments or []), *_cluster_assignments(cluster)])
    if plan:
        manifest = read_manifest(study.manifest)
        if all_views:
            manifest = all_to_train(manifest)
        found = plan_extraction(study.settings, study.root, study.cache, manifest)
        _show_plan(found, study.settings.features.dtype, as_json)
        return
    if study.settings.lpm.weights != "hub":
        remind_to_watch(study, "lpm.weights", study.settings.lpm.weights)
    start = time.monotonic()
    seen: list[ExtractProgress] = []
    with ExitStack() as bars:
        checking = bars.enter_context(ImageBar("Checking the store", "shard")) if check else None
        features: list[ImageBar] = []

        def follow(progress: ExtractProgress) -> None:
            if not features:
                bars.close()  # the check is over: a terminal shows one bar at a time
                if progress.repaired:
                    say(f"{progress.repaired} damaged shards were removed; their images are computed again.")
                features.append(bars.enter_context(ImageBar(f"Features of {study.lpm.name}")))
            seen[:] = [progress]
            features[0](progress.done, progress.total)

        execute: Execute = stop_gently(inline)
        if study.settings.cluster.kind != "inline":
            from pipeline.cluster.executor import on_cluster

            execute = stop_gently(on_cluster)
        try:
            receipt = run(study, all_views=all_views, check=check, progress=follow, checking=checking, execute=execute)
        except InterruptedRunError:
            done, total = seen[-1].done, seen[-1].total
            raise InterruptedRunError(f"{done} of {total} rows are in the store.") from None
    cached = seen[-1].cached
    rows = seen[-1].total
    computed, seconds = rows - cached, time.monotonic() - start
    store = str(study.cache / receipt.fingerprint[:16])
    if as_json:
        show_json(
            {
                "images": receipt.images,
                "rows": rows,
                "cached": cached,
                "reused": seen[-1].reused,
                "computed": computed,
                "seconds": round(seconds, 1),
                "fingerprint": receipt.fingerprint,
                "store": store,
            }
        )
        return
    spent = f" in {duration(seconds)}" if computed else ""
    copied = f" ({seen[-1].reused} copied from another store)" if seen[-1].reused else ""
    views = f" ({counted(rows, 'row')} with their views)" if rows > receipt.images else ""
    outcome = f"{cached} were in the cache{copied}, computed {computed}{spent}"
    kind = f" The LPM computes in {receipt.spec.precision}." if receipt.spec.precision != "float32" else ""
    say(f"{counted(receipt.images, 'image')}{views}: {outcome}.{kind} Store: {store}")
    say_next("fpt train")


def _cluster_assignments(cluster: str | None) -> list[str]:
    """What --cluster means as --set overrides."""
    if cluster is None:
        return []
    return ["cluster.kind=scheduler", f"cluster.address={cluster}"] if "://" in cluster else [f"cluster.kind={cluster}"]


def _show_plan(plan: ExtractionPlan, dtype: str, as_json: bool) -> None:
    if as_json:
        show_json(plan.model_dump(mode="json"))
        return
    basis = "measured in this store" if plan.estimate == "receipts" else "a rough guess for this machine"
    views = plan.rows > plan.images
    show_pairs(
        "What `fpt extract` would do",
        [
            ("Images", f"{plan.images}" + (f" ({counted(plan.rows, 'row')} with their views)" if views else "")),
            ("In the cache", f"{plan.cached}" + (f" (from another store: {plan.reused})" if plan.reused else "")),
            ("To compute", f"{plan.to_compute}"),
            ("Size", f"{size(plan.bytes)} ({size(plan.bytes_per_image)} {'a row' if views else 'an image'})"),
            ("Files", f"{plan.files}"),
            ("Free disk", size(plan.free_bytes)),
            ("Time", f"{duration(plan.seconds)} ({basis})" if plan.to_compute else "none"),
            ("Store", plan.store),
        ],
    )
    show_sizes(plan.cache_bytes_by_dtype, dtype)
    if plan.bytes > plan.free_bytes:
        say("The disk is too small: free some space, or set FPT_CACHE_DIR to a larger disk.")
