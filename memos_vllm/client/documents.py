"""A document on its way to the server, and what became of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

from memos_vllm.client.fields import Fields
from memos_vllm.client.objects import Json, MemoryInfo
from memos_vllm.client.wire import Upload
from memos_vllm.domain.checks import check_encodable
from memos_vllm.errors import InvalidRequest, TooLarge

MAX_DOCUMENT_BYTES = 32 * 1024 * 1024

# A path, the bytes of a file, or a file that is open in binary mode.
DocumentInput: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes]


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A document in a cube.

    Args:
        id: of the memory that stands for the whole.
        outcome: added, updated or unchanged.
        uri: names it in its cube.
        digest: of its bytes.
        chunks: how many memories it was cut into.
        added, changed, archived: chunks that this call made, gave a new version, took out of use.
        notes: what was left out of the memories, and why.
        memories: its chunks in reading order, at most the first 1,000.
    """

    id: str
    outcome: str
    title: str
    uri: str
    media_type: str
    digest: str
    chunks: int
    added: int
    changed: int
    archived: int
    notes: tuple[str, ...]
    memories: tuple[MemoryInfo, ...]
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> DocumentInfo:
        reply = Fields(body, "document list")
        document = Fields(reply.raw.get("document"), "document")
        return cls(
            id=document.text("id"),
            outcome=document.text("outcome"),
            title=document.text("title"),
            uri=document.text("uri"),
            media_type=document.text("media_type"),
            digest=document.text("digest"),
            chunks=document.count("chunks"),
            added=document.count("added", default=0),
            changed=document.count("changed", default=0),
            archived=document.count("archived", default=0),
            notes=document.names("notes"),
            memories=reply.each("data", MemoryInfo.from_json),
            raw=document.raw,
        )


def upload_of(
    document: DocumentInput,
    *,
    filename: str | None,
    uri: str | None,
    title: str | None,
    tags: Sequence[str],
    labels: Sequence[str],
    metadata: Mapping[str, object] | None,
    reason: str | None,
) -> Upload:
    """The form that carries a document.

    Raises:
        InvalidRequest: no file name, a file in text mode, or a field that cannot be sent.
        TooLarge: over 32 MiB.
        OSError: the file cannot be read.
    """
    content, own_name = _content(document)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise TooLarge(
            f"the document {own_name or filename or ''} has more than {MAX_DOCUMENT_BYTES:,} "
            "bytes, the most that is taken; split it"
        )
    filename = filename or own_name
    if not filename:
        raise InvalidRequest(
            "a document without a path needs a filename, whose suffix says what it is",
            param="filename",
        )
    texts = {"uri": uri, "title": title, "reason": reason}
    fields = {name: value for name, value in texts.items() if value is not None}
    for name, value in (("filename", filename), *fields.items()):
        check_encodable(value, param=name)
    # As JSON: a lone field that begins with a bracket would be read as a list.
    for name, words in (("tags", tags), ("labels", labels)):
        if words:
            fields[name] = json.dumps(list(words))
    if metadata:
        fields["metadata"] = _metadata_field(metadata)
    return Upload(filename, content, fields)


def _content(document: DocumentInput) -> tuple[bytes, str | None]:
    """The bytes, at most one more than is taken, and the file's own name if it has one."""
    if isinstance(document, bytes):
        return document, None
    if isinstance(document, str | os.PathLike):
        path = Path(document)
        with path.open("rb") as file:
            return file.read(MAX_DOCUMENT_BYTES + 1), path.name
    if not hasattr(document, "read"):
        raise InvalidRequest(
            f"a document is a path, bytes or an open file, not {type(document).__name__}",
            param="document",
        )
    content = document.read(MAX_DOCUMENT_BYTES + 1)
    if not isinstance(content, bytes):
        raise InvalidRequest("the document's file is open in text mode; open it with 'rb'")
    name = getattr(document, "name", None)
    return content, Path(name).name if isinstance(name, str) else None


def _metadata_field(metadata: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"metadata cannot be written as JSON: {error}", param="metadata"
        ) from None
