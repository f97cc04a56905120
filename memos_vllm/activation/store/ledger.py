"""What this process knows of the stored artifacts: their index, uses and pins."""

from __future__ import annotations

from collections import Counter

from memos_vllm.activation.store.errors import ArtifactStoreFull
from memos_vllm.activation.store.eviction import ArtifactUsage, EvictionPolicy
from memos_vllm.activation.store.prefix_index import PrefixIndex
from memos_vllm.activation.store.types import ArtifactManifest


class Ledger:
    """Memory only, no IO. `budget_bytes` None is no limit."""

    def __init__(self, *, budget_bytes: int | None, policy: EvictionPolicy) -> None:
        self.index = PrefixIndex()
        self.budget_bytes = budget_bytes
        self._policy = policy
        self._last_used: dict[str, float] = {}
        self._pins: Counter[str] = Counter()

    def offer(self, manifest: ArtifactManifest, *, last_used_at: float) -> None:
        """Add an artifact, or the newer one of its key."""
        if self.index.get(manifest.key) != manifest:
            self.index.add(manifest)
        self._last_used.setdefault(manifest.key, last_used_at)

    def forget(self, key: str) -> None:
        self.index.remove(key)
        self._last_used.pop(key, None)

    def use(self, key: str, *, now: float) -> float:
        """Note a use; answers the time of the one before, 0 if there was none."""
        before, self._last_used[key] = self._last_used.get(key, 0.0), now
        return before

    def pin(self, key: str) -> None:
        self._pins[key] += 1

    def unpin(self, key: str) -> None:
        self._pins[key] -= 1
        if self._pins[key] <= 0:
            del self._pins[key]

    def victims(
        self, name: str, size_bytes: int, *, replaced: ArtifactManifest | None, now: float
    ) -> list[ArtifactManifest]:
        """What must go so that `size_bytes` more fit, when `replaced` goes anyway.

        Raises:
            ArtifactStoreFull: not even without everything that is not pinned.
        """
        if self.budget_bytes is None:
            return []
        others = [m for m in self.index.manifests() if replaced is None or m.key != replaced.key]
        excess = sum(m.size_bytes for m in others) + size_bytes - self.budget_bytes
        chosen: list[ArtifactManifest] = []
        free = {m.key: m for m in others if not self._pins[m.key]}
        for usage in self._policy.order([self._usage(m) for m in free.values()], now=now):
            if excess <= 0:
                break
            chosen.append(free[usage.key])
            excess -= usage.size_bytes
        if excess > 0 and size_bytes:
            pinned = sum(m.size_bytes for m in others if m.key not in free)
            raise ArtifactStoreFull(
                name,
                f"its {size_bytes} bytes do not fit the store's budget of {self.budget_bytes} "
                f"bytes, of which {pinned} are being loaded right now; raise the budget",
            )
        return chosen

    def _usage(self, manifest: ArtifactManifest) -> ArtifactUsage:
        return ArtifactUsage(
            key=manifest.key,
            scope=manifest.identity.scope,
            num_tokens=manifest.num_tokens,
            size_bytes=manifest.size_bytes,
            created_at=manifest.created_at,
            last_used_at=self._last_used.get(manifest.key, manifest.created_at),
        )
