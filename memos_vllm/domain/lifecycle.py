"""The legal moves of a memory's life, as a table.

    added ──► active ──merge──► merged
               │ ▲ ▲              │ │
       archive │ │ └───restore────┘ │ archive
        expire │ │ restore          │
               ▼ │                  │
             archived ◄─────────────┘

Erasing is legal everywhere and leaves no memory: what stays is a tombstone in the audit log, from
which nothing leads back. A memory that has expired counts as archived from that moment on, whether
or not anyone has written it down yet.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from memos_vllm.domain.memory import MemoryState
from memos_vllm.errors import Conflict


class Verb(StrEnum):
    """What can be asked of a memory."""

    EDIT = "edit"
    PROMOTE = "promote"
    ARCHIVE = "archive"
    RESTORE = "restore"
    MERGE = "merge"


_MOVES: dict[tuple[MemoryState, Verb], MemoryState] = {
    (MemoryState.ACTIVE, Verb.EDIT): MemoryState.ACTIVE,
    (MemoryState.ACTIVE, Verb.PROMOTE): MemoryState.ACTIVE,
    (MemoryState.ACTIVE, Verb.ARCHIVE): MemoryState.ARCHIVED,
    (MemoryState.ACTIVE, Verb.MERGE): MemoryState.MERGED,
    (MemoryState.ARCHIVED, Verb.RESTORE): MemoryState.ACTIVE,
    (MemoryState.MERGED, Verb.RESTORE): MemoryState.ACTIVE,
    (MemoryState.MERGED, Verb.ARCHIVE): MemoryState.ARCHIVED,
}


def has_expired(expires_at: datetime | None, *, now: datetime) -> bool:
    """Whether a memory's time is over at `now`."""
    return expires_at is not None and expires_at <= now


def state_at(state: MemoryState, expires_at: datetime | None, *, now: datetime) -> MemoryState:
    """The state that a memory is in at `now`, given the one written down."""
    if state is MemoryState.ACTIVE and has_expired(expires_at, now=now):
        return MemoryState.ARCHIVED
    return state


def move(
    state: MemoryState,
    verb: Verb,
    *,
    memory_id: str = "",
    expires_at: datetime | None = None,
    now: datetime | None = None,
) -> MemoryState:
    """The state after `verb`.

    Args:
        state: as it is written down.
        expires_at, now: to tell whether it has expired since.
    Raises:
        Conflict: the move is not legal; the message says what would be.
    """
    present = state if now is None else state_at(state, expires_at, now=now)
    after = _MOVES.get((present, verb))
    if after is not None:
        return after
    subject = f"memory '{memory_id}'" if memory_id else "the memory"
    if verb is Verb.RESTORE:
        raise Conflict(f"{subject} is active already; there is nothing to restore")
    found = f"is {present.value}" if present is state else "has expired"
    if verb is Verb.ARCHIVE:
        raise Conflict(f"{subject} {found} already")
    raise Conflict(f"{subject} {found}; restore it before you {verb.value} it")
