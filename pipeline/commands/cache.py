"""`fpt cache`: where the features lie, whether they are whole, who needs them, and how they travel."""

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
Url = Annotated[str, typer.Argument(metavar="URL", help="A directory, or any URL that fsspec knows.")]

SHOWN = 20
"""Lines of a long list that people get to see; --json has all."""


@cache.command()
def path(params: Params = PARAMS_FILE) -> None:
    """Print the folder of the feature stores: FPT_CACHE_DIR, else .fpt/cache of the study."""
    from pipeline.project import cache_root

    show(str(cache_root(params.absolute().parent)))


@cache.command(name="ls")
def list_(params: Params = PARAMS_FILE, as_json: AsJson = False) -> None:
    """List the stores: what their features are, how large they are, and who used them last."""
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
    """Compare every byte of the stores with their receipts. Exits with 2 where something is wrong."""
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
    paths = {} if manifest is None else {row.id: row.path for row in manifest.rows}
    wanted = {}
    if manifest is not None and mine is not None and mine.receipt is not None:
        wanted = {row.row_id: row.image for row in manifest_rows(manifest, mine.receipt)}
    results, unreadable = [], []
    if mine is not None and not fingerprints and not (root / mine.use.fingerprint[:16]).is_dir():
        unreadable.append(f"The store {mine.use.fingerprint[:16]} of this study is gone: run `fpt extract`.")
    for found in _chosen(root, fingerprints):
        if found.store is None:
            unreadable.append(str(found.problem))
            continue
        uses = [live for live in live_uses(found.path, other_hosts=False) if live.unreachable is None]
        of_study = mine is not None and mine.use.fingerprint == found.store.spec.fingerprint
        if mine is not None and of_study and all(live.use.receipt != mine.use.receipt for live in uses):
            uses.append(mine)
        with ImageBar(f"Shards of {found.path.name}", unit="shard") as bar:
            results.append(verify_store(found.store, uses, wanted if of_study else None, bar))
        if repair:
            repair_store(found.store, results[-1])
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
            again = "The damaged shards are removed. `fpt extract` computes their images again."
            say(again if repair else "Run `fpt cache verify --repair`, then `fpt extract`.")
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
    """Drop the stores and shards that no study refers to. Shows them; deletes with --yes."""
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
        # A study that was moved is noted under its old place.
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
        words = [word for path in forget or [] for word in ("--forget", str(path))]
        say_next(shlex.join(["fpt", "cache", "gc", "--yes", *words]))


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
    for found in _chosen(cache_root(study), fingerprints):
        if found.store is None:
            raise found.problem or RuntimeError(found.path)
        with ImageBar(f"Shards of {found.path.name}", unit="shard") as bar:
            transfers.append(run(found.store, remote, bar))
    _report(transfers, remote.url, as_json)


@cache.command()
def pull(
    url: Url,
    fingerprints: Fingerprints = None,
    params: Params = PARAMS_FILE,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Copy stores from a URL: those named, else those that fit the study, else all. Resumable and verified."""
    from pipeline.progress import ImageBar
    from pipeline.project import cache_root
    from stages.store.manage.transfer import pull as run
    from stages.store.remote import open_remote

    remote = open_remote(url)
    stores = _offered(remote, fingerprints, params, assignments or [])
    transfers = []
    for store in stores:
        with ImageBar(f"Shards of {store.spec.fingerprint[:16]}", unit="shard") as bar:
            transfers.append(run(store, cache_root(params.absolute().parent), bar))
    _report(transfers, remote.url, as_json)
    if params.is_file() and not as_json:
        _tell_weights(params, assignments or [], stores)


def _show_garbage(root: Path, garbage: Sequence[Garbage]) -> None:
    if not garbage:
        say(f"Nothing to drop in {root}: a study refers to every shard, or an extraction is at work.")
        return
    rows = []
    for item in garbage:
        what = "the whole store" if item.whole else counted(len(item.shards), "shard")
        rows.append((Path(item.store).name, what, size(item.bytes), _time(item.last_used)))
    show_table("No study refers to", ("Store", "What", "Size", "Last used"), rows)


def _show_unreachable(studies: Sequence[UnreachableStudy]) -> None:
    if not studies:
        return
    rows = [(item.study, item.reason, ", ".join(item.stores), _time(item.last_used)) for item in studies]
    columns = ("Study", "Why", "Stores", "Last used")
    show_table("Studies that cannot be reached; what they need stays", columns, rows, words=True)
    say("Moved studies: run `fpt cache gc --yes` in the new place. Deleted ones: fpt cache gc --forget STUDY")


def _time(moment: datetime | None) -> str:
    return "never noted" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _chosen(root: Path, fingerprints: Sequence[str] | None) -> list[StoreFolder]:
    """The stores whose fingerprints begin as asked; all where nothing is asked."""
    from schemas.errors import CacheIncompleteError
    from stages.store.manage.inventory import find_stores

    stores = find_stores(root)
    if not fingerprints:
        return stores
    asked = [word[:16] for word in fingerprints]
    for word in asked:
        if not any(found.path.name.startswith(word) for found in stores):
            raise CacheIncompleteError(
                f"No store in {root} has a fingerprint that begins with {word}.", repair="`fpt cache ls` lists them."
            )
    return [found for found in stores if found.path.name.startswith(tuple(asked))]


def _offered(
    remote: Remote, fingerprints: Sequence[str] | None, params: Path, assignments: Sequence[str]
) -> list[RemoteStore]:
    from pipeline.project import open_study
    from schemas.errors import CacheIncompleteError
    from schemas.resolve import feature_spec
    from stages.store.manage.reuse import serves
    from stages.store.remote import remote_stores

    stores = remote_stores(remote)
    there = ", ".join(store.spec.fingerprint[:16] for store in stores) or "none"
    if fingerprints:
        asked = tuple(word[:16] for word in fingerprints)
        fitting = [store for store in stores if store.spec.fingerprint.startswith(asked)]
    elif params.is_file():
        study = open_study(params, assignments)
        # The weights file need not be here: its digest is the one field that the settings cannot say.
        pairs = [(s, feature_spec(study.settings, study.lpm, s.spec.weights_sha256)) for s in stores]
        fitting = [store for store, spec in pairs if spec == store.spec]
        fitting = fitting or [store for store, spec in pairs if serves(spec, store.spec)]
    else:
        fitting = stores
    if not fitting:
        raise CacheIncompleteError(
            f"{remote.url} has no store of these features.",
            cause=f"Stores there: {there}.",
            repair="Name a fingerprint, correct the URL or the settings, or push from where the features are.",
        )
    return fitting


def _tell_weights(params: Path, assignments: Sequence[str], stores: Sequence[RemoteStore]) -> None:
    """Say what `fpt extract` still needs: the weights file, of which the digest is part of the fingerprint."""
    from pipeline.project import open_study
    from stages.files import sha256_file

    study = open_study(params, assignments)
    if study.settings.lpm.weights != "hub":
        weights = study.root / study.settings.lpm.weights
        if not weights.is_file():
            say(f"The weights file {weights} is not here. `fpt extract` computes nothing with it, but needs it to name")
            say("the features: put it there first.")
            return
        found = sha256_file(weights)
        if all(store.spec.weights_sha256 != found for store in stores):
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
                f"{done.present} {'was' if done.present == 1 else 'were'} there."
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
        show(
            f"{name}: {counted(result.completed, 'receipt')} of an earlier version completed: checksums of rows added."
        )
    if not result.damages:
        show(f"{name}: complete, {counted(result.rows, 'row')} in {counted(result.shards, 'shard')}.")
        return
    count = len(result.damages)
    show(f"{name}: {counted(count, 'thing')} wrong.")
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
