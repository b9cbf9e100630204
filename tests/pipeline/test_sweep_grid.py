"""What the words after `fpt sweep` mean."""

from __future__ import annotations

import math

import pytest

from pipeline.sweep_grid import MOST_RUNS, Range, draw, grid, parse_axes
from schemas.errors import SettingsError


def test_a_grid_has_every_combination_in_order() -> None:
    found = grid(parse_axes(["train.lr=1e-3,2e-3", "seed=0..2", "method=fpt+,linear"]))
    assert len(found) == 12
    assert found[0].name == "lr=1e-3_seed=0_method=fpt+"
    assert found[0].settings == "lr=1e-3_method=fpt+"
    assert found[0].assignments == ["train.lr=1e-3", "train.seed=0", "method=fpt+"]
    assert [one.values["seed"] for one in found[:6:2]] == ["0", "1", "2"]
    (nothing,) = grid(parse_axes([]))
    assert (nothing.name, nothing.assignments) == ("as-set", [])
    assert {one.settings for one in grid(parse_axes(["seed=0,1"]))} == {"as-set"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["lr"], "key=value"),
        (["lr="], "key=value"),
        (["lr=1,2", "train.lr=3"], "an axis already"),
        (["lr=5e-3..1e-4"], "from a lower to a higher"),
    ],
)
def test_words_that_are_no_axis_are_named(words: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parse_axes(words)


def test_a_range_needs_a_number_of_draws() -> None:
    with pytest.raises(SettingsError, match="--random"):
        grid(parse_axes(["lr=1e-4..1e-2"]))


def test_draws_are_log_uniform_and_stay_when_more_are_drawn() -> None:
    axes = parse_axes(["lr=1e-4..1e-2", "dropout=0..0.5", "members=1..3", "keep=best,last"])
    drawn = draw(axes, 300, seed=0)
    assert len({one.name for one in drawn}) == 300
    assert [one.name for one in draw(axes, 20, seed=0)] == [one.name for one in drawn[:20]]
    assert [one.name for one in draw(axes, 20, seed=1)] != [one.name for one in drawn[:20]]
    rates = [float(one.values["lr"]) for one in drawn]
    assert 1e-4 <= min(rates) < 1.2e-4 < 8e-3 < max(rates) <= 1e-2
    # The middle of the exponents, not of the values.
    assert sum(rate < 1e-3 for rate in rates) == pytest.approx(150, abs=30)
    assert sum(float(one.values["dropout"]) < 0.25 for one in drawn) == pytest.approx(150, abs=30)
    assert {one.values["members"] for one in drawn} == {"1", "2", "3"}
    assert {one.values["keep"] for one in drawn} == {"best", "last"}


def test_every_draw_gets_every_seed_and_method() -> None:
    drawn = draw(parse_axes(["seed=0,1", "lr=1e-4..1e-2", "method=fpt+,attentive"]), 3, seed=0)
    assert len(drawn) == 12
    assert len({one.values["lr"] for one in drawn}) == 3
    assert len({(one.values["seed"], one.values["method"]) for one in drawn}) == 4


def test_more_draws_than_there_are_combinations_are_all() -> None:
    drawn = draw(parse_axes(["lr=1,2,3", "members=1,2"]), 50, seed=0)
    assert sorted(one.name for one in drawn) == sorted(
        one.name for one in grid(parse_axes(["lr=1,2,3", "members=1,2"]))
    )


def test_the_ends_of_a_range_can_be_reached() -> None:
    assert [Range(1, 3, True).at(share) for share in (0.0, math.nextafter(1.0, 0.0))] == ["1", "3"]
    assert [Range(1e-4, 1e-2, False).at(share) for share in (0.0, 0.5, 1.0)] == ["0.0001", "0.001", "0.01"]
    assert Range(0, 0.5, False).at(0.5) == "0.25"


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


def test_an_axis_without_effect_on_a_method_makes_no_other_model() -> None:
    found = grid(parse_axes(["method=finetune,fpt+,linear", "methods.finetune.blocks=1,2", "lr=1e-4"]))
    assert [combination.effective(combination.values["method"]).name for combination in found] == [
        "method=finetune_methods.finetune.blocks=1_lr=1e-4",
        "method=finetune_methods.finetune.blocks=2_lr=1e-4",
        *["method=fpt+_lr=1e-4"] * 2,
        *["method=linear"] * 2,
    ]
