"""Artifacts: what was compiled from memories, and which ones."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.ids import ArtifactId, CubeId, JobId, MemoryId


class ActivationState(StrEnum):
    """Of a cube: no activation memory, a bake under way, KV at hand, or out of date.

    Of an artifact only `READY` and `STALE` occur.
    """

    NONE = "none"
    BAKING = "baking"
    READY = "ready"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """A KV prefix in the artifact store and the exact memories it was computed from.

    Args:
        kind: `kv-prefix` for activation memory.
        head_key: key of the rendered head's token ids.
        scope: hex HMAC of cube ids and epoch; the store never crosses scopes.
        memory_versions: memory and version in prefix order.
        cube_version: the cube's version in the snapshot that was baked; without it only
            `memory_versions` decides whether the artifact is current.
    """

    id: ArtifactId
    cube_id: CubeId
    kind: str
    head_key: str
    scope: str
    tokens: int
    bytes: int
    memory_versions: tuple[tuple[MemoryId, int], ...]
    state: ActivationState
    created_at: datetime
    cube_version: int | None = None


@dataclass(frozen=True, slots=True)
class DeletedCube:
    """A cube that is gone; the files of its artifacts are the caller's to remove."""

    id: CubeId
    artifacts: list[ArtifactRecord]


@dataclass(frozen=True, slots=True)
class ErasedMemory:
    """A memory that is gone without trace; the files of `artifacts` are the caller's to remove.

    Args:
        versions: how many versions of it were removed.
        epoch: the cube's new epoch.
        job: sees to it that nothing is left anywhere, and says how it knows.
        derived: what went with it, because it was derived from it; only what the actor may see.
    """

    id: MemoryId
    cube_id: CubeId
    versions: int
    epoch: int
    artifacts: list[ArtifactRecord]
    job: JobId
    derived: tuple[MemoryId, ...] = ()
