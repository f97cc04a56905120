"""What callers get: the shapes of API.md, read off the domain's objects."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.erasure import Removed
from memos_vllm.domain.job import JobKind, JobState
from memos_vllm.domain.memory import MemoryChange, MemoryState, Tier

Item = TypeVar("Item", bound=BaseModel)


class Reply(BaseModel):
    """Base of every answer; read with `model_validate(domain_object)`."""

    model_config = ConfigDict(from_attributes=True)


def render(reply: Reply, *, status: int = 200) -> Response:
    """Serialise an answer; of a large list this takes a while, so call it in a worker thread."""
    version = getattr(reply, "version", None)
    headers = {} if version is None else {"ETag": f'"{version}"'}
    return Response(
        reply.model_dump_json(), status_code=status, headers=headers, media_type="application/json"
    )


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class ListReply(Reply, Generic[Item]):
    """One page; `next_cursor` is null on the last one."""

    object: Literal["list"] = "list"
    data: list[Item]
    next_cursor: str | None = None


class StateCounts(Reply):
    active: int
    merged: int
    archived: int


class TierCounts(Reply):
    plaintext: int
    activation: int
    parametric: int


class ActivationReply(Reply):
    state: ActivationState
    tokens: int
    bytes: int
    resident_tokens: int


class CubeReply(Reply):
    id: str
    object: Literal["memcube"] = "memcube"
    name: str
    description: str
    preamble: str
    labels: list[str]
    owner: str
    version: int
    created_at: datetime
    updated_at: datetime
    memories: StateCounts
    tiers: TierCounts
    activation: ActivationReply
    adapter: dict[str, Any] | None = None


class SourceReply(Reply):
    kind: str
    uri: str | None
    title: str | None
    author: str | None
    created_at: datetime | None
    locator: str | None


class LineageReply(Reply):
    derived_from: list[str]
    merged_into: str | None
    supersedes: list[str]


class EdgeReply(Reply):
    kind: str
    target: str
    weight: float


class UsageReply(Reply):
    hits: int
    last_used_at: datetime | None


class MemoryReply(Reply):
    id: str
    object: Literal["memory"] = "memory"
    cube_id: str
    text: str
    tags: list[str]
    labels: list[str]
    metadata: dict[str, Any]
    source: SourceReply
    state: MemoryState
    tier: Tier
    version: int
    lineage: LineageReply
    edges: list[EdgeReply]
    created_by: str
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None
    usage: UsageReply


class MemoryVersionReply(Reply):
    """One version: what it said, who made it so, when, why and from what."""

    object: Literal["memory.version"] = "memory.version"
    memory_id: str
    version: int
    text: str
    tags: list[str]
    labels: list[str]
    metadata: dict[str, Any]
    source: SourceReply
    state: MemoryState
    expires_at: datetime | None
    change: MemoryChange
    reason: str | None
    changed_by: str
    changed_at: datetime
    lineage: LineageReply


class DeletedReply(Reply):
    """Something is gone, with the artifacts that were built from it."""

    id: str
    object: str
    deleted: Literal[True] = True
    artifacts_removed: int = 0


class ErasedReply(DeletedReply):
    """A memory's text, its versions and all KV built from it are gone."""

    cube_id: str
    erased: Literal[True] = True
    versions_removed: int
    derived: list[str] = Field(
        default=[], description="Memories that were derived from it, and are erased too."
    )
    job_id: str = Field(description="The job that sees to it that nothing is left, and proves it.")


class ProofReply(Reply):
    """Something that an erase job has looked for, and that is gone."""

    what: Removed
    count: int | None = Field(description="How many there were; null where nobody counted.")
    checked: str = Field(description="What was looked at, and how.")
    done_at: datetime


class JobReply(Reply):
    id: str
    object: Literal["job"] = "job"
    cube_id: str
    kind: JobKind
    state: JobState
    progress: float = Field(description="0 to 1.")
    message: str
    error: str | None
    proofs: list[ProofReply] = Field(
        default=[], description="Of an erase job: what is known to be gone."
    )
    created_at: datetime
    updated_at: datetime


class TierStatsReply(Reply):
    memories: int
    text_bytes: int
    tokens: int
    artifact_bytes: int


class StatsReply(Reply):
    object: Literal["memcube.stats"] = "memcube.stats"
    cube_id: str
    version: int
    memories: StateCounts
    tiers: Mapping[Tier, TierStatsReply]
    artifacts: int
    resident_tokens: int = 0
    hits: int
    hits_by_source: Mapping[str, int]
    prefill_tokens_saved: int
    prefill_seconds_saved: float
    last_used_at: datetime | None


class HealthReply(Reply):
    status: Literal["ready", "degraded", "not_ready"]
    parts: dict[str, str]


class NotReadyReply(HealthReply, ErrorReply):
    """Which part is not ready, also as an error."""
