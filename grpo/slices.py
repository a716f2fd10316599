"""Cutting work along its rows, so that what is made of a slice fits into a CPU's cache or a share of a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator


def slices(num: int, width: int, at_once: int) -> Iterator[slice]:
    """Cut num rows so that a table of `width` entries per row has at most `at_once`; one empty slice for num = 0."""
    size = max(1, at_once // max(width, 1))
    for start in range(0, max(num, 1), size):
        yield slice(start, min(start + size, num))
