"""Labels: who may set them, what stays under them, and that reading under them is logged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from catalog_kit import ADMIN, Desk, open_desk

from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN, Principal, Role
from memos_vllm.domain.audit import AuditEntry
from memos_vllm.domain.document import NewChunk, NewDocument
from memos_vllm.domain.fact import NewFact
from memos_vllm.domain.ids import PrincipalId
from memos_vllm.domain.memory import Edge, MemoryPatch, NewMemory
from memos_vllm.domain.turn import NewTurn
from memos_vllm.errors import InvalidRequest, NotFound

TURN = NewTurn("user", "what is it?")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with open_desk(tmp_path) as opened:
        yield opened


def log(desk: Desk, action: str) -> list[AuditEntry]:
    return [one for one in desk.mos.audit_entries(ADMIN, "c").items if one.action == action]


def document(*headings: str) -> NewDocument:
    chunks = tuple(
        NewChunk(f"text of {one}", one, (one,), None, f"digest {one}") for one in headings
    )
    return NewDocument("Handbook", "text/markdown", "|".join(headings), 100, chunks)


def set_by(label: str) -> dict[str, Callable[[Mos, Principal, str], object]]:
    """Every way to put something under a label."""
    labels = (label,)
    return {
        "add": lambda mos, who, one: mos.add_memories(who, "c", [NewMemory("x", labels=labels)]),
        "patch": lambda mos, who, one: mos.update_memory(who, "c", one, MemoryPatch(labels=labels)),
        "turns": lambda mos, who, one: mos.add_turns(who, "c", [TURN], labels=labels),
        "document": lambda mos, who, one: mos.put_document(
            who, "c", document("A"), uri="a", labels=labels
        ),
    }


@pytest.mark.parametrize("how", list(set_by("")))
def test_an_editor_sets_the_labels_of_its_grant_and_no_others(desk: Desk, how: str) -> None:
    (memory,) = desk.add("open")
    editor = desk.grant("ann", Role.EDITOR, labels=["hr"])
    before = desk.mos.get_cube(ADMIN, "c").version
    with pytest.raises(InvalidRequest, match="does not hold every one of these labels") as refused:
        set_by("legal")[how](desk.mos, editor, memory.id)
    assert refused.value.param == "labels"
    assert desk.mos.get_cube(ADMIN, "c").version == before
    set_by("hr")[how](desk.mos, editor, memory.id)
    set_by("legal")[how](desk.mos, desk.grant("bob", Role.OWNER), memory.id)


def test_a_label_is_taken_off_by_who_holds_it_and_unseen_by_who_does_not(desk: Desk) -> None:
    (one,) = desk.add("secret", labels=("hr", "legal"))
    for name, held in (("ann", []), ("bob", ["hr"]), ("cat", ["legal"])):
        with pytest.raises(NotFound):
            desk.mos.update_memory(
                desk.grant(name, Role.EDITOR, labels=held), "c", one.id, MemoryPatch(labels=())
            )
    both = desk.grant("dan", Role.EDITOR, labels=["hr", "legal"])
    assert desk.mos.update_memory(both, "c", one.id, MemoryPatch(labels=("hr",))).labels == ("hr",)


def test_an_old_version_stays_under_the_labels_that_it_had(desk: Desk) -> None:
    (one,) = desk.add("the code is 4711", labels=("hr",))
    patch = MemoryPatch(text="ask the desk", labels=())
    desk.mos.update_memory(ADMIN, "c", one.id, patch)
    reader = desk.grant("ann", Role.READER)
    assert [line.text for line in desk.mos.memory_history(reader, "c", one.id)] == ["ask the desk"]
    assert log(desk, "memory.read") == []
    holder = desk.grant("bob", Role.READER, labels=["hr"])
    assert len(desk.mos.memory_history(holder, "c", one.id)) == 2
    (entry,) = log(desk, "memory.read")
    assert (entry.actor, entry.subject) == ("bob", one.id)
    assert entry.details == {"count": 1, "labels": ["hr"], "memories": [one.id]}


def test_a_patch_keeps_edges_to_what_its_sender_does_not_see(desk: Desk) -> None:
    hidden, shown = desk.add("hidden", labels=("hr",))[0], desk.add("shown")[0]
    (one,) = desk.add("one", edges=(Edge("about", hidden.id), Edge("about", shown.id)))
    editor = desk.grant("ann", Role.EDITOR)
    changed = desk.mos.update_memory(
        editor, "c", one.id, MemoryPatch(edges=(Edge("next", shown.id),))
    )
    assert changed.edges == (Edge("next", shown.id),)
    after = desk.mos.get_memory(ADMIN, "c", one.id).edges
    assert set(after) == {Edge("about", hidden.id), Edge("next", shown.id)}


def test_why_a_merge_was_made_stays_under_its_labels(desk: Desk) -> None:
    (plain,), (secret,) = desk.add("plain"), desk.add("secret", labels=("hr",))
    merged = desk.mos.merge_memories(ADMIN, "c", [plain.id, secret.id], reason="both on 4711")
    reasons = {
        one: desk.mos.memory_history(ADMIN, "c", one)[-1].reason
        for one in (plain.id, secret.id, merged.id)
    }
    assert reasons == {plain.id: None, secret.id: "both on 4711", merged.id: "both on 4711"}


def test_one_call_that_reads_under_labels_is_one_row_before_its_answer(desk: Desk) -> None:
    hidden = desk.add(*[f"s{number}" for number in range(150)], labels=("hr", "legal"))
    desk.add("open")
    holder = desk.grant("ann", Role.READER, labels=["hr", "legal"])
    desk.mos.list_memories(holder, "c", limit=1000)
    desk.mos.get_memory(ADMIN, "c", hidden[0].id)
    scope = desk.mos.search_scope(holder, ["c"])
    desk.mos.load_found(scope, [1, 2, 3], answering=True)
    desk.mos.load_found(scope, [1, 2, 3], answering=False)
    rows = log(desk, "memory.read")[::-1]
    assert [(row.actor, row.details["count"]) for row in rows] == [
        ("ann", 150),
        ("local", 1),
        ("ann", 3),
    ]
    assert rows[0].details["memories"] == [one.id for one in hidden[:100]]
    assert rows[0].details["labels"] == ["hr", "legal"]


def test_a_read_that_cannot_be_logged_gives_no_answer(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (secret,) = desk.add("secret", labels=("hr",))

    def refuse(*_arguments: object, **_named: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("memos_vllm.control.audit.append", refuse)
    with pytest.raises(OSError, match="full"):
        desk.mos.get_memory(ADMIN, "c", secret.id)


def test_a_read_without_labels_writes_nothing(desk: Desk) -> None:
    desk.add("open", "also open")
    desk.add("secret", labels=("hr",))
    reader = desk.grant("ann", Role.READER)
    before = desk.mos.verify_audit().entries
    desk.mos.list_memories(reader, "c")
    desk.mos.load_found(desk.mos.search_scope(reader, ["c"]), [1, 2, 3], answering=True)
    assert desk.mos.verify_audit().entries == before


def test_a_patch_and_a_document_that_change_nothing_are_logged_as_reads(desk: Desk) -> None:
    (one,) = desk.add("secret", labels=("hr",))
    desk.mos.update_memory(ADMIN, "c", one.id, MemoryPatch(labels=("hr",)))
    desk.mos.put_document(ADMIN, "c", document("A"), uri="a", labels=["hr"])
    desk.mos.put_document(ADMIN, "c", document("A"), uri="a")
    assert [row.details["count"] for row in log(desk, "memory.read")] == [2, 1]


def test_turns_are_numbered_and_linked_by_what_who_sees_them_sees(desk: Desk) -> None:
    said = [
        desk.mos.add_turns(ADMIN, "c", [TURN], session_id="s", labels=labels)[0].id
        for labels in ((), ("hr",), ("hr",), ())
    ]
    for who, shown in (
        (desk.grant("ann", Role.READER), [0, 3]),
        (desk.grant("bob", Role.READER, labels=["hr"]), [0, 1, 2, 3]),
    ):
        turns = desk.mos.list_memories(who, "c").items
        assert [one.id for one in turns] == [said[place] for place in shown]
        for earlier, later in itertools.pairwise(turns):
            assert later.id in {edge.target for edge in earlier.edges}
    numbers = [one.source.locator for one in desk.mos.list_memories(ADMIN, "c").items]
    assert numbers == ["turn 1", "turn 2", "turn 3", "turn 2"]


def test_a_heading_over_what_is_labelled_later_leaves_the_outline_and_its_history(
    desk: Desk,
) -> None:
    stored = desk.mos.put_document(ADMIN, "c", document("Open", "Layoffs"), uri="a")
    assert stored.document.text == "Handbook\nOpen\nLayoffs"
    secret = stored.memories[1]
    desk.mos.update_memory(ADMIN, "c", secret.id, MemoryPatch(labels=("hr",)))
    reader = desk.grant("ann", Role.EDITOR)
    shown = desk.mos.get_memory(reader, "c", stored.document.id)
    assert (shown.text, shown.version) == ("Handbook\nOpen", 2)
    history = desk.mos.memory_history(reader, "c", stored.document.id)
    assert {line.text for line in history} == {"Handbook\nOpen"}
    for who in (reader, ADMIN):
        again = desk.mos.put_document(who, "c", document("Open", "Layoffs", "New"), uri="a")
        assert again.document.text == "Handbook\nOpen\nNew"


def test_a_reading_of_turns_is_for_who_asked_and_for_owners(desk: Desk) -> None:
    ann, bob = desk.grant("ann", Role.EDITOR), desk.grant("bob", Role.EDITOR)
    _, job = desk.mos.remember_turn(ann, "c", [TURN], session_id=None, read=True)
    assert job is not None
    assert (job.created_by, desk.mos.get_job(ann, job.id).id) == ("ann", job.id)
    assert desk.mos.list_jobs(bob, cube_id="c").items == []
    for call in (desk.mos.get_job, desk.mos.cancel_job):
        with pytest.raises(NotFound, match=f"job '{job.id}' does not exist"):
            call(bob, job.id)
    owner = desk.grant("cat", Role.OWNER)
    assert [one.id for one in desk.mos.list_jobs(owner, cube_id="c").items] == [job.id]


def test_a_principal_is_known_by_its_id_for_work_in_its_name(desk: Desk) -> None:
    desk.grant("ann", Role.EDITOR)
    assert desk.mos.principal("ann") == Principal(PrincipalId("ann"))
    assert desk.mos.principal("local") == LOCAL_ADMIN
    desk.sql("UPDATE principals SET disabled_at = '2026-01-01 00:00:00'")
    for name in ("ann", "nobody"):
        with pytest.raises(NotFound):
            desk.mos.principal(name)


def test_history_says_what_came_from_what_as_far_as_its_reader_sees(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    merged = desk.mos.merge_memories(ADMIN, "c", [one.id, two.id])
    desk.mos.restore_memory(ADMIN, "c", one.id)
    lines = desk.mos.memory_history(ADMIN, "c", one.id)
    assert [(line.change, line.lineage.merged_into) for line in lines] == [
        ("added", None),
        ("merged", merged.id),
        ("restored", None),
    ]
    (first,) = desk.mos.memory_history(ADMIN, "c", merged.id)
    assert first.lineage.derived_from == (one.id, two.id)
    (fact,) = desk.mos.add_facts(
        ADMIN, "c", [NewFact("f", supersedes=(two.id,))], turn_ids=[one.id]
    )
    (line,) = desk.mos.memory_history(ADMIN, "c", fact.id)
    assert (line.lineage.derived_from, line.lineage.supersedes) == ((one.id,), (two.id,))
    desk.mos.restore_memory(ADMIN, "c", two.id)
    desk.mos.update_memory(ADMIN, "c", two.id, MemoryPatch(labels=("hr",)))
    reader = desk.grant("ann", Role.READER)
    (line,) = desk.mos.memory_history(reader, "c", fact.id)
    assert (line.lineage.derived_from, line.lineage.supersedes) == ((one.id,), ())


def test_a_cursor_tells_no_number_and_cannot_be_made_up(desk: Desk) -> None:
    desk.add("one", "two", "three")
    page = desk.mos.list_memories(ADMIN, "c", limit=1)
    assert page.next_cursor is not None
    again = desk.mos.list_memories(ADMIN, "c", limit=1)
    assert again.next_cursor == page.next_cursor
    rest = desk.mos.list_memories(ADMIN, "c", cursor=page.next_cursor)
    assert [one.text for one in rest.items] == ["two", "three"]
    for made_up in (page.next_cursor[:-2] + "AA", "bWVtb3JpZXM6MQ", "bWVtb3JpZXM6MDA"):
        with pytest.raises(InvalidRequest):
            desk.mos.list_memories(ADMIN, "c", cursor=made_up)
