"""The simulator's caches against hand-worked traces, the paper's ARC and the store's own ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memos_vllm.activation.store import ArtifactManifest, LeastValuableFirst, PrefixIdentity
from memos_vllm.activation.store.errors import ArtifactStoreFull
from memos_vllm.activation.store.ledger import Ledger
from memos_vllm.activation.store.worth import Worth
from memos_vllm.bench.simulation.caches import (
    Arc,
    BlockLru,
    Cache,
    KeepsNothing,
    WholeByUse,
    WholeLru,
)

Traces = st.lists(st.integers(0, 12), max_size=150)
SIZES = [1 + (key * 7) % 5 for key in range(13)]


def hits(cache: Cache, keys: Sequence[int] | str, sizes: Sequence[int] | None = None) -> list[bool]:
    """For each key, whether all of it was there when it was asked."""
    found = []
    for letter in keys:
        key = ord(letter) if isinstance(letter, str) else letter
        size = 1 if sizes is None else sizes[key]
        found.append(cache.held(key) == size)
        cache.use(key, size, 0.0)
    return found


def held(cache: Cache, keys: str) -> str:
    return "".join(key for key in keys if cache.held(ord(key)))


@pytest.mark.parametrize("kind", [WholeLru, BlockLru])
def test_lru_by_hand(kind: type[WholeLru] | type[BlockLru]) -> None:
    cache = kind(3)
    assert hits(cache, "abcadb") == [False, False, False, True, False, False]
    # d pushed out b, the oldest; then b pushed out c.
    assert held(cache, "abcd") == "abd"


def test_of_the_oldest_prefix_the_pool_loses_the_tail_first() -> None:
    cache = BlockLru(5)
    cache.use(1, 3, 0.0)
    cache.use(2, 2, 0.0)
    cache.use(3, 2, 0.0)
    assert [cache.held(key) for key in (1, 2, 3)] == [1, 2, 2]
    cache.use(1, 3, 0.0)
    assert [cache.held(key) for key in (1, 2, 3)] == [3, 0, 2]


def test_a_store_gives_up_whole_artifacts_and_refuses_one_that_never_fits() -> None:
    cache = WholeLru(5)
    cache.use(1, 3, 0.0)
    cache.use(2, 2, 0.0)
    cache.use(3, 2, 0.0)
    assert [cache.held(key) for key in (1, 2, 3)] == [0, 2, 2]
    cache.use(4, 6, 0.0)
    assert [cache.held(key) for key in (2, 3, 4)] == [2, 2, 0]


def test_arc_by_hand() -> None:
    cache = Arc(3)
    # a and b are seen twice; c and d once, and d pushes out c, the oldest of those seen once.
    assert hits(cache, "aabbcd") == [False, True, False, True, False, False]
    assert held(cache, "abcd") == "abd"
    assert cache.target == 0.0
    # c comes back from the names of those seen once: they should have had one place more. d is
    # that place, so what goes is a, the oldest of those seen often.
    assert hits(cache, "c") == [False]
    assert (cache.target, held(cache, "abcd")) == (1.0, "bcd")
    # a comes back from the names of those seen often, which takes the place away again: d goes.
    assert hits(cache, "a") == [False]
    assert (cache.target, held(cache, "abcd")) == (0.0, "abc")


def test_arc_keeps_what_is_asked_often_through_a_flood_where_lru_loses_it() -> None:
    flood = [key for number in range(100) for key in (1000 + number,)]
    for cache, stays in ((Arc(10), True), (WholeLru(10), False)):
        for key in [1, 2, 3, 1, 2, 3, *flood]:
            cache.use(key, 1, 0.0)
        assert all(cache.held(key) for key in (1, 2, 3)) is stays


class ArcOfThePaper:
    """Megiddo and Modha's figure 4, written down case by case for pages of one size."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def replace(self, x: int) -> None:
        t1 = len(self.t1)
        if t1 >= 1 and ((x in self.b2 and t1 == self.p) or t1 > self.p):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def use(self, x: int) -> bool:
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
            return True
        b1, b2 = len(self.b1), len(self.b2)
        if x in self.b1:
            self.p = min(float(self.c), self.p + (1.0 if b1 >= b2 else b2 / b1))
            self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
            return False
        if x in self.b2:
            self.p = max(0.0, self.p - (1.0 if b2 >= b1 else b1 / b2))
            self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
            return False
        once, often = len(self.t1) + b1, len(self.t2) + b2
        if once == self.c:
            if len(self.t1) < self.c:
                self.b1.pop(0)
                self.replace(x)
            else:
                self.t1.pop(0)
        elif once + often >= self.c:
            if once + often == 2 * self.c:
                self.b2.pop(0)
            self.replace(x)
        self.t1.append(x)
        return False


# The last key comes back from the often-used while those used once take just their target.
@example(keys=[1, 3, 4, 1, 5, 3, 4, 1], capacity=3)
@given(keys=Traces, capacity=st.integers(1, 8))
def test_arc_with_one_size_is_the_papers_arc_step_by_step(keys: list[int], capacity: int) -> None:
    ours, papers = Arc(capacity), ArcOfThePaper(capacity)
    for key in keys:
        assert (ours.held(key) == 1) == papers.use(key)
        ours.use(key, 1, 0.0)
        assert ours.target == papers.p
        for mine, theirs in (
            (ours._once, papers.t1),
            (ours._often, papers.t2),
            (ours._once_gone, papers.b1),
            (ours._often_gone, papers.b2),
        ):
            assert list(mine.sizes) == theirs


@given(keys=Traces, capacity=st.integers(0, 40))
@pytest.mark.parametrize("kind", [WholeLru, WholeByUse, BlockLru, Arc])
def test_no_cache_holds_more_than_its_capacity_or_more_of_a_prefix_than_there_is(
    kind: Callable[[int], Cache], keys: list[int], capacity: int
) -> None:
    cache = kind(capacity)
    for key in keys:
        cache.use(key, SIZES[key], 0.0)
        held_by_key = [cache.held(other) for other in range(13)]
        assert sum(held_by_key) == cache.used <= capacity
        assert all(count <= size for count, size in zip(held_by_key, SIZES, strict=True))


@given(keys=Traces, capacity=st.integers(1, 40))
def test_arcs_target_stays_within_the_capacity_and_its_names_within_twice_of_it(
    keys: list[int], capacity: int
) -> None:
    cache = Arc(capacity)
    for key in keys:
        cache.use(key, SIZES[key], 0.0)
        assert 0.0 <= cache.target <= capacity
        once = cache._once.total + cache._once_gone.total
        often = cache._often.total + cache._often_gone.total
        assert once <= capacity
        assert once + often <= 2 * capacity
        queues = (cache._once, cache._often, cache._once_gone, cache._often_gone)
        names = [name for queue in queues for name in queue.sizes]
        assert len(names) == len(set(names))
        assert all(queue.total == sum(queue.sizes.values()) for queue in queues)


@given(keys=Traces, small=st.integers(1, 20), more=st.integers(0, 20))
def test_a_larger_pool_of_lru_never_holds_less(keys: list[int], small: int, more: int) -> None:
    """It is a stack algorithm, so every hit of the smaller one is a hit of the larger one."""
    smaller, larger = BlockLru(small), BlockLru(small + more)
    for key in keys:
        assert smaller.held(key) <= larger.held(key)
        smaller.use(key, SIZES[key], 0.0)
        larger.use(key, SIZES[key], 0.0)


@given(keys=Traces, small=st.integers(max(SIZES), 30), more=st.integers(0, 20))
def test_a_larger_store_of_lru_never_holds_less_where_every_artifact_fits(
    keys: list[int], small: int, more: int
) -> None:
    smaller, larger = WholeLru(small), WholeLru(small + more)
    for key in keys:
        assert smaller.held(key) <= larger.held(key)
        smaller.use(key, SIZES[key], 0.0)
        larger.use(key, SIZES[key], 0.0)


@given(keys=Traces, capacity=st.integers(1, 30), names=st.integers(0, 5))
def test_the_simulated_store_holds_what_the_real_stores_ledger_holds(
    keys: list[int], capacity: int, names: int
) -> None:
    simulated = WholeByUse(capacity, half_life_seconds=10.0, names=names)
    ledger = Ledger(
        budget_bytes=capacity,
        policy=LeastValuableFirst(),
        worth=Worth(half_life_seconds=10.0, names=names),
    )
    for now, key in enumerate(keys, start=1):
        simulated.use(key, SIZES[key], float(now))
        name = str(key)
        if ledger.index.get(name) is not None:
            ledger.worth.use(name, now=float(now))
        else:
            _save(ledger, name, SIZES[key], now=float(now))
        real = {int(manifest.key): manifest.size_bytes for manifest in ledger.index.manifests()}
        assert {k: simulated.held(k) for k in range(13) if simulated.held(k)} == real


def _save(ledger: Ledger, name: str, size: int, *, now: float) -> None:
    """As `ArtifactStore._commit` does, without the files."""
    identity = PrefixIdentity(name, "m", "n", 1)
    manifest = ArtifactManifest(
        key=name,
        identity=identity,
        token_ids=np.full(16, int(name), dtype=np.uint32),
        num_tokens=16,
        total_layers=1,
        total_kv_heads=1,
        shards=(),
        created_at=now,
        size_bytes=size,
    )
    try:
        victims = ledger.victims(name, size, replaced=None, identity=identity, now=now)
    except ArtifactStoreFull:
        return
    ledger.commit(manifest, now=now)
    for victim in victims:
        ledger.evict(victim)


@given(keys=Traces, capacity=st.integers(1, 30), names=st.integers(0, 5))
def test_by_use_the_least_used_artifact_goes_first(
    keys: list[int], capacity: int, names: int
) -> None:
    """Beside the same rule without a heap: uses halved every 10 seconds, added up."""
    cache = WholeByUse(capacity, half_life_seconds=10.0, names=names)
    stored: dict[int, list[float]] = {}
    gone: dict[int, list[float]] = {}
    for now, key in enumerate(keys):
        cache.use(key, SIZES[key], float(now))
        if SIZES[key] <= capacity and key in stored:
            stored[key].append(now)
        elif SIZES[key] <= capacity:
            uses = [*gone.pop(key, []), float(now)]
            while sum(SIZES[other] for other in stored) + SIZES[key] > capacity:
                lowest = min(
                    stored, key=lambda k: (sum(2.0 ** (use / 10.0) for use in stored[k]), k)
                )
                gone[lowest] = stored.pop(lowest)
                if len(gone) > names:
                    del gone[next(iter(gone))]
            stored[key] = uses
        assert {k for k in range(13) if cache.held(k)} == set(stored)


def test_by_use_a_flood_of_artifacts_used_once_leaves_those_used_often() -> None:
    for cache, stays in ((WholeByUse(10), True), (WholeLru(10), False)):
        for now, key in enumerate([1, 2, 3, 1, 2, 3, *range(1000, 5000)]):
            cache.use(key, 1, float(now))
        assert all(cache.held(key) for key in (1, 2, 3)) is stays


def test_keeping_nothing_keeps_nothing() -> None:
    cache = KeepsNothing()
    cache.use(1, 3, 0.0)
    assert (cache.held(1), cache.used) == (0, 0)
