"""Walks a trace through the tiers of a machine, under one policy, and keeps the accounts.

What is modelled is what the server does. A chat takes what the pool holds of its memory, loads
the rest from the first tier below that holds the artifact whole, and computes what no tier has.
Then its memory lies in the pool, and in every tier below that had none of it: artifacts are
saved as they are computed, and kept in all tiers at once. A tier below notes a use when it is
read, not when the pool answers.

Not modelled: decoding and its blocks, conversations (the engine keeps those too), the time that
saving takes, reads that wait for each other, and batching of prefills.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_vllm.bench.flatness import flatness
from memos_vllm.bench.simulation.policies import Policy, PoolShape
from memos_vllm.bench.simulation.tiers import Machine
from memos_vllm.bench.simulation.trace import Trace
from memos_vllm.errors import ConfigurationError

# An engine's blocks are smaller. Memories are kept in whole blocks, so this decides how finely
# a budget is cut; the time to simulate grows as it shrinks.
BLOCK_TOKENS = 512
# Each block is a Python object of about 100 bytes.
_MOST_BLOCKS = 20_000_000
_PROGRESS_EVERY = 1 << 14
# Closer to full use than this, waiting times depend on the trace's length more than on the tiers.
_MOST_BUSY = 0.95
# Slices of the trace whose mean TTFTs a trend is drawn through: the minutes of an hour.
_SLICES = 60
_LEAST_SLICES = 8

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class TierUse:
    """What a tier was good for.

    Attributes:
        hit_rate: share of chats that needed nothing slower than this tier, but needed it.
        token_rate: share of all memory tokens that came from here.
        written_bytes: brought here because a chat asked for them; into the pool always, into a
            tier below where it had none of them and took them.
    """

    name: str
    capacity_bytes: int
    hit_rate: float
    token_rate: float
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy on one machine and trace.

    Attributes:
        hit_rate: share of chats that computed nothing of their memory.
        computed_token_rate: share of memory tokens that were computed.
        prefill_seconds: what computing every memory for every chat takes.
        prefill_seconds_saved: how much of it was not done.
        load_seconds: that chats waited for tiers below the pool instead.
        ttft: of a chat that finds the engine idle.
        ttft_queued: of one that waits for the prefills before it; None where the engine is
            overloaded or nearly so, and waiting never settles.
        ttft_growth: what `ttft` gains from the trace's start to its end, as a share of its median:
            the 95 % interval of a line through the means of 60 slices; None for a few chats.
        engine_busy: share of the time that prefills take, plain prompts' too; can be above 1.
    """

    policy: str
    requests: int
    hit_rate: float
    tiers: tuple[TierUse, ...]
    computed_token_rate: float
    prefill_seconds: float
    prefill_seconds_saved: float
    load_seconds: float
    ttft: Quantiles
    ttft_queued: Quantiles | None
    ttft_growth: tuple[float, float] | None
    engine_busy: float

    def as_json(self) -> dict[str, object]:
        """Plain values, numbers to six places."""
        return {name: _rounded(value) for name, value in dataclasses.asdict(self).items()}


def replay(
    trace: Trace,
    machine: Machine,
    policy: Policy,
    *,
    block_tokens: int = BLOCK_TOKENS,
    warm_up: float = 0.0,
    recompute_when_faster: bool = False,
    on_progress: Progress | None = None,
) -> Outcome:
    """Serve every chat of a trace.

    Args:
        block_tokens: what the tiers are divided into.
        warm_up: share of the trace, from its start, that fills the tiers and is not counted.
        recompute_when_faster: compute where reading a tier takes longer. The server never
            does: it loads what it finds.
        on_progress: told the share done.
    Raises:
        ConfigurationError: blocks or a warm-up that cannot be.
    """
    if block_tokens <= 0 or not 0 <= warm_up < 1:
        raise ConfigurationError(
            f"a block of {block_tokens} tokens and a warm-up of {warm_up:g} cannot be simulated: "
            "blocks have tokens, and a warm-up is a share below 1"
        )
    walk = _Walk(trace, machine, policy, block_tokens, recompute_when_faster)
    counted_from = int(warm_up * len(trace.times))
    for index in range(len(trace.times)):
        if index == counted_from:
            walk.start_counting()
        if on_progress is not None and index % _PROGRESS_EVERY == 0:
            on_progress(index / len(trace.times))
        walk.chat(index)
    return walk.outcome(counted_from)


class _Walk:
    """The state of one replay."""

    def __init__(
        self,
        trace: Trace,
        machine: Machine,
        policy: Policy,
        block_tokens: int,
        recompute_when_faster: bool,
    ) -> None:
        self._trace, self._machine, self._policy = trace, machine, policy
        self._block_tokens = block_tokens
        self._recompute_when_faster = recompute_when_faster
        self._block_bytes = block_tokens * machine.kv_bytes_per_token
        # To the nearest, so that coarse blocks do not make all memories together larger.
        self._sizes = [max(1, round(tokens / block_tokens)) for tokens in trace.cube_tokens]
        self._plain = [round(tokens / block_tokens) for tokens in trace.plain_tokens]
        self._plain_prompt = max(1, round(trace.plain_prompt_tokens / block_tokens))
        self._pool = policy.pool(self._pool_shape())
        self._stores = [
            policy.store(tier.capacity_bytes // self._block_bytes) for tier in machine.stores
        ]
        self._reads = [tier.read_seconds for tier in machine.stores]
        self.start_counting()

    def _pool_shape(self) -> PoolShape:
        """A pool larger than all that ever comes to it is the same as one that just holds it."""
        all_blocks = sum(self._sizes) + sum(self._plain) + 1
        capacity = min(self._machine.pool.capacity_bytes // self._block_bytes, all_blocks)
        if capacity > _MOST_BLOCKS:
            raise ConfigurationError(
                f"a pool of {capacity:,} blocks is more than can be simulated; use larger blocks"
            )
        step_blocks = max(1, -(-self._machine.step_tokens // self._block_tokens))
        return PoolShape(capacity, step_blocks)

    def start_counting(self) -> None:
        tiers = len(self._machine.tiers)
        self._computed, self._loading = array("d"), array("d")
        self._hits, self._tokens, self._written = [0] * tiers, [0] * tiers, [0] * tiers

    def chat(self, index: int) -> None:
        """Run the plain prompts before a chat, and the chat."""
        now, cube = self._trace.times[index], self._trace.cubes[index]
        left = self._plain[index]
        while left > 0:
            self._pool.run_plain(min(left, self._plain_prompt), now)
            left -= self._plain_prompt
        size, tokens = self._sizes[cube], self._trace.cube_tokens[cube]
        held = self._pool.held(cube)
        found = tokens if held >= size else held * self._block_tokens
        rest = tokens - found
        self._tokens[0] += found
        loading, tier = self._load(cube, rest) if rest else (0.0, 0)
        if tier is not None:
            self._hits[tier] += 1
            if tier:
                self._tokens[tier] += rest
                rest = 0
        self._computed.append(rest)
        self._loading.append(loading)
        self._written[0] += size - held
        self._pool.use(cube, size, now)
        for below, store in enumerate(self._stores, start=1):
            if below == tier:
                store.use(cube, size, now)
            elif not store.held(cube):
                store.use(cube, size, now)
                self._written[below] += store.held(cube)

    def _load(self, cube: int, rest: int) -> tuple[float, int | None]:
        """Seconds to read what the pool lacks, and from which tier; none where it is computed."""
        num_bytes = rest * self._machine.kv_bytes_per_token
        for below, store in enumerate(self._stores):
            if store.held(cube):
                seconds = self._reads[below](num_bytes)
                if self._recompute_when_faster and self._machine.prefill_seconds(rest) <= seconds:
                    break
                return seconds, below + 1
        return 0.0, None

    def outcome(self, first: int) -> Outcome:
        machine, trace = self._machine, self._trace
        cubes = np.array(trace.cubes[first:])
        wanted = int(np.array(trace.cube_tokens)[cubes].sum())
        times = np.array(trace.times[first:])
        computing = np.array(self._computed) / machine.prefill_tokens_per_second
        plain = np.array(trace.plain_tokens[first:]) / machine.prefill_tokens_per_second
        loading = np.array(self._loading)
        ttft = loading + computing + machine.first_token_seconds
        busy = float(
            (computing.sum() + plain.sum())
            / (times[-1] - (trace.times[first - 1] if first else 0.0))
        )
        computed_tokens = sum(self._computed)
        queued = None
        if busy < _MOST_BUSY:
            queued = _quantiles(
                _waits(times, plain, loading, computing) + machine.first_token_seconds
            )
        return Outcome(
            policy=self._policy.name,
            requests=len(times),
            hit_rate=sum(self._hits) / len(times),
            tiers=tuple(
                TierUse(
                    name=tier.name,
                    capacity_bytes=tier.capacity_bytes,
                    hit_rate=self._hits[index] / len(times),
                    token_rate=self._tokens[index] / wanted,
                    read_bytes=self._tokens[index] * machine.kv_bytes_per_token,
                    written_bytes=self._written[index] * self._block_bytes,
                )
                for index, tier in enumerate(machine.tiers)
            ),
            computed_token_rate=computed_tokens / wanted,
            prefill_seconds=machine.prefill_seconds(wanted),
            prefill_seconds_saved=machine.prefill_seconds(wanted - computed_tokens),
            load_seconds=float(loading.sum()),
            ttft=_quantiles(ttft),
            ttft_queued=queued,
            ttft_growth=_growth(times, ttft),
            engine_busy=busy,
        )


def _waits(
    times: npt.NDArray[np.float64],
    plain: npt.NDArray[np.float64],
    loading: npt.NDArray[np.float64],
    computing: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Seconds from each chat's arrival to the end of its prefill, with one engine that computes
    one prompt after another.

    Plain prompts arrive halfway between two chats. A load runs beside the engine's work, and
    the engine waits for none: a chat that computes nothing does not hold up those behind it.
    """
    free = before = 0.0
    seconds = np.empty_like(times)
    for index, (now, ahead, load, compute) in enumerate(
        zip(times.tolist(), plain.tolist(), loading.tolist(), computing.tolist(), strict=True)
    ):
        free = max(free, (before + now) / 2) + ahead
        end = max(free, now + load) + compute
        if compute:
            free = end
        seconds[index] = end - now
        before = now
    return seconds


def _growth(
    times: npt.NDArray[np.float64], ttft: npt.NDArray[np.float64]
) -> tuple[float, float] | None:
    edges = np.linspace(times[0], times[-1], _SLICES + 1)
    slices = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, _SLICES - 1)
    means = [float(ttft[slices == one].mean()) for one in np.unique(slices)]
    return flatness(means).growth_interval if len(means) >= _LEAST_SLICES else None


def _quantiles(seconds: npt.NDArray[np.float64]) -> Quantiles:
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Quantiles(float(seconds.mean()), p50, p90, p99)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return value
