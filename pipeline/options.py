"""The options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from pipeline.params import PARAMS
from schemas.methods import METHODS

Params: TypeAlias = Annotated[Path, typer.Option("--params", metavar="FILE", help="Settings of the study.")]
Assignments: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, such as train.lr=0.001. Repeatable."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

METHOD_NAMES = ", ".join(METHODS)
"""Every method, for help texts."""

PARAMS_FILE = Path(PARAMS)


def comma_separated(text: str) -> tuple[str, ...]:
    """Return the words of a list such as `a, b,c`, each once, without empty ones."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
