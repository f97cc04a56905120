"""What the client returns: frozen views of the server's objects, each with the `raw` JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from memos_vllm.client.errors import UnexpectedReply
from memos_vllm.client.fields import Fields

T = TypeVar("T")
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MemoryCounts:
    active: int
    merged: int
    archived: int


@dataclass(frozen=True, slots=True)
class TierCounts:
    plaintext: int
    activation: int
    parametric: int


@dataclass(frozen=True, slots=True)
class ActivationInfo:
    """A cube's activation memory; `state` is none, baking, ready or stale."""

    state: str
    tokens: int
    bytes: int
    resident_tokens: int


@dataclass(frozen=True, slots=True)
class CubeInfo:
    id: str
    name: str | None
    description: str | None
    owner: str | None
    version: int
    memories: MemoryCounts
    tiers: TierCounts
    activation: ActivationInfo
    created_at: datetime
    updated_at: datetime
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> CubeInfo:
        cube = Fields(body, "memcube")
        states, tiers = cube.part("memories"), cube.part("tiers")
        activation = cube.part("activation")
        return cls(
            id=cube.text("id"),
            name=cube.optional_text("name"),
            description=cube.optional_text("description"),
            owner=cube.optional_text("owner"),
            version=cube.count("version"),
            memories=MemoryCounts(
                active=states.count("active", default=0),
                merged=states.count("merged", default=0),
                archived=states.count("archived", default=0),
            ),
            tiers=TierCounts(
                plaintext=tiers.count("plaintext", default=0),
                activation=tiers.count("activation", default=0),
                parametric=tiers.count("parametric", default=0),
            ),
            activation=ActivationInfo(
                state=activation.optional_text("state") or "none",
                tokens=activation.count("tokens", default=0),
                bytes=activation.count("bytes", default=0),
                resident_tokens=activation.count("resident_tokens", default=0),
            ),
            created_at=cube.time("created_at"),
            updated_at=cube.time("updated_at"),
            raw=cube.raw,
        )


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """One memory; `state` is active, merged or archived, `tier` where it is kept."""

    id: str
    cube_id: str
    text: str
    tags: tuple[str, ...]
    labels: tuple[str, ...]
    metadata: Json
    source: Json
    state: str
    tier: str
    version: int
    hits: int
    created_by: str | None
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> MemoryInfo:
        memory = Fields(body, "memory")
        return cls(
            id=memory.text("id"),
            cube_id=memory.text("cube_id"),
            text=memory.text("text"),
            tags=memory.names("tags"),
            labels=memory.names("labels"),
            metadata=memory.mapping("metadata"),
            source=memory.mapping("source"),
            state=memory.text("state"),
            tier=memory.text("tier"),
            version=memory.count("version"),
            hits=memory.part("usage").count("hits", default=0),
            created_by=memory.optional_text("created_by"),
            created_at=memory.time("created_at"),
            updated_at=memory.time("updated_at"),
            expires_at=memory.optional_time("expires_at"),
            raw=memory.raw,
        )


@dataclass(frozen=True, slots=True)
class JobInfo:
    """Work in the server; `progress` runs from 0 to 1.

    Attributes:
        proofs: of an erasure, what is known to be gone: `what`, `count`, `checked`, `done_at`.
    """

    id: str
    cube_id: str | None
    kind: str
    state: str
    progress: float
    message: str
    error: str | None
    raw: Json = field(repr=False, compare=False)
    proofs: tuple[Json, ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in {"succeeded", "failed", "cancelled"}

    @classmethod
    def from_json(cls, body: object) -> JobInfo:
        job = Fields(body, "job")
        error = job.raw.get("error")
        return cls(
            id=job.text("id"),
            cube_id=job.optional_text("cube_id"),
            kind=job.text("kind"),
            state=job.text("state"),
            progress=job.number("progress", default=0.0),
            message=job.optional_text("message") or "",
            error=None if error is None else str(error),
            raw=job.raw,
            proofs=job.each("proofs", raw_object),
        )


@dataclass(frozen=True, slots=True)
class ErasedInfo:
    """A memory that is gone, with what was derived from it.

    Attributes:
        job_id: the job that removes what it led to elsewhere, and proves it.
    """

    id: str
    cube_id: str
    versions_removed: int
    derived: tuple[str, ...]
    job_id: str
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> ErasedInfo:
        erased = Fields(body, "memory")
        return cls(
            id=erased.text("id"),
            cube_id=erased.text("cube_id"),
            versions_removed=erased.count("versions_removed"),
            derived=erased.names("derived"),
            job_id=erased.text("job_id"),
            raw=erased.raw,
        )


@dataclass(frozen=True, slots=True)
class GrantInfo:
    """What a principal may do with a cube; `role` is reader, editor, owner or auditor."""

    cube_id: str
    principal: str
    role: str
    labels: tuple[str, ...]
    granted_by: str
    granted_at: datetime
    raw: Json = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, body: object) -> GrantInfo:
        grant = Fields(body, "grant")
        return cls(
            cube_id=grant.text("cube_id"),
            principal=grant.text("principal"),
            role=grant.text("role"),
            labels=grant.names("labels"),
            granted_by=grant.text("granted_by"),
            granted_at=grant.time("granted_at"),
            raw=grant.raw,
        )


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the server is ready, and per part "ready" or the reason why not.

    A `degraded` server is ready for chats, and a part that they can do without is not.
    """

    ready: bool
    degraded: bool
    parts: Mapping[str, str]
    raw: Json = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: tuple[T, ...]
    next_cursor: str | None


def raw_object(body: object) -> Json:
    """A JSON object as it is."""
    return Fields(body, "object").raw


def page_of(parse: Callable[[object], T]) -> Callable[[object], Page[T]]:
    """A parser of this API's list object."""

    def parse_page(body: object) -> Page[T]:
        page = Fields(body, "list")
        if "data" not in page.raw:
            raise UnexpectedReply("the server's list has no field 'data'")
        return Page(page.each("data", parse), page.optional_text("next_cursor"))

    return parse_page
