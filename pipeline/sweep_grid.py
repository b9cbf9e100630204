"""The axes of a sweep as the user writes them, and the combinations that they make."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.options import comma_separated
from schemas.errors import SettingsError
from schemas.methods import FITTED_BY, METHODS
from schemas.sweeps import METHOD_AXIS, SEED_AXIS
from schemas.text import shortened

AS_SET = "as-set"
"""Name of the settings where no axis but the seed changes them."""
MOST_RUNS = 10_000
"""Combinations of one sweep."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Range:
    """Values between two ends."""

    low: float
    """Lowest."""
    high: float
    """Highest."""
    whole: bool
    """Whether both ends were written as integers: then every value is one."""

    def at(self, share: float) -> str:
        """The value at a share of the way, log-uniform; uniform for integers and for a range from 0.

        Three significant digits: a name that can be read and typed again.
        """
        if self.whole:
            return str(int(self.low) + int(share * (int(self.high) - int(self.low) + 1)))
        if self.low == 0:
            return f"{share * self.high:.3g}"
        return f"{self.low * (self.high / self.low) ** share:.3g}"


Axes = Mapping[str, tuple[str, ...] | Range]
"""Setting -> values as they were written."""


@dataclass(frozen=True)
class Combination:
    """One value of each axis."""

    values: Mapping[str, str]
    """Axis -> value; `method`, or a setting of `train`."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return _name(self.values)

    @property
    def settings(self) -> str:
        """Name of all runs that differ only in their seeds."""
        return _name({key: value for key, value in self.values.items() if key != SEED_AXIS})

    @property
    def assignments(self) -> list[str]:
        """As `--set` overrides."""
        return [f"{_setting(key)}={value}" for key, value in self.values.items()]

    def effective(self, method: str) -> Combination:
        """Without the axes that change nothing for this method.

        Those are the settings of other methods and, for a method that is fitted in closed form, almost all of `train`.
        """
        row = METHODS[method]
        mine = (f"methods.{row.settings_section}.", "methods.options.")

        def counts(key: str) -> bool:
            if key == METHOD_AXIS or key in FITTED_BY:
                return True
            return key.startswith(mine) if key.startswith("methods.") else not row.closed_form

        return Combination({key: value for key, value in self.values.items() if counts(key)})


def _setting(axis: str) -> str:
    """Return the dotted setting of an axis: `method`, `methods.finetune.blocks`, or a setting of `train`."""
    return axis if axis == METHOD_AXIS or axis.startswith("methods.") else f"train.{axis}"


def _name(values: Mapping[str, str]) -> str:
    return "_".join(f"{key}={value}" for key, value in values.items()) or AS_SET


def parse_axes(words: Sequence[str]) -> dict[str, tuple[str, ...] | Range]:
    """`lr=2e-4,5e-4`, `train.seed=0,1`, `method=fpt+,linear` or, to draw from, `lr=1e-4..5e-3`.

    Raises:
        SettingsError: With every axis that cannot be read.
    """
    axes: dict[str, tuple[str, ...] | Range] = {}
    problems = []
    for word in words:
        key, separator, values = word.partition("=")
        key = key.strip().removeprefix("train.")
        texts = comma_separated(values)
        if not separator or not key or not texts:
            problems.append((word, "must be key=value,value, such as lr=2e-4,5e-4"))
            continue
        if key in axes:
            problems.append((word, f"{key} is an axis already"))
            continue
        axes[key] = texts
        if len(texts) == 1 and (found := re.fullmatch(rf"({_NUMBER})\.\.({_NUMBER})", texts[0])):
            low, high = float(found[1]), float(found[2])
            whole = all(text.lstrip("+").isdigit() for text in found.groups())
            # Seeds are not drawn: a range of them means all.
            every = key == SEED_AXIS and whole
            if not 0 <= low < high <= 1e15:
                problems.append(
                    (shortened(word, 60), "a range must go from a lower to a higher number, from 0 to 1e15")
                )
                continue
            if every and high - low >= MOST_RUNS:
                problems.append((word, f"names more than {MOST_RUNS:,} seeds"))
                continue
            axes[key] = tuple(map(str, range(int(low), int(high) + 1))) if every else Range(low, high, whole)
    if problems:
        raise SettingsError("A sweep cannot be read.", problems)
    return axes


def grid(axes: Axes) -> list[Combination]:
    """Every combination.

    Raises:
        SettingsError: An axis is a range, or there are more than `MOST_RUNS` combinations.
    """
    ranges = [key for key, values in axes.items() if isinstance(values, Range)]
    if ranges:
        problems = [(key, "is a range, which has no end of values") for key in ranges]
        raise SettingsError("A sweep cannot be read.", problems, "Say how many to draw, such as --random 16.")
    lists = [values for values in axes.values() if not isinstance(values, Range)]
    if (count := math.prod(map(len, lists))) > MOST_RUNS:
        raise SettingsError(
            f"The sweep has {count:,} combinations; at most {MOST_RUNS:,} are allowed.",
            repair="Name fewer values, or draw some of them: --random 16.",
        )
    return [Combination(dict(zip(axes, chosen, strict=True))) for chosen in itertools.product(*lists)]


def draw(axes: Axes, count: int, seed: int) -> list[Combination]:
    """Some combinations, drawn without repetition; each with every seed and method, so that these compare fairly.

    A larger count goes on with the same draws: the first ones stay.

    Args:
        axes: Lists and ranges.
        count: How many; all, where the lists have fewer.
        seed: Of the draws.
    """
    crossed = {key: values for key, values in axes.items() if key in (METHOD_AXIS, SEED_AXIS)}
    free = {key: values for key, values in axes.items() if key not in crossed}
    # Only random(): Python keeps the sequence of this method the same in all versions.
    source = random.Random(seed)
    drawn: list[dict[str, str]] = []
    # The lists may have fewer combinations than are asked for: enough tries to find the last one.
    for _ in range(200 + 100 * count):
        values = {key: _pick(choices, source.random()) for key, choices in free.items()}
        if values not in drawn:
            drawn.append(values)
        if len(drawn) == count:
            break
    combinations = [values | dict(one.values) for values in drawn for one in grid(crossed)]
    return [Combination({key: values[key] for key in axes}) for values in combinations]


def _pick(choices: tuple[str, ...] | Range, share: float) -> str:
    return choices.at(share) if isinstance(choices, Range) else choices[int(share * len(choices))]
