"""Keeps what was said in a chat as memories of its cube."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import Principal
from memos_vllm.domain.turn import NewTurn
from memos_vllm.engine.options import RememberMode
from memos_vllm.engine.recall import text_of
from memos_vllm.errors import InvalidRequest


class TurnWriter:
    """Writes the last question and its answer into a cube.

    Args:
        on_written: wakes who indexes memories and runs jobs; must not block.
    """

    def __init__(self, mos: Mos, *, on_written: Callable[[], None]) -> None:
        self._mos = mos
        self._on_written = on_written

    async def keep(
        self,
        principal: Principal,
        cube_id: str,
        messages: Sequence[Any],
        answer: str,
        *,
        session_id: str | None,
        mode: RememberMode,
        labels: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Store the turn; with `fine`, also queue the reading of facts out of it.

        Args:
            labels: of the memories that the answer was given from: it may repeat what they say.
        Returns:
            The ids of the new memories, and of the job when there is one.
        Raises:
            NotFound, InvalidRequest, TooLarge, Unavailable: nothing was stored.
        """
        turns = _turns(messages, answer)
        if not turns:
            raise InvalidRequest("neither the question nor the answer holds any text")

        def write() -> dict[str, Any]:
            stored, job = self._mos.remember_turn(
                principal,
                cube_id,
                turns,
                session_id=session_id,
                read=mode is RememberMode.FINE,
                labels=labels,
            )
            kept: dict[str, Any] = {"memory_ids": [memory.id for memory in stored]}
            if job is not None:
                kept["job"] = job.id
            return kept

        kept = await asyncio.to_thread(write)
        self._on_written()
        return kept


def _turns(messages: Sequence[Any], answer: str) -> list[NewTurn]:
    """The last user message and what was answered; what came before is kept with its own turn."""
    turns = []
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            text = text_of(message.get("content"))
            name = message.get("name")
            if text.strip():
                turns.append(NewTurn("user", text, name=name if isinstance(name, str) else None))
            break
    if answer.strip():
        turns.append(NewTurn("assistant", answer))
    return turns
