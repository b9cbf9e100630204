"""Memory sizes in the settings of the machine."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.machine import LARGEST, ClusterSettings, StoreSettings


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        (" 1.5 GiB ", 3 * 2**29),
        ("10kib", 10 * 2**10),
        ("0.25TB", 250 * 10**9),
        ("999999999999999", 999_999_999_999_999),
    ],
)
def test_sizes_are_read_and_stay_as_they_were_written(text: str, size: int) -> None:
    settings = StoreSettings(memory_budget=text)
    assert settings.memory_bytes == size
    assert settings.memory_budget == text


@pytest.mark.parametrize(
    "text",
    ["2G", "1kbit", "3 PB", "1TiB", ".5GB", "5.GB", "-1GB", "1e3MB", "2GB of RAM", "GB", "1_000", f"{LARGEST + 1}B"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"such as 2GB or 1\.5GiB"):
        StoreSettings(memory_budget=text)
    with pytest.raises(ValidationError, match="such as 16GiB"):
        ClusterSettings(kind="local", memory=text)
