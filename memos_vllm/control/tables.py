"""The catalog's tables, as typed SQLAlchemy models.

    principals ─┬─ api_keys
                ├─ grants ─┐
                └──────────┴─ cubes ─┬─ memories ─┬─ memory_versions
                                     │            ├─ memory_tags, memory_labels, memory_usage
                                     │            ├─ edges, memory_lineage    (memory to memory)
                                     │            ├─ memory_vectors, memory_entities
                                     │            ├─ documents ── document_chunks
                                     │            └─ artifact_memories ─┐
                                     ├─ artifacts ──────────────────────┘
                                     ├─ jobs, chat_sessions
                                     └─ cube_usage
    retired_cubes   audit, audit_head   idempotency        (outlive what they speak of)
    catalog_identity                                       (one row: which catalog this is)
    import_chunks                                          (archives on their way to be cubes)
    index_outbox    indexes                                (what the search index has to follow)

Deleting a cube or a memory takes its dependants along through foreign keys. Tags and labels are
kept twice: as JSON with the memory, to be read, and as rows, to be searched by.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Enum,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from memos_vllm.domain.access import PrincipalKind, Role
from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.job import JobKind, JobState
from memos_vllm.domain.memory import MemoryChange, MemoryState, Relation, Tier

Kind = TypeVar("Kind", bound=StrEnum)

# SQLite numbers rows by itself only in a column declared INTEGER.
Serial = BigInteger().with_variant(Integer, "sqlite")
Json = JSON(none_as_null=True)


class UtcTime(TypeDecorator[datetime]):
    """A time with zone; SQLite keeps none, so it is stored in UTC and read back as UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; a time without zone is a bug of ours."""
        if value is None:
            return None
        assert value.tzinfo is not None, "the catalog stores times with a zone"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """From UTC."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


def word(kind: type[Kind]) -> Enum:
    """A column type that stores the enum's value as text."""
    return Enum(
        kind,
        native_enum=False,
        create_constraint=False,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can refer to it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcTime}  # noqa: RUF012  (SQLAlchemy reads it so)


def _memory() -> Any:
    return ForeignKey("memories.seq", ondelete="CASCADE")


def _cube() -> Any:
    return ForeignKey("cubes.id", ondelete="CASCADE")


class PrincipalRow(Base):
    """Someone who asks: made by their first key, cube or grant."""

    __tablename__ = "principals"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[PrincipalKind] = mapped_column(word(PrincipalKind))
    name: Mapped[str] = mapped_column(String(200), default="")
    admin: Mapped[bool] = mapped_column(Boolean, default=False)
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]


class KeyRow(Base):
    """An API key, known by its digest. Never deleted: that one was made closes the server."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    principal_id: Mapped[str] = mapped_column(ForeignKey("principals.id"), index=True)
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(64))
    last_used_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class CubeRow(Base):
    """A cube.

    `scope_version` is the cube version at which the preamble or the epoch last changed: nothing
    baked from an earlier version is of use.
    """

    __tablename__ = "cubes"
    __table_args__ = (Index(None, "owner", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(Text)
    preamble: Mapped[str] = mapped_column(Text)
    labels: Mapped[list[str]] = mapped_column(Json)
    owner: Mapped[str] = mapped_column(ForeignKey("principals.id"))
    version: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int] = mapped_column(BigInteger)
    scope_version: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class RetiredCubeRow(Base):
    """Where a deleted cube's counters stopped.

    A new cube of the same id counts on from there, so that no version or epoch, and with them no
    cache and no KV scope, ever speaks of two cubes.
    """

    __tablename__ = "retired_cubes"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[int] = mapped_column(BigInteger)


class GrantRow(Base):
    """A principal's role on a cube, and the labels it may see there."""

    __tablename__ = "grants"
    __table_args__ = (Index(None, "principal_id", "cube_id"),)

    cube_id: Mapped[str] = mapped_column(_cube(), primary_key=True)
    principal_id: Mapped[str] = mapped_column(
        ForeignKey("principals.id", ondelete="CASCADE"), primary_key=True
    )
    role: Mapped[Role] = mapped_column(word(Role))
    labels: Mapped[list[str]] = mapped_column(Json)
    granted_by: Mapped[str] = mapped_column(String(64))
    granted_at: Mapped[datetime]


class MemoryRow(Base):
    """A memory at its newest version; `seq` is the order in which memories were added."""

    __tablename__ = "memories"
    __table_args__ = (
        UniqueConstraint("id"),
        Index(None, "cube_id", "seq"),
        Index(None, "cube_id", "state", "tier"),
        Index(
            None,
            "state",
            "expires_at",
            sqlite_where=text("expires_at IS NOT NULL"),
            postgresql_where=text("expires_at IS NOT NULL"),
        ),
    )

    seq: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(String(64))
    cube_id: Mapped[str] = mapped_column(_cube())
    text: Mapped[str] = mapped_column(Text)
    text_bytes: Mapped[int] = mapped_column(Integer)
    tags: Mapped[list[str]] = mapped_column(Json)
    labels: Mapped[list[str]] = mapped_column(Json)
    attributes: Mapped[dict[str, Any]] = mapped_column("metadata", Json)
    source: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[MemoryState] = mapped_column(word(MemoryState))
    tier: Mapped[Tier] = mapped_column(word(Tier))
    position: Mapped[int] = mapped_column(Integer)
    version: Mapped[int] = mapped_column(Integer)
    created_by: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]


class MemoryVersionRow(Base):
    """A memory as it was after one change, with who, when, why and from what.

    `lineage` holds ids by relation: what this change made it stem from, or go into.
    """

    __tablename__ = "memory_versions"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(Json)
    labels: Mapped[list[str]] = mapped_column(Json)
    attributes: Mapped[dict[str, Any]] = mapped_column("metadata", Json)
    source: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[MemoryState] = mapped_column(word(MemoryState))
    expires_at: Mapped[datetime | None]
    change: Mapped[MemoryChange] = mapped_column(word(MemoryChange))
    reason: Mapped[str | None] = mapped_column(Text)
    lineage: Mapped[dict[str, list[str]] | None] = mapped_column(Json)
    changed_by: Mapped[str] = mapped_column(String(64))
    changed_at: Mapped[datetime]


class MemoryTagRow(Base):
    """A tag of a memory, to search by."""

    __tablename__ = "memory_tags"

    cube_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tag: Mapped[str] = mapped_column(String(128), primary_key=True)
    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True, index=True)


class MemoryLabelRow(Base):
    """A label of a memory, to decide access by."""

    __tablename__ = "memory_labels"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    label: Mapped[str] = mapped_column(String(128), primary_key=True)


class MemoryUsageRow(Base):
    """How often a memory reached a model; apart from the memory, which changes more seldom."""

    __tablename__ = "memory_usage"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    hits: Mapped[int] = mapped_column(BigInteger)
    last_used_at: Mapped[datetime]


class EdgeRow(Base):
    """A typed link between two memories of one cube; `rank` keeps the caller's order."""

    __tablename__ = "edges"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    kind: Mapped[str] = mapped_column(String(64), primary_key=True)
    target_seq: Mapped[int] = mapped_column(_memory(), primary_key=True, index=True)
    weight: Mapped[float] = mapped_column(Float)
    rank: Mapped[int] = mapped_column(Integer)


class LineageRow(Base):
    """Where a memory comes from and went to; read today, written by merge and import."""

    __tablename__ = "memory_lineage"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    relation: Mapped[Relation] = mapped_column(word(Relation), primary_key=True)
    target_seq: Mapped[int] = mapped_column(_memory(), primary_key=True, index=True)


class OutboxRow(Base):
    """A memory or a whole cube that changed: the search index looks at it anew.

    Says nothing of what changed, because whoever follows reads the newest state. Without a
    memory it is the cube that is gone. Numbers are never used twice, since followers keep the
    number that they have reached.
    """

    __tablename__ = "index_outbox"
    __table_args__ = (Index(None, "cube_id"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(Serial, primary_key=True)
    cube_id: Mapped[str] = mapped_column(String(64))
    memory_seq: Mapped[int | None] = mapped_column(BigInteger)


class IndexRow(Base):
    """A collection of the search index, and how far it has followed the catalog.

    `applied` is the outbox entry reached. A new collection starts at the outbox's end and walks
    through all memories up to there; `walked` is the memory reached, None once all were.
    """

    __tablename__ = "indexes"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    embedder: Mapped[str] = mapped_column(String(256))
    dimension: Mapped[int] = mapped_column(Integer)
    applied: Mapped[int] = mapped_column(BigInteger)
    walked: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class VectorRow(Base):
    """What an embedder made of a memory's text: 16-bit floats, little-endian, in order.

    `digest` is that of the embedded text. Rebuilding the index embeds nothing anew.
    """

    __tablename__ = "memory_vectors"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    embedder: Mapped[str] = mapped_column(String(256), primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32))
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class EntityRow(Base):
    """Something that a memory mentions; memories that share a rare one are linked by it."""

    __tablename__ = "memory_entities"

    cube_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    entity: Mapped[str] = mapped_column(String(64), primary_key=True)
    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True, index=True)


class DocumentRow(Base):
    """A document that was taken in; its memory's text is its title and headings."""

    __tablename__ = "documents"
    __table_args__ = (Index(None, "cube_id", "digest"), Index(None, "cube_id", "uri"))

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    cube_id: Mapped[str] = mapped_column(String(64))
    uri: Mapped[str] = mapped_column(String(2048))
    digest: Mapped[str] = mapped_column(String(64))
    media_type: Mapped[str] = mapped_column(String(128))
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class ChunkRow(Base):
    """A memory that is a piece of a document; `digest` is that of the piece as it was read."""

    __tablename__ = "document_chunks"

    memory_seq: Mapped[int] = mapped_column(_memory(), primary_key=True)
    document_seq: Mapped[int] = mapped_column(
        ForeignKey("documents.memory_seq", ondelete="CASCADE"), index=True
    )
    ordinal: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(64))


class ChatSessionRow(Base):
    """A conversation whose turns are memories; the next turn is linked to its last one.

    Turns under different labels are counted apart, so that no number tells of what is hidden.
    `label_set` is a digest of `labels`, empty without any.
    """

    __tablename__ = "chat_sessions"

    cube_id: Mapped[str] = mapped_column(_cube(), primary_key=True)
    session_id: Mapped[str] = mapped_column(String(256), primary_key=True)
    label_set: Mapped[str] = mapped_column(String(64), primary_key=True, default="")
    labels: Mapped[list[str]] = mapped_column(Json, default=list)
    turns: Mapped[int] = mapped_column(Integer)
    last_memory_seq: Mapped[int | None] = mapped_column(
        ForeignKey("memories.seq", ondelete="SET NULL"), index=True
    )


class ArtifactRow(Base):
    """Something compiled from a cube's memories; the bytes lie in the artifact store."""

    __tablename__ = "artifacts"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    cube_id: Mapped[str] = mapped_column(_cube(), index=True)
    kind: Mapped[str] = mapped_column(String(32))
    head_key: Mapped[str] = mapped_column(String(128))
    scope: Mapped[str] = mapped_column(String(128))
    tokens: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[ActivationState] = mapped_column(word(ActivationState))
    cube_version: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class ArtifactMemoryRow(Base):
    """Which version of which memory an artifact was computed from, in prefix order."""

    __tablename__ = "artifact_memories"

    artifact_id: Mapped[str] = mapped_column(
        ForeignKey("artifacts.id", ondelete="CASCADE"), primary_key=True
    )
    rank: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    memory_seq: Mapped[int] = mapped_column(_memory(), index=True)
    memory_version: Mapped[int] = mapped_column(Integer)


class JobRow(Base):
    """Work under a lease; `seq` is the order in which jobs were queued.

    `proofs` of an erase job say what is known to be gone.
    """

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("id"), Index(None, "state", "seq"))

    seq: Mapped[int] = mapped_column(Serial, primary_key=True)
    id: Mapped[str] = mapped_column(String(64))
    cube_id: Mapped[str] = mapped_column(_cube(), index=True)
    kind: Mapped[JobKind] = mapped_column(word(JobKind))
    state: Mapped[JobState] = mapped_column(word(JobState))
    progress: Mapped[float] = mapped_column(Float)
    message: Mapped[str] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    created_by: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(Integer)
    proofs: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)


class CubeUsageRow(Base):
    """What chats took from a cube, by where its activation memory came from."""

    __tablename__ = "cube_usage"

    cube_id: Mapped[str] = mapped_column(_cube(), primary_key=True)
    source: Mapped[str] = mapped_column(String(32), primary_key=True)
    hits: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    saved_seconds: Mapped[float] = mapped_column(Float)
    last_used_at: Mapped[datetime]


class AuditRow(Base):
    """One change. Text columns hold exactly the characters that were hashed."""

    __tablename__ = "audit"
    __table_args__ = (
        Index(None, "cube_id", "seq"),
        Index(None, "actor", "seq"),
        Index(None, "action", "seq"),
    )

    seq: Mapped[int] = mapped_column(Serial, primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(40))
    actor: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    cube_id: Mapped[str | None] = mapped_column(String(64))
    subject: Mapped[str | None] = mapped_column(String(128))
    details: Mapped[str] = mapped_column(Text)
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class AuditHeadRow(Base):
    """The one row that says where the log ends, so that a missing end is seen."""

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(String(64))


class IdentityRow(Base):
    """The one row that names this catalog among others, drawn at random when it was made.

    `secret` is known to nobody else: cursors are sealed with it.
    """

    __tablename__ = "catalog_identity"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    uid: Mapped[str] = mapped_column(String(32))
    secret: Mapped[str | None] = mapped_column(String(64))


class ImportChunkRow(Base):
    """Lines of an archive that is being taken in, in order; gone once it is a cube."""

    __tablename__ = "import_chunks"

    import_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    part: Mapped[str] = mapped_column(String(16))
    lines: Mapped[bytes] = mapped_column(LargeBinary)
    staged_at: Mapped[datetime] = mapped_column(index=True)


class IdempotencyRow(Base):
    """An Idempotency-Key: reserved while `status` is None, then the answer.

    After an erase that touched the answer, `body` and `fingerprint` are None: the key is known to
    be used, and what was said is gone.
    """

    __tablename__ = "idempotency"

    principal_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    fingerprint: Mapped[str | None] = mapped_column(String(128))
    status: Mapped[int | None] = mapped_column(Integer)
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
