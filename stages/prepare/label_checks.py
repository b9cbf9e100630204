"""Check that a classifier can be trained and evaluated on the labels of a data set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from schemas.errors import DataError
from schemas.tasks import Task, names_in
from schemas.text import counted
from stages.prepare.error_text import did_you_mean, listed
from stages.prepare.labelled_image import LabelledImage


def check_classes(
    items: Sequence[LabelledImage], classes: tuple[str, ...] | None, task: Task = "multiclass"
) -> tuple[str, ...]:
    """Return the classes in the order of the model's outputs.

    Args:
        items: All images.
        classes: As listed by the user, or None for the sorted labels of the images.
        task: Determines whether an image has one label or several.

    Raises:
        DataError: There are fewer than two classes, a label is not listed, or a listed class has no image.
    """
    counts = Counter(name for item in items for name in names_in(item.label, task))
    if not items:
        raise DataError("No image has a label.", "", "Correct data.images, data.labels or data.label_column.")
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
    names = tuple(sorted(counts)) if classes is None else classes
    if task == "multilabel":
        _check_multilabel(items, names, counts)
    elif len(names) < 2:
        raise DataError(
            f"All {counted(len(items), 'image')} have the same label: {names[0]!r}.",
            "A classifier needs at least two classes.",
            "Correct data.images, data.labels or data.label_column in params.yaml.",
        )
    return names


def _check_multilabel(items: Sequence[LabelledImage], names: Sequence[str], counts: Mapping[str, int]) -> None:
    """Refuse fewer than two labels, and labels that every image has."""
    if len(names) < 2:
        raise DataError(
            f"The images have {counted(len(names), 'label')} in total{': ' + repr(names[0]) if names else ''}.",
            "A multi-label study needs at least two labels; the separator may be wrong.",
            "Correct data.label_column or data.label_separator in params.yaml, or set data.task: multiclass.",
        )
    everywhere = [repr(name) for name in names if counts[name] == len(items)]
    if everywhere:
        raise DataError(
            f"Every image has the label {', '.join(everywhere)}.",
            "A classifier cannot learn it without images that lack it.",
            "Remove it from the table.",
        )


def check_left(
    items: Sequence[LabelledImage], classes: Sequence[str], failures: int, task: Task = "multiclass"
) -> None:
    """Refuse a data set that lost all images of a class to quarantine.

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


def check_conflicts(items: Sequence[LabelledImage], ids: Mapping[str, str]) -> None:
    """Refuse identical files with different labels, since at least one of the labels is wrong.

    Args:
        items: All readable images.
        ids: Path -> content id.

    Raises:
        DataError: Lists all such files.
    """
    copies: dict[str, list[LabelledImage]] = defaultdict(list)
    for item in items:
        copies[ids[item.path]].append(item)
    conflicts = [
        " = ".join(f"{item.path} ({item.label})" for item in same)
        for same in copies.values()
        if len({item.label for item in same}) > 1
    ]
    if conflicts:
        raise DataError(
            f"{counted(len(conflicts), 'image')} with two labels (byte-identical files).",
            listed(conflicts),
            "Remove or relabel the wrong copies.",
        )
