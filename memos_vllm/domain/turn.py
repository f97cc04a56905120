"""A turn of a conversation, on its way to become a memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from memos_vllm.domain.checks import (
    JsonObject,
    JsonValue,
    check_json_object,
    check_line,
    check_time,
)
from memos_vllm.domain.memory import MAX_BATCH, NewMemory, Source, checked_memory
from memos_vllm.errors import InvalidRequest, TooLarge

ROLES: Final = ("user", "assistant", "system", "developer", "tool")
SOURCE_KIND: Final = "turn"
NEXT: Final = "next"
MAX_SESSION_CHARS = 256


@dataclass(frozen=True, slots=True)
class NewTurn:
    """What someone said, and when; without a time it is the time at which it was sent in."""

    role: str
    content: str
    name: str | None = None
    created_at: datetime | None = None
    metadata: JsonObject = field(default_factory=dict)


def check_session_id(value: str | None) -> str | None:
    """`value` itself when it is None or a short line; raises InvalidRequest."""
    if value is None:
        return None
    return check_line(value, param="session_id", max_chars=MAX_SESSION_CHARS)


def turns_to_memories(
    turns: Sequence[NewTurn], *, session_id: str | None, first_number: int, now: datetime
) -> list[NewMemory]:
    """One memory per turn, in normal form, with its speaker and time as the source.

    Args:
        first_number: the number of the first turn in its session, from 1.
        now: the time of turns that bring none.
    Raises:
        InvalidRequest: no turn, an unknown role, blank content, a bad name, time or metadata.
        TooLarge: more than 1,000 turns, or one over 64 KiB.
    """
    if not turns:
        raise InvalidRequest("messages is empty; give at least one", param="messages")
    if len(turns) > MAX_BATCH:
        raise TooLarge(
            f"{len(turns)} messages in one call and the limit is {MAX_BATCH}; send several calls"
        )
    return [
        _memory(
            turn,
            session_id=session_id,
            number=first_number + index,
            now=now,
            param=f"messages[{index}]",
        )
        for index, turn in enumerate(turns)
    ]


def _memory(
    turn: NewTurn, *, session_id: str | None, number: int, now: datetime, param: str
) -> NewMemory:
    if turn.role not in ROLES:
        raise InvalidRequest(
            f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role"
        )
    if not turn.content.strip():
        raise InvalidRequest(f"{param}.content is blank", param=f"{param}.content")
    if turn.name is not None:
        check_line(turn.name, param=f"{param}.name", max_chars=256)
    said_at = check_time(turn.created_at, param=f"{param}.created_at") or now
    metadata: dict[str, JsonValue] = {"role": turn.role}
    if session_id is not None:
        metadata["session_id"] = session_id
    metadata |= check_json_object(turn.metadata, param=f"{param}.metadata")
    source = Source(
        kind=SOURCE_KIND,
        title=None,
        author=turn.name or turn.role,
        created_at=said_at,
        locator=f"turn {number}",
    )
    return checked_memory(
        NewMemory(text=turn.content, source=source, metadata=metadata), param=param
    )
