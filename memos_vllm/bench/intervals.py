"""Medians with bootstrap intervals, and ratios of samples from the same round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from memos_vllm.bench.record import Cell, Sample

_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the 95 % bootstrap interval (percentile method) around it."""

    median: float
    low: float
    high: float
    count: int


def median_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The median of some samples, and between what it may lie.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no samples")
    array = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).choice(array, size=(_RESAMPLES, len(array)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Interval(float(np.median(array)), float(low), float(high), len(array))


def of_cell(samples: Iterable[Sample], cell: Cell, situation: str) -> dict[int, Sample]:
    """Round -> the sample of a situation; those that do not show what they claim left out."""
    return {
        sample.round: sample
        for sample in samples
        if sample.cell == cell and sample.situation == situation and not sample.fault
    }


def round_ratios(samples: Sequence[Sample], cell: Cell, situation: str, base: str) -> list[float]:
    """TTFT over the base's, for each round that has both: a slow minute slows both alike."""
    ours, theirs = of_cell(samples, cell, situation), of_cell(samples, cell, base)
    return [
        ours[number].ttft_seconds / theirs[number].ttft_seconds
        for number in sorted(ours.keys() & theirs.keys())
    ]
