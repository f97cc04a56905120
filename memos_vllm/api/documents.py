"""The route of documents: one file, as multipart form data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import Field

from memos_vllm.api import examples
from memos_vllm.api.conditions import TAKES_KEY, answer_once
from memos_vllm.api.context import CurrentCall
from memos_vllm.api.form import Part, files_and_fields, read_form
from memos_vllm.api.json_body import parse_json
from memos_vllm.api.replies import ListReply, MemoryReply, Reply, render
from memos_vllm.api.route import FormRoute
from memos_vllm.api.schemas import PathId
from memos_vllm.api.threads import Threads
from memos_vllm.domain.document import NewChunk, NewDocument, StoredDocument
from memos_vllm.errors import InvalidRequest, TooLarge
from memos_vllm.plaintext.ingest.document import Document
from memos_vllm.plaintext.ingest.pipeline import ingest_document

router = APIRouter(route_class=FormRoute, tags=["memories"])

MAX_FILE_BYTES = 32 * 1024 * 1024
MAX_FIELD_BYTES = 64 * 1024
_FIELDS = frozenset({"tags", "labels", "metadata", "title", "uri", "reason"})
# Each that waits holds its file in memory.
_MAX_WAITING = 32
# Parsers run in processes of their own; more at once would take the engine's cores.
_PARSERS = Threads(
    1,
    waiting=_MAX_WAITING,
    refusal=f"{_MAX_WAITING} documents are waiting to be read already; try again",
)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file and what was said of it."""

    content: bytes
    filename: str
    media_type: str | None
    uri: str
    title: str | None
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: Mapping[str, Any]
    reason: str | None

    def digest(self) -> bytes:
        """Of all that was sent; equal for equal uploads."""
        said = json.dumps(
            [self.filename, self.media_type, self.uri, self.title, self.tags, self.labels],
            ensure_ascii=True,
        )
        more = json.dumps([self.metadata, self.reason], sort_keys=True, ensure_ascii=True)
        state = hashlib.sha256(f"{said}{more}".encode())
        state.update(self.content)
        return state.digest()


class DocumentReply(Reply):
    id: str = Field(description="The memory that stands for the whole document.")
    object: Literal["document"] = "document"
    outcome: str = Field(description="added, updated or unchanged.")
    title: str
    uri: str
    media_type: str
    digest: str
    chunks: int
    added: int
    changed: int
    archived: int
    notes: list[str] = Field(description="What was left out of the memories, and why.")


class DocumentListReply(ListReply[MemoryReply]):
    """The document's chunks in reading order, at most the first 1,000, and the document."""

    document: DocumentReply


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "txt, md, html, pdf or docx, at most 32 MiB.",
                        },
                        "uri": {
                            "type": "string",
                            "description": "Names the document in this cube; its file name when "
                            "left out. Sending it again changes only what changed.",
                        },
                        "title": {"type": "string"},
                        "tags": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "Repeat the field, or send one JSON list.",
                        },
                        "labels": {"type": "array", "items": {"type": "string"}},
                        "metadata": {"type": "string", "description": "A JSON object."},
                        "reason": {"type": "string"},
                    },
                }
            }
        },
    }
}


@router.post(
    "/v1/memcubes/{cube_id}/documents",
    summary="Add a document",
    status_code=201,
    response_model=DocumentListReply,
    responses=examples.answers(examples.DOCUMENT, 201),
    openapi_extra=_FORM,
    dependencies=TAKES_KEY,
)
async def add_document(call: CurrentCall, cube_id: PathId) -> Response:
    """Cut a document into memories along its structure, with page and headings as provenance.

    The same content again changes nothing. A changed document gives its changed pieces new
    versions, adds what is new and archives what is gone.
    """
    # A cube that the caller may not write to is a 404 before anything is parsed.
    await call.api.read(call.mos.require_writable, call.actor, cube_id)
    upload, digest = await anyio.to_thread.run_sync(
        _read_upload, call.request, await call.request.body()
    )
    parsed = await _PARSERS.run(_parse, upload)

    def put() -> Response:
        stored = call.mos.put_document(
            call.actor,
            cube_id,
            _to_domain(parsed, title=upload.title),
            uri=upload.uri,
            tags=upload.tags,
            labels=upload.labels,
            metadata=upload.metadata,
            reason=upload.reason,
        )
        return render(_reply(stored, upload.uri, parsed.notes), status=201)

    # A form's boundary is another one every time; what it says is compared instead.
    return await answer_once(call, put, body=digest)


def _parse(upload: Upload) -> Document:
    return ingest_document(upload.content, filename=upload.filename, media_type=upload.media_type)


def _to_domain(parsed: Document, *, title: str | None) -> NewDocument:
    return NewDocument(
        title=title or parsed.title,
        media_type=parsed.media_type,
        digest=parsed.digest,
        size_bytes=parsed.size_bytes,
        chunks=tuple(
            NewChunk(
                text=chunk.text,
                locator=chunk.locator or "",
                heading_path=chunk.heading_path,
                page=chunk.page,
                digest=chunk.digest,
            )
            for chunk in parsed.chunks
        ),
    )


def _reply(stored: StoredDocument, uri: str, notes: Sequence[str]) -> DocumentListReply:
    return DocumentListReply(
        data=[MemoryReply.model_validate(memory) for memory in stored.memories],
        document=DocumentReply(
            id=stored.document.id,
            outcome=stored.outcome.value,
            title=stored.document.source.title or uri,
            uri=stored.document.source.uri or uri,
            media_type=stored.media_type,
            digest=stored.digest,
            chunks=stored.chunks,
            added=stored.added,
            changed=stored.changed,
            archived=stored.archived,
            notes=list(notes),
        ),
    )


def _read_upload(request: Request, body: bytes) -> tuple[Upload, bytes]:
    """What a form uploads, and its digest."""
    upload = _upload_of(read_form(body, content_type=request.headers.get("content-type", "")))
    return upload, upload.digest()


def _upload_of(parts: Sequence[Part]) -> Upload:
    """The one file of a form and its fields.

    Raises:
        InvalidRequest: no file or several, an unknown field, or a field that is wrong.
        TooLarge: the file or a field is over its limit.
    """
    files, fields = files_and_fields(parts)
    if len(files) != 1:
        raise InvalidRequest(
            f"the form holds {len(files)} files; send one part named 'file' with a file name",
            param="file",
        )
    (file,) = files
    size_bytes = len(file.content)
    if size_bytes > MAX_FILE_BYTES:
        raise TooLarge(
            f"the file has {size_bytes} bytes and the limit is {MAX_FILE_BYTES}; split it"
        )
    for field in fields:
        _check_field(field)
    filename = (file.filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    if not filename:
        raise InvalidRequest("the file part needs a file name", param="file")
    texts = [(field.name, field.text) for field in fields]
    return Upload(
        content=file.content,
        filename=filename,
        media_type=file.media_type,
        uri=_one(texts, "uri") or filename,
        title=_one(texts, "title"),
        tags=_words(texts, "tags"),
        labels=_words(texts, "labels"),
        metadata=_metadata(_one(texts, "metadata")),
        reason=_one(texts, "reason"),
    )


def _check_field(field: Part) -> None:
    name = field.name[:64]
    if field.name not in _FIELDS:
        raise InvalidRequest(
            f"unknown field '{name}'; the form takes file, {', '.join(sorted(_FIELDS))}",
            param=name,
        )
    if len(field.content) > MAX_FIELD_BYTES:
        raise TooLarge(
            f"{name} has {len(field.content)} bytes and the limit of a field is {MAX_FIELD_BYTES}"
        )


def _one(texts: list[tuple[str, str]], name: str) -> str | None:
    values = [value for field, value in texts if field == name]
    if len(values) > 1:
        raise InvalidRequest(f"{name} was sent {len(values)} times; send it once", param=name)
    return values[0] if values and values[0] != "" else None


def _words(texts: list[tuple[str, str]], name: str) -> tuple[str, ...]:
    """Repeated fields, or one JSON list."""
    values = [value for field, value in texts if field == name and value != ""]
    if len(values) == 1 and values[0].lstrip().startswith("["):
        listed = _json(values[0], name)
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise InvalidRequest(f"{name} must be a list of strings", param=name)
        values = listed
    return tuple(values)


def _metadata(text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    value = _json(text, "metadata")
    if not isinstance(value, dict):
        raise InvalidRequest("metadata must be a JSON object, such as {}", param="metadata")
    return value


def _json(text: str, name: str) -> object:
    try:
        return parse_json(text.encode())
    except InvalidRequest as error:
        detail = str(error).removeprefix("the body is ")
        raise InvalidRequest(f"{name} is {detail}", param=name) from error
