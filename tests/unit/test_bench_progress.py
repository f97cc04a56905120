"""One bar shows how far a whole run is, and how long the rest takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memos_vllm.bench.plan import make_plan
from memos_vllm.bench.progress import Parts, minutes, piece, reported


class Bar:
    """What a progress bar would show, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.shown: list[tuple[float, str]] = []
        self.now = 100.0

    def report(self, share: float, message: str) -> None:
        self.shown.append((round(share, 3), message))


def test_each_part_has_a_piece_of_the_bar_as_long_as_it_should_take() -> None:
    bar = Bar()
    parts = Parts(
        {"rounds": 60.0, "answers": 30.0, "load": 30.0}, bar.report, clock=lambda: bar.now
    )
    parts.report("rounds")(0.5, "round 5")
    parts.report("answers")(0.0, "comparing")
    parts.report("load")(1.0, "done")
    assert [share for share, _ in bar.shown] == [0.25, 0.5, 1.0]


def test_what_is_left_follows_from_what_it_took_so_far() -> None:
    bar = Bar()
    report = Parts({"rounds": 10.0}, bar.report, clock=lambda: bar.now).report("rounds")
    report(0.0, "first")
    bar.now += 600.0
    report(0.25, "later")
    report(1.0, "done")
    assert [message for _, message in bar.shown] == ["first", "later; 30 minutes left", "done"]


def test_pieces_of_a_part_follow_one_another() -> None:
    bar = Bar()
    for number in range(2):
        piece(bar.report, number, 2)(0.5, "half of it")
    assert [share for share, _ in bar.shown] == [0.25, 0.75]


def test_items_are_counted_as_they_come_and_never_beyond_the_end() -> None:
    bar = Bar()
    assert list(reported("abc", expected=2, report=bar.report, message="chats")) == list("abc")
    assert [share for share, _ in bar.shown] == [0.0, 0.5, 1.0, 1.0]


def test_what_fails_on_its_way_has_kept_what_came_before() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError

    kept: list[int] = []
    with pytest.raises(OSError):
        kept.extend(reported(failing(), expected=2, report=Bar().report, message=""))
    assert kept == [1]


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"quick": True}, ["rounds", "answers"]),
        ({"quick": True, "probes": False}, ["rounds"]),
        ({"quick": False}, ["rounds", "answers", "costs", "load", "floods"]),
    ],
)
def test_a_plan_names_the_parts_that_it_has(asked: dict[str, bool], parts: list[str]) -> None:
    plan = make_plan(max_model_len=8192, block_tokens=128, **asked)  # type: ignore[arg-type]
    assert list(plan.parts()) == parts
    assert plan.seconds() > sum(plan.parts().values())


@pytest.mark.parametrize(
    ("seconds", "said"), [(40.0, "40 seconds"), (600.0, "10 minutes"), (9000.0, "2.5 hours")]
)
def test_a_duration_is_said_as_a_person_says_it(seconds: float, said: str) -> None:
    assert minutes(seconds) == said
