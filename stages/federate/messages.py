"""What the server and the sites exchange, whatever carries it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stages.federate.weights import State

Kind = Literal["describe", "train", "sums", "validate"]
"""What a site is requested to do."""
Values = dict[str, int | float | str]
"""Plain values by name."""


@dataclass(frozen=True)
class Request:
    """From the server to a site."""

    kind: Kind
    """What is requested."""
    tensors: State = field(default_factory=dict)
    """Weights of the model."""
    values: Values = field(default_factory=dict)
    """Recipe of the round."""


@dataclass(frozen=True)
class Reply:
    """From a site to the server. It has weights, sums and counts, never rows, features or predictions of an image."""

    tensors: State = field(default_factory=dict)
    """Weights, or sums over rows."""
    values: Values = field(default_factory=dict)
    """Counts, sums of losses, and the kind of features."""


@dataclass(frozen=True)
class Failure:
    """A site that did not reply."""

    reason: str
    """Why, in one line."""


Replies = Mapping[str, Reply | Failure]
"""By site."""
Exchange = Callable[[Sequence[str], Request], Replies]
"""Sends a request to the sites of these names and waits for their replies."""


def reason_of(error: BaseException) -> str:
    """Return the first line of an error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
