"""Does erase jobs: removes what is left of erased memories, looks, and says how it knows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Protocol, TypeVar

from memos_vllm.activation.store import ArtifactStore
from memos_vllm.control.erasing import order_of
from memos_vllm.control.mos import Mos
from memos_vllm.domain.erasure import ErasureOrder, Proof, Removed
from memos_vllm.domain.job import Job
from memos_vllm.engine.job_runner import Report
from memos_vllm.engine.log_search import LogSearch
from memos_vllm.errors import MemosError, Unavailable
from memos_vllm.plaintext.store import PlaintextStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_SECONDS = 0.5
# What takes longer is put off, and begun again where it is not done.
_PATIENCE_SECONDS = 120.0


class Residency(Protocol):
    """The engine's block pool, as far as an erasure is concerned."""

    async def drop(self, scopes: Sequence[str]) -> str:
        """Wait until the pool keeps no block of these scopes; how that is known, for a person.

        Raises:
            Unavailable: it still does, or the engine does not answer.
        """
        ...


class Eraser:
    """Does erase jobs. Each step may be done again after a crash, and is proved once it is done.

    Args:
        scope: the artifact scope of a cube at an epoch.
        key: the secret by which pieces of erased texts are known.
    """

    def __init__(
        self,
        *,
        mos: Mos,
        plaintext: PlaintextStore,
        store: ArtifactStore,
        residency: Residency,
        logs: LogSearch,
        scope: Callable[[str, int], str],
        key: bytes,
    ) -> None:
        self._mos = mos
        self._plaintext = plaintext
        self._store = store
        self._residency = residency
        self._logs = logs
        self._scope = scope
        self._key = key

    async def erase(self, job: Job, report: Report) -> str:
        """Do one erase job.

        Returns:
            What was done, for a person.
        Raises:
            Unavailable: a store is down or busy; to be tried again later.
            MemosError: something that should be gone is there.
        """
        order = order_of(job)
        steps: tuple[tuple[str, Callable[[Job, ErasureOrder], Awaitable[None]]], ...] = (
            ("removing artifacts", self._artifacts),
            ("emptying the block pool", self._blocks),
            ("looking through the catalog", self._catalog),
            ("following the search index", self._points),
            ("rewriting the search index", self._index_files),
            ("rewriting the catalog", self._catalog_files),
            ("searching logs", self._log_files),
        )
        for done, (doing, step) in enumerate(steps):
            report(done / len(steps), doing)
            await step(job, order)
        return "nothing is left of it; the proofs say what was looked at"

    async def _artifacts(self, job: Job, order: ErasureOrder) -> None:
        scopes = self._scopes(order)
        for scope in scopes:
            await asyncio.to_thread(self._store.discard_scope, scope)

        def gone() -> bool:
            # A save that is under way finds the mark when it ends, and removes what it wrote.
            return all(self._store.traces_of_scope(scope) == 0 for scope in scopes)

        await _until(gone, "an artifact is still being written")
        await self._prove(
            job,
            order,
            Removed.ARTIFACTS,
            "the scope was marked as erased, so that nothing is saved into it any more, and the "
            "start of every file of the artifact store was read: none is of it",
        )

    async def _blocks(self, job: Job, order: ErasureOrder) -> None:
        checked = await self._residency.drop(self._scopes(order))
        await self._prove(
            job,
            order,
            Removed.BLOCKS,
            "the cube's epoch has moved, so that no request finds a block of before; " + checked,
        )

    async def _catalog(self, job: Job, order: ErasureOrder) -> None:
        left = await asyncio.to_thread(self._mos.traces_of, job.id, order)
        if left:
            tables = ", ".join(f"{rows} in {table}" for table, rows in left.items())
            raise MemosError(f"the catalog still has rows of what was erased: {tables}")
        await self._prove(
            job,
            order,
            Removed.TEXT,
            "asked by number in every column of the catalog that refers to memories, and by id",
        )
        await self._prove(
            job, order, Removed.REPLIES, "no stored reply names the id; every one was searched"
        )

    async def _points(self, job: Job, order: ErasureOrder) -> None:
        seqs = [seq for seq, _ in order.memories]
        left: int | None = None

        def followed() -> bool:
            nonlocal left
            left = self._plaintext.points_left(seqs, entry=order.entry)
            return left is not None

        await _until(followed, "the search index has not followed yet")
        if left:
            raise MemosError(f"the search index still has {left} points of what was erased")
        await self._prove(
            job,
            order,
            Removed.POINTS,
            f"the index has durably followed beyond change {order.entry}, and was asked by number",
        )

    async def _index_files(self, job: Job, order: ErasureOrder) -> None:
        purged: bool | None = False

        def rewritten() -> bool:
            nonlocal purged
            purged = self._plaintext.purged(order.entry)
            return purged is not False

        await _until(rewritten, "the search index is still being rewritten")
        checked = (
            "its points were written anew without those, and the former files removed"
            if purged
            else "left to the Qdrant server: it rewrites a segment once enough of it is deleted"
        )
        await self._prove(job, order, Removed.INDEX_FILES, checked)

    async def _catalog_files(self, job: Job, order: ErasureOrder) -> None:
        await _until(
            lambda: self._mos.rewrite_files(order.entry), "the catalog's log is still being read"
        )
        checked = await asyncio.to_thread(lambda: self._mos.rewrites_how)
        await self._prove(job, order, Removed.CATALOG_FILES, checked)

    async def _log_files(self, job: Job, order: ErasureOrder) -> None:
        if any(proof.what is Removed.LOGS for proof in job.proofs) and not order.needles:
            # Done before a crash; what to look for was dropped with that.
            return
        searched = await asyncio.to_thread(self._logs.blank, order.needles, key=self._key)
        await self._prove(job, order, Removed.LOGS, searched.told(), count=searched.blanked)

    def _scopes(self, order: ErasureOrder) -> list[str]:
        return [self._scope(cube_id, epoch) for cube_id, epoch in order.scopes]

    async def _prove(
        self,
        job: Job,
        order: ErasureOrder,
        what: Removed,
        checked: str,
        *,
        count: int | None = None,
    ) -> None:
        counted = order.counts.get(what) if count is None else count
        proof = Proof(what, counted, checked, datetime.now(UTC))
        assert job.lease_owner is not None
        await asyncio.to_thread(self._mos.note_proof, job.id, job.lease_owner, proof)


async def _until(done: Callable[[], bool], otherwise: str) -> None:
    """Look again and again, in a thread, until something is done; raises Unavailable."""
    deadline = monotonic() + _PATIENCE_SECONDS
    while not await asyncio.to_thread(done):
        if monotonic() > deadline:
            raise Unavailable(otherwise)
        await asyncio.sleep(_LOOK_SECONDS)
