"""The demo's closing table and the sentence under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memos_vllm.demo.timing import Measurement

HEAD = ("", "first token", "against scratch", "tokens cached", "source", "n")


@dataclass(frozen=True, slots=True)
class Results:
    """Every way of giving the model its memory that was measured, in the table's order."""

    scratch: Measurement
    plain_warm: Measurement
    resident: Measurement
    plain_flooded: Measurement
    flooded: Measurement
    restarted: Measurement

    @property
    def all(self) -> tuple[Measurement, ...]:
        return (
            self.scratch,
            self.plain_warm,
            self.resident,
            self.plain_flooded,
            self.flooded,
            self.restarted,
        )


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """Head and one row for each measurement, as text."""
    scratch = results.scratch.median_seconds
    return [HEAD, *(_row(measurement, scratch) for measurement in results.all)]


def _row(measurement: Measurement, scratch: float) -> tuple[str, ...]:
    samples = measurement.samples
    return (
        measurement.name,
        seconds_text(measurement.median_seconds),
        speedup_text(scratch, measurement.median_seconds),
        span([sample.cached_tokens for sample in samples]),
        ", ".join(dict.fromkeys(sample.source for sample in samples)),
        str(len(samples)),
    )


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def speedup_text(scratch: float, seconds: float) -> str:
    ratio = scratch / seconds
    return f"{ratio:.1f} x faster" if ratio >= 1.05 else f"{ratio:.1f} x"


def span(counts: Sequence[int]) -> str:
    """One number, or the least and the most."""
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def unused_memory(results: Results) -> list[str]:
    """The ways in which the cube's KV should have been reused and was not."""
    expected = (results.resident, results.flooded, results.restarted)
    return [
        measurement.name
        for measurement in expected
        if any(sample.cached_tokens == 0 for sample in measurement.samples)
    ]


def conclusion(results: Results) -> str:
    """One sentence on what was measured, and no more than that."""
    (first,) = results.restarted.samples
    fell_out = all(sample.cached_tokens == 0 for sample in results.plain_flooded.samples)
    plain = "had lost its prefix" if fell_out else "still had a part of its prefix"
    kept = span([sample.cached_tokens for sample in results.flooded.samples])
    source = {"store": "the store", "none": "nowhere"}.get(first.source, first.source)
    return (
        f"With the cube the first token {_came(results.resident, results.scratch)} with the same "
        f"text read from scratch; after the flood plain vLLM {plain} and the cube still had {kept} "
        f"tokens; after kill -9 the first request took {first.cached_tokens:,} tokens from "
        f"{source}, and its first token {_came(results.restarted, results.scratch)} from scratch."
    )


def _came(measurement: Measurement, scratch: Measurement) -> str:
    ratio = scratch.median_seconds / measurement.median_seconds
    if ratio >= 1:
        return f"came {ratio:.1f} times sooner than"
    return f"took {1 / ratio:.1f} times as long as"
