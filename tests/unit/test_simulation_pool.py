"""The simulated KV pool against vLLM's, and what the engine's residency keeps in either."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from memos_vllm.activation.residency import MAX_PREFIXES, Residency
from memos_vllm.bench.simulation.block_pool import ResidentPool
from memos_vllm.bench.simulation.caches import BlockLru

SIZES = [1 + (key * 5) % 7 for key in range(10)]
# A memory's use, or a plain prompt of so many blocks; and the seconds until then.
Events = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 9), st.integers(-12, -1)),
        st.sampled_from([0.0, 0.3, 2.0, 400.0]),
    ),
    max_size=80,
)


class RealPool:
    """Requests one after another on vLLM's own block pool, with or without our residency."""

    def __init__(self, capacity: int, *, budget: int | None, step_blocks: int) -> None:
        # vLLM never gives away one block of a pool.
        self.pool = BlockPool(capacity + 1, enable_caching=True, hash_block_size=16)
        self.step_blocks, self.now, self.prompts = step_blocks, 0.0, 0
        self.residency = Residency(
            budget_blocks=budget or 0,
            horizon_blocks=min(step_blocks, capacity),
            clock=lambda: self.now,
        )
        self.residency.bind(self.pool)

    def held(self, key: str) -> int:
        found = 0
        while self.pool.cached_block_hash_to_block.get_one_block(_hash(key, found)):
            found += 1
        return found

    def use(self, key: str, size: int, now: float, *, memory: bool) -> None:
        self.now = now
        pool, held = self.pool, self.held(key)
        blocks: list[Any] = [
            pool.cached_block_hash_to_block.get_one_block(_hash(key, index))
            for index in range(held)
        ]
        pool.touch(blocks)
        while len(blocks) < size:
            fresh = pool.get_new_blocks(min(self.step_blocks, size - len(blocks)))
            for index, block in enumerate(fresh, start=len(blocks)):
                pool._insert_block_hash(_hash(key, index), block, num_tokens=16 * (index + 1))
            blocks += fresh
            if len(blocks) < size:
                self.residency.keep()
        if memory:
            self.residency.remember(key, key, blocks)
        pool.free_blocks(reversed(blocks))
        self.residency.keep()

    def run_plain(self, size: int, now: float) -> None:
        self.prompts += 1
        self.use(f"plain-{self.prompts}", size, now, memory=False)


def _hash(key: str, index: int) -> Any:
    return make_block_hash_with_group_id(BlockHash(f"{key}/{index}".encode().ljust(32)), 0)


def run_both(
    events: list[tuple[int, float]], simulated: Any, real: RealPool
) -> list[tuple[list[int], list[int]]]:
    """What each holds of every memory, after every event."""
    now, seen = 0.0, []
    for event, pause in events:
        now += pause
        if event < 0:
            simulated.run_plain(-event, now)
            real.run_plain(-event, now)
        else:
            simulated.use(event, SIZES[event], now)
            real.use(str(event), SIZES[event], now, memory=True)
        keys = range(len(SIZES))
        seen.append(([simulated.held(key) for key in keys], [real.held(str(key)) for key in keys]))
    return seen


@given(
    events=Events,
    capacity=st.integers(12, 60),
    budget=st.integers(0, 40),
    step_blocks=st.integers(1, 16),
)
@settings(deadline=None)
def test_the_simulated_pool_holds_what_vllms_pool_holds_under_the_same_residency(
    events: list[tuple[int, float]], capacity: int, budget: int, step_blocks: int
) -> None:
    simulated = ResidentPool(capacity, budget_blocks=budget, step_blocks=step_blocks)
    real = RealPool(capacity, budget=budget, step_blocks=step_blocks)
    for ours, vllms in run_both(events, simulated, real):
        assert ours == vllms
    assert _kept(simulated.residency) == _kept(real.residency)
    assert simulated.residency.moves == real.residency.moves


def _kept(residency: Residency) -> dict[str, int]:
    return {str(key): prefix.kept_blocks for key, prefix in residency._prefixes.items()}


class LruWithPlain(BlockLru):
    prompts = 0

    def run_plain(self, size: int, now: float) -> None:
        self.prompts += 1
        self.use(-self.prompts, size, now)


@given(events=Events, capacity=st.integers(12, 60))
@settings(deadline=None)
def test_plain_vllm_is_the_simulated_lru(events: list[tuple[int, float]], capacity: int) -> None:
    simulated = LruWithPlain(capacity)
    real = RealPool(capacity, budget=None, step_blocks=12)
    for ours, vllms in run_both(events, simulated, real):
        assert ours == vllms


def test_what_residency_keeps_outlives_plain_traffic_that_turns_the_pool_over() -> None:
    pool = ResidentPool(60, budget_blocks=12, step_blocks=8)
    for now in range(4):
        pool.use(1, 6, float(now))
        pool.use(2, 6, float(now))
    pool.use(3, 6, 10.0)
    for prompt in range(50):
        pool.run_plain(8, 20.0 + prompt)
    assert [pool.held(key) for key in (1, 2, 3)] == [6, 6, 0]


def test_the_engines_bound_on_remembered_prefixes_holds_in_the_simulation() -> None:
    pool = ResidentPool(3 * MAX_PREFIXES, budget_blocks=MAX_PREFIXES, step_blocks=8)
    for key in range(2 * MAX_PREFIXES):
        pool.use(key, 1, float(key))
    assert len(pool.residency._prefixes) == MAX_PREFIXES


@pytest.mark.parametrize("seed", range(3))
def test_the_pools_queue_stays_whole(seed: int) -> None:
    """Every block is in the queue exactly once between requests, linked both ways."""
    rng = random.Random(seed)
    pool = ResidentPool(50, budget_blocks=20, step_blocks=9)
    for step in range(400):
        if rng.random() < 0.5:
            pool.run_plain(rng.randint(1, 30), float(step))
        else:
            key = rng.randint(0, 9)
            pool.use(key, SIZES[key], float(step))
        queue = pool.pool.free_block_queue
        ids, block = [], queue.fake_free_list_head
        while block.next_free_block is not queue.fake_free_list_tail:
            assert block.next_free_block.prev_free_block is block
            block = block.next_free_block
            ids.append(block.block_id)
        assert sorted(ids) == list(range(50))
        assert queue.num_free_blocks == 50
        assert all(block.ref_cnt == 0 for block in pool.pool.blocks)
