"""Find leaks: images of two splits that share their content or patient, or are nearly the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from schemas.errors import DataError
from schemas.manifest import GroupUnit, Leak, Split
from schemas.text import counted
from stages.groups import Cluster, find_clusters
from stages.prepare.error_text import listed
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.near_duplicates import NearDuplicates

_SHOWN = 4
"""Images of a leak that a message names."""


@dataclass(frozen=True)
class FoundLeak:
    """Images of several splits that belong together."""

    kind: Leak | None
    """What they share; None if they are connected through other images."""
    name: str
    """What they share, in words."""
    paths: Mapping[str, Split]
    """Path -> split of all images that share it and have a split."""

    def __str__(self) -> str:
        # Start with one path of each split, which is the conflict.
        first: dict[Split, str] = {}
        for path, split in self.paths.items():
            first.setdefault(split, path)
        shown = list(dict.fromkeys([*first.values(), *self.paths]))[:_SHOWN]
        rest = len(self.paths) - len(shown)
        more = f" and {rest:,} more" if rest > 0 else ""
        return f"{self.name}: " + ", ".join(f"{path} ({self.paths[path]})" for path in shown) + more


def find_leaks(
    items: Sequence[LabelledImage],
    ids: Mapping[str, str],
    near: NearDuplicates,
    unit: GroupUnit | None = None,
    allowed: Collection[Leak] = (),
) -> list[FoundLeak]:
    """Return all leaks: those of a content, then of a patient or other group, then pairs of near-duplicates.

    Without any, connections through images that have no split yet or are in the same split: such as a copy of a
    patient's image under another patient.

    Args:
        items: Images; those without a split are in no leak.
        ids: Path -> content id.
        near: Near-duplicates.
        unit: Kind of the groups, for the names.
        allowed: Kinds that make no connection.
    """
    noun = (unit or "groups").removesuffix("s")
    splits: dict[str, Split] = {item.path: item.split for item in items if item.split is not None}
    contents: dict[str, dict[str, Split]] = defaultdict(dict)
    groups: dict[str, dict[str, Split]] = defaultdict(dict)
    for item in items:
        if item.split is not None:
            contents[ids[item.path]][item.path] = item.split
            if item.group is not None:
                groups[item.group][item.path] = item.split
    leaks = [FoundLeak("content", f"the content of {content[:16]}", paths) for content, paths in contents.items()]
    leaks += [FoundLeak("patient", f"{noun} {group!r}", paths) for group, paths in groups.items()]
    for one, other, similarity in near.pairs:
        if one in splits and other in splits:
            pair = {one: splits[one], other: splits[other]}
            leaks.append(FoundLeak("near", f"nearly the same ({similarity:.2f})", pair))
    leaks = [leak for leak in leaks if _spread(leak.paths)]
    return leaks or _connected(items, ids, near, splits, allowed)


def _spread(paths: Mapping[str, Split]) -> bool:
    return len(set(paths.values())) > 1


def _connected(
    items: Sequence[LabelledImage],
    ids: Mapping[str, str],
    near: NearDuplicates,
    splits: Mapping[str, Split],
    allowed: Collection[Leak],
) -> list[FoundLeak]:
    """Return the leaks that take more than one step, ignoring the allowed kinds of connection."""
    clusters: Iterable[Cluster] = find_clusters(
        [replace(item, group=None) for item in items] if "patient" in allowed else items,
        {path: f"{path}:{content}" for path, content in ids.items()} if "content" in allowed else ids,
        near={} if "near" in allowed else near.key_of,
    )
    sets = ({path: splits[path] for path in cluster.paths if path in splits} for cluster in clusters)
    return [FoundLeak(None, f"images connected with {min(paths)}", paths) for paths in sets if _spread(paths)]


def check_leaks(
    items: Sequence[LabelledImage],
    ids: Mapping[str, str],
    near: NearDuplicates,
    unit: GroupUnit | None = None,
    allowed: Collection[Leak] = (),
) -> dict[Leak, int]:
    """Refuse predefined splits that separate images that belong together, unless this is allowed.

    Args:
        items: Images, some of them with a predefined split.
        ids: Path -> content id.
        near: Near-duplicates.
        unit: Kind of the groups, or None if no group is known.
        allowed: `data.allow_leaks`.

    Returns:
        Allowed kind -> number of its leaks.

    Raises:
        DataError: Lists all leaks that are not allowed.
    """
    found = find_leaks(items, ids, near, unit, allowed)
    refused = [leak for leak in found if leak.kind not in allowed]
    if not refused:
        # The direct leaks hide connections through other images.
        splits: dict[str, Split] = {item.path: item.split for item in items if item.split is not None}
        refused = _connected(items, ids, near, splits, allowed)
    if refused:
        kinds = sorted({leak.kind for leak in refused if leak.kind is not None})
        by_name = f" To allow it nevertheless: data.allow_leaks: [{', '.join(kinds)}]" if kinds else ""
        raise DataError(
            f"{counted(len(refused), 'leak')} between the splits of data.split_column: images that belong together are "
            "split up.",
            listed(map(str, refused)) + "\nA model would be evaluated on patients or images that it was trained on.",
            "Correct the split column, or let `fpt data repair` write a table without the images of train and val that "
            f"leak.{by_name}",
        )
    counts: dict[Leak, int] = {}
    for leak in found:
        if leak.kind is not None:
            counts[leak.kind] = counts.get(leak.kind, 0) + 1
    return counts
