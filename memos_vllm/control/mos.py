"""`Mos`: the one door to cubes, memories, artifacts, jobs and the audit log."""

from __future__ import annotations

from memos_vllm.control.chat import ChatService
from memos_vllm.control.comparing import ComparisonService
from memos_vllm.control.cubes import CubeService
from memos_vllm.control.documents import DocumentService
from memos_vllm.control.erasing import ErasingService
from memos_vllm.control.erasure import EraseService
from memos_vllm.control.expiry import ExpiryService
from memos_vllm.control.exporting import ExportService
from memos_vllm.control.facts import FactService
from memos_vllm.control.finding import FindingService
from memos_vllm.control.grants import GrantService
from memos_vllm.control.idempotency import IdempotencyService
from memos_vllm.control.importing import ImportService
from memos_vllm.control.indexing import IndexService
from memos_vllm.control.jobs import JobService
from memos_vllm.control.keeping import KeepService
from memos_vllm.control.keys import KeyService
from memos_vllm.control.log import LogService
from memos_vllm.control.memories import MemoryService
from memos_vllm.control.merging import MergeService
from memos_vllm.control.ownership import OwnershipService
from memos_vllm.control.tiers import TierService
from memos_vllm.control.turns import TurnService
from memos_vllm.domain.artifact import DeletedCube, ErasedMemory
from memos_vllm.domain.audit import AuditEntry, AuditVerdict
from memos_vllm.domain.cube import CubePatch, CubeSnapshot, CubeStats, SnapshotMemory
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
    KeepService,
    DocumentService,
    TurnService,
    FactService,
    EraseService,
    ErasingService,
    ExpiryService,
    TierService,
    JobService,
    ChatService,
    IndexService,
    FindingService,
    KeyService,
    GrantService,
    ExportService,
    ImportService,
    OwnershipService,
    ComparisonService,
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
