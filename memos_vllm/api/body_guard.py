"""Finding and removing forbidden members of a JSON request body, without touching the rest.

A body is edited as text: the members that go are cut out and every other byte of meaning stays as
it was sent, so large integers, exact floats, duplicate keys and escapes reach vLLM unchanged.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

MEMORY_FIELDS = frozenset({"memcube_id", "mem_cube_id", "memos"})
TRANSFER_FIELD = "kv_transfer_params"
MODEL_FIELD = "model"

# Where vLLM looks for extra arguments of a request, and where batch forms keep their requests.
_CONTAINERS = frozenset({"vllm_xargs", "extra_args", "sampling_params", "requests", "batch"})

# One pass with a quote as its literal start: 25 microseconds for a body of 100 kB.
_TRANSFER_NAME = re.compile(f'"{TRANSFER_FIELD}"'.encode())
_ANY_NAME = re.compile(f'"(?:{"|".join(sorted({TRANSFER_FIELD, *MEMORY_FIELDS}))})"'.encode())

# Every letter of the names above, and the underscore, lies in U+0050..U+007F. Text in other
# languages is full of \u escapes too, so only escapes of these characters make a body suspect.
_HIDING_ESCAPE = re.compile(rb"\\u00[5-7][0-9a-fA-F]")
_WHITESPACE = re.compile(r"[ \t\n\r]*")

# Numbers are only skipped, so they are read in the way that never fails: int() refuses more than
# 4,300 digits, float() answers infinity.
_DECODER = json.JSONDecoder(parse_int=float, parse_float=float)


class UnreadableBodyError(ValueError):
    """The body is not one JSON value, or is nested too deep to read."""


@dataclass(frozen=True, slots=True)
class GuardedBody:
    """What is left of a body, and what was found in it.

    `text` is the whole new body, or None when nothing was removed.
    """

    text: str | None
    dropped: int
    memory_fields: tuple[str, ...]
    models: tuple[object, ...]


def is_suspect(body: bytes, *, memory_fields: bool, also: re.Pattern[bytes] | None = None) -> bool:
    """Say whether a body has to be parsed; a few searches over the bytes, no copy.

    Args:
        body: the whole body as sent.
        memory_fields: also look for the fields that only the chat route takes.
        also: what else to look for, wherever it stands; escapes of letters are looked for anyway.
    """
    if also is not None and also.search(body) is not None:
        return True
    names = _ANY_NAME if memory_fields else _TRANSFER_NAME
    if names.search(body) is not None:
        return True
    if b"\\" in body and _HIDING_ESCAPE.search(body) is not None:
        return True
    # UTF-16 and UTF-32 would hide every needle, and json.loads reads both.
    return json.detect_encoding(body) != "utf-8"


def guard_body(body: bytes) -> GuardedBody:
    """Cut `kv_transfer_params` out of a body; list the memory fields and models at its top.

    Raises:
        UnreadableBodyError: where json.loads, with which vLLM reads bodies, would fail too.
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        # vLLM reads the body with json.loads; whatever that refuses is refused here as well.
        _DECODER.decode(text)
        walker = _Walker(text)
        walker.walk(_skip_whitespace(text, 0), depth=0)
    except (ValueError, RecursionError) as error:
        raise UnreadableBodyError(str(error)) from error
    return GuardedBody(
        text=walker.edited() if walker.dropped else None,
        dropped=walker.dropped,
        memory_fields=tuple(walker.memory_fields),
        models=tuple(walker.models),
    )


def _skip_whitespace(text: str, index: int) -> int:
    match = _WHITESPACE.match(text, index)
    return index if match is None else match.end()


class _Walker:
    """One pass over a text that is known to be valid JSON; every character is read once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._cuts: list[tuple[int, int]] = []
        self.dropped = 0
        self.memory_fields: list[str] = []
        self.models: list[object] = []

    def edited(self) -> str:
        """The text without the cut spans."""
        kept, index = [], 0
        for start, end in sorted(self._cuts):
            kept.append(self._text[index:start])
            index = max(index, end)
        return "".join([*kept, self._text[index:]])

    def walk(self, start: int, *, depth: int) -> int:
        """Walk the value at `start` and return where it ends."""
        opening = self._text[start]
        if opening == "{":
            return self._walk_object(start, depth=depth)
        if opening == "[":
            return self._walk_array(start, depth=depth)
        return self._skip(start)

    def _skip(self, start: int) -> int:
        _, end = _DECODER.raw_decode(self._text, start)
        return end

    def _walk_object(self, start: int, *, depth: int) -> int:
        text, kept_end = self._text, start + 1
        member = _skip_whitespace(text, start + 1)
        while text[member] != "}":
            name, name_end = _DECODER.raw_decode(text, member)
            value = _skip_whitespace(text, _skip_whitespace(text, name_end) + 1)
            if depth == 0 and name in MEMORY_FIELDS:
                self.memory_fields.append(name)
            if depth == 0 and name == MODEL_FIELD:
                self.models.append(_DECODER.raw_decode(text, value)[0])
            end = self.walk(value, depth=depth + 1) if name in _CONTAINERS else self._skip(value)
            following = self._next(end)
            if name != TRANSFER_FIELD:
                kept_end = end
            else:
                self.dropped += 1
                # The last member takes the comma before it along, any other the one after it.
                last = text[following] == "}"
                self._cuts.append((kept_end, end) if last else (member, following))
            member = following
        return member + 1

    def _walk_array(self, start: int, *, depth: int) -> int:
        index = _skip_whitespace(self._text, start + 1)
        while self._text[index] != "]":
            index = self._next(self.walk(index, depth=depth))
        return index + 1

    def _next(self, end: int) -> int:
        """Step from the end of a member to the next one, or to the closing bracket."""
        index = _skip_whitespace(self._text, end)
        if self._text[index] == ",":
            return _skip_whitespace(self._text, index + 1)
        return index
