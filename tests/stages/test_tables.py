"""Cells that a spreadsheet would run are escaped, and read back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.tables import plain_cell, safe_cell


@pytest.mark.parametrize("text", ["=1+1", "+x.png", "-1", "@SUM(A1)", "\tx", "\rx", "\nx"])
def test_a_formula_is_escaped(text: str) -> None:
    assert safe_cell(text) == "'" + text


@pytest.mark.parametrize("text", ["", "a=b", "x-1.png", "'quoted'", "1", "'"])
def test_other_text_is_kept(text: str) -> None:
    assert safe_cell(text) == text
    assert plain_cell(text) == text


@given(st.text(alphabet=st.sampled_from("'=+-@\t\r\nab "), max_size=6))
def test_every_text_is_read_back(text: str) -> None:
    escaped = safe_cell(text)
    assert plain_cell(escaped) == text
    assert not escaped.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
