"""The options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias, get_args

import typer

from pipeline.params import PARAMS
from schemas.settings import FittedMethod, Method

Params: TypeAlias = Annotated[Path, typer.Option("--params", metavar="FILE", help="Settings of the study.")]
Assignments: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, such as train.lr=0.001. Repeatable."),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

METHODS = ", ".join(get_args(Method))
"""Every method, for help texts."""
TRAINED_METHODS = ", ".join(name for name in get_args(Method) if name not in get_args(FittedMethod))
"""Methods with a training step."""

PARAMS_FILE = Path(PARAMS)
