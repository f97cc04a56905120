"""A server's counters, read from its Prometheus page."""

from __future__ import annotations

import math
import re
from collections import Counter

import httpx

from memos_vllm.errors import MemosError

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One reading of `/metrics`."""

    def __init__(self, page: str) -> None:
        self._lines = [line for line in page.splitlines() if line and not line.startswith("#")]

    def total(self, name: str) -> float:
        """A metric summed over all its labels; 0 when it is not there yet."""
        return sum(value for _, value in self._samples(name))

    def by_label(self, name: str, label: str) -> Counter[str]:
        """A counter by the values of one label, whole numbers."""
        counts: Counter[str] = Counter()
        for labels, value in self._samples(name):
            if label in labels:
                counts[labels[label]] += int(value)
        return counts

    def quantile(self, name: str, share: float, *, since: Metrics) -> float:
        """A quantile of what a histogram has observed since an earlier reading, over all labels.

        Within a bucket it is interpolated, as Prometheus does; nan when there was nothing new.
        """
        buckets, before = self._buckets(name), since._buckets(name)
        counts = {bound: count - before.get(bound, 0) for bound, count in buckets.items()}
        rank = share * counts.get(math.inf, 0)
        low, below = 0.0, 0
        for bound, count in sorted(counts.items()):
            if count >= rank > below:
                # What lies above the last bound is as good as on it.
                high = low if math.isinf(bound) else bound
                return low + (high - low) * (rank - below) / (count - below)
            low, below = bound, count
        return math.nan

    def _buckets(self, name: str) -> dict[float, int]:
        """Upper bound -> how many were at most that."""
        counts: dict[float, int] = {}
        for labels, value in self._samples(f"{name}_bucket"):
            bound = float(labels["le"])
            counts[bound] = counts.get(bound, 0) + int(value)
        return counts

    def _samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        return [
            (dict(_LABEL.findall(line)), float(line.rpartition(" ")[2]))
            for line in self._lines
            if line.startswith((name + "{", name + " "))
        ]


def read_metrics(url: str) -> Metrics:
    """Read the metrics of the server at `url`.

    Raises:
        MemosError: it does not answer.
    """
    try:
        return Metrics(httpx.get(f"{url}/metrics", timeout=30.0, trust_env=False).text)
    except httpx.HTTPError as error:
        raise MemosError(f"the server at {url} does not tell its metrics: {error}") from error
