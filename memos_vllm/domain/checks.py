"""Checks of what callers send, shared by memories and cubes.

Messages name the field and the limit, and never repeat what was sent: it may be a memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

from typing_extensions import TypeAliasType

from memos_vllm.errors import InvalidRequest, TooLarge

# Recursive; pydantic finds the way back to it from any module.
JsonValue = TypeAliasType(
    "JsonValue", "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)
JsonObject: TypeAlias = Mapping[str, JsonValue]

MAX_TEXT_BYTES = 64 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_METADATA_DEPTH = 16
MAX_WORDS = 64
MAX_WORD_CHARS = 128

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_encodable(value: str, *, param: str) -> int:
    """Size of `value` in bytes of UTF-8.

    Raises:
        InvalidRequest: it holds NUL or half of a surrogate pair, which no store keeps.
    """
    if "\x00" in value:
        raise InvalidRequest(f"{param} holds a NUL character; remove it", param=param)
    try:
        return len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair and is not valid Unicode", param=param
        ) from None


def check_document(value: str, *, param: str, blank: bool = False) -> str:
    """`value` itself when it is text of at most 64 KiB.

    Raises:
        InvalidRequest: blank although `blank` is false, or not encodable.
        TooLarge: over `MAX_TEXT_BYTES`.
    """
    size_bytes = check_encodable(value, param=param)
    if size_bytes > MAX_TEXT_BYTES:
        raise TooLarge(
            f"{param} has {size_bytes} bytes of UTF-8 and the limit is {MAX_TEXT_BYTES}; split it"
        )
    if not blank and not value.strip():
        raise InvalidRequest(f"{param} is blank", param=param)
    return value


def check_line(value: str, *, param: str, max_chars: int, blank: bool = False) -> str:
    """`value` itself when it is one line of at most `max_chars` characters.

    Raises:
        InvalidRequest: too long, blank although `blank` is false, or with control characters.
    """
    if len(value) > max_chars:
        raise InvalidRequest(
            f"{param} has {len(value)} characters and the limit is {max_chars}", param=param
        )
    if _CONTROL.search(value):
        raise InvalidRequest(
            f"{param} holds a line break or another control character", param=param
        )
    check_encodable(value, param=param)
    if not blank and not value.strip():
        raise InvalidRequest(f"{param} is blank", param=param)
    return value


def check_words(values: Sequence[str], *, param: str) -> tuple[str, ...]:
    """Tags or labels without doubles, in the order given.

    Raises:
        InvalidRequest: more than `MAX_WORDS`, or one of them is no short line.
    """
    if isinstance(values, str):
        raise InvalidRequest(f"{param} must be a list of strings", param=param)
    if len(values) > MAX_WORDS:
        raise InvalidRequest(
            f"{param} has {len(values)} entries and the limit is {MAX_WORDS}", param=param
        )
    for index, value in enumerate(values):
        check_line(value, param=f"{param}[{index}]", max_chars=MAX_WORD_CHARS)
    return tuple(dict.fromkeys(values))


def check_time(value: datetime | None, *, param: str) -> datetime | None:
    """`value` in UTC.

    Raises:
        InvalidRequest: it names no time zone, or lies outside the calendar once in UTC.
    """
    if value is None:
        return None
    if value.tzinfo is None:
        raise InvalidRequest(f"{param} needs a time zone, such as a final Z", param=param)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest(f"{param} lies outside the calendar", param=param) from None


def check_json_object(value: JsonObject, *, param: str) -> dict[str, JsonValue]:
    """A plain copy of `value` when it is a JSON object of at most 16 KiB.

    Raises:
        InvalidRequest: not JSON (NaN, other types), nested too deeply, or not encodable.
        TooLarge: over `MAX_METADATA_BYTES`.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{param} must be an object", param=param)
    _check_json(value, param=param, depth=1)
    encoded = json.dumps(value, ensure_ascii=False, allow_nan=False)
    size_bytes = len(encoded.encode("utf-8"))
    if size_bytes > MAX_METADATA_BYTES:
        raise TooLarge(
            f"{param} has {size_bytes} bytes as JSON and the limit is {MAX_METADATA_BYTES}"
        )
    copy: dict[str, JsonValue] = json.loads(encoded)
    return copy


def _check_json(value: object, *, param: str, depth: int) -> None:
    if depth > MAX_METADATA_DEPTH:
        raise InvalidRequest(
            f"{param} is nested deeper than {MAX_METADATA_DEPTH} levels", param=param
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequest(f"{param} holds a key that is no string", param=param)
            check_encodable(key, param=param)
            _check_json(item, param=param, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(item, param=param, depth=depth + 1)
    else:
        _check_scalar(value, param=param)


def _check_scalar(value: object, *, param: str) -> None:
    if isinstance(value, str):
        check_encodable(value, param=param)
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        # JSON readers part ways beyond 64 bits, and Python's own refuses thousands of digits.
        if not -(2**63) <= value < 2**64:
            raise InvalidRequest(f"{param} holds an integer of more than 64 bits", param=param)
    elif not isinstance(value, float) or not math.isfinite(value):
        raise InvalidRequest(f"{param} holds a value that JSON does not know", param=param)
