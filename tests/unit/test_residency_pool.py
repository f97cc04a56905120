"""Residency over vLLM's real block pool: what it may do to the pool, and what survives."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from memos_vllm.activation.residency import MAX_PREFIXES, Residency

BLOCK = 16


def hash_of(name: str, index: int) -> Any:
    return make_block_hash_with_group_id(BlockHash(f"{name}/{index}".encode().ljust(32)), 0)


def compute(pool: BlockPool, name: str, count: int) -> list[KVCacheBlock]:
    """Blocks of a prompt as a request leaves them: those in the cache shared, the others new."""
    blocks: list[KVCacheBlock] = []
    for index in range(count):
        cached = pool.cached_block_hash_to_block.get_one_block(hash_of(name, index))
        if cached is None:
            break
        blocks.append(cached)
    pool.touch(blocks)
    fresh = pool.get_new_blocks(count - len(blocks))
    for index, block in enumerate(fresh, start=len(blocks)):
        pool._insert_block_hash(hash_of(name, index), block, num_tokens=BLOCK * (index + 1))
    return blocks + fresh


def finish(pool: BlockPool, blocks: Sequence[KVCacheBlock]) -> None:
    pool.free_blocks(reversed(blocks))


def free_queue(pool: BlockPool) -> list[int]:
    """Block ids in eviction order, with every link checked in both directions."""
    queue = pool.free_block_queue
    ids: list[int] = []
    previous, block = queue.fake_free_list_head, queue.fake_free_list_head.next_free_block
    while block is not queue.fake_free_list_tail:
        assert block is not None
        assert block.prev_free_block is previous
        ids.append(block.block_id)
        assert len(ids) <= len(pool.blocks), "the free queue has a loop"
        previous, block = block, block.next_free_block
    assert queue.fake_free_list_tail.prev_free_block is previous
    assert len(ids) == len(set(ids)) == pool.get_num_free_blocks()
    return ids


def hit(pool: BlockPool, name: str, count: int) -> int:
    """How many blocks of a prompt the prefix cache would find."""
    found = 0
    while found < count and pool.cached_block_hash_to_block.get_one_block(hash_of(name, found)):
        found += 1
    return found


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def kept_prefix(
    pool: BlockPool, residency: Residency, name: str, count: int, scope: str = "s"
) -> list[Any]:
    blocks = compute(pool, name, count)
    residency.remember(name, scope, blocks)
    finish(pool, blocks)
    return blocks


def pool_and_residency(
    num_blocks: int, *, budget: int, horizon: int, clock: Callable[[], float] | None = None
) -> tuple[BlockPool, Residency]:
    pool = BlockPool(num_blocks, enable_caching=True, hash_block_size=BLOCK)
    residency = Residency(budget_blocks=budget, horizon_blocks=horizon, clock=clock or Clock())
    residency.bind(pool)
    return pool, residency


class ResidencyMachine(RuleBasedStateMachine):
    """Random engines: requests come, grow, hit, end; floods; resets; evictions by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[list[KVCacheBlock]] = []
        self.remembered: dict[str, int] = {}
        self.flood = 0
        self.clock = Clock()

    @initialize(blocks=st.integers(8, 80), budget=st.integers(0, 40), horizon=st.integers(1, 24))
    def start(self, blocks: int, budget: int, horizon: int) -> None:
        self.pool, self.residency = pool_and_residency(
            blocks, budget=budget, horizon=horizon, clock=self.clock
        )

    def _room(self, count: int) -> bool:
        return self.pool.get_num_free_blocks() >= count

    @rule(name=st.sampled_from("abcdef"), count=st.integers(1, 12), scope=st.sampled_from("xy"))
    def use_memory(self, name: str, count: int, scope: str) -> None:
        if self._room(count):
            self.clock.now += 1.0
            blocks = compute(self.pool, name, count)
            self.residency.remember(name, scope, blocks)
            self.remembered[name] = count
            finish(self.pool, blocks)

    @rule(name=st.sampled_from("abcdefghi"), count=st.integers(1, 12))
    def start_request(self, name: str, count: int) -> None:
        if self._room(count):
            self.running.append(compute(self.pool, name, count))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.running) - 1))
        finish(self.pool, self.running.pop(index))

    @rule(count=st.integers(1, 24), hashed=st.booleans())
    def flood_once(self, count: int, hashed: bool) -> None:
        if self._room(count):
            self.flood += 1
            if hashed:
                finish(self.pool, compute(self.pool, f"flood-{self.flood}", count))
            else:
                finish(self.pool, self.pool.get_new_blocks(count))

    @rule(data=st.data())
    def evict_by_hand(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.integers(1, len(self.pool.blocks) - 1), max_size=3))
        self.pool.evict_blocks(ids)

    @rule(tell=st.booleans())
    def reset(self, tell: bool) -> None:
        expected = not self.running
        assert self.pool.reset_prefix_cache() is expected
        if tell and expected:
            self.residency.clear()

    @rule(scope=st.sampled_from("xyz"))
    def erase(self, scope: str) -> None:
        self.residency.erase_scope(scope)
        assert scope not in self.residency.scopes

    @rule()
    def keep(self) -> None:
        before = sorted(free_queue(self.pool))
        references = [block.ref_cnt for block in self.pool.blocks]
        hashes = [block.block_hash for block in self.pool.blocks]
        moved = self.residency.keep()
        assert moved >= 0
        assert sorted(free_queue(self.pool)) == before, "a block came or went"
        assert [block.ref_cnt for block in self.pool.blocks] == references
        assert [block.block_hash for block in self.pool.blocks] == hashes

    @rule()
    def keep_moves_nothing_that_is_not_ours(self) -> None:
        ours = {
            pin.block_id
            for prefix in self.residency._prefixes.values()
            for pin in prefix.pins
            if self.pool.blocks[pin.block_id].block_hash == pin.block_hash
        }
        others = [block for block in free_queue(self.pool) if block not in ours]
        self.residency.keep()
        assert [block for block in free_queue(self.pool) if block not in ours] == others

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        free_queue(self.pool)
        residency = self.residency
        assert len(residency._kept) <= residency.budget_blocks
        owned: dict[int, set[Any]] = {}
        for key, prefix in residency._prefixes.items():
            assert prefix.pins
            assert 0 <= prefix.kept_blocks <= len(prefix.pins)
            for pin in prefix.pins[: prefix.kept_blocks]:
                owned.setdefault(pin.block_id, set()).add(key)
                assert residency._kept[pin.block_id].block_hash == pin.block_hash
        assert owned == {block: set(kept.owners) for block, kept in residency._kept.items()}
        assert residency.resident_blocks() <= len(self.pool.blocks)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for blocks in self.running:
            finish(self.pool, blocks)
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1
        assert self.pool.reset_prefix_cache()


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("seed", range(8))
def test_prefixes_within_the_budget_survive_floods_of_any_length(seed: int) -> None:
    """Any mix of new prompts and cache hits, of at most `horizon` blocks a step."""
    rng = random.Random(seed)
    horizon = rng.randint(4, 40)
    sizes = [rng.randint(1, 20) for _ in range(rng.randint(1, 6))]
    pool, residency = pool_and_residency(
        1 + sum(sizes) + 3 * horizon, budget=sum(sizes), horizon=horizon
    )
    for index, size in enumerate(sizes):
        kept_prefix(pool, residency, f"memory-{index}", size)
    running: list[list[KVCacheBlock]] = []
    for step in range(600):
        left = horizon
        # At least twice the horizon stays free besides memory: the requests end in between.
        while running and (len(running) > 3 or sum(map(len, running)) + horizon > horizon * 2):
            finish(pool, running.pop(0))
        while left > 0:
            count = rng.randint(1, left)
            running.append(compute(pool, f"plain-{rng.randint(0, 40)}-{step // 50}", count))
            left -= count
        residency.keep()
    for index, size in enumerate(sizes):
        assert hit(pool, f"memory-{index}", size) == size
    assert residency.resident_blocks() == sum(sizes)
    free_queue(pool)


def test_a_run_of_prefixes_that_lie_together_is_moved_together() -> None:
    """Those behind the first one must not be left at the head of the queue."""
    pool, residency = pool_and_residency(101, budget=60, horizon=8)
    for index in range(10):
        kept_prefix(pool, residency, f"memory-{index}", 6)
    for step in range(200):
        finish(pool, compute(pool, f"flood-{step}", 8))
        residency.keep()
    assert [hit(pool, f"memory-{index}", 6) for index in range(10)] == [6] * 10


def test_blocks_that_are_hit_in_the_middle_of_the_queue_bring_memory_nearer() -> None:
    """The head of the queue stays where it was, so looking at it alone would miss this."""
    pool, residency = pool_and_residency(36, budget=4, horizon=8)
    stay, warm = pool.get_new_blocks(1), compute(pool, "warm", 20)
    memory, last = compute(pool, "memory", 4), compute(pool, "last", 10)
    residency.remember("memory", "s", memory)
    for blocks in (stay, warm, memory, last):
        finish(pool, blocks)
    head, tail = free_queue(pool)[0], free_queue(pool)[-1]
    assert residency.keep() == 0
    compute(pool, "warm", 20)
    assert (free_queue(pool)[0], free_queue(pool)[-1]) == (head, tail)
    assert residency.keep() == 4
    compute(pool, "next", 8)
    assert hit(pool, "memory", 4) == 4


def test_a_lost_block_cuts_the_prefix_there_and_its_rest_is_no_longer_kept() -> None:
    pool, residency = pool_and_residency(41, budget=10, horizon=40)
    kept_prefix(pool, residency, "memory", 8)
    pool.evict_blocks({residency._prefixes["memory"].pins[3].block_id})
    residency.keep()
    assert residency.resident_blocks() == 3
    assert len(residency._kept) == 3


def test_a_block_that_another_prompt_has_taken_is_never_moved_as_ours() -> None:
    pool, residency = pool_and_residency(9, budget=4, horizon=8)
    kept_prefix(pool, residency, "memory", 4)
    finish(pool, compute(pool, "other", 8))
    before = free_queue(pool)
    assert residency.keep() == 0
    assert free_queue(pool) == before
    assert residency.resident_blocks() == 0


def test_the_tail_of_a_prefix_goes_first_after_every_move() -> None:
    pool, residency = pool_and_residency(65, budget=12, horizon=10)
    kept_prefix(pool, residency, "memory", 12)
    ids = [pin.block_id for pin in residency._prefixes["memory"].pins]
    moves = 0
    for step in range(50):
        finish(pool, compute(pool, f"flood-{step}", 10))
        moves += bool(residency.keep())
        order = [free_queue(pool).index(block) for block in ids]
        assert order == sorted(order, reverse=True)
    assert moves > 3


def test_of_prefixes_moved_together_the_more_used_one_goes_last() -> None:
    clock = Clock()
    pool, residency = pool_and_residency(30, budget=12, horizon=29, clock=clock)
    kept_prefix(pool, residency, "often", 4)
    kept_prefix(pool, residency, "often", 4)
    kept_prefix(pool, residency, "rare", 4)
    finish(pool, compute(pool, "flood", 5))
    assert residency.keep() == 8
    order = free_queue(pool)
    often, rare = (residency._prefixes[name].pins for name in ("often", "rare"))
    assert max(order.index(pin.block_id) for pin in rare) < min(
        order.index(pin.block_id) for pin in often
    )


def test_where_only_memory_is_free_nothing_is_moved() -> None:
    """It would cost time with every step and protect nothing."""
    pool, residency = pool_and_residency(21, budget=12, horizon=8)
    kept_prefix(pool, residency, "memory", 12)
    running = pool.get_new_blocks(8)
    assert residency.keep() == 0
    finish(pool, running)
    assert residency.keep() == 0
    finish(pool, compute(pool, "plain", 4))
    assert residency.keep() == 12


def test_the_budget_is_not_spent_on_blocks_that_are_gone() -> None:
    clock = Clock()
    pool, residency = pool_and_residency(65, budget=6, horizon=8, clock=clock)
    kept_prefix(pool, residency, "gone", 6)
    kept_prefix(pool, residency, "gone", 6)
    kept_prefix(pool, residency, "here", 6)
    pool.evict_blocks({pin.block_id for pin in residency._prefixes["gone"].pins[2:]})
    clock.now += 10.0
    kept_prefix(pool, residency, "third", 6)
    assert len(residency._prefixes["gone"].pins) == 2
    assert residency._prefixes["third"].kept_blocks + residency._prefixes["here"].kept_blocks == 4


def test_the_more_used_prefix_is_kept_when_the_budget_holds_one() -> None:
    clock = Clock()
    pool, residency = pool_and_residency(65, budget=6, horizon=8, clock=clock)
    kept_prefix(pool, residency, "rare", 6)
    for _ in range(3):
        clock.now += 2.0
        kept_prefix(pool, residency, "often", 6)
    for step in range(40):
        clock.now += 0.1
        finish(pool, compute(pool, f"flood-{step}", 8))
        residency.keep()
    assert (hit(pool, "often", 6), hit(pool, "rare", 6)) == (6, 0)


def test_old_uses_lose_their_worth() -> None:
    clock = Clock()
    pool, residency = pool_and_residency(65, budget=6, horizon=8, clock=clock)
    for _ in range(5):
        kept_prefix(pool, residency, "yesterday", 6)
    clock.now += 20 * 600.0
    for _ in range(2):
        kept_prefix(pool, residency, "today", 6)
    assert residency._prefixes["today"].kept_blocks == 6
    assert residency._prefixes["yesterday"].kept_blocks == 0


def test_the_budget_left_over_keeps_the_start_of_the_next_prefix() -> None:
    pool, residency = pool_and_residency(65, budget=10, horizon=8)
    kept_prefix(pool, residency, "first", 6)
    kept_prefix(pool, residency, "second", 6)
    assert (
        residency._prefixes["first"].kept_blocks + residency._prefixes["second"].kept_blocks == 10
    )


def test_a_budget_of_zero_keeps_nothing_and_moves_nothing() -> None:
    pool, residency = pool_and_residency(33, budget=0, horizon=8)
    kept_prefix(pool, residency, "memory", 4)
    pool.get_new_blocks(1)
    assert residency.keep() == 0
    assert residency.resident_blocks() == 4


def test_as_many_conversations_as_callers_like_cost_a_bounded_amount() -> None:
    pool, residency = pool_and_residency(600, budget=64, horizon=16)
    blocks = compute(pool, "shared", 4)
    for index in range(3 * MAX_PREFIXES):
        residency.remember(("session", index), "s", blocks)
    finish(pool, blocks)
    assert len(residency._prefixes) == MAX_PREFIXES
    assert all(len(kept.owners) <= MAX_PREFIXES for kept in residency._kept.values())
    for step in range(200):
        finish(pool, compute(pool, f"flood-{step}", 16))
        # A block that many want is moved once, not once for each.
        assert residency.keep() <= 4
    assert hit(pool, "shared", 4) == 4


def test_with_prefix_caching_off_there_is_nothing_to_keep() -> None:
    pool = BlockPool(17, enable_caching=False, hash_block_size=BLOCK)
    residency = Residency(budget_blocks=8, horizon_blocks=8)
    residency.bind(pool)
    blocks = pool.get_new_blocks(4)
    residency.remember("memory", "s", blocks)
    finish(pool, blocks)
    assert residency.keep() == 0
    assert residency.resident_by_scope() == {}


def test_blocks_are_counted_once_for_each_cube() -> None:
    pool, residency = pool_and_residency(65, budget=32, horizon=8)
    kept_prefix(pool, residency, "head", 4, scope="a")
    blocks = compute(pool, "head", 4) + compute(pool, "turn", 3)
    residency.remember("session", "a", blocks)
    finish(pool, blocks)
    kept_prefix(pool, residency, "other", 5, scope="b")
    assert residency.resident_by_scope() == {"a": 7, "b": 5}
    assert (residency.resident_blocks("a"), residency.resident_blocks()) == (7, 12)
    assert residency.scopes == {"a", "b"}


def test_an_erased_scope_cannot_be_found_in_the_prefix_cache_any_more() -> None:
    pool, residency = pool_and_residency(65, budget=32, horizon=8)
    gone = kept_prefix(pool, residency, "head", 4, scope="a")
    stays = kept_prefix(pool, residency, "other", 5, scope="b")
    residency.erase_scope("a")
    assert [block.block_hash for block in gone] == [None] * 4
    assert all(block.block_hash is not None for block in stays)
    assert residency.resident_by_scope() == {"b": 5}
    assert residency.scopes == {"b"}


def test_what_a_step_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed for people; a shared machine asserts no times."""
    pool, residency = pool_and_residency(20_000, budget=5_000, horizon=384)
    for index in range(24):
        kept_prefix(pool, residency, f"memory-{index}", 192)
    times: list[float] = []
    for step in range(300):
        finish(pool, compute(pool, f"flood-{step}", 128))
        begun = time.perf_counter()
        residency.keep()
        times.append(time.perf_counter() - begun)
    idle = time.perf_counter()
    for _ in range(1000):
        residency.keep()
    idle = (time.perf_counter() - idle) / 1000
    times.sort()
    with capsys.disabled():
        print(
            f"\nkeep(): median {times[150] * 1e6:.0f} us in a flood of 128 blocks a step, worst "
            f"{times[-1] * 1e6:.0f} us ({residency.moves} moves), {idle * 1e6:.2f} us when idle"
        )
    assert sum(hit(pool, f"memory-{index}", 192) for index in range(24)) == 24 * 192
