"""Drawn traces: what is asked how often, when, and how large it is."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from memos_vllm.bench.simulation.trace import Workload, draw, draw_ranks
from memos_vllm.errors import ConfigurationError

SMALL = Workload(cubes=200, requests=20_000, requests_per_second=5.0, seed=3)


def test_the_same_seed_draws_the_same_trace_and_another_seed_another() -> None:
    assert draw(SMALL) == draw(dataclasses.replace(SMALL))
    assert draw(SMALL).cubes != draw(dataclasses.replace(SMALL, seed=4)).cubes


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_popularity_is_zipfs(exponent: float) -> None:
    """Within five standard deviations at every rank of 50."""
    cubes, count = 50, 200_000
    ranks = draw_ranks(np.random.default_rng(1).random(count), cubes=cubes, zipf=exponent)
    weights = [(rank + 1) ** -exponent for rank in range(cubes)]
    seen = Counter(ranks.tolist())
    for rank, weight in enumerate(weights):
        share = weight / sum(weights)
        deviation = math.sqrt(count * share * (1 - share))
        assert abs(seen[rank] - count * share) < 5 * deviation


def test_every_uniform_number_has_a_rank() -> None:
    ranks = draw_ranks(np.array([0.0, np.nextafter(1.0, 0.0)]), cubes=7, zipf=1.0)
    assert ranks.tolist() == [0, 6]


def test_without_drift_one_cube_stays_the_most_popular_and_with_drift_others_become_it() -> None:
    def most_popular(drift_seconds: float) -> set[int]:
        trace = draw(
            dataclasses.replace(SMALL, zipf=1.2, drift_seconds=drift_seconds, drift_share=0.9)
        )
        parts = [trace.cubes[start : start + 1000] for start in range(0, 20_000, 1000)]
        return {Counter(part).most_common(1)[0][0] for part in parts}

    assert len(most_popular(0.0)) == 1
    assert len(most_popular(200.0)) > 5


def test_drift_changes_who_is_asked_and_nothing_else() -> None:
    still, drifting = draw(SMALL), draw(dataclasses.replace(SMALL, drift_seconds=100.0))
    assert still.cubes != drifting.cubes
    assert dataclasses.replace(still, cubes=[]) == dataclasses.replace(drifting, cubes=[])


def test_chats_come_at_the_rate_asked_for_and_sizes_have_the_median_asked_for() -> None:
    trace = draw(dataclasses.replace(SMALL, cubes=20_000))
    assert trace.times == sorted(trace.times)
    assert trace.times[-1] == pytest.approx(20_000 / 5.0, rel=0.05)
    assert float(np.median(trace.cube_tokens)) == pytest.approx(2048, rel=0.05)
    assert min(trace.cube_tokens) >= 256
    assert max(trace.cube_tokens) == 8192
    assert float(np.std(np.log(trace.cube_tokens))) == pytest.approx(0.6, rel=0.05)
    assert float(np.mean(trace.plain_tokens)) == pytest.approx(2048, rel=0.05)


def test_popularity_does_not_go_with_a_cubes_number_or_size() -> None:
    trace = draw(dataclasses.replace(SMALL, zipf=1.2))
    popular = [cube for cube, _ in Counter(trace.cubes).most_common(20)]
    assert set(popular) != set(range(20))
    assert np.mean([trace.cube_tokens[cube] for cube in popular]) == pytest.approx(2400, rel=0.4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cubes": 0},
        {"requests": -1},
        {"requests_per_second": 0.0},
        {"zipf": float("nan")},
        {"plain_tokens": -1},
        {"min_tokens": 900, "max_tokens": 800},
        {"drift_share": 1.5},
    ],
)
def test_a_workload_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Workload(**wrong)  # type: ignore[arg-type]
