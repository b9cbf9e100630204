"""Compare a manifest with the one before: what changed, and what has to be computed again."""

from __future__ import annotations

from collections import defaultdict

from schemas.manifest import Manifest, ManifestRow
from schemas.text import counted

Rows = dict[str, list[ManifestRow]]


def describe_changes(before: Manifest, now: Manifest) -> tuple[str, ...]:
    """Return a line about the images, and one about what they make necessary.

    Images are identified by their content: a renamed image is neither new nor removed. An image is edited if its path
    has another content than before.
    """
    changes = _count(before, now)
    if not any(changes.values()) and before.classes == now.classes:
        return ("Nothing changed since the last `fpt prepare`.",)
    parts = [f"{counted(number, 'image')} {what}" for what, number in changes.items() if number]
    if before.classes != now.classes:
        parts.append(f"classes {', '.join(now.classes)} (were {', '.join(before.classes)})")
    return (f"Since the last `fpt prepare`: {', '.join(parts)}.", _consequences(before, now))


def _count(before: Manifest, now: Manifest) -> dict[str, int]:
    old, new = _by_content(before), _by_content(now)
    old_paths, new_paths = ({row.path: row.id for row in manifest.every()} for manifest in (before, now))
    edited = sum(old_paths[path] != one for path, one in new_paths.items() if path in old_paths)
    fresh = [row for row in now.every() if row.id not in old and row.path not in old_paths]
    gone = [row for row in before.every() if row.id not in new and row.path not in new_paths]
    both = old.keys() & new.keys()
    copies = {one: len(new[one]) - len(old[one]) for one in both}
    return {
        "added": len(fresh) + sum(max(0, number) for number in copies.values()),
        "removed": len(gone) + sum(max(0, -number) for number in copies.values()),
        "renamed": sum(
            min(len(_paths(new[one]) - _paths(old[one])), len(_paths(old[one]) - _paths(new[one]))) for one in both
        ),
        "edited": edited,
        "relabelled": sum(len(new[one]) for one in both if _values(old[one], "label") != _values(new[one], "label")),
        "with another patient": sum(len(new[one]) for one in both if _groups(old[one]) != _groups(new[one])),
        "in another split": sum(
            len(new[one]) for one in both if _values(old[one], "split") != _values(new[one], "split")
        ),
    }


def _consequences(before: Manifest, now: Manifest) -> str:
    """Name what depends on the changes: features, training, evaluation."""
    new = len(set(now.ids()) - set(before.ids()))
    features = f"features of up to {counted(new, 'image')} (those that the cache lacks)" if new else ""
    if _used(before, "train", "val") != _used(now, "train", "val"):
        parts = [features, "training", "evaluation"]
    elif _used(before, "test") != _used(now, "test"):
        parts = [features, "evaluation; training and validation images are the same"]
    else:
        parts = [features or "nothing: every split has the same images and labels"]
    return f"To compute: {', '.join(part for part in parts if part)}."


def _used(manifest: Manifest, *splits: str) -> tuple[object, ...]:
    rows = ((row.split, row.id, row.label) for row in manifest.rows if row.split in splits)
    return manifest.classes, manifest.task, sorted(rows)


def _by_content(manifest: Manifest) -> Rows:
    rows: Rows = defaultdict(list)
    for row in manifest.every():
        rows[row.id].append(row)
    return rows


def _paths(rows: list[ManifestRow]) -> set[str]:
    return {row.path for row in rows}


def _values(rows: list[ManifestRow], name: str) -> set[str]:
    return {getattr(row, name) for row in rows}


def _groups(rows: list[ManifestRow]) -> set[str]:
    # An image without a group has its path as group, which a new name changes.
    return {"" if row.group == row.path else row.group for row in rows}
