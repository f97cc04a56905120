"""Cursors: opaque to callers, the last item's sort key to us.

A number by which memories or jobs are sorted counts those of others, too, so it is sealed: nobody
reads it off a cursor or makes one up.
"""

from __future__ import annotations

import base64
import binascii
import hmac
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


def encode_cursor(listing: str, key: str) -> str:
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
    # A NUL is more than PostgreSQL takes.
    if found != listing or not key or not key.isprintable():
        raise problem
    return key


def number_key(listing: str, cursor: str | None, *, secret: bytes) -> int | None:
    """As `text_key`, for lists that are sorted by number; the key is `sealed_number`."""
    key = text_key(listing, cursor)
    if key is None:
        return None
    problem = InvalidRequest(
        "the cursor is not one that this list gave out; start again without it", param="cursor"
    )
    try:
        token = bytes.fromhex(key)
    except ValueError:
        raise problem from None
    if len(token) != 16:
        raise problem
    hidden, mark = token[:8], token[8:]
    number = int.from_bytes(_xor(hidden, _digest(secret, listing, mark)), "big", signed=True)
    if mark != _mark(secret, listing, number):
        raise problem
    return number


def sealed_number(listing: str, number: int, *, secret: bytes) -> str:
    """A sort key that only who knows the secret can read or make; the same for the same number."""
    mark = _mark(secret, listing, number)
    shown = number.to_bytes(8, "big", signed=True)
    return (_xor(shown, _digest(secret, listing, mark)) + mark).hex()


def _mark(secret: bytes, listing: str, number: int) -> bytes:
    return _digest(secret, listing, str(number).encode())


def _digest(secret: bytes, listing: str, value: bytes) -> bytes:
    return hmac.digest(secret, listing.encode() + b"\0" + value, "sha256")[:8]


def _xor(one: bytes, two: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, two, strict=True))


def cut(
    rows: Sequence[Item], *, limit: int, listing: str, key: Callable[[Item], str]
) -> tuple[Sequence[Item], str | None]:
    """The first `limit` of `limit + 1` fetched rows, and the cursor when there are more."""
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], encode_cursor(listing, key(rows[limit - 1]))
