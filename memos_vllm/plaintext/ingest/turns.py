"""A chat turn is one memory; only one over the size of a memory becomes several."""

from __future__ import annotations

from memos_vllm.domain.checks import MAX_TEXT_BYTES
from memos_vllm.plaintext.ingest import pieces
from memos_vllm.plaintext.ingest.cleaning import clean_text


def split_turn(text: str, *, max_bytes: int = MAX_TEXT_BYTES) -> tuple[str, ...]:
    """A message in as few pieces of at most `max_bytes` of UTF-8 as its sentences allow.

    The text is cleaned first (`cleaning.clean_text`); blanks at the ends of pieces go, and a blank
    message gives none.
    """
    found = pieces.split_at_sentences(clean_text(text), max_bytes=max_bytes)
    return tuple(piece for piece in map(str.strip, found) if piece)
