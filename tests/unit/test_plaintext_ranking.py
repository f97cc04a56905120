"""Scores from parts, edges that carry them, and near copies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.domain.finding import Link
from memos_vllm.plaintext.ranking import (
    Weights,
    best_first,
    blend_rerank,
    duplicate_penalty,
    excess,
    largest_score,
    match_scores,
    recency,
    superseded_penalty,
    usage,
)
from memos_vllm.plaintext.spreading import HOP_DECAY, KIND_WEIGHTS, Reached, spread, superseded

WEIGHTS = Weights()


def both_ways(origin: int, target: int, kind: str = "next", weight: float = 1.0) -> list[Link]:
    return [
        Link(origin, target, kind, weight, True),
        Link(target, origin, kind, weight, False),
    ]


def values(reached: Mapping[int, Reached]) -> dict[int, object]:
    return {seq: pytest.approx(entry.value) for seq, entry in reached.items()}


def test_the_best_match_of_each_kind_gets_the_whole_weight() -> None:
    dense, sparse = match_scores(np.array([0.8, 0.4, -0.2]), np.array([0.0, 10.0, 5.0]), WEIGHTS)
    assert dense == pytest.approx([WEIGHTS.dense, WEIGHTS.dense / 2, 0.0])
    assert sparse == pytest.approx([0.0, WEIGHTS.sparse, WEIGHTS.sparse / 2])


def test_the_best_of_weak_matches_does_not_look_good() -> None:
    dense, sparse = match_scores(np.array([0.1]), np.array([0.4]), WEIGHTS)
    assert dense == pytest.approx([WEIGHTS.dense * 0.2])
    assert sparse == pytest.approx([WEIGHTS.sparse * 0.1])


def test_a_part_that_was_not_asked_stays_away() -> None:
    assert match_scores(None, None, WEIGHTS) == (None, None)
    only = largest_score(WEIGHTS, dense=False, sparse=True, author=False, graph=False)
    assert only == pytest.approx(WEIGHTS.sparse + WEIGHTS.recency + WEIGHTS.usage)


def test_priors_cannot_lift_what_does_not_match() -> None:
    assert WEIGHTS.recency + WEIGHTS.usage <= 0.05 * (WEIGHTS.dense + WEIGHTS.sparse)
    assert recency(np.array([0.0, 30.0, -5.0, np.inf])).tolist() == [1.0, 0.5, 1.0, 0.0]
    assert usage(np.array([0.0, 32.0, 10_000.0])).tolist() == [0.0, 1.0, 1.0]


def test_only_what_seeds_have_ahead_of_the_next_best_spreads() -> None:
    ahead = excess(np.array([0.9, 0.2, 0.7, 0.4]), num_seeds=2)
    assert ahead == pytest.approx([0.5, 0.0, 0.3, 0.0])
    assert excess(np.array([0.9, 0.2]), num_seeds=2) == pytest.approx([0.9, 0.2])


def test_a_seed_more_or_less_changes_little() -> None:
    scores = np.linspace(1.0, 0.0, 101)
    assert abs(excess(scores, num_seeds=50) - excess(scores, num_seeds=51)).max() < 0.011


def test_equal_scores_are_ordered_by_number() -> None:
    assert best_first(np.array([0.5, 0.9, 0.5]), [30, 20, 10]) == [1, 2, 0]


def test_a_match_reaches_its_neighbours_both_ways_and_less_over_two_edges() -> None:
    links = both_ways(1, 2) + both_ways(2, 3) + both_ways(3, 4)
    assert values(spread({2: 0.5}, links, hops=1)) == {1: 0.5, 3: 0.5}
    two = spread({2: 0.5}, links, hops=2)
    assert values(two) == {1: 0.5, 3: 0.5, 4: 0.5 * HOP_DECAY}
    assert [(hop.origin, hop.target) for hop in two[4].path] == [(2, 3), (3, 4)]
    assert 5 not in two


def test_a_match_gives_nothing_to_itself() -> None:
    links = both_ways(1, 2) + both_ways(2, 3) + both_ways(3, 1)
    assert 1 not in spread({1: 1.0}, links, hops=3)


def test_of_several_ways_the_best_counts_and_not_their_sum() -> None:
    links = both_ways(1, 9, weight=0.4) + both_ways(2, 9, weight=0.9)
    reached = spread({1: 1.0, 2: 0.5}, links, hops=1)
    assert reached[9].value == pytest.approx(0.45)
    assert reached[9].path[0].origin == 2


def test_a_shorter_way_wins_over_a_longer_one_that_carries_less() -> None:
    links = both_ways(1, 2) + both_ways(2, 3) + both_ways(1, 3, weight=0.9)
    assert len(spread({1: 1.0}, links, hops=2)[3].path) == 1


def test_the_kind_of_an_edge_and_its_direction_decide_what_it_carries() -> None:
    link = Link(1, 2, "supersedes", 1.0, True)
    back = link._replace(forward=False)
    kind = KIND_WEIGHTS["supersedes"]
    assert spread({1: 1.0}, [link], hops=1)[2].value == kind.along
    assert spread({1: 1.0}, [back], hops=1)[2].value == kind.against
    assert kind.against > kind.along
    assert spread({1: 1.0}, [Link(1, 2, "invented", 0.5, True)], hops=1)[2].value == 0.35


def test_an_edge_of_weight_0_leads_nowhere() -> None:
    assert spread({1: 1.0}, both_ways(1, 2, weight=0.0), hops=3) == {}


edges = st.lists(
    st.builds(
        Link,
        st.integers(1, 8),
        st.integers(1, 8),
        st.sampled_from([*KIND_WEIGHTS, "invented"]),
        st.floats(0, 1),
        st.booleans(),
    ),
    max_size=30,
)
seeds = st.dictionaries(st.integers(1, 8), st.floats(0.01, 1), max_size=4)


@given(seeds, edges, st.integers(0, 3))
def test_nothing_grows_and_every_path_holds_together(
    held: dict[int, float], links: list[Link], hops: int
) -> None:
    for target, reached in spread(held, links, hops=hops).items():
        path = reached.path
        assert 1 <= len(path) <= hops
        assert path[0].origin in held
        assert path[0].origin != target
        assert path[-1].target == target
        assert all(a.target == b.origin for a, b in itertools.pairwise(path))
        assert 0 < reached.value <= held[path[0].origin]


@given(seeds, edges, st.integers(1, 2))
def test_another_hop_never_takes_anything_away(
    held: dict[int, float], links: list[Link], hops: int
) -> None:
    near, far = spread(held, links, hops=hops), spread(held, links, hops=hops + 1)
    assert all(far[target].value >= reached.value for target, reached in near.items())


def test_what_another_hit_took_the_place_of_is_known() -> None:
    links = [
        Link(1, 2, "supersedes", 1.0, True),
        Link(2, 1, "supersedes", 1.0, False),
        Link(3, 4, "supersedes", 1.0, False),
    ]
    assert superseded(links, [1, 2, 3, 4]) == {2: {1}, 3: {4}}
    assert superseded(links, [2, 3]) == {}
    assert superseded(both_ways(1, 2), [1, 2]) == {}


def test_what_was_superseded_falls_behind_its_successor_but_not_out_of_sight() -> None:
    scores = np.array([0.9, 0.8, 0.1])
    penalty = superseded_penalty(scores, {0: [1]}, WEIGHTS)
    assert 0.7 < scores[0] + penalty[0] < 0.8
    far_behind = superseded_penalty(scores, {0: [2]}, WEIGHTS)
    assert far_behind[0] == pytest.approx(-0.9 * WEIGHTS.superseded)
    assert not superseded_penalty(scores, {2: [0, 1]}, WEIGHTS).any()


def unit(*numbers: float) -> npt.NDArray[np.float32]:
    vector = np.array(numbers, np.float32)
    return vector / np.linalg.norm(vector)


def test_a_copy_of_a_better_hit_loses_and_the_better_one_does_not() -> None:
    vectors = np.stack([unit(1, 0), unit(1, 0), unit(0, 1)])
    penalty = duplicate_penalty(np.array([0.9, 0.9, 0.5]), vectors, WEIGHTS)
    assert penalty == pytest.approx([0.0, -0.9 * WEIGHTS.duplicate, 0.0], abs=1e-6)


def test_what_is_merely_alike_loses_nothing() -> None:
    vectors = np.stack([unit(1, 0), unit(0.85, (1 - 0.85**2) ** 0.5)])
    assert not duplicate_penalty(np.array([0.9, 0.8]), vectors, WEIGHTS).any()


def test_without_vectors_nothing_is_a_copy() -> None:
    zeros = np.zeros((3, 4), np.float32)
    assert not duplicate_penalty(np.array([0.9, 0.8, 0.7]), zeros, WEIGHTS).any()


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_of_a_group_of_copies_one_keeps_its_score(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.random(size))[::-1].copy()
    vectors = np.repeat(unit(1, 2, 3)[None], size, axis=0)
    penalty = duplicate_penalty(scores, vectors, WEIGHTS)
    assert penalty[0] == 0
    assert penalty[1:] == pytest.approx(-WEIGHTS.duplicate * scores[1:], abs=1e-5)


def test_a_reranker_of_any_scale_adds_0_to_its_weight() -> None:
    scores = np.array([0.9, 0.8, 0.7])
    assert blend_rerank(scores, {0: -7.0, 1: 3.0}, WEIGHTS) == pytest.approx(
        [0.0, WEIGHTS.rerank, 0.0]
    )
    assert blend_rerank(scores, {0: 2.0}, WEIGHTS) == pytest.approx([WEIGHTS.rerank, 0.0, 0.0])
    assert not blend_rerank(scores, {}, WEIGHTS).any()
