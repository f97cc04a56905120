"""A document and its chunks, on their way to become memories."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from memos_vllm.domain.memory import Memory

DOCUMENT_KIND: Final = "document"
CHUNK_KIND: Final = "chunk"
PART_OF: Final = "part-of"


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A piece of a document.

    Args:
        locator: where it stands, in one line: page and headings.
        heading_path: the headings that lead to it, outermost first.
        digest: of its text in normal form; the same text has the same digest.
    """

    text: str
    locator: str
    heading_path: tuple[str, ...]
    page: int | None
    digest: str


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document as it was read.

    Args:
        digest: of its bytes.
        size_bytes: of the file.
    """

    title: str
    media_type: str
    digest: str
    size_bytes: int
    chunks: tuple[NewChunk, ...]


class DocumentOutcome(StrEnum):
    """What sending a document did."""

    ADDED = "added"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document in a cube.

    Args:
        document: the memory that stands for the whole.
        memories: its chunks in reading order, at most the first 1,000.
        chunks: how many there are.
        added, changed, archived: chunks that this call made, gave a new version, took out of use.
    """

    document: Memory
    outcome: DocumentOutcome
    digest: str
    media_type: str
    memories: tuple[Memory, ...]
    chunks: int
    added: int
    changed: int
    archived: int
