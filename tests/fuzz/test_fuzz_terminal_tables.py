"""In tables of any shape on any terminal, no number is broken.

One hour: `FPT_FUZZ_CASES=100000 FPT_FUZZ_SEED=1 pytest tests/fuzz/test_fuzz_terminal_tables.py`.
"""

import io
import os
import re

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pipeline.terminal_tables import fold, pairs, tables

CASES = int(os.environ.get("FPT_FUZZ_CASES", "150"))
SEED = os.environ.get("FPT_FUZZ_SEED")
FRAME = "┃│┏┳┓┡╇┩└┴┘━─"

attack = settings(
    max_examples=CASES, derandomize=SEED is None, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
numbers = st.one_of(
    st.floats(-1e6, 1e6).map("{:.3f}".format),
    st.floats(0, 1).map("{:.3f}".format),
    st.integers(-(10**9), 10**9).map("{:,}".format),
    st.floats(1e-9, 1e9).map("{:g}".format),
    st.just("-"),
)
cells = st.one_of(
    numbers,
    st.tuples(numbers, numbers, numbers).map(lambda three: "{} ({} to {})".format(*three)),
    st.tuples(numbers, numbers).map(lambda two: "{} ({})".format(*two)),
)
names = st.one_of(
    st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters=FRAME), min_size=1, max_size=40),
    st.lists(
        st.sampled_from(["outputs", "lr=0.0005", "seed=12", "fold-3-of-10", "1e-05", "_", "模型"]), min_size=1
    ).map("/".join),
)


def printed(columns: list[str], rows: list[list[str]], width: int) -> str:
    text = io.StringIO()
    for table in tables(columns, rows, width):
        Console(file=text, width=width, highlight=False).print(table)
    return text.getvalue()


@seed(int(SEED or 0))
@attack
@given(st.data(), st.integers(1, 12), st.integers(1, 6), st.integers(40, 240))
def test_every_number_is_on_one_line(data: st.DataObject, models: int, metrics: int, width: int) -> None:
    columns = ["metric", *data.draw(st.lists(names, min_size=models, max_size=models))]
    first = data.draw(st.lists(names, min_size=metrics, max_size=metrics))
    rows = [[name, *data.draw(st.lists(cells, min_size=models, max_size=models))] for name in first]
    text = printed(columns, rows, width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    # The words of each line in the model columns, between the frames.
    seen = [
        word
        for line in text.splitlines()
        if line.startswith("│")
        for cell in line.split("│")[2:]
        for word in cell.split()
    ]
    expected = [word for row in rows for cell in row[1:] for word in cell.split()]
    assert sorted(seen) == sorted(expected)


@seed(int(SEED or 0))
@attack
@given(names, st.integers(12, 80))
def test_names_lose_nothing_and_break_no_number_that_fits(name: str, width: int) -> None:
    lines = fold(name, width).split("\n")
    assert "".join(lines) == name
    assert all(cell_len(line) <= width for line in lines)
    for number in re.findall(r"\d+(?:\.\d+)?", name):
        if len(number) <= 4:
            assert any(number in line for line in lines), (number, lines)


@seed(int(SEED or 0))
@attack
@given(
    st.lists(st.tuples(st.sampled_from(["AUC", "Balanced accuracy", "Hamming loss"]), cells), min_size=1),
    st.integers(40, 100),
)
def test_named_values_are_whole(rows: list[tuple[str, str]], width: int) -> None:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False).print(pairs(rows, width))
    words = text.getvalue().split()
    for _, value in rows:
        assert all(word in words for word in value.split())
