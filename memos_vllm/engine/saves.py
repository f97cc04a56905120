"""Saves under way: the blocks that they reference, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from memos_vllm.activation.store import ArtifactManifest, ArtifactStore, PrefixIdentity, ShardEntry
from memos_vllm.engine.transfer import SaveJob, SaveReport

logger = logging.getLogger(__name__)

# How long chats leave a prefix alone whose save failed; a bake tries at once.
_RETRY_SECONDS = 30.0


class BlockPool(Protocol):
    """The part of vLLM's `BlockPool` that a save uses."""

    def touch(self, blocks: Any) -> None: ...
    def free_blocks(self, ordered_blocks: Any) -> None: ...


@dataclass(slots=True)
class _Save:
    """One save: the blocks that it references and the shards that came in."""

    identity: PrefixIdentity
    token_ids: tuple[int, ...]
    blocks: list[Any]
    shards: list[ShardEntry] = field(default_factory=list)
    reports: int = 0
    error: str | None = None


class PrefixSaves:
    """Plans saves, and commits them when every rank has written its shard.

    Used by the scheduler's thread alone.

    Args:
        total_layers, total_kv_heads: of the whole model, over all ranks.
        num_shards: worker ranks that hold distinct KV.
        committer: runs commits, whose fsync takes milliseconds.
        count: of outcomes, `ok` or `failed`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        total_layers: int,
        total_kv_heads: int,
        num_shards: int,
        committer: Executor,
        count: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._total_layers = total_layers
        self._total_kv_heads = total_kv_heads
        self._num_shards = num_shards
        self._committer = committer
        self._count = count
        self._clock = clock
        self._pool: BlockPool | None = None
        self._running: dict[int, _Save] = {}
        self._commits: list[tuple[_Save, Future[ArtifactManifest]]] = []
        self._next_id = 0
        # (scope, tokens) of failed saves -> when to try again.
        self._backoff: dict[tuple[str, tuple[int, ...]], float] = {}

    def bind(self, pool: BlockPool) -> None:
        self._pool = pool

    @property
    def under_way(self) -> bool:
        """Whether a save still has to be reported or committed."""
        return bool(self._running or self._commits)

    def plan(
        self,
        identity: PrefixIdentity,
        token_ids: tuple[int, ...],
        blocks: Sequence[Any],
        *,
        retry: bool,
    ) -> SaveJob | None:
        """The save of a computed prefix; None when it is stored, or about to be.

        Args:
            blocks: hold the prefix's KV, whole; referenced until the save has ended.
            retry: also when saving it failed a moment ago.
        """
        stored = self._store.lookup(identity, token_ids)
        if stored is not None and stored.num_tokens >= len(token_ids):
            return None
        under_way = [*self._running.values(), *(save for save, _ in self._commits)]
        if any(s.identity == identity and s.token_ids == token_ids for s in under_way):
            return None
        if not retry and self._backoff.get((identity.scope, token_ids), 0.0) > self._clock():
            return None
        assert self._pool is not None
        # The only references that memory ever holds.
        self._pool.touch(blocks)
        save_id, self._next_id = self._next_id, self._next_id + 1
        self._running[save_id] = _Save(identity, token_ids, list(blocks))
        return SaveJob(save_id, identity, token_ids, tuple(block.block_id for block in blocks))

    def on_report(self, report: SaveReport) -> None:
        """A rank has written its shard, or failed to."""
        save = self._running.get(report.save_id)
        if save is None:
            return
        save.reports += 1
        if report.shard is not None:
            save.shards.append(report.shard)
        save.error = save.error or report.error
        if save.reports < self._num_shards:
            return
        del self._running[report.save_id]
        assert self._pool is not None
        self._pool.free_blocks(reversed(save.blocks))
        if save.error is not None:
            self._failed(save, save.error)
            return
        commit = self._committer.submit(
            self._store.commit,
            save.identity,
            save.token_ids,
            total_layers=self._total_layers,
            total_kv_heads=self._total_kv_heads,
            shards=save.shards,
        )
        self._commits.append((save, commit))

    def finish_commits(self) -> None:
        """Take note of the commits that ended."""
        if not self._commits:
            return
        ended = [(save, commit) for save, commit in self._commits if commit.done()]
        self._commits = [(save, commit) for save, commit in self._commits if not commit.done()]
        for save, commit in ended:
            error = commit.exception()
            if error is None:
                self._count("ok")
            else:
                self._failed(save, str(error) or repr(error))

    def _failed(self, save: _Save, reason: str) -> None:
        self._count("failed")
        logger.warning(
            "memos: a prefix of %d tokens was not saved: %s", len(save.token_ids), reason
        )
        now = self._clock()
        self._backoff = {key: ends for key, ends in self._backoff.items() if ends > now}
        self._backoff[save.identity.scope, save.token_ids] = now + _RETRY_SECONDS
