"""Activation memory that leaves with a cube, and that comes in with one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from memos_vllm.activation.store import ArtifactManifest, ArtifactStore, PrefixIdentity
from memos_vllm.activation.store.portable import adopt, describe, open_shard, read_description
from memos_vllm.cartridge.artifacts import CarriedArtifact
from memos_vllm.cartridge.layout import MAX_ARTIFACTS, ArtifactFacts
from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.cartridge import LoadedCube
from memos_vllm.domain.job import JobState
from memos_vllm.engine.baker import Baker
from memos_vllm.engine.chat import MemoryChat
from memos_vllm.errors import ArtifactError, MemosError

logger = logging.getLogger(__name__)


class ArtifactPorter:
    """`memos_vllm.api.gateway.CartridgeSupport` over this server's store.

    Args:
        identity: of this engine's artifacts in a scope.
        wake_jobs: called when a rebuild was left to the jobs.
    """

    def __init__(
        self,
        *,
        mos: Mos,
        chat: MemoryChat,
        baker: Baker,
        store: ArtifactStore,
        identity: Callable[[str], PrefixIdentity],
        settings: ServerSettings,
        wake_jobs: Callable[[], None],
    ) -> None:
        self._mos = mos
        self._chat = chat
        self._baker = baker
        self._store = store
        self._identity = identity
        self._settings = settings
        self._wake_jobs = wake_jobs

    @property
    def spool_dir(self) -> Path:
        self._settings.spool_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._settings.spool_dir

    @property
    def max_import_bytes(self) -> int:
        return self._settings.max_import_bytes

    def open_artifacts(self, cube_id: str) -> list[CarriedArtifact]:
        opened = []
        records = self._mos.list_artifacts(cube_id)
        ready = [record for record in records if record.state is ActivationState.READY]
        for record in ready[-MAX_ARTIFACTS:]:
            try:
                opened.append(self._open(self._store.read_manifest(record.id)))
            except (ArtifactError, OSError) as error:
                logger.info("memos: an artifact of cube %s is not exported: %s", cube_id, error)
        return opened

    def _open(self, manifest: ArtifactManifest) -> CarriedArtifact:
        description = describe(manifest)
        shards = [(entry.size_bytes, open_shard(self._store, entry)) for entry in manifest.shards]
        identity = manifest.identity
        facts = ArtifactFacts(
            fingerprint=identity.fingerprint,
            numerics=identity.numerics,
            renderer_version=identity.renderer_version,
            tokens=manifest.num_tokens,
            size_bytes=len(description) + sum(size for size, _ in shards),
        )
        return CarriedArtifact(facts, description, shards)

    async def adopt_artifacts(
        self, loaded: LoadedCube, artifacts: Iterable[CarriedArtifact]
    ) -> list[str]:
        if loaded.job_id is None:
            return []
        warnings: list[str] = []
        adopted = False
        try:
            adopted = await self._adopt(loaded, artifacts, warnings)
        except MemosError as error:
            warnings.append(f"activation memory was not taken over: {error}")
        finally:
            await asyncio.to_thread(self._settle, loaded.job_id, adopted=adopted)
        return warnings

    async def _adopt(
        self, loaded: LoadedCube, artifacts: Iterable[CarriedArtifact], warnings: list[str]
    ) -> bool:
        """Take in what fits; whether the cube now has activation memory."""
        (snapshot,) = await asyncio.to_thread(self._mos.snapshots, LOCAL_ADMIN, [loaded.cube.id])
        prompt, head_tokens = await self._chat.bake_prompt(snapshot)
        head = prompt[:head_tokens]
        scope = self._chat.scope_of([snapshot])
        taken = await asyncio.to_thread(self._take_in, artifacts, scope, head, warnings)
        for manifest in taken:
            await self._baker.record(snapshot, head, manifest.num_tokens)
        return bool(taken)

    def _take_in(
        self,
        artifacts: Iterable[CarriedArtifact],
        scope: str,
        head: Sequence[int],
        warnings: list[str],
    ) -> list[ArtifactManifest]:
        taken = []
        for artifact in artifacts:
            problem = self._unfit(artifact.facts)
            if problem is None:
                try:
                    taken.append(self._take_one(artifact, scope, head))
                except ArtifactError as error:
                    problem = str(error)
            if problem is not None:
                warnings.append(f"an artifact was kept out and is computed anew: {problem}")
        return taken

    def _unfit(self, facts: ArtifactFacts) -> str | None:
        ours = self._identity("")
        if facts.fingerprint != ours.fingerprint:
            return (
                f"it is of model {facts.fingerprint[:16]}, this server runs {ours.fingerprint[:16]}"
            )
        if facts.numerics != ours.numerics:
            return f"it is of numerics class {facts.numerics}, this server's is {ours.numerics}"
        if facts.renderer_version != ours.renderer_version:
            return "its prefix was rendered by another version"
        if facts.size_bytes > self._settings.artifact_budget_bytes:
            return "it is larger than the artifact store may become"
        return None

    def _take_one(
        self, artifact: CarriedArtifact, scope: str, head: Sequence[int]
    ) -> ArtifactManifest:
        described = read_description(artifact.description)
        # What the archive says outside of the artifact proves nothing.
        if described.identity != self._identity(described.identity.scope):
            raise ArtifactError("(imported)", "it is not of this model and numerics class")
        if described.token_ids.tolist() != list(head[: described.num_tokens]):
            raise ArtifactError("(imported)", "its tokens are not those of this cube's prefix here")
        return adopt(self._store, described, scope=scope, shards=artifact.shards)

    def _settle(self, job_id: str, *, adopted: bool) -> None:
        """End the rebuild that was held back, or leave it to the jobs."""
        if adopted:
            message = "activation memory came with the cube"
            self._mos.finish_job(job_id, job_id, state=JobState.SUCCEEDED, message=message)
            return
        self._mos.renew_job(
            job_id, job_id, lease_seconds=0.0, progress=0.0, message="waiting for a worker"
        )
        self._wake_jobs()
