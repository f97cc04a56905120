"""Blocks are packed into chunks: whole sentences, up to a number of tokens, never over a heading.

Where a chunk ends inside a section is chosen by content, so that an edit moves few boundaries: of
the places that fit, the best kind wins (between paragraphs, then items, then sentences), and among
equals the one whose following text has the smallest checksum. Two versions of a section agree on
that place again soon after the spot where they differ; packing to the brim would shift every
boundary behind the edit.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from blake3 import blake3

from memos_vllm.domain.checks import MAX_TEXT_BYTES
from memos_vllm.errors import TooLarge
from memos_vllm.plaintext.ingest.cleaning import clean_line
from memos_vllm.plaintext.ingest.document import Block, BlockKind, Chunk, CountTokens
from memos_vllm.plaintext.ingest.pieces import split_at_words
from memos_vllm.plaintext.ingest.sentences import spans

MAX_LOCATOR_CHARS = 512

_TITLE_CHARS = 80
_UNFINISHED = re.compile(r"[^\W_][\"'”’»)\]]*\Z")
_BLANK = re.compile(r"\s+")

_TOKENS = re.compile(
    "[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"  # one character, one token
    r"|[a-zA-Z]{1,6}|[^\W\d_]{1,3}|\d{1,3}|_+|[^\w\s]"
)


class _Cut(IntEnum):
    """Kinds of places between two atoms, the best first."""

    BLOCKS = 0
    ITEMS = 1
    SENTENCES = 2
    AFTER_INTRODUCTION = 3
    INSIDE_ROW = 4


# Which kinds may end a chunk that is filled this far; tried in order. Half full is the aim at
# least; a chunk ends at a quarter only where a better kind of place is found.
_ATTEMPTS = (
    (_Cut.ITEMS, 0.5),
    (_Cut.BLOCKS, 0.25),
    (_Cut.SENTENCES, 0.5),
    (_Cut.ITEMS, 0.25),
    (_Cut.AFTER_INTRODUCTION, 0.25),
    (_Cut.INSIDE_ROW, 0.5),
)


@dataclass(frozen=True, slots=True)
class _Atom:
    """What is never cut: a sentence, a row's cell, a line of code.

    `separator` goes between this atom and the one before it; `cut` says what kind of place that is.
    """

    text: str
    separator: str
    cut: _Cut
    page: int | None
    last_page: int | None
    num_tokens: int
    num_bytes: int
    checksum: int


def estimate_tokens(text: str) -> int:
    """About what a subword tokenizer counts, without one.

    Six letters, three digits, one sign or one ideograph are a token.
    """
    return len(_TOKENS.findall(text))


def digest_text(text: str) -> str:
    """BLAKE3 in hex of the text with its white space collapsed."""
    return blake3(clean_line(text).encode("utf-8")).hexdigest()


def chunk_blocks(
    blocks: Sequence[Block], *, count_tokens: CountTokens, max_tokens: int, max_chunks: int
) -> tuple[tuple[Chunk, ...], tuple[str, ...]]:
    """Chunks of a document, in its order, and notes on what had to be cut.

    A sentence over the budget is a chunk by itself, up to 64 KiB; only beyond that is it cut, at
    the end of a clause or a word, and a note says so. Linear in the length of the text.

    Args:
        max_tokens: of a chunk, as `count_tokens` counts; at least 1.
    Raises:
        TooLarge: more than `max_chunks` chunks.
    """
    packer = _Packer(count_tokens, max_tokens)
    chunks: list[Chunk] = []
    for path, section in _sections(blocks):
        for atoms in packer.pack(section):
            if len(chunks) == max_chunks:
                raise TooLarge(
                    f"the document makes more than {max_chunks} chunks, which is the limit; "
                    "split it"
                )
            chunks.append(_chunk(atoms, path, ordinal=len(chunks), count_tokens=count_tokens))
    notes: tuple[str, ...] = ()
    if packer.num_cut:
        notes = (
            f"{packer.num_cut} stretches of more than {MAX_TEXT_BYTES} bytes without the end of a "
            "sentence were cut between clauses or words",
        )
    return tuple(chunks), notes


def _sections(blocks: Iterable[Block]) -> Iterator[tuple[tuple[str, ...], list[Block]]]:
    """(headings above, blocks) of every stretch between headings.

    A heading without text below it, and without a lower heading, is a stretch by itself.
    """
    above: list[Block] = []
    body: list[Block] = []
    is_bare = False
    for block in blocks:
        if block.kind is not BlockKind.HEADING:
            body.append(block)
            is_bare = False
            continue
        if body:
            yield tuple(heading.text for heading in above), body
            body = []
        elif is_bare and above and block.level <= above[-1].level:
            yield tuple(heading.text for heading in above[:-1]), [above[-1]]
        while above and above[-1].level >= block.level:
            above.pop()
        above.append(block)
        is_bare = True
    if body:
        yield tuple(heading.text for heading in above), body
    elif is_bare:
        yield tuple(heading.text for heading in above[:-1]), [above[-1]]


class _Packer:
    """Packs the blocks of one section at a time; `num_cut` counts atoms cut for their size."""

    def __init__(self, count_tokens: CountTokens, max_tokens: int) -> None:
        self.num_cut = 0
        self._count_tokens = count_tokens
        self._max_tokens = max_tokens

    def pack(self, blocks: Sequence[Block]) -> Iterator[list[_Atom]]:
        """The atoms of each chunk."""
        atoms = list(self._atoms(blocks))
        start = 0
        while start < len(atoms):
            end = self._end_of_chunk(atoms, start)
            yield atoms[start:end]
            start = end

    def _end_of_chunk(self, atoms: Sequence[_Atom], start: int) -> int:
        budget = self._max_tokens
        while True:
            end = _choose_end(atoms, start, budget)
            if end == start + 1:
                return end
            # Tokenizers may count more for a text than for its sentences one by one.
            actual = self._count_tokens(_joined(atoms[start:end]))
            if actual <= self._max_tokens:
                return end
            budget = min(budget - 1, budget * self._max_tokens // actual)

    def _atoms(self, blocks: Sequence[Block]) -> Iterator[_Atom]:
        previous: Block | None = None
        for block in blocks:
            page = block.page
            turns = list(reversed(block.turns))
            for start, end in spans(block.text, block.cuts):
                while turns and turns[-1][0] <= start:
                    page = turns.pop()[1]
                first_page = page
                while turns and turns[-1][0] < end:
                    page = turns.pop()[1]
                cut, separator = _between(previous, block, start)
                for text in self._bounded(block.text[start:end]):
                    yield self._atom(text, cut, separator, first_page, page)
                    cut, separator = _Cut.INSIDE_ROW, ""
            previous = block

    def _atom(
        self, text: str, cut: _Cut, separator: str, page: int | None, last_page: int | None
    ) -> _Atom:
        return _Atom(
            text=text,
            separator=separator,
            cut=cut,
            page=page,
            last_page=last_page,
            num_tokens=self._count_tokens(text.strip()),
            num_bytes=len(text.encode("utf-8")) + len(separator),
            checksum=zlib.crc32(_BLANK.sub(" ", text.strip()).encode("utf-8")),
        )

    def _bounded(self, text: str) -> Iterator[str]:
        """The text itself, in pieces of at most 64 KiB."""
        # No character takes more than four bytes.
        if len(text) <= MAX_TEXT_BYTES // 4 or len(text.encode("utf-8")) <= MAX_TEXT_BYTES:
            yield text
            return
        self.num_cut += 1
        yield from split_at_words(text, max_bytes=MAX_TEXT_BYTES)


def _between(previous: Block | None, block: Block, start: int) -> tuple[_Cut, str]:
    """What kind of place lies before an atom, and what is written there."""
    if start > 0:
        is_apart = block.kind in {BlockKind.TABLE_ROW, BlockKind.CODE}
        return (_Cut.INSIDE_ROW if is_apart else _Cut.SENTENCES), ""
    if previous is None:
        return _Cut.BLOCKS, ""
    if _introduces(previous):
        return _Cut.AFTER_INTRODUCTION, "\n\n"
    if previous.kind is block.kind and block.kind in {BlockKind.LIST_ITEM, BlockKind.TABLE_ROW}:
        return _Cut.ITEMS, "\n"
    return _Cut.BLOCKS, "\n\n"


def _introduces(block: Block) -> bool:
    """Whether a block wants the next one: "These are taken:", or a title that was not marked."""
    if block.kind is not BlockKind.PARAGRAPH:
        return False
    if block.text.endswith((":", "：")):
        return True
    return (
        len(block.text) <= _TITLE_CHARS
        and not block.cuts
        and not block.text[:1].islower()
        and _UNFINISHED.search(block.text) is not None
    )


def _choose_end(atoms: Sequence[_Atom], start: int, budget: int) -> int:
    """The index behind the last atom of the chunk that begins at `start`."""
    tokens = atoms[start].num_tokens
    size = atoms[start].num_bytes
    filled: list[int] = []
    end = start + 1
    while end < len(atoms):
        filled.append(tokens)
        tokens += atoms[end].num_tokens
        size += atoms[end].num_bytes
        if tokens > budget or size > MAX_TEXT_BYTES:
            break
        end += 1
    else:
        return end
    for worst, share in _ATTEMPTS:
        fitting = [
            index
            for index in range(start + 1, end + 1)
            if filled[index - start - 1] >= share * budget and atoms[index].cut <= worst
        ]
        if fitting:
            return min(fitting, key=lambda index: (atoms[index].cut, atoms[index].checksum, -index))
    return end


def _joined(atoms: Sequence[_Atom]) -> str:
    pieces = [atoms[0].text]
    for atom in atoms[1:]:
        if atom.separator:
            pieces[-1] = pieces[-1].rstrip()
        pieces.append(atom.separator + atom.text)
    return "".join(pieces).strip()


def _chunk(
    atoms: Sequence[_Atom], path: tuple[str, ...], *, ordinal: int, count_tokens: CountTokens
) -> Chunk:
    text = _joined(atoms)
    page, last_page = atoms[0].page, atoms[-1].last_page
    return Chunk(
        text=text,
        ordinal=ordinal,
        heading_path=path,
        page=page,
        last_page=last_page,
        locator=_locator(path, page, last_page),
        num_tokens=count_tokens(text),
        digest=digest_text(text),
    )


def _locator(path: tuple[str, ...], page: int | None, last_page: int | None) -> str | None:
    parts: list[str] = []
    if page is not None:
        one_page = last_page is None or last_page == page
        parts.append(f"page {page}" if one_page else f"pages {page}–{last_page}")
    # The lowest heading says most; the highest is the first to go.
    headings = list(path)
    while headings:
        line = " · ".join([*parts, " > ".join(headings)])
        if len(line) <= MAX_LOCATOR_CHARS:
            return line
        headings.pop(0)
    return " · ".join(parts) or None
