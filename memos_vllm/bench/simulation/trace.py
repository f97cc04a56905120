"""The requests of a simulation: which cube is asked when, and what plain traffic runs beside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_vllm.errors import ConfigurationError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a trace is drawn from. Every default is an assumption, not a measurement.

    Attributes:
        zipf: exponent s; the cube of rank k is asked with a weight of 1 / k**s. 0 is uniform.
        requests_per_second: chats with memory; they arrive as a Poisson process.
        median_tokens, spread: of the memories, which are log-normal: `spread` is the standard
            deviation of the logarithm.
        min_tokens, max_tokens: what drawn sizes are clipped to.
        plain_tokens: mean tokens of plain prompts between two chats with memory, exponentially
            distributed; they are never asked again and turn the KV pool over.
        plain_prompt_tokens: of the longest of them; more are several prompts.
        drift_seconds: how often popularity changes; 0 is never.
        drift_share: the share of popularity ranks that go to other cubes then.
    """

    cubes: int = 100_000
    requests: int = 1_000_000
    zipf: float = 1.0
    requests_per_second: float = 1.0
    median_tokens: int = 2048
    spread: float = 0.6
    min_tokens: int = 256
    max_tokens: int = 8192
    plain_tokens: int = 2048
    plain_prompt_tokens: int = 2048
    drift_seconds: float = 0.0
    drift_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (
            *("cubes", "requests", "requests_per_second", "median_tokens", "min_tokens"),
            "plain_prompt_tokens",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("zipf", "spread", "plain_tokens", "drift_seconds", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must not be below 0")
        if self.max_tokens < self.min_tokens:
            raise ConfigurationError(
                f"max_tokens is {self.max_tokens}, below min_tokens, {self.min_tokens}"
            )
        if not 0 <= self.drift_share <= 1:
            raise ConfigurationError(f"drift_share is {self.drift_share}; it is from 0 to 1")


@dataclass(frozen=True, slots=True)
class Trace:
    """Chats with memory in order of arrival.

    Attributes:
        times: seconds since the start.
        cubes: which cube each chat asks.
        plain_tokens: tokens of plain prompts that ran between the chat before and this one.
        cube_tokens: size of each cube's memory.
        plain_prompt_tokens: most tokens of one plain prompt.
    """

    times: list[float]
    cubes: list[int]
    plain_tokens: list[int]
    cube_tokens: list[int]
    plain_prompt_tokens: int = 2048

    @property
    def distinct_cubes(self) -> int:
        return len(set(self.cubes))


def draw(workload: Workload) -> Trace:
    """The trace of a workload; the same one for the same seed.

    Each kind of draw has random numbers of its own, so that changing one setting leaves the
    others' draws as they were. Only uniform numbers are taken from numpy: what it makes of
    them may differ between its versions.
    """
    streams = [
        np.random.Generator(np.random.PCG64(seed))
        for seed in np.random.SeedSequence(workload.seed).spawn(6)
    ]
    arrivals, ranks, sizes, plain, naming, drift = streams
    count = workload.requests
    times = np.cumsum(-np.log1p(-arrivals.random(count)) / workload.requests_per_second)
    plain_tokens = np.rint(-np.log1p(-plain.random(count)) * workload.plain_tokens)
    # The popular cubes must not be the small or the large ones by accident of their number.
    cube_of_rank = _shuffled(naming, np.arange(workload.cubes))
    drawn = draw_ranks(ranks.random(count), cubes=workload.cubes, zipf=workload.zipf)
    cubes = _with_drift(workload, drift, times, drawn, cube_of_rank)
    return Trace(
        times=[round(float(time), 6) for time in times],
        cubes=cubes.tolist(),
        plain_tokens=plain_tokens.astype(np.int64).tolist(),
        cube_tokens=_sizes(workload, sizes).tolist(),
        plain_prompt_tokens=workload.plain_prompt_tokens,
    )


def draw_ranks(uniform: Floats, *, cubes: int, zipf: float) -> Integers:
    """Popularity ranks from 0, by the inverse of Zipf's distribution over `cubes` ranks."""
    cumulative = np.cumsum(np.arange(1, cubes + 1, dtype=np.float64) ** -zipf)
    found = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    ranks: Integers = np.minimum(found, cubes - 1).astype(np.int64)
    return ranks


def _sizes(workload: Workload, random: np.random.Generator) -> Integers:
    """Log-normal sizes, by Box and Muller's transform."""
    radius = np.sqrt(-2.0 * np.log1p(-random.random(workload.cubes)))
    normal = radius * np.cos(2.0 * math.pi * random.random(workload.cubes))
    tokens = np.rint(workload.median_tokens * np.exp(workload.spread * normal))
    clipped: Integers = np.clip(tokens, workload.min_tokens, workload.max_tokens).astype(np.int64)
    return clipped


def _with_drift(
    workload: Workload,
    random: np.random.Generator,
    times: Floats,
    ranks: Integers,
    cube_of_rank: Integers,
) -> Integers:
    """The cube of each rank at each time: in every period, some ranks change hands."""
    if not workload.drift_seconds:
        return cube_of_rank[ranks]
    moving = round(workload.drift_share * workload.cubes)
    cubes = np.empty_like(ranks)
    periods = (times // workload.drift_seconds).astype(np.int64)
    starts = np.flatnonzero(np.diff(periods, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(times)], strict=True):
        cubes[start:end] = cube_of_rank[ranks[start:end]]
        chosen = np.unique((random.random(moving) * workload.cubes).astype(np.int64))
        cube_of_rank[chosen] = _shuffled(random, cube_of_rank[chosen])
    return cubes


def _shuffled(random: np.random.Generator, values: Integers) -> Integers:
    return values[np.argsort(random.random(len(values)), kind="stable")]
