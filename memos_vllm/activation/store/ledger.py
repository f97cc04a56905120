"""What this process knows of the stored artifacts: their index, worth and pins."""

from __future__ import annotations

from collections import Counter

from memos_vllm.activation.store.errors import ArtifactStoreFull
from memos_vllm.activation.store.eviction import ArtifactUsage, EvictionPolicy
from memos_vllm.activation.store.prefix_index import PrefixIndex
from memos_vllm.activation.store.types import ArtifactManifest, PrefixIdentity
from memos_vllm.activation.store.worth import Worth


class Ledger:
    """Memory only, no IO. `budget_bytes` None is no limit."""

    def __init__(
        self, *, budget_bytes: int | None, policy: EvictionPolicy, worth: Worth | None = None
    ) -> None:
        self.index = PrefixIndex()
        self.worth = worth or Worth()
        self.budget_bytes = budget_bytes
        self._policy = policy
        self._pins: Counter[str] = Counter()

    def offer(self, manifest: ArtifactManifest) -> None:
        """Add an artifact, or the newer one of its key."""
        if self.index.get(manifest.key) != manifest:
            self.index.add(manifest)

    def commit(self, manifest: ArtifactManifest, *, now: float) -> list[str]:
        """Add an artifact that was just computed: the others of its identity are of another text.

        Returns:
            Those others, which are worth less now.
        """
        others = [key for key in self.index.keys_of(manifest.identity) if key != manifest.key]
        self.worth.succeed(manifest.key, manifest.identity, others, now=now)
        self.offer(manifest)
        return others

    def forget(self, key: str) -> None:
        self.index.remove(key)
        self.worth.forget(key)

    def evict(self, manifest: ArtifactManifest) -> None:
        """Forget an artifact that goes for the budget's sake, but not what it was worth."""
        self.index.remove(manifest.key)
        self.worth.evict(manifest.key, manifest.identity)

    def pin(self, key: str) -> None:
        self._pins[key] += 1

    def unpin(self, key: str) -> None:
        self._pins[key] -= 1
        if self._pins[key] <= 0:
            del self._pins[key]

    def excess(self, size_bytes: int, *, replaced: ArtifactManifest | None) -> int:
        """Bytes over the budget with `size_bytes` more, when `replaced` goes anyway."""
        if self.budget_bytes is None:
            return 0
        replacing = 0
        if replaced is not None and (known := self.index.get(replaced.key)) is not None:
            replacing = known.size_bytes
        return self.index.bytes_used - replacing + size_bytes - self.budget_bytes

    def victims(
        self,
        name: str,
        size_bytes: int,
        *,
        replaced: ArtifactManifest | None,
        identity: PrefixIdentity | None,
        now: float,
    ) -> list[ArtifactManifest]:
        """What must go so that `size_bytes` more fit, when `replaced` goes anyway.

        Args:
            identity: of what comes; what it takes the place of counts as used just once.
        Raises:
            ArtifactStoreFull: not even without everything that is not pinned.
        """
        excess = self.excess(size_bytes, replaced=replaced)
        if excess <= 0:
            return []
        others = [m for m in self.index.manifests() if replaced is None or m.key != replaced.key]
        chosen: list[ArtifactManifest] = []
        free = {m.key: m for m in others if not self._pins[m.key]}
        usages = [self._usage(m, succeeded=m.identity == identity, now=now) for m in free.values()]
        for usage in self._policy.order(usages, now=now):
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

    def _usage(self, manifest: ArtifactManifest, *, succeeded: bool, now: float) -> ArtifactUsage:
        worth = self.worth.of(manifest.key, otherwise=manifest.created_at)
        return ArtifactUsage(
            key=manifest.key,
            scope=manifest.identity.scope,
            num_tokens=manifest.num_tokens,
            size_bytes=manifest.size_bytes,
            created_at=manifest.created_at,
            worth=min(worth, now) if succeeded else worth,
        )
