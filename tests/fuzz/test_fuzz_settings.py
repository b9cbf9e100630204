"""Random settings end in `Settings` or in a `SettingsError` that a person can read; nothing else.

FPT_FUZZ_CASES and FPT_FUZZ_SEED run more cases, or others.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from pipeline.axes import MOST_RUNS, Range, grid, parse_axes
from schemas.errors import SettingsError
from schemas.parse import MOST_PROBLEMS, parse_settings, settings_keys
from schemas.settings import Settings

CASES = int(os.environ.get("FPT_FUZZ_CASES", "300"))
SEED = int(os.environ.get("FPT_FUZZ_SEED", "0"))
QUICK = settings(
    max_examples=CASES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)

KEYS = settings_keys()

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**4000, -(10**4000)]),
    st.floats(),
    st.sampled_from([0.0, 1e-300, 1e300, float("inf"), float("nan"), -0.0]),
    st.text(max_size=20),
    st.sampled_from(["auto", "hub", "none", "\0", "x" * 10_000, "1e400", "9" * 400 + "GB", "../" * 2000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def tree_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in pairs:
        *sections, leaf = path.split(".")
        place = tree
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                inner = place[section] = {}
            place = inner
        place[leaf] = value
    return tree


def check(raw: Any) -> None:
    try:
        parsed = parse_settings(raw)
    except SettingsError as error:
        assert len(str(error)) < 40_000
        assert error.problems
        assert len(error.problems) <= MOST_PROBLEMS + 1
        assert all(len(path) < 300 and len(text) < 1500 for path, text in error.problems)
        return
    text = yaml.safe_dump(parsed.model_dump(mode="json"), allow_unicode=True)
    assert parse_settings(yaml.safe_load(text)) == parsed


@seed(SEED)
@QUICK
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=5))
def test_valid_keys_with_any_values(pairs: list[tuple[str, Any]]) -> None:
    check(tree_of(pairs))


@seed(SEED)
@QUICK
@given(st.dictionaries(st.one_of(st.text(), st.sampled_from(list(Settings.model_fields))), VALUES, max_size=4))
def test_any_tree(raw: dict[str, Any]) -> None:
    check(raw)


EXTREME: list[tuple[str, Any]] = [
    ("train.seed", -1),
    ("train.seed", 2**64),
    ("train.order_seed", -5),
    ("data.seed", 10**5000),
    ("train.augment.crop_ratio", [1e-300, 1e300]),
    ("train.augment.crop_scale", [1e-300, 1.0]),
    ("train.prompts", 1e8),
    ("features.crops", 100_000),
    ("features.layers", list(range(2000))),
    ("data.images", "x" * 100_000),
    ("data.images", "a\0b"),
    ("data.classes", ["a\0", "b"]),
    ("data.classes", [str(number) for number in range(100_000)]),
    ("lpm.name", "n" * 50_000),
    ("store.memory_budget", "9" * 400 + "GB"),
    ("cluster.workers", 10**9),
    ("cluster.wait", 1e308),
]


@pytest.mark.parametrize(("path", "value"), EXTREME, ids=[f"{path}-{n}" for n, (path, _) in enumerate(EXTREME)])
def test_extreme_values_are_refused_in_few_words(path: str, value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(tree_of([(path, value)]))
    assert caught.value.problems[0][0].startswith(path)
    assert len(str(caught.value)) < 4000


def test_thousands_of_wrong_keys_are_listed_in_part() -> None:
    with pytest.raises(SettingsError, match="5000 problems") as caught:
        parse_settings({f"key{number}": 1 for number in range(5000)})
    assert len(caught.value.problems) == MOST_PROBLEMS + 1
    assert caught.value.problems[-1] == ("...", f"and {5000 - MOST_PROBLEMS} more")


@pytest.mark.parametrize("value", ["x", "9" * 5000, "é" * 300])
def test_a_key_as_long_as_a_book_is_not_echoed(value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({"key" * 100_000: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "word",
    [
        "seed=0..1000000000000",
        f"seed=0..{'9' * 400}",
        f"lr=1..{'9' * 400}",
        f"lr=1e-4..{'9' * 5000}",
        "lr=1e-4..1e999",
        "seed=0..20000",
    ],
)
def test_ranges_without_an_end_are_refused(word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_axes([word])
    assert len(str(caught.value)) < 400


def test_a_sweep_has_a_bounded_number_of_runs() -> None:
    axes = parse_axes(["seed=0..999", "lr=" + ",".join(str(number) for number in range(1, 200))])
    assert not any(isinstance(values, Range) for values in axes.values())
    with pytest.raises(SettingsError, match=f"at most {MOST_RUNS:,}"):
        grid(axes)
