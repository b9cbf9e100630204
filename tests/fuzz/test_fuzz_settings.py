"""Random settings trees yield `Settings` or a short `SettingsError`; valid ones survive a round trip through YAML."""

from __future__ import annotations

import datetime
import math
import os
from random import Random
from typing import Any

import pytest

from pipeline.params import dump_settings, load_yaml
from schemas.errors import SettingsError
from schemas.features import LpmInfo
from schemas.parse import parse_settings, settings_keys
from schemas.resolve import resolve
from schemas.settings import Settings

SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FPT_FUZZ_CASES", "700"))

LPM = LpmInfo(
    name="vit", depth=12, width=384, heads=6, patch=16, prefix_tokens=1, has_class_token=True, image_size=512,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", mlp_width=1536,
)  # fmt: skip
NUMBERS: list[Any] = [
    0, 1, 2, 3, 16, 64, 0.1, 0.5, 1.0, -1, -0.0, 5e-324, 1e-300, 1e308, math.nan, math.inf, -math.inf,
    2**31, 2**63 - 1, 2**63, 2**64, -(2**64), 10**30, 10**5000, -(10**5000),
]  # fmt: skip
TEXTS = [
    "",
    "auto",
    "none",
    "a",
    "null",
    "1e3",
    "9" * 5000,
    "9" * 400 + "GB",
    "2GB",
    "a\0b",
    "\ud800",
    "\u2028\x85",
    "ø: #",
]
OTHERS: list[Any] = [None, True, False, [], {}, b"\xff", datetime.date(2024, 1, 1), "x" * 100_000]


def value(random: Random, depth: int = 0) -> Any:
    kind = random.random()
    if kind < 0.45:
        return random.choice(NUMBERS)
    if kind < 0.7:
        return random.choice(TEXTS)
    if kind < 0.85 or depth > 2:
        return random.choice(OTHERS)
    if kind < 0.97:
        return [value(random, depth + 1) for _ in range(random.choice([1, 2, 2, 3, 3000 if depth == 0 else 4]))]
    return {key(random): value(random, depth + 1)}


def key(random: Random) -> Any:
    names = ["lr", "GPU", "x" * 10_000, "a\nb", "\ud800", "", 3, None, True, 10**5000, (1, 2)]
    return random.choice(names)


def tree(random: Random) -> dict[Any, Any]:
    raw: dict[Any, Any] = {}
    for dotted in random.sample(settings_keys(), random.choice([1, 1, 2, 3, 8])):
        *sections, name = dotted.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value(random)
    if random.random() < 0.2:
        place = random.choice([raw, *(part for part in raw.values() if isinstance(part, dict))])
        place[key(random)] = value(random)
    if random.random() < 0.05:
        raw[random.choice(["train", "data", "cluster"])] = value(random)
    return raw


def reloaded(settings: Settings) -> Settings:
    return parse_settings(load_yaml(dump_settings(settings), "settings.yaml"))


def test_random_trees() -> None:
    valid = 0
    for case in range(CASES):
        raw = tree(Random(SEED * 1_000_003 + case))
        try:
            settings = parse_settings(raw)
            assert reloaded(settings) == settings
            resolved = resolve(settings, LPM)
            assert resolve(reloaded(resolved), LPM) == resolved
            valid += 1
        except SettingsError as error:
            assert len(str(error)) < 5000
    assert valid > CASES // 50


@pytest.mark.parametrize("dotted", settings_keys())
def test_every_number_of_every_field(dotted: str) -> None:
    """One extreme value at a time, also in lists: a message names the field and is short."""
    for one in [*NUMBERS, *TEXTS, *OTHERS]:
        for shaped in (one, [one], [one, one]):
            raw: Any = shaped
            for name in reversed(dotted.split(".")):
                raw = {name: raw}
            try:
                settings = parse_settings(raw)
            except SettingsError as error:
                assert len(str(error)) < 1000
                assert dotted.split(".")[0] in str(error)
            else:
                assert reloaded(settings) == settings
