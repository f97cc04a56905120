"""Writes what chats used to the catalog, off their path."""

from __future__ import annotations

import asyncio
import logging

from memos_vllm.control.mos import Mos
from memos_vllm.domain.usage import UsageEvent
from memos_vllm.errors import MemosError

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0
# Usage is a hint for tiering: under a pile-up the oldest goes, chats do not wait.
_MAX_QUEUED = 10_000


class UsageRecorder:
    """Collects usage events and writes them once a second, in one transaction."""

    def __init__(self, mos: Mos) -> None:
        self._mos = mos
        self._queued: list[UsageEvent] = []

    def note(self, events: list[UsageEvent]) -> None:
        """Queue events; never blocks."""
        self._queued += events
        if len(self._queued) > _MAX_QUEUED:
            del self._queued[:-_MAX_QUEUED]

    async def run(self) -> None:
        """Flush until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            events, self._queued = self._queued, []
            if not events:
                continue
            try:
                await asyncio.to_thread(self._mos.record_usage, events)
            except MemosError as error:
                logger.warning("memos: usage of %d chats is lost: %s", len(events), error)
