"""Rows of the registry that are adaptations of the LPM: what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from schemas.method_row import MethodRow
from schemas.specs import AdaptationSpec, Inputs

if TYPE_CHECKING:
    from schemas.resolved import ResolvedSettings

Count = Annotated[int, Field(ge=1, le=4096)]
"""Number of prompts, ranks or channels."""


def reads_hidden(settings: ResolvedSettings) -> bool:
    """Return whether an adaptation reads cached hidden tokens: they enter its first block, or one below."""
    hidden = settings.features.hidden
    return hidden is not None and hidden <= settings.train.start_block


def _inputs(settings: ResolvedSettings) -> Inputs:
    return frozenset({"hidden"} if reads_hidden(settings) else {"image"})


def adaptation(name: str, title: str, line: str, paper: str, module: str, **fields: Any) -> MethodRow:
    """Return the row of an adaptation of the LPM, with a linear head and AdaptationSpec as its spec.

    Args:
        name: As in `method`.
        title: For reports and tables.
        line: One line of help.
        paper: Source.
        module: Module of `stages.methods`, or a full module name.
        fields: Further fields of the row.
    """
    return MethodRow(
        name=name,
        title=title,
        help=line,
        paper=paper,
        module=module,
        spec=AdaptationSpec,
        inputs=frozenset(),
        trained_by="gradient",
        adapts_lpm=True,
        images_setting="features.hidden=null",
        added_inputs=_inputs,
        **fields,
    )
