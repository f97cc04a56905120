"""A KV pool in Python that behaves like vLLM's, for the engine's own residency policy to run on.

Its tests compare it with vLLM's `BlockPool`, block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from memos_vllm.activation.residency import Residency

# The hash of blocks of plain prompts: they are in vLLM's prefix cache, and never asked again.
_PLAIN = -1


class SimulatedBlock:
    """One block of the pool, with the names that `Residency` reads in vLLM's blocks."""

    __slots__ = (
        "block_hash",
        "block_id",
        "is_null",
        "next_free_block",
        "prev_free_block",
        "ref_cnt",
    )

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.is_null = False
        self.block_hash: int | None = None
        self.prev_free_block = self
        self.next_free_block = self


class FreeQueue:
    """Free blocks, the next one to be given away first."""

    def __init__(self, blocks: Sequence[SimulatedBlock]) -> None:
        self.fake_free_list_head = SimulatedBlock(-1)
        self.fake_free_list_tail = SimulatedBlock(-1)
        self.fake_free_list_head.next_free_block = self.fake_free_list_tail
        self.fake_free_list_tail.prev_free_block = self.fake_free_list_head
        self.num_free_blocks = 0
        self.append(blocks)

    def append(self, blocks: Iterable[SimulatedBlock]) -> None:
        """To the tail, in the order given."""
        tail = self.fake_free_list_tail
        last = tail.prev_free_block
        for block in blocks:
            last.next_free_block = block
            block.prev_free_block = last
            last = block
            self.num_free_blocks += 1
        last.next_free_block = tail
        tail.prev_free_block = last

    def remove(self, block: SimulatedBlock) -> None:
        before, after = block.prev_free_block, block.next_free_block
        before.next_free_block = after
        after.prev_free_block = before
        self.num_free_blocks -= 1

    def pop(self, count: int) -> list[SimulatedBlock]:
        """The first `count` blocks, which the caller knows to be there."""
        head = self.fake_free_list_head
        block = head.next_free_block
        taken = []
        for _ in range(count):
            taken.append(block)
            block = block.next_free_block
        head.next_free_block = block
        block.prev_free_block = head
        self.num_free_blocks -= count
        return taken


class SimulatedPool:
    """The part of vLLM's block pool that residency and a request need."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks: Sequence[Any] = [SimulatedBlock(block_id) for block_id in range(num_blocks)]
        self.free_block_queue = FreeQueue(self.blocks)

    def allocate(self, block_hashes: Sequence[int]) -> list[SimulatedBlock]:
        """Blocks from the head of the queue, with their new hashes."""
        taken = self.free_block_queue.pop(len(block_hashes))
        for block, block_hash in zip(taken, block_hashes, strict=True):
            block.ref_cnt = 1
            block.block_hash = block_hash
        return taken

    def touch(self, blocks: Iterable[SimulatedBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[SimulatedBlock]) -> None:
        """To the tail of the queue. Every block here has a hash; vLLM puts others to the head."""
        freed = []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        self.free_block_queue.append(freed)

    def evict_blocks(self, block_ids: set[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id].block_hash = None


class ResidentPool:
    """The KV pool of a server with memory: vLLM's prefix cache, with our soft pins on it.

    Requests run one after another, so that all of the pool is free between them; and as in the
    engine, residency looks at the queue after each step's allocation.

    Args:
        budget_blocks: most blocks that residency keeps.
        step_blocks: most blocks that one engine step allocates.
        half_life_seconds: of past uses; None is the engine's default.
    """

    def __init__(
        self,
        capacity: int,
        *,
        budget_blocks: int,
        step_blocks: int,
        half_life_seconds: float | None = None,
    ) -> None:
        self.pool = SimulatedPool(capacity)
        self._now = 0.0
        half_life = {} if half_life_seconds is None else {"half_life_seconds": half_life_seconds}
        self.residency = Residency(
            budget_blocks=budget_blocks,
            horizon_blocks=min(step_blocks, capacity),
            clock=lambda: self._now,
            **half_life,
        )
        self.residency.bind(self.pool)
        self._step_blocks = step_blocks
        self._blocks: dict[int, list[SimulatedBlock]] = {}

    @property
    def used(self) -> int:
        return sum(self.held(key) for key in self._blocks)

    def held(self, key: int) -> int:
        return len(self._leading(key))

    def use(self, key: int, size: int, now: float) -> None:
        self._now = now
        first = _hash_of(key, 0)
        blocks = self._leading(key)
        self.pool.touch(blocks)
        self._extend(blocks, range(first + len(blocks), first + self._fitting(size)))
        self._blocks[key] = blocks
        self.residency.remember(key, str(key), blocks)
        self._finish(blocks)

    def run_plain(self, size: int, now: float) -> None:
        self._now = now
        blocks: list[SimulatedBlock] = []
        self._extend(blocks, [_PLAIN] * self._fitting(size))
        self._finish(blocks)

    def _fitting(self, size: int) -> int:
        """Of a prompt larger than the pool, which an engine refuses, the start."""
        return min(size, len(self.pool.blocks))

    def _extend(self, blocks: list[SimulatedBlock], block_hashes: Sequence[int]) -> None:
        """Allocate what a request computes, step by step."""
        for start in range(0, len(block_hashes), self._step_blocks):
            if start:
                self.residency.keep()
            blocks += self.pool.allocate(block_hashes[start : start + self._step_blocks])

    def _finish(self, blocks: list[SimulatedBlock]) -> None:
        self.pool.free_blocks(reversed(blocks))
        self.residency.keep()

    def _leading(self, key: int) -> list[SimulatedBlock]:
        """The blocks of a prefix that are in the pool, up to the first one that is not."""
        leading = []
        for block_hash, block in enumerate(self._blocks.get(key, ()), start=_hash_of(key, 0)):
            if block.block_hash != block_hash:
                break
            leading.append(block)
        return leading


def _hash_of(key: int, index: int) -> int:
    """Names a block among all prefixes, of at most 2**24 blocks each."""
    return (key << 24) + index
