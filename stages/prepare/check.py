"""Is this a data set that a classifier can be trained and judged on?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from schemas.errors import DataError
from schemas.tasks import Task, names_in
from schemas.text import counted
from stages.prepare.listing import did_you_mean, listed
from stages.prepare.scan import Item


def check_classes(items: Sequence[Item], classes: tuple[str, ...] | None, task: Task = "multiclass") -> tuple[str, ...]:
    """The labels in the order of the model's outputs.

    Args:
        items: All images.
        classes: As listed by the user, or None: the labels found, sorted.
        task: What a label says.

    Raises:
        DataError: Fewer than two classes, a label that is not listed, or a listed class that no image has.
    """
    counts = Counter(name for item in items for name in names_in(item.label, task))
    if classes is not None:
        problems = [
            f"{label!r}, {counted(counts[label], 'image')}: not in data.classes{did_you_mean(label, classes)}"
            for label in sorted(counts.keys() - set(classes))
        ] + [f"{label!r}: in data.classes, but no image has it" for label in classes if label not in counts]
        if problems:
            raise DataError(
                "data.classes and the labels of the images differ.",
                listed(problems),
                "Correct data.classes in params.yaml, or the labels.",
            )
    found = tuple(sorted(counts)) if classes is None else classes
    if task == "multilabel":
        _check_labels(items, found, counts)
    elif len(found) < 2:
        raise DataError(
            f"All {counted(len(items), 'image')} have one label: {found[0]!r}.",
            "A classifier needs at least two classes.",
            "Correct data.images, data.labels or data.label_column in params.yaml.",
        )
    return found


def _check_labels(items: Sequence[Item], found: Sequence[str], counts: Mapping[str, int]) -> None:
    """Refuse labels that would not be several, and those that tell no image from another."""
    if len(found) < 2:
        raise DataError(
            f"The images have {counted(len(found), 'label')} in all{': ' + repr(found[0]) if found else ''}.",
            "Several labels an image need at least two of them; the separator may be another.",
            "Correct data.label_column or data.label_separator in params.yaml, or set data.task: multiclass.",
        )
    everywhere = [repr(name) for name in found if counts[name] == len(items)]
    if everywhere:
        raise DataError(
            f"Every image has the label {', '.join(everywhere)}.",
            "There is nothing to tell it from.",
            "Leave it out of the table.",
        )


def check_left(items: Sequence[Item], classes: Sequence[str], failures: int, task: Task = "multiclass") -> None:
    """Refuse a data set that lost a whole class to quarantine.

    Raises:
        DataError: A class has no readable image.
    """
    left = {name for item in items for name in names_in(item.label, task)}
    lost = [label for label in classes if label not in left]
    if lost:
        raise DataError(
            f"No image of {', '.join(map(repr, lost))} can be used.",
            f"{counted(failures, 'image')} cannot be used and would be set aside (data.on_error: quarantine).",
            "Set data.on_error: fail and run `fpt prepare` to see why.",
        )


def check_conflicts(items: Sequence[Item], ids: Mapping[str, str]) -> None:
    """Refuse one content under two labels: one of them is wrong, and no rule can know which.

    Args:
        items: All readable images.
        ids: Path -> content.

    Raises:
        DataError: All such contents are listed.
    """
    copies: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        copies[ids[item.path]].append(item)
    conflicts = [
        " = ".join(f"{item.path} ({item.label})" for item in same)
        for same in copies.values()
        if len({item.label for item in same}) > 1
    ]
    if conflicts:
        raise DataError(
            f"{counted(len(conflicts), 'image')} with two labels: the same content, byte for byte.",
            listed(conflicts),
            "Remove or relabel the wrong copies.",
        )
