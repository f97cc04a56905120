"""What ingest takes and gives: limits, blocks as a reader found them, chunks, the document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

MIB = 1 << 20

CountTokens: TypeAlias = Callable[[str], int]

DEFAULT_CHUNK_TOKENS = 256


class FileKind(StrEnum):
    """The formats that are read."""

    TEXT = "text"
    MARKDOWN = "markdown"
    HTML = "html"
    PDF = "pdf"
    DOCX = "docx"


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestLimits:
    """What one document may cost. The defaults are far above what people write.

    Args:
        max_bytes: of the file as sent.
        max_text_bytes: UTF-8 of the text found in it.
        max_chunks: memories that one document may become.
        max_pages: of a PDF.
        timeout_seconds: of wall clock, and of CPU, for the process that parses.
        memory_bytes: of address space for that process.
        max_unpacked_bytes: of a docx once inflated, all parts together, as its directory says.
        max_archive_entries: parts in a docx.
    """

    max_bytes: int = 32 * MIB
    max_text_bytes: int = 32 * MIB
    max_chunks: int = 10_000
    max_pages: int = 5_000
    timeout_seconds: float = 60.0
    memory_bytes: int = 1024 * MIB
    max_unpacked_bytes: int = 256 * MIB
    max_archive_entries: int = 10_000


class BlockKind(StrEnum):
    """What a stretch of text is in its document."""

    HEADING = "heading"
    PARAGRAPH = "paragraph"
    LIST_ITEM = "list_item"
    TABLE_ROW = "table_row"
    CODE = "code"


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of clean text that a reader found.

    Args:
        level: of a heading, 1 is the highest; 0 for the document's title and for what is none.
        page: where it begins, counted from 1; None in formats without pages.
        cuts: ascending offsets into `text` where a chunk may begin: the starts of sentences, of
            lines of code, of cells of a row; 0 is left out.
        turns: (offset, page) wherever the text runs on to another page.
    """

    kind: BlockKind
    text: str
    level: int = 0
    page: int | None = None
    cuts: tuple[int, ...] = ()
    turns: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """What a reader hands over. `notes` are lines for the caller on what was left out and why."""

    title: str | None
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a document, small enough to be a memory.

    Args:
        text: at most 64 KiB of UTF-8, never blank.
        ordinal: position in the document, from 0.
        heading_path: the headings above it, highest first.
        page: where it begins (PDF); `last_page` is where it ends.
        locator: one line of at most 512 characters that says where to look.
        num_tokens: of `text`, as `count_tokens` counts.
        digest: of the text with white space collapsed; equal text has an equal digest.
    """

    text: str
    ordinal: int
    heading_path: tuple[str, ...]
    page: int | None
    last_page: int | None
    locator: str | None
    num_tokens: int
    digest: str

    @property
    def headed_text(self) -> str:
        """The text below its headings in one line: what an embedder should see."""
        return "\n".join((" > ".join(self.heading_path), self.text)).lstrip("\n")


@dataclass(frozen=True, slots=True)
class Document:
    """A file as chunks.

    Args:
        title: one line of at most 512 characters; the file's name when it says none itself.
        digest: BLAKE3 of the bytes, in hex; equal files have equal digests.
        notes: what was left out or cut, in lines for the person who sent the file.
    """

    title: str
    kind: FileKind
    media_type: str
    size_bytes: int
    digest: str
    chunks: tuple[Chunk, ...]
    notes: tuple[str, ...] = ()
