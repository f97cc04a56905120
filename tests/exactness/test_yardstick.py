"""The yardstick's arithmetic, on answers made up for it."""

from __future__ import annotations

import pytest

from memos_vllm.bench.yardstick import (
    Answer,
    Comparison,
    Difference,
    chance_of,
    common_head,
    compare,
    first_difference,
    together,
)

PROMPT = (1, 2, 3)


def answer(
    *tops: tuple[tuple[int, float], tuple[int, float]], prompt: tuple[int, ...] = PROMPT
) -> Answer:
    """A greedy answer from the two likeliest tokens of each position, the likeliest first."""
    return Answer(
        token_ids=tuple(first for (first, _), _ in tops),
        top=tuple(dict(top) for top in tops),
        prompt_ids=prompt,
    )


def test_equal_runs_differ_nowhere() -> None:
    run = [answer(((5, -0.5), (6, -1.0)))]
    assert compare(run, run) == Comparison(1, (), 0.0)


def test_the_gap_is_taken_where_the_runs_first_part() -> None:
    left = answer(((5, -0.1), (6, -3.0)), ((7, -0.5), (8, -0.75)), ((9, -0.1), (1, -9.0)))
    right = answer(((5, -0.1), (6, -3.0)), ((8, -0.5), (7, -0.625)), ((2, -0.1), (1, -5.0)))
    found = compare([left], [right])
    assert found.differences == (Difference(prompt=0, position=1, gap_a=0.25, gap_b=0.125),)
    assert found.rate == 1.0
    assert found.gap == 0.25


def test_the_shift_counts_only_positions_with_the_same_context() -> None:
    left = answer(((5, -0.5), (6, -1.0)), ((7, -0.5), (8, -0.5)), ((9, -0.1), (1, -9.0)))
    right = answer(((5, -0.5), (6, -1.25)), ((8, -0.5), (7, -0.625)), ((9, -0.1), (1, -5.0)))
    assert compare([left], [right]).shift == 0.25


def test_a_missing_token_is_a_difference() -> None:
    assert first_difference((1, 2), (1, 2, 3)) == 2
    assert first_difference((1, 2), (1, 2)) is None


def test_runs_of_different_prompts_are_not_compared() -> None:
    left, right = answer(((5, -0.5), (6, -1.0))), answer(((5, -0.5), (6, -1.0)), prompt=(9,))
    with pytest.raises(ValueError, match="different prompts"):
        compare([left], [right])


def test_comparisons_add_up() -> None:
    one = Comparison(12, (Difference(0, 3, 0.25, 0.0),), 0.5)
    other = Comparison(12, (), 0.75)
    assert together([one, other]) == Comparison(24, one.differences, 0.75)


def test_more_differences_than_the_noise_has_are_unlikely() -> None:
    quiet = Comparison(72, (), 0.0)
    noisy = Comparison(72, tuple(Difference(0, n, 0.1, 0.1) for n in range(54)), 0.5)
    assert chance_of(0, 12, noise=quiet) == 1.0
    assert chance_of(6, 12, noise=quiet) < 0.001
    assert chance_of(12, 12, noise=noisy) > 0.01
    assert chance_of(1, 1, noise=Comparison(1, (), 0.0)) == 0.5


def test_the_common_head_ends_before_the_first_difference() -> None:
    assert common_head([(1, 2, 3), (1, 2, 4), (1, 2)]) == [1, 2]
