"""The adaptations of the LPM: one registry row each, and their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from schemas.base import Section
from schemas.method_row import MethodRow
from schemas.specs import AdaptationSpec, Inputs

if TYPE_CHECKING:
    from schemas.resolved import ResolvedSettings

Count = Annotated[int, Field(ge=1, le=4096)]
"""Number of prompts, ranks or channels."""


class EptSettings(Section):
    """Settings of ept and ept-lse."""

    prompts: Count = 100
    """Prompt logits per token and block (d_p); the paper chooses among 5, 10, 20, 50, 100, 200, 400 and 600."""


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


_EPT = "arXiv 2407.01003 (Medical Image Analysis 2024)"
ROWS = (
    adaptation(
        "ept",
        "EPT",
        "prompt logits in every softmax of the LPM, as published",
        _EPT,
        "ept",
        section="ept",
        options=EptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
    adaptation(
        "ept-lse",
        "EPT-lse",
        "EPT with one logit per token and block, in fused attention",
        _EPT,
        "ept",
        section="ept",
        options=EptSettings,
        rates=(1e-3, 5e-3, 2e-2),
    ),
)
"""In the order of help texts."""
