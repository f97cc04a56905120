"""Whether a series of times rises: a robust line through it, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_vllm.errors import InvalidRequest

_LEAST = 8


@dataclass(frozen=True, slots=True)
class Flatness:
    """How a series of times goes on.

    Attributes:
        slope: of the Theil-Sen line, seconds per sample.
        slope_low, slope_high: its 95 % interval.
        median: of the series, in seconds.
        last_to_first: the median of the last quarter over that of the first.
        samples: how many there are.
    """

    slope: float
    slope_low: float
    slope_high: float
    median: float
    last_to_first: float
    samples: int

    @property
    def growth(self) -> float:
        """What the line gains from the first sample to the last, as a share of the median."""
        return self._share(self.slope)

    @property
    def growth_interval(self) -> tuple[float, float]:
        return self._share(self.slope_low), self._share(self.slope_high)

    @property
    def rises(self) -> bool:
        """Whether the whole interval lies above no slope."""
        return self.slope_low > 0

    def _share(self, slope: float) -> float:
        return slope * (self.samples - 1) / self.median


def flatness(seconds: Sequence[float], *, seed: int = 0, draws: int = 1000) -> Flatness:
    """Fit a line that a few slow samples do not tilt.

    The interval is of a moving block bootstrap of what the line leaves over: on a shared machine
    slow samples come in runs, and drawn one by one they would promise too narrow an interval.

    Raises:
        InvalidRequest: fewer than eight samples.
    """
    if len(seconds) < _LEAST:
        raise InvalidRequest(f"a slope needs {_LEAST} samples, there are {len(seconds)}")
    values = np.asarray(seconds, dtype=np.float64)
    number = len(values)
    first, second = np.triu_indices(number, k=1)

    def theil_sen(series: npt.NDArray[np.float64]) -> float:
        """The median of the slopes between all pairs."""
        return float(np.median((series[second] - series[first]) / (second - first)))

    slope = theil_sen(values)
    line = slope * np.arange(number)
    left_over = values - line
    # The usual growth of the block with the series, n ** (1/3).
    block = max(1, round(number ** (1 / 3)))
    blocks = -(-number // block)
    chance = np.random.default_rng(seed)
    slopes = np.empty(draws)
    for draw in range(draws):
        starts = chance.integers(0, number - block + 1, size=blocks)
        places = (starts[:, None] + np.arange(block)).ravel()[:number]
        slopes[draw] = theil_sen(line + left_over[places])
    low, high = np.quantile(slopes, (0.025, 0.975))
    quarter = number // 4
    return Flatness(
        slope=slope,
        slope_low=float(low),
        slope_high=float(high),
        median=float(np.median(values)),
        last_to_first=float(np.median(values[-quarter:]) / np.median(values[:quarter])),
        samples=number,
    )
