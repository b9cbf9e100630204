"""Give images the split of the text files that list them, such as those of few-shot benchmarks: `data.split_files`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from schemas.data_settings import REST, DataSettings
from schemas.errors import DataError
from schemas.manifest import Split
from schemas.text import counted
from stages.prepare.error_text import listed
from stages.prepare.labelled_image import LabelledImage
from stages.prepare.table_text import decoded, read_bytes


@dataclass(frozen=True)
class ListedImages:
    """Images with the splits of the lists."""

    items: list[LabelledImage]
    """Those in a list, or all if one split is `rest`; in the given order."""
    notes: list[str]
    """What was left out, as lines for the user."""


def split_by_lists(
    items: Sequence[LabelledImage], unlabelled: Sequence[LabelledImage], data: DataSettings, root: Path
) -> ListedImages:
    """Return the images with their splits; those in no list are left out, unless a split is `rest`.

    A line is the path of an image below `data.images`, or its file name; what follows a blank, such as labels, is not
    read if the line as a whole is no image. Blank lines do not count.

    Args:
        items: Images with a label.
        unlabelled: Images without one, which lists may have: they get no split.
        data: Settings, with `split_files`.
        root: Folder of `params.yaml`, where relative paths start.

    Raises:
        DataError: A file cannot be read, lists an image that the study does not have, or an image is in two lists.
    """
    named = _ByName([item.path for item in (*items, *unlabelled)])
    splits: dict[str, dict[Split, str]] = defaultdict(dict)
    unknown: list[str] = []
    rest: Split | None = None
    for split, name in (data.split_files or {}).items():
        if name == REST:
            rest = split
            continue
        file = root / Path(name).expanduser()
        for number, line in enumerate(decoded(file, read_bytes(file)).splitlines(), 1):
            if not line.strip():
                continue
            if (path := named.find(line.strip())) is None:
                unknown.append(f"{file.name}, line {number}: {line.strip()}")
            else:
                splits[path].setdefault(split, f"{file.name}, line {number}")
    _check(unknown, splits)
    split_of = {path: next(iter(found)) for path, found in splits.items()}
    chosen = [
        replace(item, split=split_of.get(item.path, rest))
        for item in items
        if rest is not None or item.path in split_of
    ]
    left_out = len(items) - len(chosen)
    return ListedImages(chosen, [f"{counted(left_out, 'image')} in no list left out."] if left_out else [])


class _ByName:
    """Images by path, and by file name where that is unique."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = set(paths)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in self._paths:
            self._by_name[PurePosixPath(path).name].append(path)

    def find(self, line: str) -> str | None:
        """Return the path of the image of a line, or None.

        Raises:
            DataError: Several images have the name.
        """
        for text in (line, line.rpartition(" ")[0].strip(), line.split()[0], line.split(",")[0].strip()):
            usual = text.replace("\\", "/").removeprefix("./")
            if usual in self._paths:
                return usual
            found = self._by_name.get(PurePosixPath(usual).name, [])
            if len(found) > 1:
                raise DataError(
                    f"{counted(len(found), 'image')} of data.images are called {PurePosixPath(usual).name!r}.",
                    listed(sorted(found)),
                    "Write their paths into the lists of data.split_files.",
                )
            if found:
                return found[0]
        return None


def _check(unknown: Sequence[str], splits: Mapping[str, Mapping[Split, str]]) -> None:
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'line')} of data.split_files without an image of the study.",
            listed(unknown),
            "Correct data.images, the labels table or the lists: each image of a list needs a file and a row with its "
            "label.",
        )
    twice = [
        f"{path}: {'; '.join(f'{split} ({place})' for split, place in found.items())}"
        for path, found in sorted(splits.items())
        if len(found) > 1
    ]
    if twice:
        raise DataError(
            f"{counted(len(twice), 'image')} of data.split_files in two splits.",
            listed(twice),
            "Remove each from one of the lists.",
        )
