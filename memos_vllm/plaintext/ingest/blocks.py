"""How readers make blocks: cleaned, and with the offsets at which a chunk may begin."""

from __future__ import annotations

from memos_vllm.plaintext.ingest.cleaning import clean_code, clean_line, clean_prose
from memos_vllm.plaintext.ingest.document import Block, BlockKind
from memos_vllm.plaintext.ingest.sentences import sentence_starts

# Longer than any title: a reader that calls this a heading has met a styled paragraph.
MAX_HEADING_CHARS = 200
MAX_HEADING_LEVEL = 9


def heading(text: str, *, level: int, page: int | None = None) -> list[Block]:
    """A heading, or a paragraph if it is too long for one; nothing if it is blank.

    Args:
        level: 1 is the highest of the text, 0 the title of the document.
    """
    line = clean_line(text)
    if len(line) > MAX_HEADING_CHARS:
        return prose(text, page=page)
    if not line:
        return []
    level = min(max(level, 0), MAX_HEADING_LEVEL)
    return [Block(BlockKind.HEADING, line, level=level, page=page)]


def prose(
    text: str, *, kind: BlockKind = BlockKind.PARAGRAPH, page: int | None = None
) -> list[Block]:
    """A paragraph or list item; nothing if it is blank."""
    clean = clean_prose(text)
    if not clean:
        return []
    return [Block(kind, clean, page=page, cuts=tuple(sentence_starts(clean)))]


def code(text: str) -> list[Block]:
    """Lines that keep their shape; nothing if they are blank."""
    clean = clean_code(text)
    if not clean.strip():
        return []
    cuts: list[int] = []
    position = clean.find("\n")
    while position >= 0:
        cuts.append(position + 1)
        position = clean.find("\n", position + 1)
    return [Block(BlockKind.CODE, clean, cuts=tuple(cuts))]
