"""What the project promises of its ratios, and what a record says about each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from memos_vllm.bench.intervals import Interval, median_interval, round_ratios
from memos_vllm.bench.record import Cell, Record

# An interval of fewer says nothing.
FEWEST_ROUNDS = 5


class Outcome(StrEnum):
    KEPT = "kept"
    OPEN = "within noise"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Promise:
    """The TTFT of a situation, at most so many times that of another in the same round.

    Attributes:
        least_memory_tokens: shorter memories are not meant: there is little to save.
    """

    situation: str
    base: str
    limit: float
    least_memory_tokens: int = 0


PROMISES = (
    Promise("memos-resident", "apc-warm", 1.05),
    Promise("memos-resident", "direct", 1 / 8, least_memory_tokens=3072),
    Promise("memos-flooded", "apc-warm", 1.05),
    Promise("memos-restart", "apc-warm", 1.35, least_memory_tokens=3072),
    Promise("memos-store", "lmcache", 0.8),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise held against one cell of a record."""

    promise: Promise
    cell: Cell
    ratio: Interval

    @property
    def outcome(self) -> Outcome:
        if self.ratio.count < FEWEST_ROUNDS:
            return Outcome.OPEN
        if self.ratio.high <= self.promise.limit:
            return Outcome.KEPT
        return Outcome.BROKEN if self.ratio.low > self.promise.limit else Outcome.OPEN


def findings(record: Record) -> Iterator[Finding]:
    """Every promise that the record can tell of, for short queries: long ones hide memory."""
    cells = sorted({sample.cell for sample in record.samples})
    for promise in PROMISES:
        for cell in cells:
            shortest = min(c.query_tokens for c in cells if c.memory_tokens == cell.memory_tokens)
            if cell.query_tokens > shortest or cell.memory_tokens < promise.least_memory_tokens:
                continue
            ratios = round_ratios(record.samples, cell, promise.situation, promise.base)
            if ratios:
                yield Finding(promise, cell, median_interval(ratios))


def losses(record: Record) -> Iterator[tuple[Cell, str, str, Interval]]:
    """Where memory is slower than what one would use instead, beyond noise."""
    rivals = ("apc-warm", "lmcache", "example-connector", "direct")
    names = sorted({s.situation for s in record.samples if s.situation.startswith("memos-")})
    for cell in sorted({sample.cell for sample in record.samples}):
        for name in names:
            for rival in rivals:
                ratios = round_ratios(record.samples, cell, name, rival)
                found = median_interval(ratios) if len(ratios) >= FEWEST_ROUNDS else None
                if found is not None and found.low > 1.0:
                    yield cell, name, rival, found
