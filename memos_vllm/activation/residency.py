"""Which prefixes stay in the engine's KV pool, and how: soft pins.

A soft pin holds no reference. A pinned block lies in the pool's free queue like any cached
block, counts as free, and may be taken when the pool needs it. All a pin does is move the
block back to the tail when the queue has turned over far enough to come near it. So memory
never makes admission, preemption, reset or pause behave other than in plain vLLM.

Pure policy: the pool is a protocol that vLLM's `BlockPool` satisfies as it is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from memos_vllm.activation.store.worth import rank_after_use

# Callers choose how many conversations and heads there are; this bounds what each costs.
MAX_PREFIXES = 512
# Choosing what to keep anew takes 15 ms for 25,000 blocks: not with every request.
_REBALANCE_SECONDS = 1.0


class Block(Protocol):
    """What a pin needs to know of a KV block."""

    block_id: int
    ref_cnt: int
    is_null: bool

    @property
    def block_hash(self) -> Any: ...


class Pool(Protocol):
    """The part of vLLM's `BlockPool` that residency uses."""

    blocks: Sequence[Any]
    free_block_queue: Any

    def touch(self, blocks: Any) -> None: ...
    def free_blocks(self, ordered_blocks: Any) -> None: ...
    def evict_blocks(self, block_ids: set[int]) -> None: ...


class Pin(NamedTuple):
    """One block and the hash under which it is ours."""

    block_id: int
    block_hash: Hashable


@dataclass(slots=True)
class ResidentPrefix:
    """A prefix whose blocks are, or were, in the pool.

    Attributes:
        key: names the prefix (cache salt and head).
        scope: the artifact scope that it belongs to, for counting per cube.
        pins: in token order; a lost block cuts the list there, since a prefix cache hit
            needs every block before it.
        rank: orders prefixes by worth; see `rank_after_use`.
        kept_blocks: how many of the pins, from the first, are within the budget.
    """

    key: Hashable
    scope: str
    pins: tuple[Pin, ...]
    rank: float
    kept_blocks: int = 0


@dataclass(slots=True)
class _KeptBlock:
    """A block within the budget, and the prefixes that want it."""

    block_hash: Hashable
    rank: float
    owners: dict[Hashable, ResidentPrefix] = field(default_factory=dict)


class Residency:
    """Keeps the most valuable prefixes in the pool within a budget of blocks.

    Args:
        budget_blocks: most blocks that are kept from eviction at any time.
        horizon_blocks: how many blocks one engine step can allocate at most; a pinned block
            nearer than this to the head of the free queue is moved.
        half_life_seconds: how fast past uses lose their worth.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        budget_blocks: int,
        horizon_blocks: int,
        half_life_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_blocks = budget_blocks
        self._horizon = max(1, horizon_blocks)
        self._half_life = half_life_seconds
        self._clock = clock
        self._prefixes: dict[Hashable, ResidentPrefix] = {}
        self._kept: dict[int, _KeptBlock] = {}
        self._pool: Pool | None = None
        self._seen_queue: object = None
        # Whether the budget cuts a prefix short, and whether to look again which one.
        self._crowded = False
        self._unbalanced = False
        self._rebalance_at = -math.inf
        self.moves = 0

    def bind(self, pool: Pool) -> None:
        """Use this pool; called once, when the engine has made it."""
        self._pool = pool

    def remember(self, key: Hashable, scope: str, blocks: Sequence[Block]) -> None:
        """Note a use of a prefix and where its blocks are now.

        Args:
            blocks: the prefix's blocks in token order; the list ends at the first that the
                prefix cache cannot find again.
        """
        usable = itertools.takewhile(lambda b: b.block_hash is not None and not b.is_null, blocks)
        pins = tuple(Pin(block.block_id, block.block_hash) for block in usable)
        if not pins:
            return
        now = self._clock()
        prefix = self._prefixes.get(key)
        rank = rank_after_use(prefix.rank if prefix else None, now / self._half_life)
        if prefix is None or prefix.pins != pins:
            if prefix is not None:
                self._forget(prefix)
            elif len(self._prefixes) >= MAX_PREFIXES:
                self._forget(min(self._prefixes.values(), key=lambda p: p.rank))
            prefix = self._prefixes[key] = ResidentPrefix(key, scope, pins, rank)
        prefix.rank = rank
        for pin in prefix.pins[: prefix.kept_blocks]:
            kept = self._kept[pin.block_id]
            kept.rank = max(kept.rank, rank)
        self._take(prefix)
        self._seen_queue = None
        if prefix.kept_blocks < len(prefix.pins):
            self._crowded = self._unbalanced = True
            self._rebalance(now)

    @property
    def scopes(self) -> frozenset[str]:
        """Scopes of the remembered prefixes."""
        return frozenset(prefix.scope for prefix in self._prefixes.values())

    def erase_scope(self, scope: str) -> None:
        """Forget everything of a scope, and take its blocks out of the prefix cache."""
        for prefix in [p for p in self._prefixes.values() if p.scope == scope]:
            ours = {pin.block_id for pin in prefix.pins if self._is_ours(pin)}
            if self._pool is not None:
                self._pool.evict_blocks(ours)
            self._forget(prefix)

    def clear(self) -> None:
        """The prefix cache was reset: nothing is resident any more."""
        self._prefixes.clear()
        self._kept.clear()
        self._seen_queue = None

    def keep(self) -> int:
        """Move kept blocks away from the head of the free queue; call once per engine step.

        Returns:
            How many blocks were moved.
        """
        pool = self._pool
        if pool is None or not self._prefixes:
            return 0
        if self._unbalanced:
            self._rebalance(self._clock())
        if not self._kept or self._queue_state(pool) == self._seen_queue:
            return 0
        endangered = self._endangered(pool)
        # In the order of the queue, so a prefix's tail still goes before its start; and the
        # most valuable prefix last, so that it ends up farthest from eviction.
        endangered.sort(key=lambda block: self._kept[block.block_id].rank)
        pool.touch(endangered)
        pool.free_blocks(endangered)
        self._seen_queue = self._queue_state(pool)
        self.moves += len(endangered)
        return len(endangered)

    def resident_blocks(self, scope: str | None = None) -> int:
        """Blocks of remembered prefixes that are in the pool now, each counted once."""
        by_scope = self.resident_by_scope()
        return sum(by_scope.values()) if scope is None else by_scope.get(scope, 0)

    def resident_by_scope(self) -> dict[str, int]:
        """Scope -> blocks in the pool now. A block is of one scope: scopes have own salts."""
        ids: dict[str, set[int]] = {prefix.scope: set() for prefix in self._prefixes.values()}
        for prefix in self._prefixes.values():
            ids[prefix.scope].update(
                pin.block_id for pin in itertools.takewhile(self._is_ours, prefix.pins)
            )
        return {scope: len(found) for scope, found in ids.items()}

    def _is_ours(self, pin: Pin) -> bool:
        return self._pool is None or bool(
            self._pool.blocks[pin.block_id].block_hash == pin.block_hash
        )

    # --- the budget ---------------------------------------------------------------------

    def _take(self, prefix: ResidentPrefix) -> None:
        """Keep as much of a prefix as the budget leaves, from its start."""
        for index in range(prefix.kept_blocks, len(prefix.pins)):
            pin = prefix.pins[index]
            if not self._is_ours(pin):
                self._cut(prefix, index)
                return
            kept = self._kept.get(pin.block_id)
            if kept is not None and kept.block_hash != pin.block_hash:
                self._lose(pin.block_id)
                kept = None
            if kept is None:
                if len(self._kept) >= self.budget_blocks:
                    return
                kept = self._kept[pin.block_id] = _KeptBlock(pin.block_hash, prefix.rank)
            kept.owners[prefix.key] = prefix
            kept.rank = max(kept.rank, prefix.rank)
            prefix.kept_blocks = index + 1

    def _rebalance(self, now: float) -> None:
        """Choose anew: whole prefixes by rank, then the start of the next one."""
        if now < self._rebalance_at:
            return
        self._unbalanced = False
        self._rebalance_at = now + _REBALANCE_SECONDS
        self._kept = {}
        self._seen_queue = None
        by_rank = sorted(self._prefixes.values(), key=lambda p: p.rank, reverse=True)
        for prefix in by_rank:
            prefix.kept_blocks = 0
        for prefix in by_rank:
            self._take(prefix)
        self._crowded = any(prefix.kept_blocks < len(prefix.pins) for prefix in by_rank)

    def _lose(self, block_id: int) -> None:
        """The pool gave a kept block away; what its owners have after it is of no use."""
        for owner in list(self._kept[block_id].owners.values()):
            ids = [pin.block_id for pin in owner.pins]
            self._cut(owner, ids.index(block_id))

    def _cut(self, prefix: ResidentPrefix, index: int) -> None:
        """Shorten a prefix to its first `index` pins."""
        for pin in prefix.pins[index : prefix.kept_blocks]:
            kept = self._kept[pin.block_id]
            kept.owners.pop(prefix.key, None)
            if not kept.owners:
                del self._kept[pin.block_id]
        prefix.pins = prefix.pins[:index]
        if prefix.kept_blocks > index:
            prefix.kept_blocks = index
            self._unbalanced |= self._crowded
        if index == 0:
            self._prefixes.pop(prefix.key, None)

    def _forget(self, prefix: ResidentPrefix) -> None:
        self._cut(prefix, 0)

    # --- the queue ----------------------------------------------------------------------

    @staticmethod
    def _queue_state(pool: Pool) -> tuple[int, int, int]:
        """Differs whenever blocks came to or went from the queue, up to rare coincidence."""
        queue = pool.free_block_queue
        head = queue.fake_free_list_head.next_free_block
        tail = queue.fake_free_list_tail.prev_free_block
        return queue.num_free_blocks, id(head), id(tail)

    def _endangered(self, pool: Pool) -> list[Any]:
        """Kept blocks with fewer than `horizon` other blocks before them, in queue order.

        Where the pool has hardly any other free block, moving every kept one with each step
        would cost more than it saves: only those near the head are looked at then.
        """
        queue = pool.free_block_queue
        enough_others = queue.num_free_blocks - len(self._kept) >= self._horizon
        left_to_walk = math.inf if enough_others else 2 * self._horizon
        found: list[Any] = []
        lost: list[int] = []
        others, useful = 0, False
        block = queue.fake_free_list_head.next_free_block
        # The queue ends with a sentinel whose id is -1.
        while block.block_id >= 0 and others < self._horizon and left_to_walk > 0:
            left_to_walk -= 1
            kept = self._kept.get(block.block_id)
            if kept is not None and kept.block_hash == block.block_hash:
                found.append(block)
            else:
                others += 1
                # There is a block behind kept ones that may go before them.
                useful = bool(found)
                if kept is not None:
                    lost.append(block.block_id)
            block = block.next_free_block
        if queue.fake_free_list_tail.prev_free_block.block_id not in self._kept:
            useful = True
        for block_id in lost:
            if block_id in self._kept:
                self._lose(block_id)
        # All or none: a prefix's start must not come to lie before its tail.
        return [block for block in found if useful and block.block_id in self._kept]
