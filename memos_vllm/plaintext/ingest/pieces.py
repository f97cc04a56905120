"""Where to cut a text that is longer than a memory may be."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from memos_vllm.plaintext.ingest.sentences import sentence_starts

_PARAGRAPH_ENDS = re.compile(r"\n[^\S\n]*\n\s*")
_CLAUSE_ENDS = re.compile(r"[,;:、，；：—–)\]}]\s*|\n")
_BLANKS = re.compile(r"\s+")


def split_at_words(text: str, *, max_bytes: int) -> Iterator[str]:
    """Pieces of at most `max_bytes` of UTF-8 that end behind a clause, else a word, else a letter.

    Joined they are the text.
    """
    start = 0
    while start < len(text):
        end = _word_end(text, start, _fitting_end(text, start, max_bytes))
        yield text[start:end]
        start = end


def split_at_sentences(text: str, *, max_bytes: int) -> Iterator[str]:
    """Pieces of at most `max_bytes` of UTF-8 that end between paragraphs, else between sentences.

    A sentence over `max_bytes` is cut as in `split_at_words`. Joined they are the text.
    """
    paragraphs = [match.end() for match in _PARAGRAPH_ENDS.finditer(text)]
    sentences = sentence_starts(text)
    start = 0
    while start < len(text):
        fitting = _fitting_end(text, start, max_bytes)
        if fitting < len(text):
            least = start + (fitting - start) // 2
            end = (
                _last_between(paragraphs, least, fitting)
                or _last_between(sentences, start + 1, fitting)
                or _word_end(text, start, fitting)
            )
        else:
            end = fitting
        yield text[start:end]
        start = end


def _fitting_end(text: str, start: int, max_bytes: int) -> int:
    """The end of the longest stretch from `start` that fits."""
    encoded = text[start : start + max_bytes].encode("utf-8")
    if len(encoded) <= max_bytes:
        return min(len(text), start + max_bytes)
    return start + len(encoded[:max_bytes].decode("utf-8", "ignore"))


def _word_end(text: str, start: int, end: int) -> int:
    if end >= len(text):
        return len(text)
    for pattern in (_CLAUSE_ENDS, _BLANKS):
        last = None
        for match in pattern.finditer(text, start + (end - start) // 2, end):
            last = match
        if last is not None:
            return last.end()
    return end


def _last_between(offsets: Sequence[int], least: int, most: int) -> int:
    """The largest of the ascending `offsets` in least..most; 0 when there is none."""
    index = bisect_right(offsets, most)
    return offsets[index - 1] if index and offsets[index - 1] >= least else 0
