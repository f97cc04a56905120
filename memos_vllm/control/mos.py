"""`Mos`: the one door to cubes, memories, artifacts, jobs and the audit log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from memos_vllm.control.catalog import Catalog
from memos_vllm.control.chat import ChatService
from memos_vllm.control.cubes import CubeService
from memos_vllm.control.documents import DocumentService
from memos_vllm.control.erasure import EraseService
from memos_vllm.control.facts import FactService
from memos_vllm.control.finding import FindingService
from memos_vllm.control.idempotency import IdempotencyService
from memos_vllm.control.indexing import IndexService
from memos_vllm.control.jobs import JobService
from memos_vllm.control.log import LogService
from memos_vllm.control.memories import MemoryService
from memos_vllm.control.merging import MergeService
from memos_vllm.control.tiers import TierService
from memos_vllm.control.turns import TurnService
from memos_vllm.domain.access import Principal
from memos_vllm.domain.artifact import DeletedCube, ErasedMemory
from memos_vllm.domain.audit import AuditEntry, AuditVerdict
from memos_vllm.domain.cube import CubePatch, CubeSnapshot, CubeStats, SnapshotMemory
from memos_vllm.domain.ids import IdSource
from memos_vllm.domain.memory import MemoryVersion
from memos_vllm.domain.page import Page
from memos_vllm.domain.reply import StoredReply
from memos_vllm.domain.usage import UsageEvent

__all__ = [
    "AuditEntry",
    "AuditVerdict",
    "CubePatch",
    "CubeSnapshot",
    "CubeStats",
    "DeletedCube",
    "ErasedMemory",
    "MemoryVersion",
    "Mos",
    "Page",
    "SnapshotMemory",
    "StoredReply",
    "UsageEvent",
]


class Mos(
    CubeService,
    MemoryService,
    MergeService,
    DocumentService,
    TurnService,
    FactService,
    EraseService,
    TierService,
    JobService,
    ChatService,
    IndexService,
    FindingService,
    LogService,
    IdempotencyService,
):
    """The memory operating system's service, as a plain synchronous class.

    Holds nothing that a crash can lose: every method is one transaction, and what it returned is
    on the disk, together with its audit row. Thread-safe; each process opens its own. Any method
    raises Unavailable when the database does not answer.

    Args:
        clock: the time, with a zone.
        new_id: an id that starts with the kind given and an underscore.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        clock: Callable[[], datetime],
        new_id: Callable[[str], str],
    ) -> None:
        super().__init__(catalog, clock=clock, new_id=new_id)

    @classmethod
    def open(cls, url: str) -> Mos:
        """Open the catalog at a SQLAlchemy URL, create and migrate it if need be.

        Raises:
            ConfigurationError: the URL cannot be used, or the catalog is newer than this code.
        """
        return cls(Catalog.open(url), clock=_now, new_id=IdSource())

    def close(self) -> None:
        """Close the catalog's idle connections."""
        self._catalog.close()

    def delete_cube(
        self, actor: Principal, cube_id: str, *, if_match: int | None = None
    ) -> DeletedCube:
        """See `CubeService.delete_cube`; its text leaves this process's cache too."""
        deleted = super().delete_cube(actor, cube_id, if_match=if_match)
        self._drop_snapshot(cube_id)
        return deleted

    def erase_memory(
        self,
        actor: Principal,
        cube_id: str,
        memory_id: str,
        *,
        if_match: int | None = None,
        tombstone_key: bytes,
    ) -> ErasedMemory:
        """See `EraseService.erase_memory`; its text leaves this process's cache too."""
        erased = super().erase_memory(
            actor, cube_id, memory_id, if_match=if_match, tombstone_key=tombstone_key
        )
        self._drop_snapshot(cube_id)
        return erased


def _now() -> datetime:
    return datetime.now(UTC)
