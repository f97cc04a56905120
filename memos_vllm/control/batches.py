"""Long lists of values, in parts that every database takes as parameters of one statement."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from typing import TypeVar

Value = TypeVar("Value")

# SQLite takes 32,766 parameters as it is usually built, PostgreSQL 65,535.
MAX_VALUES = 10_000


def in_parts(values: Collection[Value]) -> Iterator[list[Value]]:
    """The values in lists of at most `MAX_VALUES`; no list when there are none."""
    left = iter(values)
    while part := list(islice(left, MAX_VALUES)):
        yield part
