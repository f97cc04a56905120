"""The legal moves of a memory's life, as a table.

Erasure is legal from every state and leaves none, so it is no move.
"""

from __future__ import annotations

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


def move(state: MemoryState, verb: Verb, *, memory_id: str = "") -> MemoryState:
    """The state after `verb`.

    Raises:
        Conflict: the move is not legal from `state`; the message says what would be.
    """
    after = _MOVES.get((state, verb))
    if after is not None:
        return after
    subject = f"memory '{memory_id}'" if memory_id else "the memory"
    if verb is Verb.RESTORE:
        raise Conflict(f"{subject} is active already; there is nothing to restore")
    if verb is Verb.ARCHIVE:
        raise Conflict(f"{subject} is archived already")
    raise Conflict(f"{subject} is {state.value}; restore it before you {verb.value} it")
