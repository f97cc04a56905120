"""Lifecycle, access and ids: the rules that need no database."""

from __future__ import annotations

import re

import pytest

from memos_vllm.domain.access import Access, Role, allows, roles_that_allow, sees_labels
from memos_vllm.domain.audit import GENESIS_HASH, seal
from memos_vllm.domain.cube import validate_cube_id
from memos_vllm.domain.ids import IdSource
from memos_vllm.domain.job import JobState
from memos_vllm.domain.lifecycle import Verb, move
from memos_vllm.domain.memory import MemoryState
from memos_vllm.errors import Conflict

ACTIVE, MERGED, ARCHIVED = MemoryState.ACTIVE, MemoryState.MERGED, MemoryState.ARCHIVED
LEGAL = {
    (ACTIVE, Verb.EDIT): ACTIVE,
    (ACTIVE, Verb.PROMOTE): ACTIVE,
    (ACTIVE, Verb.ARCHIVE): ARCHIVED,
    (ACTIVE, Verb.MERGE): MERGED,
    (MERGED, Verb.RESTORE): ACTIVE,
    (MERGED, Verb.ARCHIVE): ARCHIVED,
    (ARCHIVED, Verb.RESTORE): ACTIVE,
}


@pytest.mark.parametrize("state", list(MemoryState))
@pytest.mark.parametrize("verb", list(Verb))
def test_only_legal_moves_are_made_and_the_others_say_why(state: MemoryState, verb: Verb) -> None:
    if (state, verb) in LEGAL:
        assert move(state, verb) is LEGAL[state, verb]
    else:
        with pytest.raises(Conflict, match="memory 'mem_1' is "):
            move(state, verb, memory_id="mem_1")


def test_every_state_has_a_way_back_to_active() -> None:
    for state in (MERGED, ARCHIVED):
        assert move(state, Verb.RESTORE) is ACTIVE


@pytest.mark.parametrize(
    ("role", "verbs"),
    [
        (Role.READER, {Access.SEE, Access.READ}),
        (Role.EDITOR, {Access.SEE, Access.READ, Access.WRITE}),
        (Role.OWNER, set(Access)),
        (Role.AUDITOR, {Access.SEE, Access.AUDIT}),
    ],
)
def test_a_role_allows_what_it_says_and_no_more(role: Role, verbs: set[Access]) -> None:
    assert {verb for verb in Access if allows(role, verb)} == verbs
    assert all((role in roles_that_allow(verb)) == (verb in verbs) for verb in Access)


def test_a_labelled_memory_needs_a_grant_for_all_its_labels() -> None:
    assert sees_labels(Role.READER, [], [])
    assert not sees_labels(Role.EDITOR, ["hr"], ["hr", "legal"])
    assert sees_labels(Role.READER, ["legal", "hr"], ["hr", "legal"])
    assert sees_labels(Role.OWNER, [], ["hr"])


def test_ids_of_one_source_differ_sort_by_time_and_are_legal_cube_ids() -> None:
    source = IdSource()
    ids = [source("mem") for _ in range(2000)]
    assert len(set(ids)) == len(ids)
    stamps = [one[: len("mem_") + 9] for one in ids]
    assert stamps == sorted(stamps)
    assert all(re.fullmatch(r"mem_[0-9a-z]{25}", one) for one in ids)
    assert validate_cube_id(source("cube"))


def test_a_finished_job_is_one_that_cannot_change() -> None:
    finished = {state for state in JobState if state.finished}
    assert finished == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


def test_every_part_of_an_audit_row_is_under_its_seal() -> None:
    parts = {
        "at": "t",
        "actor": "a",
        "action": "x",
        "cube_id": "c",
        "subject": None,
        "details": "{}",
        "previous_hash": GENESIS_HASH,
    }
    sealed = seal(**parts)
    assert all(seal(**{**parts, name: "other"}) != sealed for name in parts)
    # Moving a character from one field to the next is a change too.
    assert seal(**{**parts, "actor": "ax", "action": ""}) != sealed
