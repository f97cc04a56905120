"""What stands in a line of an archive, checked by the rules that hold for HTTP as well."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from memos_vllm.cartridge.layout import CubeFacts, Part, invalid
from memos_vllm.domain.checks import check_line, check_time, check_words
from memos_vllm.domain.cube import CubePatch, checked_cube_patch, validate_cube_id
from memos_vllm.domain.ids import MemoryId
from memos_vllm.domain.memory import (
    Edge,
    MemoryChange,
    MemoryState,
    NewMemory,
    Relation,
    Source,
    Tier,
    checked_memory,
    validate_edges,
    validate_reason,
)
from memos_vllm.domain.turn import MAX_SESSION_CHARS
from memos_vllm.errors import InvalidRequest

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{16,64}")
# What is counted on from here must still fit the column.
_MAX_INT = 10**9
_MAX_BIG_INT = 2**53


def _utc(value: datetime) -> datetime:
    return check_time(value, param="it") or value


def _memory_id(value: str) -> str:
    if _ID.fullmatch(value) is None:
        raise ValueError("is no id of a memory")
    return value


def _digest(value: str) -> str:
    if _HEX.fullmatch(value) is None:
        raise ValueError("is no digest in hex")
    return value


def _line(max_chars: int) -> Callable[[str], str]:
    return lambda value: check_line(value, param="it", max_chars=max_chars)


Time = Annotated[AwareDatetime, AfterValidator(_utc)]
Id = Annotated[str, AfterValidator(_memory_id)]
Digest = Annotated[str, AfterValidator(_digest)]
Name = Annotated[str, AfterValidator(_line(64))]
Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
Version = Annotated[int, Field(ge=1, le=_MAX_INT)]
BigCount = Annotated[int, Field(ge=0, le=_MAX_BIG_INT)]


class Record(BaseModel):
    """One line. `checked` applies the domain's rules, which may bring it into normal form."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )

    def checked(self) -> Record:
        """Raises InvalidRequest, TooLarge."""
        return self


class SourceRecord(Record):
    kind: str
    uri: str | None = None
    title: str | None = None
    author: str | None = None
    created_at: Time | None = None
    locator: str | None = None

    def to_domain(self) -> Source:
        return Source(**dict(self))


class _Content(Record):
    """What a memory says at one version."""

    text: str
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: dict[str, Any]
    source: SourceRecord
    state: MemoryState
    expires_at: Time | None

    def content(self) -> NewMemory:
        """It as a caller could have sent it, in normal form."""
        return checked_memory(
            NewMemory(
                text=self.text,
                tags=self.tags,
                labels=self.labels,
                metadata=self.metadata,
                source=self.source.to_domain(),
                expires_at=self.expires_at,
            )
        )


class MemoryRecord(_Content):
    """A memory at its newest version."""

    id: Id
    tier: Tier
    position: Count
    version: Version
    created_by: Name
    created_at: Time
    updated_at: Time
    hits: BigCount = 0
    last_used_at: Time | None = None

    def checked(self) -> MemoryRecord:
        self.content()
        if self.tier is Tier.PARAMETRIC:
            raise InvalidRequest("a memory is in the parametric tier, which no server has yet")
        if self.labels and self.tier is not Tier.PLAINTEXT:
            raise InvalidRequest("a memory has labels and is not in the plaintext tier")
        if (self.hits == 0) != (self.last_used_at is None):
            raise InvalidRequest("a memory's hits and the time of the last one disagree")
        return self


class VersionRecord(_Content):
    """A line of a memory's history."""

    memory_id: Id
    version: Version
    change: MemoryChange
    reason: str | None
    changed_by: Name
    changed_at: Time
    lineage: dict[Relation, tuple[Id, ...]] = Field(default_factory=dict)

    def checked(self) -> VersionRecord:
        self.content()
        validate_reason(self.reason)
        return self


class EdgeRecord(Record):
    memory_id: Id
    kind: str
    target: Id
    weight: float
    rank: Count

    def checked(self) -> EdgeRecord:
        validate_edges([Edge(self.kind, MemoryId(self.target), self.weight)])
        if self.memory_id == self.target:
            raise InvalidRequest("a memory cannot have an edge to itself")
        return self


class LineageRecord(Record):
    memory_id: Id
    relation: Relation
    target: Id


class DocumentRecord(Record):
    """That a memory stands for a document."""

    memory_id: Id
    uri: Annotated[str, AfterValidator(_line(2048))]
    digest: Digest
    media_type: Annotated[str, AfterValidator(_line(128))]
    size_bytes: BigCount


class ChunkRecord(Record):
    """That a memory is a piece of a document."""

    memory_id: Id
    document_id: Id
    ordinal: Count
    digest: Digest


class SessionRecord(Record):
    """What was said in a conversation under these labels, and the turn after which it goes on."""

    session_id: Annotated[str, AfterValidator(_line(MAX_SESSION_CHARS))]
    labels: tuple[str, ...] = ()
    turns: Count
    last_memory_id: Id | None

    def checked(self) -> SessionRecord:
        check_words(self.labels, param="labels")
        return self


class VectorRecord(Record):
    """What an embedder made of a memory's text: 16-bit floats, little-endian."""

    memory_id: Id
    embedder: Annotated[str, AfterValidator(_line(256))]
    digest: Annotated[bytes, Field(min_length=32, max_length=32)]
    vector: Annotated[bytes, Field(min_length=2, max_length=1 << 16)]


class AuditRecord(Record):
    """A row of the exporter's audit log: to be read, never to be taken for one of the reader's."""

    seq: BigCount
    at: str
    actor: str
    action: str
    subject: str | None
    details: dict[str, Any]
    previous_hash: str
    hash: str


KINDS: dict[Part, type[Record]] = {
    Part.MEMORIES: MemoryRecord,
    Part.VERSIONS: VersionRecord,
    Part.EDGES: EdgeRecord,
    Part.LINEAGE: LineageRecord,
    Part.DOCUMENTS: DocumentRecord,
    Part.CHUNKS: ChunkRecord,
    Part.SESSIONS: SessionRecord,
    Part.VECTORS: VectorRecord,
    Part.AUDIT: AuditRecord,
}


def encode(record: Record) -> bytes:
    """A line, with its end."""
    return record.model_dump_json().encode() + b"\n"


def decode(part: Part, line: bytes) -> Record:
    """Raises InvalidRequest, TooLarge: what is wrong, without what the line says."""
    try:
        return KINDS[part].model_validate_json(line).checked()
    except ValidationError as error:
        raise invalid(f"a line of {part.file_name}", error) from None


def checked_facts(facts: CubeFacts, *, cube_id: str | None, name: str | None) -> CubeFacts:
    """What is said of a cube, under another id or name when given; raises as for HTTP."""
    fields = checked_cube_patch(
        CubePatch(
            name=facts.name if name is None else name,
            description=facts.description,
            preamble=facts.preamble,
            labels=facts.labels,
        )
    )
    changes = {
        "id": validate_cube_id(facts.id if cube_id is None else cube_id),
        "name": fields.name,
        "description": fields.description,
        "preamble": fields.preamble,
        "labels": fields.labels,
        "created_at": check_time(facts.created_at, param="created_at"),
    }
    return facts.model_copy(update=changes)
