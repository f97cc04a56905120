"""The way in: a file becomes a document of chunks, or an error that says what to do."""

from __future__ import annotations

from pathlib import PurePosixPath

from blake3 import blake3

from memos_vllm.errors import InvalidRequest, TooLarge
from memos_vllm.plaintext.ingest.chunking import chunk_blocks, estimate_tokens
from memos_vllm.plaintext.ingest.cleaning import clean_line
from memos_vllm.plaintext.ingest.decoding import declared_charset
from memos_vllm.plaintext.ingest.document import (
    DEFAULT_CHUNK_TOKENS,
    CountTokens,
    Document,
    IngestLimits,
)
from memos_vllm.plaintext.ingest.isolation import parse_isolated
from memos_vllm.plaintext.ingest.kinds import MEDIA_TYPES, detect_kind
from memos_vllm.plaintext.ingest.wire import Task

MAX_TITLE_CHARS = 512


def ingest_document(
    data: bytes,
    *,
    filename: str,
    media_type: str | None = None,
    limits: IngestLimits | None = None,
    count_tokens: CountTokens = estimate_tokens,
    max_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Document:
    """A file as chunks. Deterministic; keeps nothing and fetches nothing.

    Blocks while a process of its own parses the file; call it from a thread.

    Args:
        filename: as the sender named it; its suffix says the format, and it is the title of a
            document that has none.
        media_type: as the sender declared it, with a charset if it likes.
        count_tokens: how many tokens a text has; called for every sentence.
        max_chunk_tokens: tokens of a chunk; only a longer sentence exceeds it.
    Raises:
        InvalidRequest: not a file that can be read; the message says what to do.
        TooLarge: over one of `limits`.
        Unavailable: no process could be started.
    """
    limits = limits or IngestLimits()
    if not data:
        raise InvalidRequest("the file is empty", param="file")
    if len(data) > limits.max_bytes:
        raise TooLarge(
            f"the file has {len(data)} bytes and the limit is {limits.max_bytes}; split it"
        )
    if max_chunk_tokens < 1:
        raise InvalidRequest("max_chunk_tokens must be at least 1", param="max_chunk_tokens")
    kind = detect_kind(data, filename=filename, media_type=media_type)
    task = Task(kind=kind, declared=declared_charset(media_type), limits=limits)
    parsed = parse_isolated(data, task)
    chunks, notes = chunk_blocks(
        parsed.blocks,
        count_tokens=count_tokens,
        max_tokens=max_chunk_tokens,
        max_chunks=limits.max_chunks,
    )
    return Document(
        title=_title(parsed.title, filename),
        kind=kind,
        media_type=MEDIA_TYPES[kind],
        size_bytes=len(data),
        digest=blake3(data).hexdigest(),
        chunks=chunks,
        notes=(*parsed.notes, *notes),
    )


def _title(found: str | None, filename: str) -> str:
    """One line that is never blank: the document's own title, or the name of the file."""
    own = clean_line(found or "")
    name = clean_line(PurePosixPath(filename.replace("\\", "/")).stem)
    return (own or name or "document")[:MAX_TITLE_CHARS]
