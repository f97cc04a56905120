"""How far a run is, and how long the rest takes: one bar over all of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

# A share done, from 0 to 1, and what is going on.
Report = Callable[[float, str], None]

# Before this share is done, what is left is anybody's guess.
_TELLING_SHARE = 0.02


class Parts:
    """The parts of a run in their order, each as long a piece of the bar as it should take.

    Args:
        seconds: of each part, roughly.
        report: is told the share of the whole, and with it what is left.
    """

    def __init__(
        self,
        seconds: Mapping[str, float],
        report: Report,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = dict(seconds)
        self._total = sum(self._seconds.values()) or 1.0
        self._report = report
        self._clock = clock
        self._began = clock()

    def report(self, part: str) -> Report:
        """What the part reports its own share to."""
        names = list(self._seconds)
        before = sum(self._seconds[name] for name in names[: names.index(part)])

        def report(share: float, message: str) -> None:
            done = (before + share * self._seconds[part]) / self._total
            self._report(done, f"{message}{self._left(done)}")

        return report

    def _left(self, done: float) -> str:
        if not _TELLING_SHARE <= done < 1.0:
            return ""
        return f"; {minutes((self._clock() - self._began) / done * (1.0 - done))} left"


def piece(report: Report, number: int, of: int) -> Report:
    """One of some equal pieces of what a report covers; the first is 0."""
    return lambda share, message: report((number + share) / of, message)


def reported(items: Iterable[T], *, expected: int, report: Report, message: str) -> Iterator[T]:
    """The items, with a report of how many of them have come."""
    report(0.0, message)
    for number, item in enumerate(items, 1):
        yield item
        report(min(1.0, number / expected), message)


def minutes(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
