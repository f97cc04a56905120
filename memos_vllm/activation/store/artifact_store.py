"""The store: one directory, many processes, artifacts that are whole or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from memos_vllm.activation.store.durable import FolderLock, make_folder, write_file
from memos_vllm.activation.store.errors import (
    ArtifactScopeErased,
    ArtifactStoreFull,
    save_error,
)
from memos_vllm.activation.store.eviction import EvictionPolicy, LeastValuableFirst
from memos_vllm.activation.store.ledger import Ledger
from memos_vllm.activation.store.manifest import artifact_key, encode_manifest
from memos_vllm.activation.store.paths import StorePaths, is_key
from memos_vllm.activation.store.quarantine import Quarantine
from memos_vllm.activation.store.reader import ArtifactReader
from memos_vllm.activation.store.recovery import (
    Recovery,
    check_shards,
    delete_artifact,
    files_of,
    read_manifest_file,
    unnamed_shards_of,
)
from memos_vllm.activation.store.shard_format import ShardFormat, chunk_tokens_for
from memos_vllm.activation.store.tiling import check_tiling
from memos_vllm.activation.store.types import (
    ArtifactManifest,
    Match,
    PrefixIdentity,
    ScanReport,
    ShardEntry,
    ShardLayout,
    StoreStats,
    TokenIds,
    as_token_ids,
)
from memos_vllm.activation.store.watch import FolderWatch
from memos_vllm.activation.store.writer import ShardWriter
from memos_vllm.errors import ArtifactError, ArtifactMissing

logger = logging.getLogger(__name__)


class ArtifactStore:
    """Opening one creates the folders and reads nothing: call `scan` (the process that
    commits and evicts) or `refresh` (the ones that only read) next.

    Every method may be called from any thread. `lookup`, `contains`, `pin`, `unpin` and
    `forget` do no IO and fit a scheduler step; all others belong on another thread.

    Args:
        root: created with mode 0700 when missing.
        mac_key: 32 secret bytes; manifests signed with another key are not used.
        budget_bytes: for all artifacts together, manifests included; None is no limit.
        quarantine_budget_bytes: beyond it the oldest bad files are dropped.
        orphan_age_seconds: a shard without a manifest is swept when it is older.
        clock: seconds since the epoch, comparable with file times.
    """

    def __init__(
        self,
        root: Path,
        *,
        mac_key: bytes,
        budget_bytes: int | None = None,
        eviction_policy: EvictionPolicy | None = None,
        quarantine_budget_bytes: int = 256 << 20,
        orphan_age_seconds: float = 600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if len(mac_key) != 32:
            raise ValueError(f"the MAC key has {len(mac_key)} bytes, not 32")
        self._mac_key, self._clock = mac_key, clock
        self._orphan_age_seconds = orphan_age_seconds
        self._paths = StorePaths(root)
        root.parent.mkdir(parents=True, exist_ok=True)
        make_folder(root)
        for folder in self._paths.folders:
            make_folder(folder)
        self._lock = FolderLock(self._paths.lock)
        self._quarantine = Quarantine(
            self._paths, budget_bytes=quarantine_budget_bytes, clock=clock
        )
        self._ledger = Ledger(
            budget_bytes=budget_bytes, policy=eviction_policy or LeastValuableFirst()
        )
        self._index = self._ledger.index
        self._watch = FolderWatch(self._paths.manifests)
        self._counts: Counter[str] = Counter()

    # Saving: workers write shards, the scheduler half commits.

    def begin_shard(
        self, identity: PrefixIdentity, token_ids: Sequence[int] | TokenIds, layout: ShardLayout
    ) -> ShardWriter:
        """Preallocate one shard file under a temporary name.

        Raises:
            ArtifactStoreFull: no room on the disk.
            ArtifactSaveFailed: the system refused for another reason.
            ArtifactScopeErased: the scope was discarded.
        """
        ids = as_token_ids(token_ids)
        if not len(ids):
            raise ValueError("an artifact needs at least one token")
        key = artifact_key(identity, ids)
        self._refuse_erased(key, identity.scope)
        shard_format = ShardFormat(identity, layout, len(ids), chunk_tokens_for(layout))
        try:
            return ShardWriter(
                self._paths,
                key=key,
                shard_format=shard_format,
                token_ids=ids,
                is_erased=self._paths.erased_mark(identity.scope).exists,
            )
        except OSError as error:
            raise save_error(key, error) from error

    def admit(self, identity: PrefixIdentity, size_bytes: int) -> None:
        """Ask before saving: could an artifact of this size be committed? Changes nothing.

        Raises:
            ArtifactStoreFull: not even with everything that is not pinned evicted.
            ArtifactScopeErased: the scope was discarded.
        """
        name = f"of scope {identity.scope[:12]}"
        self._refuse_erased(name, identity.scope)
        self._victims(name, size_bytes, identity=identity)

    def commit(
        self,
        identity: PrefixIdentity,
        token_ids: Sequence[int] | TokenIds,
        *,
        total_layers: int,
        total_kv_heads: int,
        shards: Sequence[ShardEntry],
    ) -> ArtifactManifest:
        """Make finished shards an artifact, evicting others if the budget asks for it.

        The manifest's rename is the commit point; an older artifact of the same key is
        replaced. On any error below, the shards are removed.

        Raises:
            ArtifactIncomplete: they do not tile layers x heads exactly once.
            ArtifactMissing, ArtifactCorrupted: a shard file is altered or gone: another process
                may have evicted an older artifact of the very same bytes just now.
            ArtifactStoreFull, ArtifactSaveFailed, ArtifactScopeErased.
        """
        ids = as_token_ids(token_ids)
        manifest = ArtifactManifest(
            key=artifact_key(identity, ids),
            identity=identity,
            token_ids=ids,
            num_tokens=len(ids),
            total_layers=total_layers,
            total_kv_heads=total_kv_heads,
            shards=tuple(shards),
            created_at=self._clock(),
            size_bytes=0,
        )
        with self._lock.held():
            self.refresh()
            try:
                return self._commit(manifest)
            except ArtifactError:
                self._remove_shards(manifest, keep=self._index.get(manifest.key))
                raise

    def drop_shards(self, shards: Sequence[ShardEntry]) -> None:
        """Remove finished shards that will not be committed."""
        for shard in shards:
            with contextlib.suppress(OSError):
                self.shard_path(shard).unlink(missing_ok=True)

    # Finding and reading.

    def shard_path(self, shard: ShardEntry) -> Path:
        """Where the file of a shard lies."""
        return self._paths.shard(shard.content_digest)

    def lookup(
        self,
        identity: PrefixIdentity,
        token_ids: Sequence[int] | TokenIds,
        *,
        any_numerics: bool = False,
    ) -> Match | None:
        """The artifact that shares the longest prefix (at least 16 tokens) with `token_ids`.

        From memory alone, so what another process did since the last refresh is not seen.
        Never raises: ids that are no ids match nothing.
        """
        return self._index.lookup(identity, token_ids, any_numerics=any_numerics)

    def contains(self, identity: PrefixIdentity, token_ids: Sequence[int] | TokenIds) -> bool:
        """Whether exactly these tokens are stored for this identity, from memory alone."""
        try:
            key = artifact_key(identity, as_token_ids(token_ids))
        except (TypeError, ValueError, OverflowError):
            return False
        return self._index.get(key) is not None

    def read_manifest(self, key: str) -> ArtifactManifest:
        """Read and check one manifest from disk, for a process that was sent only the key.

        Raises:
            ArtifactMissing, ArtifactCorrupted, ArtifactUnreadable.
        """
        if not is_key(key):
            raise ArtifactMissing("?", "this is not the key of an artifact")
        return read_manifest_file(self._paths, key, mac_key=self._mac_key)

    def open_shards(
        self,
        manifest: ArtifactManifest,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> ArtifactReader:
        """Map the shards that hold these model layers and KV heads (None: all of them).

        Raises:
            ArtifactMissing: deleted since lookup.
            ArtifactCorrupted: truncated, or not what the manifest names.
            ArtifactUnreadable: out of descriptors or memory.
            ValueError: layers or heads that the artifact does not have.
        """
        return ArtifactReader(
            self._paths,
            manifest,
            layers=range(manifest.total_layers) if layers is None else layers,
            heads=range(manifest.total_kv_heads) if heads is None else heads,
        )

    # Keeping and dropping.

    def pin(self, key: str) -> None:
        """Keep budget eviction away from `key` until `unpin`; counted, in this process."""
        self._ledger.pin(key)

    def unpin(self, key: str) -> None:
        """Undo one `pin`; harmless when there was none."""
        self._ledger.unpin(key)

    def mark_used(self, key: str) -> None:
        """Note a use for eviction order, and once a minute on disk."""
        if self._index.get(key) is None:
            return
        now, worth = self._clock(), self._ledger.worth
        due = worth.due(key, now=now)
        if due:
            self._look_at_worth(key)
        worth.use(key, now=now)
        if due:
            self._write_worth(key)

    def forget(self, key: str) -> None:
        """Stop offering `key` in this process, until its manifest is written anew; no IO."""
        self._ledger.forget(key)

    def discard(self, key: str, reason: str) -> bool:
        """Delete an artifact from disk, pinned or not; answers whether there was one."""
        with self._lock.held():
            manifest = self._index.get(key) or self._readable(key)
            self.forget(key)
            if manifest is None:
                return False
            delete_artifact(self._paths, manifest)
        self._counts["discarded"] += 1
        logger.info("discarded artifact %s: %s", key, reason)
        return True

    def quarantine(self, key: str, reason: str) -> bool:
        """Move a bad artifact aside, with the reason beside it; answers whether there was one.

        The caller, who knows what it meant for a request, logs the reason.
        """
        with self._lock.held():
            manifest = self._index.get(key) or self._readable(key)
            self.forget(key)
            paths = [self._paths.manifest(key)] if is_key(key) else []
            if manifest is not None:
                paths += [self._paths.shard(shard.content_digest) for shard in manifest.shards]
            scope = manifest.identity.scope if manifest else None
            taken = [self._quarantine.take(path, reason, scope=scope) for path in paths]
            self._quarantine.trim()
        self._counts["quarantined"] += any(taken)
        return any(taken)

    def discard_scope(self, scope: str) -> int:
        """Erase a scope: its artifacts, quarantined files and unfinished saves.

        Later saves into the scope are refused, in every process.
        Returns: the number of artifacts deleted.
        Raises:
            ArtifactStoreFull, ArtifactSaveFailed: the mark could not be written; try again.
        """
        try:
            write_file(self._paths.temporaries, self._paths.erased_mark(scope), b"")
        except OSError as error:
            raise save_error(f"of scope {scope[:12]}", error) from error
        with self._lock.held():
            self.refresh()
            manifests = self._index.manifests()
            erased = [m for m in manifests if m.identity.scope == scope]
            for manifest in erased:
                self.discard(manifest.key, "its scope was erased")
            named = {
                self._paths.shard(shard.content_digest) for m in manifests for shard in m.shards
            }
            for path in list(unnamed_shards_of(self._paths, scope, named=named)):
                path.unlink(missing_ok=True)
            self._quarantine.drop_scope(scope)
            self._ledger.worth.forget_scope(scope)
        return len(erased)

    def erased_among(self, scopes: Iterable[str]) -> frozenset[str]:
        """Those of the scopes that any process has erased."""
        return frozenset(scope for scope in scopes if self._paths.erased_mark(scope).exists())

    def traces_of_scope(self, scope: str) -> int:
        """Look at every file: how many are of this scope still; -1 when it is not marked erased."""
        if not self._paths.erased_mark(scope).exists():
            return -1
        return len(files_of(self._paths, scope))

    def evict_to_budget(self) -> tuple[str, ...]:
        """Delete the least valuable unpinned artifacts until the budget holds; their keys."""
        with self._lock.held():
            self.refresh()
            return self._evict(self._victims("", 0))

    # The state on disk.

    def scan(self) -> ScanReport:
        """Read all of it: index what is good, quarantine what is not, sweep what is dead."""
        with self._lock.held():
            recovery = Recovery(
                self._paths,
                mac_key=self._mac_key,
                quarantine=self._quarantine,
                orphan_age_seconds=self._orphan_age_seconds,
                now=self._clock(),
            )
            found = recovery.run()
            for manifest in found.erased:
                delete_artifact(self._paths, manifest)
            good = {manifest.key for manifest in found.good}
            for manifest in self._index.manifests():
                if manifest.key not in good:
                    self.forget(manifest.key)
            for manifest in found.good:
                self._offer(manifest)
            self._watch.changes()
            self._counts["quarantined"] += len(found.quarantined)
            evicted = self._evict(self._victims("", 0))
        return ScanReport(
            num_artifacts=self.num_artifacts,
            quarantined=tuple(found.quarantined),
            removed_temporaries=tuple(found.removed_temporaries),
            removed_orphans=tuple(found.removed_orphans),
            evicted=evicted,
        )

    def refresh(self) -> bool:
        """Notice what other processes committed or removed; one stat when nothing changed."""
        written, removed = self._watch.changes()
        for name in removed:
            self.forget(name.removesuffix(".json"))
        for name in written:
            manifest = self._readable(name.removesuffix(".json"))
            if manifest is None:
                self.forget(name.removesuffix(".json"))
            else:
                self._offer(manifest)
        return bool(written or removed)

    @property
    def bytes_used(self) -> int:
        return self._index.bytes_used

    @property
    def num_artifacts(self) -> int:
        return len(self._index)

    def stats(self) -> StoreStats:
        num_quarantined, quarantine_bytes = self._quarantine.usage()
        return StoreStats(
            num_artifacts=self.num_artifacts,
            bytes_used=self.bytes_used,
            budget_bytes=self._ledger.budget_bytes,
            num_quarantined=num_quarantined,
            quarantine_bytes=quarantine_bytes,
            committed=self._counts["committed"],
            evicted=self._counts["evicted"],
            discarded=self._counts["discarded"],
            quarantined=self._counts["quarantined"],
            refused=self._counts["refused"],
        )

    def close(self) -> None:
        """Release the folder's lock file; open readers stay valid."""
        self._lock.close()

    def _commit(self, manifest: ArtifactManifest) -> ArtifactManifest:
        key = manifest.key
        self._refuse_erased(key, manifest.identity.scope)
        check_tiling(
            key,
            manifest.shards,
            total_layers=manifest.total_layers,
            total_kv_heads=manifest.total_kv_heads,
        )
        check_shards(self._paths, manifest)
        data = encode_manifest(manifest, mac_key=self._mac_key)
        size_bytes = len(data) + sum(shard.size_bytes for shard in manifest.shards)
        replaced = self._index.get(key)
        victims = self._victims(key, size_bytes, replaced=replaced, identity=manifest.identity)
        # Others go only after this one is safe: a save that fails costs nobody else.
        try:
            write_file(self._paths.temporaries, self._paths.manifest(key), data)
        except OSError as error:
            raise save_error(key, error) from error
        if replaced is not None:
            self._remove_shards(replaced, keep=manifest)
        committed = dataclasses.replace(manifest, size_bytes=size_bytes)
        for changed in [key, *self._ledger.commit(committed, now=self._clock())]:
            self._write_worth(changed)
        self._counts["committed"] += 1
        self._evict(victims)
        return committed

    def _victims(
        self,
        name: str,
        size_bytes: int,
        *,
        replaced: ArtifactManifest | None = None,
        identity: PrefixIdentity | None = None,
    ) -> list[ArtifactManifest]:
        if self._ledger.excess(size_bytes, replaced=replaced) > 0:
            # What other processes have used counts as well.
            for manifest in self._index.manifests():
                self._look_at_worth(manifest.key)
        try:
            return self._ledger.victims(
                name, size_bytes, replaced=replaced, identity=identity, now=self._clock()
            )
        except ArtifactStoreFull:
            self._counts["refused"] += 1
            raise

    def _evict(self, victims: Sequence[ArtifactManifest]) -> tuple[str, ...]:
        for manifest in victims:
            self._ledger.evict(manifest)
            delete_artifact(self._paths, manifest)
            self._counts["evicted"] += 1
            logger.info("evicted artifact %s: over the store's budget", manifest.key)
        return tuple(manifest.key for manifest in victims)

    def _offer(self, manifest: ArtifactManifest) -> None:
        self._look_at_worth(manifest.key)
        self._ledger.offer(manifest)

    def _look_at_worth(self, key: str) -> None:
        """What an artifact is worth is its manifest's mtime: it outlives the process, and others
        see it."""
        with contextlib.suppress(OSError):
            worth = self._paths.manifest(key).stat().st_mtime
            self._ledger.worth.see(key, worth, now=self._clock())

    def _write_worth(self, key: str) -> None:
        now, worth = self._clock(), self._ledger.worth
        with contextlib.suppress(OSError):
            os.utime(self._paths.manifest(key), (now, worth.of(key, otherwise=now)))
            worth.wrote(key, now=now)

    def _readable(self, key: str) -> ArtifactManifest | None:
        """The manifest on disk if it can be used; a bad one is left for the next scan."""
        try:
            return self.read_manifest(key)
        except ArtifactMissing:
            return None
        except ArtifactError as error:
            logger.warning("not used: %s", error)
            return None

    def _refuse_erased(self, name: str, scope: str) -> None:
        if self._paths.erased_mark(scope).exists():
            raise ArtifactScopeErased(name, "its memory was erased")

    def _remove_shards(self, manifest: ArtifactManifest, *, keep: ArtifactManifest | None) -> None:
        """Delete the files of `manifest` that `keep` does not name too."""
        kept = {shard.content_digest for shard in keep.shards} if keep else set()
        for shard in manifest.shards:
            if shard.content_digest not in kept and is_key(shard.content_digest):
                with contextlib.suppress(OSError):
                    self._paths.shard(shard.content_digest).unlink(missing_ok=True)
