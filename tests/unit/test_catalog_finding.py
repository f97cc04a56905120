"""What a search asks of the catalog: scope, links and texts, all within what the caller may see."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, START, Desk, open_desk
from databases import Database

from memos_vllm.domain.access import Principal, Role
from memos_vllm.domain.fact import NewFact
from memos_vllm.domain.finding import Link
from memos_vllm.domain.indexing import DerivedMemory, IndexBacklog
from memos_vllm.domain.memory import Edge, Memory
from memos_vllm.domain.scope import Scope
from memos_vllm.domain.turn import NewTurn
from memos_vllm.domain.usage import UsageEvent
from memos_vllm.errors import NotFound


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def seqs(desk: Desk, *memories: Memory) -> list[int]:
    numbers = {str(name): int(str(seq)) for name, seq in desk.sql("SELECT id, seq FROM memories")}
    return [numbers[memory.id] for memory in memories]


def scope(desk: Desk, actor: Principal = ADMIN, *cube_ids: str) -> Scope:
    return desk.mos.search_scope(actor, cube_ids or ["c"])


def links(desk: Desk, *memories: Memory, actor: Principal = ADMIN, **limits: int) -> list[Link]:
    bounds = {"fan_out": 8, "max_mentions": 4} | limits
    origins = seqs(desk, *memories)
    return desk.mos.links(scope(desk, actor), origins, mentioning=origins, **bounds)


def mention(desk: Desk, entity: str, *memories: Memory) -> None:
    desk.mos.keep_derived(
        [
            DerivedMemory(seq, memory.cube_id, b"d" * 32, None, (entity,))
            for seq, memory in zip(seqs(desk, *memories), memories, strict=True)
        ],
        embedder="words",
    )


def test_edges_are_found_from_both_ends(desk: Desk) -> None:
    (end,) = desk.add("end")
    (start,) = desk.add("start", edges=(Edge("cites", end.id, 0.5),))
    first, last = seqs(desk, start, end)
    assert links(desk, start) == [Link(first, last, "cites", 0.5, True)]
    assert links(desk, end) == [Link(last, first, "cites", 0.5, False)]


def test_lineage_is_found_as_edges(desk: Desk) -> None:
    (turn,) = desk.mos.add_turns(ADMIN, "c", [NewTurn("user", "I moved to York.")])
    (old,) = desk.add("Ada lives in Leeds.")
    fact = NewFact("Ada lives in York.", supersedes=(old.id,))
    (new,) = desk.mos.add_facts(ADMIN, "c", [fact], turn_ids=[turn.id])
    found = {(link.kind, link.forward) for link in links(desk, new)}
    assert found == {("derived-from", True), ("supersedes", True)}
    assert [link.kind for link in links(desk, old)] == ["supersedes"]
    assert not links(desk, old)[0].forward


def test_memories_that_mention_something_rare_are_linked_by_it(desk: Desk) -> None:
    one, two, three = desk.add("one", "two", "three")
    mention(desk, "leeds", one, two)
    mention(desk, "york", three)
    first, second = seqs(desk, one, two)
    assert links(desk, one) == [Link(first, second, "mentions", 1.0, True, "leeds")]
    assert links(desk, three) == []


def test_what_everyone_mentions_links_nobody(desk: Desk) -> None:
    memories = desk.add(*"abcde")
    mention(desk, "ada", *memories)
    assert links(desk, memories[0], max_mentions=4) == []
    assert len(links(desk, memories[0], max_mentions=5)) == 4


def test_links_are_bounded_and_the_strongest_stay(desk: Desk) -> None:
    targets = desk.add(*"abcde")
    weighted = tuple(
        Edge("cites", target.id, weight / 10) for weight, target in enumerate(targets, start=1)
    )
    (start,) = desk.add("start", edges=weighted)
    found = links(desk, start, fan_out=2)
    assert [link.weight for link in found] == [0.5, 0.4]


def test_nothing_leads_to_what_the_caller_may_not_see(desk: Desk) -> None:
    (secret,) = desk.add("secret", labels=("hr",))
    (gone,) = desk.add("gone")
    (start,) = desk.add("start", edges=(Edge("cites", secret.id), Edge("cites", gone.id)))
    desk.mos.archive_memory(ADMIN, "c", gone.id)
    mention(desk, "leeds", secret, start)
    reader = desk.grant("reader", Role.READER)
    assert links(desk, start, actor=reader) == []
    assert {link.kind for link in links(desk, start)} == {"cites", "mentions"}
    cleared = desk.grant("cleared", Role.READER, labels=["hr"])
    assert len(links(desk, start, actor=cleared)) == 2


def test_only_what_is_true_now_is_loaded(desk: Desk) -> None:
    kept, archived, expired = desk.add("kept", "archived", "expired")
    (secret,) = desk.add("secret", labels=("hr",))
    desk.mos.archive_memory(ADMIN, "c", archived.id)
    (late,) = desk.add("late", expires_at=START + timedelta(seconds=5))
    desk.clock.advance(10)
    asked = seqs(desk, kept, archived, expired, secret, late)
    reader = desk.grant("reader", Role.READER)
    found = desk.mos.load_found(scope(desk, reader), [*asked, 999], answering=True)
    assert sorted(memory.text for memory in found.values()) == ["expired", "kept"]
    found = desk.mos.load_found(scope(desk), asked, answering=True)
    assert sorted(memory.text for memory in found.values()) == ["expired", "kept", "secret"]


def test_several_cubes_are_one_scope_with_the_labels_seen_in_each(desk: Desk) -> None:
    desk.mos.create_cube(ADMIN, cube_id="d")
    desk.grant("reader", Role.READER, labels=["hr", "legal"])
    with desk.mos._catalog.write() as session:
        from memos_vllm.control.tables import GrantRow

        session.add(
            GrantRow(
                cube_id="d",
                principal_id="reader",
                role=Role.READER,
                labels=["hr"],
                granted_by="local",
                granted_at=START,
            )
        )
    from memos_vllm.domain.ids import PrincipalId

    reader = Principal(PrincipalId("reader"))
    assert scope(desk, reader, "c", "d").labels == {"hr"}
    assert scope(desk, ADMIN, "c", "d").labels is None


def test_a_cube_that_may_not_be_read_is_not_there(desk: Desk) -> None:
    stranger = desk.grant("stranger", Role.AUDITOR)
    with pytest.raises(NotFound):
        scope(desk, stranger)
    with pytest.raises(NotFound):
        scope(desk, ADMIN, "c", "nowhere")


def test_the_backlog_counts_what_the_index_has_not_followed(desk: Desk) -> None:
    desk.mos.start_index("words", embedder="words", dimension=2, anew=True)
    desk.mos.end_walk("words")
    desk.add("one", "two")
    assert desk.mos.index_backlog("words", cube_ids=["c"]) == IndexBacklog(changes=2, memories=0)


def test_the_backlog_of_some_labels_tells_of_no_other(desk: Desk) -> None:
    desk.add("old", labels=("blue",))
    desk.mos.start_index("words", embedder="words", dimension=2, anew=True)
    desk.add("one", labels=("red",))
    desk.add("two", "three", labels=("red", "blue"))

    def seen(*labels: str) -> IndexBacklog:
        return desk.mos.index_backlog("words", cube_ids=["c"], labels=frozenset(labels))

    assert seen() == IndexBacklog(changes=0, memories=0)
    assert seen("red") == IndexBacklog(changes=1, memories=1)
    assert seen("red", "blue") == IndexBacklog(changes=3, memories=4)


def test_facts_tell_age_and_use(desk: Desk) -> None:
    said_at = START - timedelta(days=400)
    (turn,) = desk.mos.add_turns(ADMIN, "c", [NewTurn("user", "Hello.", created_at=said_at)])
    (plain,) = desk.add("plain")
    event = UsageEvent(
        cube_id=turn.cube_id,
        memory_ids=(turn.id,),
        tokens=0,
        cached_tokens=0,
        source="none",
        at=START,
    )
    desk.mos.record_usage([event])
    first, second = seqs(desk, turn, plain)
    facts = desk.mos.facts([first, second])
    assert (facts[first].created_at, facts[first].hits, facts[first].last_used_at) == (
        said_at,
        1,
        START,
    )
    assert (facts[second].created_at, facts[second].hits) == (START, 0)
