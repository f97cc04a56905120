"""Runs bake jobs: computes a cube's prefix once, and sees it into the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from vllm.inputs import tokens_input
from vllm.sampling_params import SamplingParams

from memos_vllm.activation.store import ArtifactStore, ArtifactUnreadable, PrefixIdentity
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.artifact import ActivationState, ArtifactRecord
from memos_vllm.domain.cube import CubeSnapshot
from memos_vllm.domain.ids import ArtifactId
from memos_vllm.domain.job import Job
from memos_vllm.engine.chat import MemoryChat
from memos_vllm.engine.heads import head_digest
from memos_vllm.engine.job_runner import Report
from memos_vllm.engine.observer import MemoryCall
from memos_vllm.engine.stats import latest_reports
from memos_vllm.errors import ArtifactError, MemosError, NotFound

logger = logging.getLogger(__name__)

_STORE_POLL_SECONDS = 0.02
_STORE_TIMEOUT_SECONDS = 120.0


class Baker:
    """Does bake jobs.

    Args:
        identity: of this engine's artifacts in a scope.
    """

    def __init__(
        self,
        *,
        mos: Mos,
        chat: MemoryChat,
        store: ArtifactStore,
        identity: Callable[[str], PrefixIdentity],
    ) -> None:
        self._mos = mos
        self._chat = chat
        self._store = store
        self._identity = identity
        self._recordings: set[asyncio.Task[None]] = set()

    def record_later(self, snapshot: CubeSnapshot, head: list[int], kept_tokens: int) -> None:
        """Note in the catalog the artifact that a chat used or made, once it is stored."""
        if kept_tokens:
            task = asyncio.create_task(self._record_quietly(snapshot, head, kept_tokens))
            self._recordings.add(task)
            task.add_done_callback(self._recordings.discard)

    def forget_unusable(self) -> None:
        """Drop from the catalog what this server cannot load: evicted, or another model's.

        Their cubes then say `stale`, which they are, instead of `ready`. What another server of
        the catalog keeps in a folder of its own stays: when it is erased it is found by that.
        """
        unusable = []
        for record in self._mos.list_artifacts():
            try:
                found = self._store.read_manifest(record.id).identity
            except ArtifactUnreadable:
                continue
            except ArtifactError:
                if self._is_in_our_scope(record):
                    unusable.append(record.id)
                continue
            if found != self._identity(found.scope):
                unusable.append(record.id)
        if unusable:
            forgotten = self._mos.forget_artifacts(unusable)
            logger.info("memos: %d artifacts are not usable by this server", forgotten)

    def _is_in_our_scope(self, record: ArtifactRecord) -> bool:
        """Scopes are made with a key of each data folder."""
        try:
            return record.scope == self._chat.scope_of(
                self._mos.snapshots(LOCAL_ADMIN, [record.cube_id])
            )
        except NotFound:
            return True

    async def bake(self, job: Job, report: Report) -> str:
        """Do one bake job.

        Returns:
            What was done, for a person.
        Raises:
            NotFound: the cube is gone.
            MemosError: the prefix could not be computed or saved.
        """
        report(0.5, "computing the prefix")
        (snapshot,) = await asyncio.to_thread(self._mos.snapshots, LOCAL_ADMIN, [job.cube_id])
        if not snapshot.memories:
            await self._drop_stale(snapshot.id)
            return "the cube has no activation memory"
        prompt, head_tokens = await self._chat.bake_prompt(snapshot)
        failures = _failed_saves()
        started = time.perf_counter()
        outcome = await self._compute(job, snapshot, prompt, head_tokens)
        kept = outcome.get("kept_tokens", 0)
        if outcome.get("unsupported"):
            return f"computed with each request and not kept: {outcome['unsupported']}"
        if not kept:
            return f"{head_tokens} tokens are less than one block: computed with each request"
        await self._until_stored(snapshot, prompt[:kept], failures)
        await self.record(snapshot, prompt[:head_tokens], kept)
        seconds = time.perf_counter() - started
        return f"{head_tokens} tokens baked in {seconds:.1f} s"

    async def _compute(
        self, job: Job, snapshot: CubeSnapshot, prompt: list[int], head_tokens: int
    ) -> dict[str, Any]:
        async def find_head(_: list[int]) -> tuple[int, bool]:
            return head_tokens, True

        call = MemoryCall(
            cache_salt=self._chat.salt_of([snapshot]),
            scope=self._chat.scope_of([snapshot]),
            find_head=find_head,
            retry_save=True,
        )
        outputs = self._chat.engine_for(call).generate(
            tokens_input(prompt),
            SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
            f"memos-bake-{job.id}-{job.attempts}",
        )
        async for _ in outputs:
            pass
        return call.report

    async def _until_stored(self, snapshot: CubeSnapshot, tokens: list[int], failures: int) -> None:
        identity = self._identity(self._chat.scope_of([snapshot]))
        deadline = time.monotonic() + _STORE_TIMEOUT_SECONDS
        while True:
            await asyncio.to_thread(self._store.refresh)
            if self._store.contains(identity, tokens):
                return
            if _failed_saves() > failures:
                raise MemosError(
                    "the prefix was computed but not saved: the server's log holds the reason"
                )
            if time.monotonic() > deadline:
                raise MemosError(
                    f"the prefix did not reach the store in {_STORE_TIMEOUT_SECONDS:.0f} s"
                )
            await asyncio.sleep(_STORE_POLL_SECONDS)

    async def _record_quietly(
        self, snapshot: CubeSnapshot, head: list[int], kept_tokens: int
    ) -> None:
        try:
            await self._until_stored(snapshot, head[:kept_tokens], _failed_saves())
            await self.record(snapshot, head, kept_tokens)
        except MemosError as error:
            logger.info("memos: the prefix of cube %s is not in the store: %s", snapshot.id, error)

    async def record(self, snapshot: CubeSnapshot, head: list[int], kept_tokens: int) -> None:
        """Note in the catalog an artifact of these first tokens of a head that the store holds.

        Raises:
            NotFound: the cube or a memory is gone, and now the artifact with it.
        """
        scope = self._chat.scope_of([snapshot])
        match = self._store.lookup(self._identity(scope), head[:kept_tokens])
        if match is None:
            return
        manifest = match.manifest
        record = ArtifactRecord(
            id=ArtifactId(manifest.key),
            cube_id=snapshot.id,
            kind="kv-prefix",
            head_key=head_digest(head),
            scope=scope,
            tokens=len(head),
            bytes=manifest.size_bytes,
            memory_versions=tuple((memory.id, memory.version) for memory in snapshot.memories),
            state=ActivationState.READY,
            created_at=datetime.now(UTC),
            cube_version=snapshot.version,
        )
        try:
            await asyncio.to_thread(self._mos.record_artifact, record)
        except NotFound:
            # Erased while it was being computed.
            await asyncio.to_thread(self._store.discard, manifest.key, "its memory is gone")
            raise
        await self._drop_stale(snapshot.id)

    async def _drop_stale(self, cube_id: str) -> None:
        """Delete what a newer artifact of the cube has replaced."""
        records = await asyncio.to_thread(self._mos.list_artifacts, cube_id)
        stale = [record.id for record in records if record.state is ActivationState.STALE]
        for artifact_id in stale:
            await asyncio.to_thread(self._store.discard, artifact_id, "replaced by a newer one")
        if stale:
            await asyncio.to_thread(self._mos.forget_artifacts, stale)


def _failed_saves() -> int:
    """How many saves this server's engines have reported as failed."""
    return sum(report.get("failed_saves", 0) for report in latest_reports.values())
