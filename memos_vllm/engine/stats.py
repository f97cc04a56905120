"""What the connector counts, on its way to Prometheus and to `/v1/memos/status`.

The scheduler half counts in the engine process; vLLM carries its `KVConnectorStats` to the API
server, where `MemosPromMetrics` feeds Prometheus and keeps the latest gauges for the status
route.
"""

from __future__ import annotations

import functools
from collections import Counter as Tally
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

_COUNTERS = {
    "requests": "memory requests that finished, by what the connector did for them",
    "tokens": "memory tokens of finished requests, by where their KV came from",
    "tickets_rejected": "tickets that were refused, by reason",
    "params_dropped": "kv_transfer_params that no ticket backs, dropped unread",
    "loads": "artifact loads, by outcome",
    "load_bytes": "bytes of KV imported",
    "load_seconds": "seconds spent importing, verification included",
    "hook_failures": "scheduler hooks that failed and were answered as if without memory",
    "saves": "artifact saves, by outcome",
    "save_seconds": "seconds spent exporting and writing",
    "residency_moves": "blocks moved away from eviction",
}
# Fine where the control plane's answers lie.
_WAIT_BUCKETS = tuple(
    milliseconds / 1000
    for milliseconds in (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 50, 100, 500, 2000)
)
_GAUGES = {
    "resident_blocks": "memory blocks in the KV pool",
    "residency_budget_blocks": "most memory blocks that are kept in the KV pool",
    "store_artifacts": "artifacts in the store",
    "store_bytes": "bytes in the artifact store",
}


@dataclass
class MemosStats(KVConnectorStats):
    """Counter increments and gauge values of one or more engine steps.

    `data` holds `counters` ("name" or "name:label" -> increment), `gauges` (name -> value)
    and `scopes` (artifact scope -> resident tokens), all plain enough for msgpack.
    """

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        counters = Tally(self.data.get("counters", {}))
        counters.update(other.data.get("counters", {}))
        return MemosStats(data={**self.data, **other.data, "counters": dict(counters)})

    def reduce(self) -> dict[str, int | float]:
        """A log line's worth; scopes stay out of it."""
        return {**self.data.get("counters", {}), **self.data.get("gauges", {})}


class StatsCollector:
    """Counts in the engine; `take()` hands over what is new."""

    def __init__(self) -> None:
        self._counters: Tally[str] = Tally()
        self._sent_gauges: dict[str, Any] = {}

    def count(self, name: str, label: str | None = None, *, by: float = 1) -> None:
        key = name if label is None else f"{name}:{label}"
        self._counters[key] += by  # type: ignore[assignment]

    @property
    def has_news(self) -> bool:
        """Whether anything was counted since the last `take()`."""
        return bool(self._counters)

    def take(self, gauges: dict[str, float], scopes: dict[str, int]) -> MemosStats | None:
        """The increments since the last call, or None when nothing changed."""
        state = {"gauges": gauges, "scopes": scopes}
        if not self._counters and state == self._sent_gauges:
            return None
        counters, self._counters = dict(self._counters), Tally()
        self._sent_gauges = state
        return MemosStats(data={"counters": counters, **state})


# Engine index -> the latest gauges and resident scopes that this API server was told.
latest_reports: dict[int, dict[str, Any]] = {}


class MemosPromMetrics(KVConnectorPromMetrics):
    """`memos_*` metrics, one labelled child per engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: metric_types[Counter](
                name=f"memos_{name}", documentation=text, labelnames=[*labelnames, "kind"]
            )
            for name, text in _COUNTERS.items()
        }
        self._gauges = {
            name: metric_types[Gauge](
                name=f"memos_{name}",
                documentation=text,
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
            for name, text in _GAUGES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for key, increment in transfer_stats_data.get("counters", {}).items():
            name, _, kind = key.partition(":")
            self._counters[name].labels(*labels, kind).inc(increment)
        for name, value in transfer_stats_data.get("gauges", {}).items():
            self._gauges[name].labels(*labels).set(value)
        failed = transfer_stats_data.get("counters", {}).get("saves:failed", 0)
        latest_reports[engine_idx] = {
            "failed_saves": latest_reports.get(engine_idx, {}).get("failed_saves", 0) + failed,
            "gauges": transfer_stats_data.get("gauges", {}),
            "scopes": transfer_stats_data.get("scopes", {}),
        }


@functools.cache
def api_counters() -> tuple[Counter, Counter]:
    """Counters that this API server keeps itself: what the guard met, and head misses."""
    return (
        Counter("memos_guard", "requests that the guard changed or refused, by kind", ["kind"]),
        Counter("memos_head_misses", "chats whose prompt did not open with the baked head"),
    )


@functools.cache
def control_plane_wait() -> Histogram:
    """How long chats wait for the control plane before their prompt goes to the engine."""
    return Histogram(
        "memos_chat_wait_seconds",
        "what chats that name a cube wait for the control plane, by what they ask of it",
        ["part"],
        buckets=_WAIT_BUCKETS,
    )


def count_guard_event(name: str, increment: int) -> None:
    """A listener for `memos_vllm.api.middleware.guard_listeners`."""
    api_counters()[0].labels(name).inc(increment)
