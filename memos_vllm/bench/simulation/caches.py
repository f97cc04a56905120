"""Caches of prefixes for the simulator: LRU, ARC, by use, and none at all.

Sizes are in blocks; what a tier counts as a block is the caller's choice.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol

from memos_vllm.activation.store.worth import GONE_NAMES, HALF_LIFE_SECONDS, rank_after_use


class Cache(Protocol):
    """What one tier holds."""

    @property
    def used(self) -> int:
        """Blocks held, at most the capacity."""

    def held(self, key: int) -> int:
        """How many blocks of a prefix are here, from its start."""

    def use(self, key: int, size: int, now: float) -> None:
        """A prefix of `size` blocks was asked, and lies here now if the cache wants it."""


class KeepsNothing:
    """No cache."""

    used = 0

    def held(self, key: int) -> int:
        del key
        return 0

    def use(self, key: int, size: int, now: float) -> None:
        """Nothing stays."""


class WholeLru:
    """Whole artifacts, the least recently used one out first.

    One that is larger than the capacity is not taken, and changes nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self.used = 0

    def held(self, key: int) -> int:
        return self._sizes.get(key, 0)

    def use(self, key: int, size: int, now: float) -> None:
        del now
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return
        if size > self._capacity:
            return
        while self.used + size > self._capacity:
            self.used -= self._sizes.popitem(last=False)[1]
        self._sizes[key] = size
        self.used += size


class WholeByUse:
    """Whole artifacts, the one with the fewest uses lately out first, as our store has them.

    It is what `store.worth` does, on memories that nobody edits and with a heap in the place
    of the order that the store makes anew when its budget is short.

    Args:
        half_life_seconds: how fast past uses lose their worth.
        names: most artifacts that are remembered after they went.
    """

    def __init__(
        self,
        capacity: int,
        *,
        half_life_seconds: float = HALF_LIFE_SECONDS,
        names: int = GONE_NAMES,
    ) -> None:
        self._capacity, self._names = capacity, names
        self._half_life = half_life_seconds
        self._sizes: dict[int, int] = {}
        self._ranks: dict[int, float] = {}
        self._gone: OrderedDict[int, float] = OrderedDict()
        # The lowest rank first; entries that a later use has outdated are skipped.
        self._order: list[tuple[float, int]] = []
        self.used = 0

    def held(self, key: int) -> int:
        return self._sizes.get(key, 0)

    def use(self, key: int, size: int, now: float) -> None:
        if size > self._capacity:
            return
        before = self._ranks.get(key)
        if before is None:
            before = self._gone.pop(key, None)
            while self.used + size > self._capacity:
                self._drop_lowest()
            self._sizes[key] = size
            self.used += size
        rank = self._ranks[key] = rank_after_use(before, now / self._half_life)
        heapq.heappush(self._order, (rank, key))
        if len(self._order) > 1000 + 4 * len(self._ranks):
            self._order = [(rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._order)

    def _drop_lowest(self) -> None:
        rank, key = heapq.heappop(self._order)
        if self._ranks.get(key) != rank:
            return
        self.used -= self._sizes.pop(key)
        self._gone[key] = self._ranks.pop(key)
        if len(self._gone) > self._names:
            self._gone.popitem(last=False)


class BlockLru:
    """vLLM's own prefix cache: least recently used blocks first, and of a prefix the tail.

    It holds the first `capacity` blocks of the order of last use, so it is a stack algorithm:
    more capacity never holds less.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, int] = OrderedDict()
        self.used = 0

    def held(self, key: int) -> int:
        return self._held.get(key, 0)

    def use(self, key: int, size: int, now: float) -> None:
        del now
        size = min(size, self._capacity)
        self.used += size - self._held.pop(key, 0)
        while self.used > self._capacity:
            oldest = next(iter(self._held))
            excess = self.used - self._capacity
            if self._held[oldest] > excess:
                self._held[oldest] -= excess
                self.used -= excess
            else:
                self.used -= self._held.pop(oldest)
        if size:
            self._held[key] = size


class Arc:
    """Adaptive replacement cache after Megiddo and Modha (FAST 2003), over sizes in blocks.

    The paper's pages have one size. Here its lists are as long as the blocks in them: `target`
    (the paper's p) moves by a page's size times the paper's step, and room is made, in each
    list, until the new page fits. With sizes of 1 it is the paper's algorithm step by step.
    One that is larger than the capacity is not taken, and changes nothing.

    Attributes:
        target: blocks that the prefixes seen once should take, from 0 to the capacity.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # Seen once and more than once lately; and of each, those that went, as names only.
        self._once, self._often = _Queue(), _Queue()
        self._once_gone, self._often_gone = _Queue(), _Queue()
        self.target = 0.0

    @property
    def used(self) -> int:
        return self._once.total + self._often.total

    def held(self, key: int) -> int:
        return self._once.sizes.get(key, 0) or self._often.sizes.get(key, 0)

    def use(self, key: int, size: int, now: float) -> None:
        del now
        if size > self._capacity:
            return
        if key in self._often.sizes:
            self._often.sizes.move_to_end(key)
        elif key in self._once.sizes:
            self._once.remove(key)
            self._often.add(key, size)
        elif key in self._once_gone.sizes:
            step = size * max(1.0, self._often_gone.total / self._once_gone.total)
            self.target = min(float(self._capacity), self.target + step)
            self._bring_back(key, size, self._once_gone)
        elif key in self._often_gone.sizes:
            step = size * max(1.0, self._once_gone.total / self._often_gone.total)
            self.target = max(0.0, self.target - step)
            self._bring_back(key, size, self._often_gone)
        else:
            self._forget_for(size)
            self._make_room(size, came_back_often=False)
            self._once.add(key, size)

    def _bring_back(self, key: int, size: int, gone: _Queue) -> None:
        gone.remove(key)
        self._make_room(size, came_back_often=gone is self._often_gone)
        self._often.add(key, size)

    def _make_room(self, size: int, *, came_back_often: bool) -> None:
        """The paper's REPLACE, until `size` blocks fit."""
        while self.used + size > self._capacity:
            once = self._once.total
            too_long = once > self.target or (came_back_often and once == self.target)
            if self._once.sizes and (too_long or not self._often.sizes):
                self._once_gone.add(*self._once.pop_oldest())
            else:
                self._often_gone.add(*self._often.pop_oldest())

    def _forget_for(self, size: int) -> None:
        """Case IV: names seen once take at most the capacity, all names twice of it."""
        while self._once.total + self._once_gone.total + size > self._capacity:
            (self._once_gone if self._once_gone.sizes else self._once).pop_oldest()
        gone = self._once_gone.total + self._often_gone.total
        excess = self.used + gone + size - 2 * self._capacity
        while excess > 0:
            excess -= self._often_gone.pop_oldest()[1]


class _Queue:
    """Keys in order of last use, with their sizes."""

    __slots__ = ("sizes", "total")

    def __init__(self) -> None:
        self.sizes: OrderedDict[int, int] = OrderedDict()
        self.total = 0

    def add(self, key: int, size: int) -> None:
        self.sizes[key] = size
        self.total += size

    def remove(self, key: int) -> None:
        self.total -= self.sizes.pop(key)

    def pop_oldest(self) -> tuple[int, int]:
        key, size = self.sizes.popitem(last=False)
        self.total -= size
        return key, size
