"""A cube that came in as a whole, and how two cubes differ."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memos_vllm.domain.artifact import ArtifactRecord
from memos_vllm.domain.cube import Cube
from memos_vllm.domain.ids import JobId
from memos_vllm.domain.memory import Memory

MAX_NAMED_IDS = 1000


@dataclass(frozen=True, slots=True)
class LoadedCube:
    """A cube that was imported or cloned.

    Args:
        origin: the id it had where it came from.
        mapped: how many of its memories have new ids; all of them or none.
        memory_ids: former and new id of the first 1,000 of these.
        job_id: the rebuild of its activation memory, which whoever loads artifacts holds under
            a lease; None when there is nothing to compute.
        replaced: artifacts of the cube whose place it took, whose files have to be removed.
    """

    cube: Cube
    origin: str
    memories: int
    mapped: int = 0
    memory_ids: tuple[tuple[str, str], ...] = ()
    job_id: JobId | None = None
    replaced: tuple[ArtifactRecord, ...] = ()


class Difference(StrEnum):
    """Where a memory is, or that it is in both cubes and not the same."""

    ONLY_HERE = "only_here"
    ONLY_THERE = "only_there"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class MemoryDifference:
    """A memory that two cubes do not share.

    Args:
        here, there: the memory in either cube, None where it is not.
        fields: names of what differs, for a changed one.
    """

    kind: Difference
    here: Memory | None
    there: Memory | None
    fields: tuple[str, ...] = ()
