"""Jobs: work that outlives a request, held under a lease."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.access import SYSTEM
from memos_vllm.domain.checks import JsonObject
from memos_vllm.domain.erasure import Proof
from memos_vllm.domain.ids import CubeId, JobId, PrincipalId


class JobKind(StrEnum):
    """What a job does: `extract` reads facts out of turns, `reindex` indexes a cube anew.

    `erase` removes what is left of erased memories outside of the catalog's tables, and looks.
    """

    BAKE = "bake"
    REBUILD = "rebuild"
    ERASE = "erase"
    EXTRACT = "extract"
    REINDEX = "reindex"


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether the job can no longer change."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands.

    Args:
        progress: 0 to 1.
        message: what it is doing, for a person.
        error: why it failed, None otherwise.
        lease_owner: the worker that runs it until `lease_until`; after that anyone may claim it.
        attempts: how often it was claimed.
        created_by: who asked for it.
        proofs: of an erase job, what is known to be gone, in the order in which it was looked at.
    """

    id: JobId
    cube_id: CubeId
    kind: JobKind
    state: JobState
    progress: float
    message: str
    error: str | None
    payload: JsonObject
    created_at: datetime
    updated_at: datetime
    lease_owner: str | None = None
    lease_until: datetime | None = None
    attempts: int = 0
    created_by: PrincipalId = SYSTEM.id
    proofs: tuple[Proof, ...] = ()
