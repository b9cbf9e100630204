"""Reports of `fpt cache` about stores: their users, damage, and features that nobody needs."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from schemas.base import Contract
from schemas.features import FeatureSpec
from schemas.manifest import ImageId


class StoreUse(Contract):
    """Note of a study in a store that it relies on; the study's extraction receipt is authoritative."""

    study: str
    """Folder of the study."""
    receipt: str
    """Path of its extraction receipt."""
    host: str
    """Machine of these paths: other machines cannot check whether they still exist."""
    fingerprint: str
    """Fingerprint of the store."""
    shards: tuple[int, ...]
    """Shards in the receipt at that time."""
    finished: bool
    """False during an extraction, and after an interrupted one: every shard then counts as needed."""
    time: datetime
    """Time of the last use, UTC."""


class StoreListing(Contract):
    """One store of a cache root."""

    store: str
    """Folder."""
    fingerprint: str
    """Fingerprint of the features; only its first 16 characters if the store cannot be read."""
    spec: FeatureSpec | None
    """Spec of the features; null if the metadata cannot be read."""
    shards: int
    """Finished shards."""
    rows: int
    """Images and other views of images, each counted once."""
    bytes: int
    """Size on disk, including metadata."""
    studies: tuple[str, ...]
    """Studies that currently refer to it."""
    last_used: datetime | None
    """Latest extraction or training, UTC; null if none was recorded."""


DamageKind = Literal["flipped", "truncated", "missing", "receipt", "foreign", "metadata", "replaced"]


class Damage(Contract):
    """One defect of a store."""

    kind: DamageKind
    """flipped: bytes differ; truncated: another length; missing: a file or shard is gone; receipt: does not parse or
    belongs to another shard; foreign: no receipt names the file; metadata: the description of the arrays is wrong;
    replaced: a study relies on a shard that has other content now."""
    file: str
    """Path relative to the store."""
    shard: int | None
    """Shard number, if the damage concerns one shard."""
    reason: str
    """Explanation in one sentence."""


class Verification(Contract):
    """Result of comparing every byte of a store with its receipts."""

    store: str
    """Folder."""
    fingerprint: str
    """Fingerprint of the store."""
    shards: int
    """Finished shards that were compared."""
    rows: int
    """Images and other views of images in undamaged shards."""
    damages: tuple[Damage, ...]
    """All damage; empty if the store is intact."""
    images: tuple[ImageId, ...]
    """Images to compute again, because at least one of their rows is in damaged shards only."""
    completed: int = 0
    """Receipts of earlier versions to which row checksums were added."""


class Garbage(Contract):
    """A store, or shards of one, that no study refers to."""

    store: str
    """Folder."""
    whole: bool
    """Whether nothing of the store is needed."""
    shards: tuple[int, ...]
    """Finished shards that can be deleted."""
    bytes: int
    """Bytes that deleting them frees."""
    last_used: datetime | None
    """Latest recorded extraction or training, UTC."""


class UnreachableStudy(Contract):
    """A study that counts as a user of stores because it cannot be checked."""

    study: str
    """Folder of the study as recorded."""
    host: str
    """Machine of this path."""
    reason: str
    """Why it cannot be checked."""
    stores: tuple[str, ...]
    """Stores that are kept for it, by the first 16 characters of their fingerprints."""
    last_used: datetime
    """Its latest recorded extraction or training, UTC."""


class Transfer(Contract):
    """Result of a push or pull of one store."""

    fingerprint: str
    """Fingerprint of the store."""
    copied: int
    """Shards that were copied."""
    renumbered: int
    """Copied shards that got another number because theirs was taken."""
    present: int
    """Shards whose rows the target had already."""
    bytes: int
    """Bytes that were copied."""
    failures: tuple[str, ...]
    """Shards that could not be copied, with the reason; repeat the command to retry them."""
