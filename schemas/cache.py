"""What `fpt cache` says about stores: who uses them, what is damaged, what nobody needs."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from schemas.base import Contract
from schemas.features import FeatureSpec
from schemas.manifest import ImageId


class StoreUse(Contract):
    """Note of a study in a store that it relies on; the newest word is the study's own extraction receipt."""

    study: str
    """Folder of the study."""
    receipt: str
    """Path of its extraction receipt."""
    host: str
    """Machine whose paths these are: another machine cannot look whether they still exist."""
    fingerprint: str
    """Of the store."""
    shards: tuple[int, ...]
    """Shards of the receipt at that time."""
    finished: bool
    """False while the extraction runs, and after one that was stopped: then every shard counts as needed."""
    time: datetime
    """Of the last use, UTC."""


class StoreListing(Contract):
    """One store of a cache root."""

    store: str
    """Folder."""
    fingerprint: str
    """Of the spec; the first 16 characters alone where the store cannot be read."""
    spec: FeatureSpec | None
    """What its features are; null where its metadata cannot be read."""
    shards: int
    """Finished shards."""
    rows: int
    """Images and other views of images, each counted once."""
    bytes: int
    """On the disk, metadata included."""
    studies: tuple[str, ...]
    """Studies that refer to it now."""
    last_used: datetime | None
    """Newest extraction or training, UTC; null where none was noted."""


DamageKind = Literal["flipped", "truncated", "missing", "receipt", "foreign", "metadata", "replaced"]


class Damage(Contract):
    """One thing that is wrong in a store."""

    kind: DamageKind
    """flipped: bytes differ; truncated: another length; missing: a file or shard is gone; receipt: does not parse or
    belongs elsewhere; foreign: no receipt names the file; metadata: the store describes itself wrongly; replaced: a
    study relies on a shard that has other content now."""
    file: str
    """Relative to the store."""
    shard: int | None
    """Number of the shard, if it concerns one."""
    reason: str
    """One sentence."""


class Verification(Contract):
    """Result of comparing every byte of a store with its receipts."""

    store: str
    """Folder."""
    fingerprint: str
    """Of the store."""
    shards: int
    """Finished shards that were compared."""
    rows: int
    """Images and other views of images in shards without damage."""
    damages: tuple[Damage, ...]
    """Empty: the store is whole."""
    images: tuple[ImageId, ...]
    """To be computed again: rows of theirs, maybe of other views, are in damaged shards only."""
    completed: int = 0
    """Receipts of earlier versions that now have the checksums of their rows."""


class Garbage(Contract):
    """A store, or shards of one, that no study refers to."""

    store: str
    """Folder."""
    whole: bool
    """Whether nothing of the store is needed."""
    shards: tuple[int, ...]
    """Finished shards that can go."""
    bytes: int
    """What their removal frees."""
    last_used: datetime | None
    """Newest extraction or training that was noted, UTC."""


class UnreachableStudy(Contract):
    """A study that counts as a user of stores because it cannot be looked at."""

    study: str
    """Folder of the study as it was noted."""
    host: str
    """Machine whose path this is."""
    reason: str
    """Why it cannot be looked at."""
    stores: tuple[str, ...]
    """Stores that stay for it: beginnings of their fingerprints."""
    last_used: datetime
    """Its newest extraction or training that was noted, UTC."""


class Transfer(Contract):
    """What a push or pull did to one store."""

    fingerprint: str
    """Of the store."""
    copied: int
    """Shards."""
    renumbered: int
    """Of these, shards that got another number, because theirs was taken."""
    present: int
    """Shards whose rows were there already."""
    bytes: int
    """Copied."""
    failures: tuple[str, ...]
    """Shards that could not be copied, with the reason; a repeated command tries them again."""
