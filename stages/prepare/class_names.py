"""Apply `data.class_names` to the labels of a table or of class folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from schemas.data_settings import DataSettings
from schemas.errors import DataError
from schemas.tasks import Task, names_in, written
from schemas.text import counted
from stages.prepare.error_text import did_you_mean, listed
from stages.prepare.labelled_image import LabelledImage

_NUMBER = re.compile(r"[+-]?\d+(\.0+)?")


def name_classes(items: Sequence[LabelledImage], data: DataSettings) -> list[LabelledImage]:
    """Replace each label by its name in `data.class_names`; labels without an entry stay as they are.

    Raises:
        DataError: Two labels would have one name.
    """
    names = data.class_names
    if not names:
        return list(items)
    labels = {label for item in items for label in names_in(item.label, data.task)}
    ambiguous = sorted((labels - names.keys()) & set(names.values()))
    if ambiguous:
        raise DataError(
            f"{counted(len(ambiguous), 'name')} in data.class_names for two labels each.",
            listed(
                f"{name!r}: a label of the images, and the name of label {label!r}"
                for name in ambiguous
                for label, given in names.items()
                if given == name
            ),
            "Choose other names, or rename these labels as well.",
        )
    return [replace(item, label=_renamed(item.label, names, data.task)) for item in items]


def given_labels(label: str, data: DataSettings) -> tuple[str, ...]:
    """Return the labels of an image as in the table or folder: the inverse of `name_classes`."""
    back = {name: given for given, name in (data.class_names or {}).items()}
    return tuple(back.get(name, name) for name in names_in(label, data.task))


def class_order(data: DataSettings) -> tuple[str, ...] | None:
    """Return the class names in the order of `data.classes`, else of `data.label_columns`, or None.

    `data.classes` may list names or original labels; an ambiguous entry is taken as a name.

    Raises:
        DataError: A class is listed both by its label and by its name.
    """
    order = data.classes or data.label_columns
    names = data.class_names
    if order is None or not names:
        return order
    if data.classes is None or not all(entry in names.values() or entry not in names for entry in order):
        order = tuple(names.get(entry, entry) for entry in order)
    twice = sorted({entry for entry in order if order.count(entry) > 1})
    if twice:
        raise DataError(
            f"data.classes lists {', '.join(map(repr, twice))} twice: as a label and by its name.",
            "",
            "List each class once.",
        )
    return order


def check_named(data: DataSettings, items: Sequence[LabelledImage]) -> None:
    """Refuse entries of `data.class_names` whose label no image has.

    Args:
        data: Settings.
        items: All images, after `name_classes`.

    Raises:
        DataError: Lists all such entries.
    """
    names = data.class_names or {}
    present = {name for item in items for name in names_in(item.label, data.task)}
    labels = {label for item in items for label in given_labels(item.label, data)} - names.keys()
    unknown = [
        f"{label!r} ({name}){did_you_mean(label, labels)}" for label, name in names.items() if name not in present
    ]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'label')} in data.class_names that no image has.",
            listed(unknown),
            "Correct data.class_names in params.yaml, or the labels.",
        )


def numbers_hint(data: DataSettings, classes: Sequence[str]) -> list[str]:
    """Suggest `data.class_names` if all classes are numbers and none has a name."""
    if data.class_names or not all(_NUMBER.fullmatch(name) for name in classes):
        return []
    example = ", ".join(f"{name}: ..." for name in classes[:2])
    return [f"The classes are numbers ({', '.join(classes)}). Name them with data.class_names: {{{example}}}"]


def _renamed(label: str, names: Mapping[str, str], task: Task) -> str:
    return written(sorted(names.get(one, one) for one in names_in(label, task)))
