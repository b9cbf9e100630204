"""`fpt cache`: list, verify, clean up and transfer the feature stores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import say, say_next, show, show_json, show_pairs, show_table, size
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.text import counted

if TYPE_CHECKING:
    from datetime import datetime

    from schemas.cache import Garbage, Transfer, UnreachableStudy, Verification
    from stages.store.manage.inventory import StoreFolder
    from stages.store.remote import Remote, RemoteStore

cache = typer.Typer(help="The cache of features.", no_args_is_help=True)

Fingerprints = Annotated[
    list[str] | None, typer.Argument(metavar="[FINGERPRINT]...", help="Beginnings of fingerprints.", show_default=False)
]
Url = Annotated[str, typer.Argument(metavar="URL", help="A directory, or any URL that fsspec supports.")]

SHOWN = 20
"""Lines of a long list that are printed; --json has all."""


@cache.command()
def path(params: Params = PARAMS_FILE) -> None:
    """Print the folder of the feature stores: FPT_CACHE_DIR, else .fpt/cache of the study."""
    from pipeline.project import cache_root

    show(str(cache_root(params.absolute().parent)))


@cache.command(name="ls")
def list_(params: Params = PARAMS_FILE, as_json: AsJson = False) -> None:
    """List the stores with their features, size, users and last use."""
    from pipeline.project import cache_root
    from stages.store.manage.inventory import list_stores

    root = cache_root(params.absolute().parent)
    stores = list_stores(root)
    if as_json:
        show_json({"cache": str(root), "stores": [store.model_dump(mode="json") for store in stores]})
        return
    for store in stores:
        spec = store.spec
        show_pairs(
            store.fingerprint[:16],
            [("LPM", "cannot be read: see `fpt cache verify`")]
            if spec is None
            else [
                ("LPM", f"{spec.lpm.name} at {spec.lpm.image_size}"),
                ("Layers", ", ".join(map(str, spec.layers))),
                ("Type", spec.dtype),
                ("Rows", f"{store.rows:,} in {counted(store.shards, 'shard')}"),
                ("Size", size(store.bytes)),
                ("Last used", _time(store.last_used)),
                ("Studies", ", ".join(store.studies) or "none"),
            ],
        )
    say(f"{counted(len(stores), 'store')}, {size(sum(s.bytes for s in stores))}, in {root}")


@cache.command()
def verify(
    fingerprints: Fingerprints = None,
    params: Params = PARAMS_FILE,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged; `fpt extract` computes it again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every byte of the stores with their receipts. Exits with 2 if something is wrong."""
    from pipeline.progress import ImageBar
    from pipeline.project import cache_root
    from schemas.settings import OUTPUTS
    from schemas.views import manifest_rows
    from stages.manifest import read_manifest
    from stages.store.manage.usage import live_uses, study_use
    from stages.store.manage.verify import repair_store, verify_store

    study = params.absolute().parent
    root = cache_root(study)
    mine = study_use(study, study / OUTPUTS / "features" / "receipt.json")
    file = study / OUTPUTS / "manifest" / "manifest.parquet"
    manifest = read_manifest(file) if file.is_file() else None
    paths = {} if manifest is None else {row.id: row.path for row in manifest.every()}
    needed_rows = {}
    if manifest is not None and mine is not None and mine.receipt is not None:
        needed_rows = {row.row_id: row.image for row in manifest_rows(manifest, mine.receipt)}
    results, unreadable = [], []
    if mine is not None and not fingerprints and not (root / mine.use.fingerprint[:16]).is_dir():
        unreadable.append(f"The store {mine.use.fingerprint[:16]} of this study is gone: run `fpt extract`.")
    for folder in _select(root, fingerprints):
        if folder.store is None:
            unreadable.append(str(folder.problem))
            continue
        uses = [live for live in live_uses(folder.path, other_hosts=False) if live.unreachable is None]
        of_study = mine is not None and mine.use.fingerprint == folder.store.spec.fingerprint
        if mine is not None and of_study and all(live.use.receipt != mine.use.receipt for live in uses):
            uses.append(mine)
        with ImageBar(f"Shards of {folder.path.name}", unit="shard") as bar:
            results.append(verify_store(folder.store, uses, needed_rows if of_study else None, bar))
        if repair:
            repair_store(folder.store, results[-1])
    damaged = any(result.damages for result in results) or bool(unreadable)
    if as_json:
        stores = [_with_paths(result, paths) for result in results]
        show_json({"cache": str(root), "whole": not damaged, "stores": stores, "unreadable": unreadable})
    else:
        for line in unreadable:
            show(line)
        for result in results:
            _show_verification(result, paths)
    if damaged:
        if not as_json:
            repaired = "The damaged shards were removed. `fpt extract` computes their images again."
            say(repaired if repair else "Run `fpt cache verify --repair`, then `fpt extract`.")
        raise typer.Exit(2)


@cache.command()
def gc(
    params: Params = PARAMS_FILE,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show.")] = False,
    other_hosts: Annotated[
        bool, typer.Option("--other-hosts", help="Also drop what only studies of other machines refer to.")
    ] = False,
    forget: Annotated[
        list[Path] | None,
        typer.Option(
            "--forget", metavar="STUDY", help="Also drop what only this study refers to, which cannot be reached."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the stores and shards that no study refers to; --yes deletes them."""
    from pipeline.project import cache_root
    from schemas.settings import OUTPUTS
    from stages.store.manage.gc import Retention, drop_garbage, find_garbage, forgettable, unreachable_studies
    from stages.store.manage.usage import register_use, study_use

    study = params.absolute().parent
    root = cache_root(study)
    mine = study_use(study, study / OUTPUTS / "features" / "receipt.json")
    keep = Retention(mine, not other_hosts, forgettable(root, forget or []))
    garbage = find_garbage(root, keep)
    if yes and mine is not None:
        # The note of a moved study still has its old path.
        register_use(root, mine.use.fingerprint, study, Path(mine.use.receipt), list(mine.use.shards))
    freed = drop_garbage(root, garbage, keep) if yes else 0
    unreachable = unreachable_studies(root, keep)
    if as_json:
        dropped = [item.model_dump(mode="json") for item in garbage]
        listed = [item.model_dump(mode="json") for item in unreachable]
        show_json({"cache": str(root), "freed": freed, "garbage": dropped, "unreachable": listed})
        return
    _show_garbage(root, garbage)
    _show_unreachable(unreachable)
    if garbage and yes:
        say(f"Deleted: {size(freed)}.")
    elif garbage:
        say("Nothing is deleted yet.")
        options = [option for path in forget or [] for option in ("--forget", str(path))]
        say_next(shlex.join(["fpt", "cache", "gc", "--yes", *options]))


@cache.command()
def push(url: Url, fingerprints: Fingerprints = None, params: Params = PARAMS_FILE, as_json: AsJson = False) -> None:
    """Copy stores to a URL: those named, else the study's, else all. Resumable; every file is read back."""
    from pipeline.progress import ImageBar
    from pipeline.project import cache_root
    from schemas.settings import OUTPUTS
    from stages.store.manage.transfer import push as run
    from stages.store.manage.usage import study_use
    from stages.store.remote import open_remote

    study = params.absolute().parent
    mine = study_use(study, study / OUTPUTS / "features" / "receipt.json")
    if not fingerprints and mine is not None:
        fingerprints = [mine.use.fingerprint]
    remote, transfers = open_remote(url), []
    for folder in _select(cache_root(study), fingerprints):
        if folder.store is None:
            raise folder.problem or RuntimeError(folder.path)
        with ImageBar(f"Shards of {folder.path.name}", unit="shard") as bar:
            transfers.append(run(folder.store, remote, bar))
    _report(transfers, remote.url, as_json)


@cache.command()
def pull(
    url: Url,
    fingerprints: Fingerprints = None,
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Copy stores from a URL: those named, else those that match the study, else all. Resumable and verified."""
    from pipeline.progress import ImageBar
    from pipeline.project import cache_root
    from stages.store.manage.transfer import pull as run
    from stages.store.remote import open_remote

    remote = open_remote(url)
    stores = _select_remote(remote, fingerprints, params, assignments or [])
    transfers = []
    for store in stores:
        with ImageBar(f"Shards of {store.spec.fingerprint[:16]}", unit="shard") as bar:
            transfers.append(run(store, cache_root(params.absolute().parent), bar))
    _report(transfers, remote.url, as_json)
    if params.is_file() and not as_json:
        _show_weights_needed(params, assignments or [], stores)


def _show_garbage(root: Path, garbage: Sequence[Garbage]) -> None:
    if not garbage:
        say(f"Nothing to delete in {root}: a study refers to every shard, or an extraction is running.")
        return
    rows = []
    for item in garbage:
        content = "complete store" if item.whole else counted(len(item.shards), "shard")
        rows.append((Path(item.store).name, content, size(item.bytes), _time(item.last_used)))
    show_table("No study refers to", ("Store", "Content", "Size", "Last used"), rows)


def _show_unreachable(studies: Sequence[UnreachableStudy]) -> None:
    if not studies:
        return
    rows = [(item.study, item.reason, ", ".join(item.stores), _time(item.last_used)) for item in studies]
    columns = ("Study", "Why", "Stores", "Last used")
    show_table("Studies that cannot be reached; their features are kept", columns, rows, words=True)
    say("If a study was moved, run `fpt cache gc --yes` there. If it was deleted: fpt cache gc --forget STUDY")


def _time(moment: datetime | None) -> str:
    return "unknown" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _select(root: Path, fingerprints: Sequence[str] | None) -> list[StoreFolder]:
    """Return the stores whose fingerprints start with one of the given prefixes, or all stores without prefixes."""
    from schemas.errors import CacheIncompleteError
    from stages.store.manage.inventory import find_stores

    stores = find_stores(root)
    if not fingerprints:
        return stores
    prefixes = tuple(fingerprint[:16] for fingerprint in fingerprints)
    for prefix in prefixes:
        if not any(folder.path.name.startswith(prefix) for folder in stores):
            raise CacheIncompleteError(
                f"No store in {root} has a fingerprint that begins with {prefix}.", repair="`fpt cache ls` lists them."
            )
    return [folder for folder in stores if folder.path.name.startswith(prefixes)]


def _select_remote(
    remote: Remote, fingerprints: Sequence[str] | None, params: Path, assignments: Sequence[str]
) -> list[RemoteStore]:
    """Return the remote stores to pull: those named, else those that match the study, else all."""
    from pipeline.project import open_study
    from schemas.errors import CacheIncompleteError
    from schemas.resolve import expected_spec
    from stages.store.manage.reuse import serves
    from stages.store.remote import remote_stores

    stores = remote_stores(remote)
    available = ", ".join(store.spec.fingerprint[:16] for store in stores) or "none"
    if fingerprints:
        prefixes = tuple(fingerprint[:16] for fingerprint in fingerprints)
        fitting = [store for store in stores if store.spec.fingerprint.startswith(prefixes)]
    elif params.is_file():
        study = open_study(params, assignments)
        # The weights file need not be here: its digest is taken from the store.
        pairs = [(s, expected_spec(study.settings, study.lpm, s.spec)) for s in stores]
        fitting = [store for store, spec in pairs if spec == store.spec]
        fitting = fitting or [store for store, spec in pairs if serves(spec, store.spec)]
    else:
        fitting = stores
    if not fitting:
        raise CacheIncompleteError(
            f"{remote.url} has no store of these features.",
            cause=f"Stores there: {available}.",
            repair="Name a fingerprint, correct the URL or the settings, or push from where the features are.",
        )
    return fitting


def _show_weights_needed(params: Path, assignments: Sequence[str], stores: Sequence[RemoteStore]) -> None:
    """Print what `fpt extract` still needs: the weights file, whose digest is part of the fingerprint."""
    from pipeline.project import open_study
    from stages.files import sha256_file

    study = open_study(params, assignments)
    if study.settings.lpm.weights != "hub":
        weights = study.root / study.settings.lpm.weights
        if not weights.is_file():
            say(f"The weights file {weights} is missing. `fpt extract` does not run the LPM on these images, but it")
            say("needs the file's digest for the fingerprint: copy it there first.")
            return
        digest = sha256_file(weights)
        if all(store.spec.weights_sha256 != digest for store in stores):
            say(f"The weights file {weights} is not the one that these features were computed with: `fpt extract`")
            say("would compute all images again.")
            return
    say_next("fpt extract")


def _report(transfers: Sequence[Transfer], url: str, as_json: bool) -> None:
    from stages.store.manage.transfer import require_arrival

    if as_json:
        show_json({"url": url, "stores": [transfer.model_dump(mode="json") for transfer in transfers]})
    else:
        for done in transfers:
            renumbered = f" ({done.renumbered} under other numbers)" if done.renumbered else ""
            say(
                f"{done.fingerprint[:16]}: {counted(done.copied, 'shard')} copied{renumbered}, {size(done.bytes)}; "
                f"{done.present} already there."
            )
    require_arrival(transfers, url)


def _with_paths(result: Verification, paths: dict[str, str]) -> dict[str, object]:
    return {
        **result.model_dump(mode="json"),
        "paths": [paths[image_id] for image_id in result.images if image_id in paths],
    }


def _show_verification(result: Verification, paths: dict[str, str]) -> None:
    name = result.fingerprint[:16]
    if result.completed:
        show(f"{name}: row checksums added to {counted(result.completed, 'receipt')} of an earlier version.")
    if not result.damages:
        show(f"{name}: complete, {counted(result.rows, 'row')} in {counted(result.shards, 'shard')}.")
        return
    count = len(result.damages)
    show(f"{name}: {counted(count, 'problem')}.")
    for damage in result.damages[:SHOWN]:
        show(f"  {damage.kind}: {damage.file}. {damage.reason}")
    if count > SHOWN:
        show(f"  ... and {count - SHOWN} more; --json has all")
    images = len(result.images)
    show(f"{counted(images, 'image')} to compute again{':' if images else '.'}")
    for image_id in result.images[:SHOWN]:
        show(f"  {image_id[:16]} {paths.get(image_id, '')}".rstrip())
    if images > SHOWN:
        show(f"  ... and {images - SHOWN} more; --json has all")
