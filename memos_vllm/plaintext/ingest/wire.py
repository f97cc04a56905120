"""What passes between the server and the process that parses: JSON, checked on arrival.

The answer comes from a process that has touched hostile bytes, so it is read as hostile too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from memos_vllm.errors import InvalidRequest, MemosError, TooLarge
from memos_vllm.plaintext.ingest.blocks import MAX_HEADING_LEVEL
from memos_vllm.plaintext.ingest.document import (
    Block,
    BlockKind,
    FileKind,
    IngestLimits,
    ParsedDocument,
)

_MAX_MESSAGE_CHARS = 500
_KINDS = {kind.value: kind for kind in BlockKind}


class MalformedAnswer(Exception):
    """The parser's answer is not one that it can give: it was killed, or taken over."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the worker is asked to read; the bytes follow on the next line."""

    kind: FileKind
    declared: str | None
    limits: IngestLimits


def encode_task(task: Task) -> bytes:
    """One line of JSON."""
    return json.dumps(asdict(task)).encode("ascii") + b"\n"


def decode_task(line: bytes) -> Task:
    """The task of `encode_task`."""
    fields = json.loads(line)
    return Task(FileKind(fields["kind"]), fields["declared"], IngestLimits(**fields["limits"]))


def encode_answer(parsed: ParsedDocument) -> bytes:
    """A document as JSON."""
    blocks = [
        [block.kind.value, block.text, block.level, block.page, block.cuts, block.turns]
        for block in parsed.blocks
    ]
    answer = {"title": parsed.title, "notes": parsed.notes, "blocks": blocks}
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def encode_refusal(error: MemosError) -> bytes:
    """A refusal as JSON."""
    kind = "too_large" if isinstance(error, TooLarge) else "invalid"
    return json.dumps({"error": kind, "message": str(error)}).encode("ascii")


def decode_answer(data: bytes) -> ParsedDocument:
    """The document of `encode_answer`.

    Raises:
        InvalidRequest, TooLarge: the worker refused the file.
        MalformedAnswer: neither a document nor a refusal.
    """
    try:
        answer = json.loads(data)
        if not isinstance(answer, dict):
            raise MalformedAnswer("no object")
        if "error" in answer:
            raise _refusal(answer)
        return ParsedDocument(
            title=_optional_text(answer["title"]),
            blocks=tuple(_block(fields) for fields in answer["blocks"]),
            notes=tuple(_text(note)[:_MAX_MESSAGE_CHARS] for note in answer["notes"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MalformedAnswer(type(error).__name__) from error


def _refusal(answer: dict[str, Any]) -> MemosError:
    message = _text(answer["message"])[:_MAX_MESSAGE_CHARS]
    if answer["error"] == "too_large":
        return TooLarge(message)
    return InvalidRequest(message, param="file")


def _block(fields: Any) -> Block:
    kind, text, level, page, cuts, turns = fields
    size = len(_text(text))
    _check_offsets(cuts, size)
    _check_offsets([offset for offset, _ in turns], size)
    _check(_is_count(level) and level <= MAX_HEADING_LEVEL)
    _check(page is None or _is_count(page))
    _check(all(_is_count(number) for _, number in turns))
    return Block(
        _KINDS[kind],
        text,
        level=level,
        page=page,
        cuts=tuple(cuts),
        turns=tuple((offset, number) for offset, number in turns),
    )


def _check_offsets(offsets: Sequence[Any], size: int) -> None:
    _check(all(type(offset) is int for offset in offsets))
    _check(all(first < second for first, second in pairwise([0, *offsets, max(size, 1)])))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _text(value: Any) -> str:
    _check(isinstance(value, str))
    text: str = value
    _check("\x00" not in text)
    text.encode("utf-8")
    return text


def _check(holds: bool) -> None:
    if not holds:
        raise MalformedAnswer("a field out of range")
