"""What is kept in each tier: our policy, and those that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from memos_vllm.bench.simulation.block_pool import ResidentPool
from memos_vllm.bench.simulation.caches import (
    Arc,
    BlockLru,
    Cache,
    KeepsNothing,
    WholeByUse,
    WholeLru,
)
from memos_vllm.config import ServerSettings
from memos_vllm.errors import ConfigurationError


class Pool(Cache, Protocol):
    """The KV pool: a cache that plain prompts run through too."""

    def run_plain(self, size: int, now: float) -> None:
        """A prompt of `size` blocks without memory, which is not asked again."""


@dataclass(frozen=True, slots=True)
class PoolShape:
    """In blocks of the simulation, which may be larger than the engine's.

    Attributes:
        step_blocks: most blocks that one engine step can allocate.
    """

    capacity: int
    step_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Settings of our own policy; None is the engine's default."""

    residency_fraction: float | None = None
    half_life_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.residency_fraction is not None and not 0 <= self.residency_fraction <= 1:
            raise ConfigurationError(
                f"the residency fraction is {self.residency_fraction}; it is from 0 to 1"
            )
        if self.half_life_seconds is not None and not self.half_life_seconds > 0:
            raise ConfigurationError(
                f"the half-life is {self.half_life_seconds} seconds; it must be above 0"
            )


class Policy(Protocol):
    """How the tiers of one server choose what to keep."""

    @property
    def name(self) -> str: ...

    def pool(self, shape: PoolShape) -> Pool: ...

    def store(self, capacity: int) -> Cache:
        """A tier of whole artifacts below the pool."""


class KeepNothing:
    """Every memory is computed for every chat: no prefix cache, no store."""

    name = "nothing"

    def pool(self, shape: PoolShape) -> Pool:
        del shape
        return _ForgettingPool()

    def store(self, capacity: int) -> Cache:
        del capacity
        return KeepsNothing()


class Lru:
    """The least recently used goes first, everywhere; in the pool that is plain vLLM."""

    name = "lru"

    def pool(self, shape: PoolShape) -> Pool:
        return _WithPlain(BlockLru(shape.capacity))

    def store(self, capacity: int) -> Cache:
        return WholeLru(capacity)


class AdaptiveReplacement:
    """ARC everywhere; plain prompts go through it like memories that are asked once."""

    name = "arc"

    def pool(self, shape: PoolShape) -> Pool:
        return _WithPlain(Arc(shape.capacity))

    def store(self, capacity: int) -> Cache:
        return Arc(capacity)


class Ours:
    """What the server does: the engine's `Residency` on the pool, the store's `Worth` below.

    It is the engine's class, with its bound of 512 prefixes and its rebalancing once a second
    of the trace, not a copy.
    """

    name = "ours"

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()

    def pool(self, shape: PoolShape) -> Pool:
        fraction = self._tuning.residency_fraction
        if fraction is None:
            fraction = ServerSettings.model_fields["residency_fraction"].default
        return ResidentPool(
            shape.capacity,
            budget_blocks=int(shape.capacity * fraction),
            step_blocks=shape.step_blocks,
            half_life_seconds=self._tuning.half_life_seconds,
        )

    def store(self, capacity: int) -> Cache:
        return WholeByUse(capacity)


POLICIES: dict[str, Callable[[Tuning], Policy]] = {
    "ours": Ours,
    "lru": lambda _tuning: Lru(),
    "arc": lambda _tuning: AdaptiveReplacement(),
    "nothing": lambda _tuning: KeepNothing(),
}


def create_policy(name: str, tuning: Tuning | None = None) -> Policy:
    """A policy by its name in `POLICIES`.

    Raises:
        ConfigurationError: there is none of this name.
    """
    if name not in POLICIES:
        raise ConfigurationError(f"there is no policy '{name}'; there are {', '.join(POLICIES)}")
    return POLICIES[name](tuning or Tuning())


class _ForgettingPool(KeepsNothing):
    def run_plain(self, size: int, now: float) -> None:
        """Nothing is there to be turned over."""


class _WithPlain:
    """A pool of a cache that takes plain prompts as prefixes of their own."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.held = cache.held
        self.use = cache.use
        self._prompts = 0

    @property
    def used(self) -> int:
        return self._cache.used

    def run_plain(self, size: int, now: float) -> None:
        self._prompts += 1
        self._cache.use(-self._prompts, size, now)
