"""`fpt extract`: stage one, the LPM's features of every image that the cache does not hold yet."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import duration, say, say_next, show_json, show_pairs, show_sizes, size
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from pipeline.waiting import wait_briefly
from schemas.errors import InterruptedRunError
from schemas.text import counted

if TYPE_CHECKING:
    from pipeline.progress import ImageBar
    from pipeline.project import Study
    from schemas.features import ExtractionPlan, ExtractionReceipt
    from stages.extract.extractor import ExtractProgress, Step


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
    from pipeline.project import open_study, remind_to_watch

    wait_briefly()
    study = open_study(params, [*(assignments or []), *_cluster_assignments(cluster)])
    settings = study.settings
    if plan:
        from stages.extract.plan import plan_extraction
        from stages.manifest import read_manifest

        planned = plan_extraction(settings, study.root, study.cache, read_manifest(study.manifest), all_views)
        _show_plan(planned, settings.features.dtype, as_json)
        return
    if settings.lpm.weights != "hub":
        remind_to_watch(study, "lpm.weights", settings.lpm.weights)
    _extract(study, all_views, check, as_json)


def _cluster_assignments(cluster: str | None) -> list[str]:
    """Return the --set overrides that --cluster stands for."""
    if cluster is None:
        return []
    return ["cluster.kind=scheduler", f"cluster.address={cluster}"] if "://" in cluster else [f"cluster.kind={cluster}"]


def _extract(study: Study, all_views: bool, check: bool, as_json: bool) -> None:
    """Extract with progress bars, and print the result.

    Raises:
        InterruptedRunError: After Ctrl-C or SIGTERM, with the number of rows in the store.
    """
    from pipeline.api import extract as run
    from pipeline.api import shard_runner
    from pipeline.interrupt import stop_gently

    start = time.monotonic()
    with _Bars(study.lpm.name) as bars:
        try:
            receipt = run(
                study,
                all_views=all_views,
                check=check,
                progress=bars.extracting,
                preparing=bars.preparing,
                execute=stop_gently(shard_runner(study.settings)),
            )
        except InterruptedRunError:
            raise InterruptedRunError(f"{bars.last.done} of {bars.last.total} rows are in the store.") from None
    _show_result(receipt, bars.last, time.monotonic() - start, str(study.cache / receipt.fingerprint[:16]), as_json)


class _Bars:
    """Progress bars of an extraction, one at a time as a terminal needs it."""

    def __init__(self, lpm: str) -> None:
        self._lpm = lpm
        self._open = ExitStack()
        self._bar: ImageBar | None = None
        self._step: str | None = None
        self._last: ExtractProgress | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def last(self) -> ExtractProgress:
        """The last state of the extraction; it reports one before it computes anything."""
        if self._last is None:
            raise ValueError("the extraction reported no state")
        return self._last

    def preparing(self, step: Step, done: int, total: int) -> None:
        """Show a step before the extraction itself."""
        texts = {"statistics": ("Mean and deviation of the training images", "image")}
        text, unit = texts.get(step, ("Checking the store", "shard"))
        self._show(step, text, unit)(done, total)

    def extracting(self, progress: ExtractProgress) -> None:
        """Show the extraction itself."""
        if self._step != "features" and progress.repaired:
            self._open.close()
            say(f"{progress.repaired} damaged shards were removed; their images are computed again.")
        self._last = progress
        self._show("features", f"Features of {self._lpm}", "image")(progress.done, progress.total)

    def _show(self, step: str, text: str, unit: str) -> ImageBar:
        from pipeline.progress import ImageBar

        if self._bar is None or self._step != step:
            self._open.close()
            self._step, self._bar = step, self._open.enter_context(ImageBar(text, unit))
        return self._bar


def _show_result(
    receipt: ExtractionReceipt, progress: ExtractProgress, seconds: float, store: str, as_json: bool
) -> None:
    rows, cached = progress.total, progress.cached
    computed = rows - cached
    if as_json:
        show_json(
            {
                "images": receipt.images,
                "rows": rows,
                "cached": cached,
                "reused": progress.reused,
                "computed": computed,
                "seconds": round(seconds, 1),
                "fingerprint": receipt.fingerprint,
                "store": store,
            }
        )
        return
    spent = f" in {duration(seconds)}" if computed else ""
    copied = f" ({progress.reused} copied from another store)" if progress.reused else ""
    views = f" ({counted(rows, 'row')} with their views)" if rows > receipt.images else ""
    outcome = f"{cached} were in the cache{copied}, computed {computed}{spent}"
    precision = receipt.spec.precision
    kind = f" The LPM computes in {precision}." if precision != "float32" else ""
    say(f"{counted(receipt.images, 'image')}{views}: {outcome}.{kind} Store: {store}")
    say_next("fpt train")


def _show_plan(plan: ExtractionPlan, dtype: str, as_json: bool) -> None:
    if as_json:
        show_json(plan.model_dump(mode="json"))
        return
    basis = "measured in this store" if plan.estimate == "receipts" else "a rough guess for this machine"
    views = plan.rows > plan.images
    moments = f", {size(plan.statistics_bytes)} of them token statistics" if plan.statistics_bytes else ""
    show_pairs(
        "What `fpt extract` would do",
        [
            ("Images", f"{plan.images}" + (f" ({counted(plan.rows, 'row')} with their views)" if views else "")),
            ("In the cache", f"{plan.cached}" + (f" (from another store: {plan.reused})" if plan.reused else "")),
            ("To compute", f"{plan.to_compute}"),
            ("Size", f"{size(plan.bytes)} ({size(plan.bytes_per_image)} per {'row' if views else 'image'}{moments})"),
            ("Files", f"{plan.files}"),
            ("Free disk", size(plan.free_bytes)),
            ("Time", f"{duration(plan.seconds)} ({basis})" if plan.to_compute else "none"),
            ("Store", plan.store or "named once the mean and deviation of the training images are computed"),
        ],
    )
    show_sizes(plan.cache_bytes_by_dtype, dtype)
    if plan.bytes > plan.free_bytes:
        say("The disk is too small: free some space, or set FPT_CACHE_DIR to a larger disk.")
