"""Plain text: paragraphs between blank lines, lists by their marks, wrapped lines joined."""

from __future__ import annotations

import re
from itertools import pairwise

from memos_vllm.plaintext.ingest import blocks
from memos_vllm.plaintext.ingest.cleaning import clean_text
from memos_vllm.plaintext.ingest.decoding import decode_text
from memos_vllm.plaintext.ingest.document import Block, BlockKind, IngestLimits, ParsedDocument

_BLANK_LINES = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
LIST_MARK = re.compile(r"(?:[-*+•‣◦▪●–—]|\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5})[.)])[ \t]+\S")
# Colours and cursor moves in logs.
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]{0,20}[A-Za-z]")
_UNDERLINE = re.compile(r"(=|-|~|\*|#|\^)\1{2,}")
# Narrower text than this was not wrapped by a program: its lines are lines.
_LEAST_WRAP_COLUMNS = 45
# Scripts that are written without spaces are joined without one.
_UNSPACED = re.compile(
    "[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u0e00-\u0eff\U00020000-\U0003ffff]"
)


def read(data: bytes, *, declared: str | None, limits: IngestLimits) -> ParsedDocument:
    """Plain text as paragraphs, list items and underlined headings.

    Args:
        declared: the character set that came with the file.
    Raises:
        InvalidRequest: it is not text.
    """
    text = clean_text(_TERMINAL_CODES.sub("", decode_text(data, declared=declared)))
    found: list[Block] = []
    for paragraph in _BLANK_LINES.split(text.strip("\n")):
        lines = [line.rstrip() for line in paragraph.split("\n")]
        found.extend(_paragraph([line for line in lines if line]))
    return ParsedDocument(title=None, blocks=tuple(found))


def _paragraph(lines: list[str]) -> list[Block]:
    if len(lines) >= 2 and _is_underline(lines[1].strip(), lines[0].strip()):
        level = 1 if lines[1].strip()[0] in "=#*" else 2
        return [*blocks.heading(lines[0], level=level), *_paragraph_body(lines[2:])]
    return _paragraph_body(lines)


def _is_underline(line: str, title: str) -> bool:
    return (
        _UNDERLINE.fullmatch(line) is not None
        and len(line) >= len(title) / 2
        and len(title) <= blocks.MAX_HEADING_CHARS
    )


def _paragraph_body(lines: list[str]) -> list[Block]:
    # One line that begins like a list is a sentence: "A. Smith wrote this."
    marks = [LIST_MARK.match(line.lstrip()) is not None for line in lines]
    if sum(marks) <= 1:
        return blocks.prose(_unwrap(lines))
    groups: list[list[str]] = [[]]
    for line, marked in zip(lines, marks, strict=True):
        if marked:
            groups.append([])
        groups[-1].append(line)
    found = blocks.prose(_unwrap(groups[0]))
    for group in groups[1:]:
        found.extend(blocks.prose(_unwrap(group, is_item=True), kind=BlockKind.LIST_ITEM))
    return found


def _unwrap(lines: list[str], *, is_item: bool = False) -> str:
    """Lines as text: a line end is kept where the next word would still have fitted.

    Args:
        is_item: a line that is indented below the first goes on with it.
    """
    width = max((len(line) for line in lines), default=0)
    pieces: list[str] = []
    for line, following in pairwise(lines):
        words = following.lstrip()
        first_word = words.split(" ", 1)[0]
        wrapped = len(line) + len(first_word) >= max(width, _LEAST_WRAP_COLUMNS)
        goes_on = wrapped or (is_item and following[0].isspace())
        pieces.append(line)
        pieces.append(join_mark(line, words) if goes_on else "\n")
    return "".join([*pieces, *lines[-1:]])


def join_mark(line: str, following: str) -> str:
    """What stood for the line end between two halves of a sentence."""
    both = _UNSPACED.match(line[-1:]) and _UNSPACED.match(following[:1])
    return "" if both else " "
