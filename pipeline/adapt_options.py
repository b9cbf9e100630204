"""Options of `fpt predict` and `fpt evaluate` about adaptation at test time."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

from schemas.errors import SettingsError
from schemas.test_time import ADAPTS, LEAST_BATCH, Adapt, AdaptOptions

DEFAULTS = AdaptOptions(name="foa")


class AdaptName(StrEnum):
    """Kinds of adaptation."""

    foa = "foa"
    foa_shift = "foa-shift"
    vptta = "vptta"


Name: TypeAlias = Annotated[
    AdaptName | None,
    typer.Option(
        "--adapt",
        help="Adapt to the images at test time, and show the predictions without and with it.",
        show_default=False,
    ),
]
Batch: TypeAlias = Annotated[
    int, typer.Option("--adapt-batch", min=LEAST_BATCH, max=4096, help="Images of a batch of foa and foa-shift.")
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--adapt-seed", min=0, help="Seed of the order of the images, and of the search of foa.")
]


def adapt_options(name: str | None, batch: int = DEFAULTS.batch, seed: int = DEFAULTS.seed) -> AdaptOptions | None:
    """Return the options of an adaptation; None without one.

    Raises:
        SettingsError: There is no such adaptation, or batch or seed are out of range.
    """
    if name is None:
        return None
    known: dict[str, Adapt] = {one: one for one in ADAPTS}
    if name not in known:
        raise SettingsError(f"There is no adaptation named {name!r}.", repair=f"Use one of {', '.join(ADAPTS)}.")
    try:
        return AdaptOptions(name=known[name], batch=batch, seed=seed)
    except ValueError as error:
        raise SettingsError(
            f"A batch of {batch} images or the seed {seed} is out of range.",
            repair=f"Batches have {LEAST_BATCH} to 4096 images; the seed is not negative.",
        ) from error
