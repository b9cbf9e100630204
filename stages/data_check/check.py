"""Check a data set before anything is computed: contents, defects, copies, leaks, suspected shortcuts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from schemas.data_check import Copies, DataCheck, Probe
from schemas.data_settings import DataSettings
from schemas.manifest import Manifest
from schemas.rendering import DEFAULT_RENDERING, Rendering
from schemas.tasks import names_in
from stages.data_check.headers import Header, read_header
from stages.data_check.probes import probe_column, probe_vectors, sample
from stages.groups import find_clusters
from stages.prepare.class_names import class_order
from stages.prepare.dataset_listing import Listing, read_listing
from stages.prepare.image_digests import Digests, read_images
from stages.prepare.image_files import skipped_lines
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.leaks import find_leaks
from stages.prepare.near_duplicates import SIDE, is_blank
from stages.progress import Progress

_TINY = 4
"""Images with a side shorter than the input of the LPM by this factor are tiny."""
_MAX_VALUES = 20
"""Columns with more values are no categories."""
_COARSE = 8
"""Side of the thumbnail of the probe, in pixels."""


@dataclass(frozen=True)
class ReadData:
    """A listed and decoded data set."""

    data: DataSettings
    """Settings."""
    listing: Listing
    """The images; with the splits of the manifest, if the table has none."""
    digests: Digests
    """What was read of them."""
    rendering: Rendering = DEFAULT_RENDERING
    """Window and frame with which they were read."""

    @cached_property
    def usable(self) -> list[LabelledImage]:
        """Images with a label that were decoded."""
        return [item for item in self.listing.items if item.path in self.digests.records]

    @cached_property
    def unlabelled(self) -> list[LabelledImage]:
        """Images without a label that were decoded."""
        return [item for item in self.listing.unlabelled if item.path in self.digests.records]

    @cached_property
    def every(self) -> list[LabelledImage]:
        """Images with and without a label that were decoded, sorted by path."""
        return [item for item in self.listing.every if item.path in self.digests.records]

    @cached_property
    def known_labels(self) -> dict[str, str]:
        """Path -> label, for the decoded images that have one."""
        return {item.path: item.label for item in self.usable}

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Path -> header, for usable images."""
        return {item.path: read_header(self.listing.images / item.path) for item in self.usable}

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """All labels, those of the settings first."""
        present = {name for item in self.listing.items for name in names_in(item.label, self.data.task)}
        return tuple(dict.fromkeys([*(class_order(self.data) or ()), *sorted(present)]))


def read_data(
    data: DataSettings,
    root: Path,
    manifest: Manifest | None = None,
    progress: Progress | None = None,
    index: Path | None = None,
    rendering: Rendering = DEFAULT_RENDERING,
    private: Path | None = None,
) -> ReadData:
    """List and decode all images.

    Args:
        data: Settings; relative folders start at `root`.
        root: Folder of `params.yaml`.
        manifest: Gives the splits if the table has none; None if nothing was prepared.
        progress: Called with (images read, images).
        index: Folder that remembers what was read of each file (`stages.prepare.image_index`), or None to read all.
        rendering: Window and frame as `prepare` reads them; with others neither could use the index of the other.
        private: The study's folder `.fpt`, so that pseudonyms are those of `prepare`; None: they differ at each call.

    Raises:
        DataError: The folder or table is missing, unreadable or malformed.
    """
    listing = read_listing(data, root, private)
    if manifest is not None and all(item.split is None for item in listing.items):
        split_of = {row.path: row.split for row in manifest.rows}
        listing.items[:] = [replace(item, split=split_of.get(item.path)) for item in listing.items]
    digests = read_images(listing.every, listing.images, data, progress, index, rendering=rendering)
    return ReadData(data, listing, digests, rendering)


def check_data(read: ReadData, lpm_size: int) -> DataCheck:
    """Describe a data set; nothing is refused.

    Args:
        read: From `read_data`.
        lpm_size: Side of the input of the LPM, in pixels.
    """
    listing, digests = read.listing, read.digests
    records = digests.records
    sizes = Counter(f"{record.width} x {record.height}" for record in records.values())
    tiny = lpm_size / _TINY
    return DataCheck(
        task=read.data.task,
        unit=listing.unit,
        images=len(listing.items),
        unlabelled=len(listing.unlabelled),
        groups=len({item.path if item.group is None else (item.group,) for item in listing.items}),
        classes=read.classes,
        by_class=_by_class(read),
        columns=_columns(read),
        sizes=dict(sizes.most_common()),
        unreadable=dict(sorted(digests.failures.items())),
        problems=tuple(listing.problems()),
        skipped=tuple(skipped_lines(listing.skipped, listing.images)),
        corrupt=dict(sorted(digests.warnings.items())),
        tiny=tuple(path for path, record in records.items() if min(record.width, record.height) < tiny),
        blank=tuple(path for path, record in records.items() if is_blank(record.thumbnail)),
        duplicates=_duplicates(read),
        near=_near(read),
        leaks=tuple(map(str, find_leaks(read.every, digests.ids, digests.near, listing.unit))),
        probes=_probes(read),
    )


def _by_class(read: ReadData) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {name: Counter() for name in read.classes}
    groups: dict[str, set[str]] = defaultdict(set)
    for item in read.listing.items:
        # An image of no class, which only a multi-label study has, counts as the class "".
        for name in names_in(item.label, read.data.task) or ("",):
            column = counts.setdefault(name, Counter())
            column["images"] += 1
            column[item.split or ""] += 1
            groups[name].add(item.group if item.group is not None else f"\0{item.path}")
    unit = read.listing.unit
    return {
        name: {
            "images": column["images"],
            **({unit: len(groups[name])} if unit else {}),
            **{split: column[split] for split in ("train", "val", "test") if any(item.split for item in read.usable)},
        }
        for name, column in counts.items()
    }


def _columns(read: ReadData) -> dict[str, dict[str, dict[str, int]]]:
    """Count the classes for each value of the columns with few values."""
    return {
        name: {
            value: dict(
                Counter(
                    label
                    for item, one in zip(read.usable, values, strict=True)
                    if one == value
                    for label in names_in(item.label, read.data.task)
                )
            )
            for value in sorted(set(values))
        }
        for name, values in _categories(read).items()
    }


def _categories(read: ReadData) -> dict[str, list[str]]:
    """Return column -> value of each usable image: format, mode, bits, and columns of the table with few values."""
    headers = read.headers
    found = {name: [getattr(headers[item.path], name) for item in read.usable] for name in ("format", "mode", "bits")}
    names = list(dict.fromkeys(name for item in read.usable for name in item.others))
    for name in names:
        values = [item.others.get(name, "") for item in read.usable]
        if 2 <= len(set(values)) <= _MAX_VALUES:
            found[name] = values
    return found


def find_copies(read: ReadData) -> tuple[Copies, ...]:
    """Return all byte-identical images, and all pairs of near-duplicates."""
    return _duplicates(read) + _near(read)


def _duplicates(read: ReadData) -> tuple[Copies, ...]:
    same: dict[str, list[str]] = defaultdict(list)
    for item in read.every:
        same[read.digests.ids[item.path]].append(item.path)
    label_of = read.known_labels
    return tuple(
        Copies(paths=tuple(paths), labels=tuple(label_of.get(path) for path in paths))
        for paths in same.values()
        if len(paths) > 1
    )


def _near(read: ReadData) -> tuple[Copies, ...]:
    label_of = read.known_labels
    return tuple(
        Copies(paths=(one, other), labels=(label_of.get(one), label_of.get(other)), similarity=round(similarity, 4))
        for one, other, similarity in read.digests.near.pairs
    )


def _probes(read: ReadData) -> tuple[Probe, ...]:
    """Probe file properties and every column with few values."""
    exclusive = read.data.task != "multilabel"
    items = [item for item in read.usable if item.label or not exclusive]
    if len({item.label for item in items}) < 2:
        return ()
    clusters = find_clusters(read.usable, read.digests.ids, near=read.digests.near.key_of, links=read.unlabelled)
    cluster_of = {path: number for number, cluster in enumerate(clusters) for path in cluster.paths}
    order = sample(len(items))
    chosen: Sequence[LabelledImage] = [items[at] for at in order]
    targets = np.array(
        [[float(name in names_in(item.label, read.data.task)) for name in read.classes] for item in chosen]
    )
    numbers = np.array([cluster_of[item.path] for item in chosen])
    records = [read.digests.records[item.path] for item in chosen]
    sizes = np.log([(record.width, record.height, record.file_size) for record in records])
    fold = SIDE // _COARSE
    thumbnails = np.frombuffer(b"".join(record.thumbnail for record in records), np.uint8)
    coarse = thumbnails.reshape(len(records), _COARSE, fold, _COARSE, fold).mean(axis=(2, 4))
    found = [
        probe_vectors("width, height, file bytes", sizes, targets, numbers, exclusive),
        probe_vectors("8 x 8 thumbnail", coarse.reshape(len(records), -1), targets, numbers, exclusive),
    ]
    at_path = {item.path: at for at, item in enumerate(read.usable)}
    for name, values in _categories(read).items():
        column = [values[at_path[item.path]] for item in chosen]
        if len(set(column)) > 1:
            found.append(probe_column(name, column, targets, numbers, exclusive))
    return tuple(found)
