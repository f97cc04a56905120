"""Does reindex jobs: has the index drop a cube and take it in again."""

from __future__ import annotations

import asyncio

from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.job import Job
from memos_vllm.engine.job_runner import Report
from memos_vllm.errors import Unavailable
from memos_vllm.plaintext.store import PlaintextStore

_LOOK_SECONDS = 0.5


class Reindexer:
    """Queues a cube's memories for the index and watches until they are through."""

    def __init__(self, mos: Mos, plaintext: PlaintextStore) -> None:
        self._mos = mos
        self._plaintext = plaintext

    async def reindex(self, job: Job, report: Report) -> str:
        """Returns what was done, for a person.

        Raises:
            NotFound: the cube is gone.
            Unavailable: the index is down; what is queued is done when it is back.
        """
        total = await asyncio.to_thread(self._mos.reindex_cube, LOCAL_ADMIN, job.cube_id)
        self._plaintext.wake()
        while True:
            left = await asyncio.to_thread(self._plaintext.backlog, job.cube_id)
            if left == 0:
                # Without numbers: they would count what a reader of the job may not see.
                return "indexed anew"
            if (problem := self._plaintext.problem()) is not None:
                raise Unavailable(f"{left} changes wait for the index: {problem}")
            report(1.0 - min(1.0, left / (total + 1)), "indexing")
            await asyncio.sleep(_LOOK_SECONDS)
