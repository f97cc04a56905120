"""Cursors: opaque to callers, the last item's sort key to us."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from memos_vllm.domain.page import MAX_LIMIT
from memos_vllm.errors import InvalidRequest

Item = TypeVar("Item")

_MAX_CURSOR_CHARS = 256


def check_limit(limit: int) -> int:
    """`limit` itself when it lies in 1..1000; raises InvalidRequest."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit is {limit} and must lie in 1..{MAX_LIMIT}", param="limit")
    return limit


def encode_cursor(listing: str, key: str | int) -> str:
    """A cursor that continues `listing` after the item with this sort key."""
    return base64.urlsafe_b64encode(f"{listing}:{key}".encode()).decode().rstrip("=")


def text_key(listing: str, cursor: str | None) -> str | None:
    """The sort key in a cursor of `listing`, None for the first page; raises InvalidRequest."""
    if cursor is None:
        return None
    problem = InvalidRequest(
        "the cursor is not one that this list gave out; start again without it", param="cursor"
    )
    if len(cursor) > _MAX_CURSOR_CHARS:
        raise problem
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        found, _, key = (
            base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii").partition(":")
        )
    except (ValueError, binascii.Error):
        raise problem from None
    if found != listing or not key:
        raise problem
    return key


def number_key(listing: str, cursor: str | None) -> int | None:
    """As `text_key`, for lists sorted by number."""
    key = text_key(listing, cursor)
    if key is None:
        return None
    if not (key.isascii() and key.isdigit() and len(key) < 19):
        raise InvalidRequest(
            "the cursor is not one that this list gave out; start again without it", param="cursor"
        )
    return int(key)


def cut(
    rows: Sequence[Item], *, limit: int, listing: str, key: Callable[[Item], str | int]
) -> tuple[Sequence[Item], str | None]:
    """The first `limit` of `limit + 1` fetched rows, and the cursor when there are more."""
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], encode_cursor(listing, key(rows[limit - 1]))
