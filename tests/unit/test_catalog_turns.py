"""Chat turns and the facts read out of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from catalog_kit import ADMIN, START, Desk, open_desk
from databases import Database

from memos_vllm.domain.fact import NewFact
from memos_vllm.domain.job import JobKind
from memos_vllm.domain.memory import Memory
from memos_vllm.domain.turn import NewTurn
from memos_vllm.errors import InvalidRequest, NotFound, TooLarge

QUESTION = NewTurn("user", "My parcel is late.", name="Ada")
ANSWER = NewTurn("assistant", "Which order is it?")


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def chain(desk: Desk, *memories: Memory) -> list[list[str]]:
    """What each memory's `next` edges lead to."""
    found = [desk.mos.get_memory(ADMIN, "c", memory.id) for memory in memories]
    return [[edge.target for edge in memory.edges if edge.kind == "next"] for memory in found]


def test_turns_become_memories_with_speaker_and_time(desk: Desk) -> None:
    said_at = datetime(2024, 5, 8, 13, 56, tzinfo=UTC)
    turns = [NewTurn("user", "Hello.", name="Ada", created_at=said_at), ANSWER]
    first, second = desk.mos.add_turns(ADMIN, "c", turns, session_id="s")
    assert (first.source.kind, first.source.author, first.source.created_at) == (
        "turn",
        "Ada",
        said_at,
    )
    assert (second.source.author, second.source.created_at) == ("assistant", START)
    assert first.metadata == {"role": "user", "session_id": "s"}
    assert second.source.locator == "turn 2"


def test_turns_are_linked_in_the_order_they_were_said_across_calls(desk: Desk) -> None:
    first, second = desk.mos.add_turns(ADMIN, "c", [QUESTION, ANSWER], session_id="s")
    (other,) = desk.mos.add_turns(ADMIN, "c", [QUESTION], session_id="another")
    (third,) = desk.mos.add_turns(ADMIN, "c", [QUESTION], session_id="s")
    assert chain(desk, first, second, other, third) == [[second.id], [third.id], [], []]
    assert third.source.locator == "turn 3"


def test_turns_without_a_session_are_linked_within_their_call(desk: Desk) -> None:
    first, second = desk.mos.add_turns(ADMIN, "c", [QUESTION, ANSWER])
    (third,) = desk.mos.add_turns(ADMIN, "c", [QUESTION])
    assert chain(desk, first, second, third) == [[second.id], [], []]


def test_a_session_goes_on_after_its_last_turn_was_erased(desk: Desk) -> None:
    (first,) = desk.mos.add_turns(ADMIN, "c", [QUESTION], session_id="s")
    desk.mos.erase_memory(ADMIN, "c", first.id, tombstone_key=b"k" * 32)
    (second,) = desk.mos.add_turns(ADMIN, "c", [ANSWER], session_id="s")
    assert second.source.locator == "turn 2"


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([], "messages"),
        ([NewTurn("robot", "hello")], "messages[0].role"),
        ([QUESTION, NewTurn("user", " \n")], "messages[1].content"),
        ([NewTurn("user", "hello", name="two\nlines")], "messages[0].name"),
        ([NewTurn("user", "hello", created_at=datetime(2024, 1, 1))], "messages[0].created_at"),
    ],
)
def test_a_bad_turn_is_named_and_nothing_is_stored(
    desk: Desk, turns: list[NewTurn], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        desk.mos.add_turns(ADMIN, "c", turns)
    assert caught.value.param == param
    assert desk.mos.get_cube(ADMIN, "c").memories.active == 0


def test_a_turn_over_64_kib_is_too_large(desk: Desk) -> None:
    with pytest.raises(TooLarge):
        desk.mos.add_turns(ADMIN, "c", [QUESTION, NewTurn("user", "x" * 65_537)])
    assert desk.mos.get_cube(ADMIN, "c").memories.active == 0


def test_a_remembered_turn_may_queue_its_reading(desk: Desk) -> None:
    stored, none = desk.mos.remember_turn(ADMIN, "c", [QUESTION], session_id=None, read=False)
    assert (len(stored), none) == (1, None)
    stored, job = desk.mos.remember_turn(ADMIN, "c", [QUESTION, ANSWER], session_id=None, read=True)
    assert job is not None
    assert job.kind is JobKind.EXTRACT
    assert job.payload == {"memory_ids": [memory.id for memory in stored]}


def test_facts_stem_from_their_turns_and_mark_what_they_contradict(desk: Desk) -> None:
    turns = desk.mos.add_turns(ADMIN, "c", [QUESTION, ANSWER])
    ids = [turn.id for turn in turns]
    (old,) = desk.mos.add_facts(ADMIN, "c", [NewFact("Ada lives in Leeds.")], turn_ids=ids)
    assert old.lineage.derived_from == tuple(ids)
    (new,) = desk.mos.add_facts(
        ADMIN, "c", [NewFact("Ada lives in York.", supersedes=(old.id,))], turn_ids=ids[:1]
    )
    assert new.lineage.supersedes == (old.id,)
    assert desk.mos.get_memory(ADMIN, "c", old.id).text == "Ada lives in Leeds."


def test_the_same_fact_again_only_gains_an_origin(desk: Desk) -> None:
    first, second = desk.mos.add_turns(ADMIN, "c", [QUESTION, ANSWER])
    fact = NewFact("Ada lives in Leeds.")
    (known,) = desk.mos.add_facts(ADMIN, "c", [fact], turn_ids=[first.id])
    assert desk.mos.add_facts(ADMIN, "c", [fact], turn_ids=[first.id]) == []
    again = NewFact("Ada is at home in Leeds.", same_as=known.id)
    assert desk.mos.add_facts(ADMIN, "c", [again], turn_ids=[second.id]) == []
    origins = desk.mos.get_memory(ADMIN, "c", known.id).lineage.derived_from
    assert set(origins) == {first.id, second.id}


def test_facts_of_turns_that_are_gone_are_not_kept(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.mos.add_facts(ADMIN, "c", [NewFact("Ada lives in Leeds.")], turn_ids=["mem_none"])
    assert desk.mos.get_cube(ADMIN, "c").memories.active == 0
