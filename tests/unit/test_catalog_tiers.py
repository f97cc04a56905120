"""Promote, demote, and when what was baked is out of date."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import Database

from memos_vllm.domain.artifact import ActivationState
from memos_vllm.domain.job import JobKind, JobState
from memos_vllm.domain.memory import MemoryPatch, Tier
from memos_vllm.errors import Conflict, InvalidRequest, NotFound, TooLarge


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        yield opened


def texts(desk: Desk) -> list[str]:
    return [memory.text for memory in desk.shot().memories]


def test_promotion_puts_memories_into_the_prefix_and_queues_one_bake(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    assert desk.state() == "none"
    job = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=[two.id])
    assert (job.kind, job.state, job.cube_id) == (JobKind.BAKE, JobState.QUEUED, "c")
    assert desk.state() == "baking"
    assert texts(desk) == ["two"]
    again = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=[one.id])
    assert again.id == job.id
    assert texts(desk) == ["two", "one"]
    tiers = desk.mos.get_cube(ADMIN, "c").tiers
    assert (tiers.activation, tiers.plaintext) == (2, 0)


def test_memories_keep_their_place_and_new_ones_go_to_the_end(desk: Desk) -> None:
    one, two, three = desk.add("one", "two", "three")
    desk.promote(three.id, one.id)
    desk.promote()
    assert texts(desk) == ["three", "one", "two"]
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION, memory_ids=[three.id])
    desk.promote(three.id)
    assert texts(desk) == ["one", "two", "three"]
    desk.mos.update_memory(ADMIN, "c", one.id, MemoryPatch(text="ONE"))
    assert texts(desk) == ["ONE", "two", "three"]
    assert two.position == 0


def test_a_running_bake_is_not_reused_because_it_may_have_read_the_cube_already(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    desk.promote(one.id)
    running = desk.mos.claim_job("w", lease_seconds=30)
    queued = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION, memory_ids=[two.id])
    assert running is not None
    assert queued.id != running.id


def test_all_leaves_out_what_is_labelled_archived_or_expired(desk: Desk) -> None:
    desk.add("plain")
    desk.add("labelled", labels=("hr",))
    desk.add("expired", expires_at=desk.clock.now - timedelta(seconds=1))
    (archived,) = desk.add("archived")
    desk.mos.archive_memory(ADMIN, "c", archived.id)
    desk.promote()
    assert texts(desk) == ["plain"]


def test_what_cannot_be_promoted_is_refused_with_the_reason_and_nothing_moves(desk: Desk) -> None:
    (good,) = desk.add("good")
    (labelled,) = desk.add("labelled", labels=("hr",))
    (expired,) = desk.add("expired", expires_at=desk.clock.now)
    (archived,) = desk.add("archived")
    desk.mos.archive_memory(ADMIN, "c", archived.id)

    def promote(*ids: str, to: Tier = Tier.ACTIVATION) -> None:
        desk.mos.promote(ADMIN, "c", to=to, memory_ids=list(ids))

    with pytest.raises(InvalidRequest, match="labelled memory stays plaintext"):
        promote(good.id, labelled.id)
    with pytest.raises(Conflict, match="expired"):
        promote(good.id, expired.id)
    with pytest.raises(Conflict, match="archived; restore it before you promote it"):
        promote(good.id, archived.id)
    with pytest.raises(NotFound):
        promote(good.id, "mem_nowhere")
    with pytest.raises(InvalidRequest, match="arrives with adapters"):
        promote(good.id, to=Tier.PARAMETRIC)
    with pytest.raises(InvalidRequest):
        promote(good.id, to=Tier.PLAINTEXT)
    with pytest.raises(InvalidRequest):
        promote()
    with pytest.raises(TooLarge):
        promote(*[f"m{number}" for number in range(1001)])
    assert texts(desk) == []
    assert desk.mos.list_jobs(ADMIN).items == []


def test_promoting_a_cube_without_memory_is_a_conflict(desk: Desk) -> None:
    with pytest.raises(Conflict, match="no active, unlabelled memory"):
        desk.promote()


def test_promoting_the_same_again_moves_no_version_but_bakes(desk: Desk) -> None:
    desk.add("one")
    desk.promote()
    desk.run_jobs()
    version = desk.shot().version
    job = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION)
    assert job.state is JobState.QUEUED
    assert desk.shot().version == version


def test_demotion_takes_memories_out_and_bakes_what_remains(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    desk.promote()
    desk.run_jobs()
    assert desk.state() == "ready"
    job = desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION, memory_ids=[one.id])
    assert job.state is JobState.QUEUED
    assert texts(desk) == ["two"]
    assert desk.state() == "baking"
    assert [one.state for one in desk.mos.list_artifacts("c")] == [ActivationState.STALE]
    with pytest.raises(Conflict, match="plaintext tier"):
        desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION, memory_ids=[one.id])
    assert desk.mos.get_memory(ADMIN, "c", two.id).position == 2


def test_demoting_the_last_memory_needs_no_bake(desk: Desk) -> None:
    desk.add("one")
    desk.promote()
    desk.run_jobs()
    job = desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
    assert (job.state, job.progress) == (JobState.SUCCEEDED, 1.0)
    assert desk.mos.get_job(ADMIN, job.id) == job
    assert desk.mos.claim_job("w", lease_seconds=1) is None
    assert desk.state() == "none"
    with pytest.raises(InvalidRequest):
        desk.mos.demote(ADMIN, "c", from_tier=Tier.PLAINTEXT)
    with pytest.raises(InvalidRequest, match="adapters"):
        desk.mos.demote(ADMIN, "c", from_tier=Tier.PARAMETRIC)


@pytest.mark.parametrize("field", ["text", "tags", "metadata"])
def test_an_edit_of_a_baked_memory_makes_the_cube_stale_until_it_is_baked_again(
    desk: Desk, field: str
) -> None:
    one, _ = desk.add("one", "two")
    desk.promote(one.id)
    desk.run_jobs()
    changes = {"text": "other", "tags": ("t",), "metadata": {"a": 1}}
    desk.mos.update_memory(ADMIN, "c", one.id, MemoryPatch(**{field: changes[field]}))
    assert desk.state() == "stale"
    assert [record.state for record in desk.mos.list_artifacts()] == [ActivationState.STALE]
    # The engine met the head in its store, or prefilled it for a chat.
    desk.mos.record_artifact(desk.artifact())
    assert desk.state() == "ready"


def test_an_edit_of_a_plaintext_memory_leaves_what_is_baked_alone(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    desk.promote(one.id)
    desk.run_jobs()
    desk.mos.update_memory(ADMIN, "c", two.id, MemoryPatch(text="other"))
    desk.add("three")
    desk.mos.archive_memory(ADMIN, "c", two.id)
    assert desk.state() == "ready"


def test_archiving_takes_a_memory_out_of_the_prefix_and_restoring_puts_it_back_in_place(
    desk: Desk,
) -> None:
    one, _two = desk.add("one", "two")
    desk.promote()
    desk.run_jobs()
    desk.mos.archive_memory(ADMIN, "c", one.id)
    assert texts(desk) == ["two"]
    assert desk.state() == "stale"
    desk.mos.restore_memory(ADMIN, "c", one.id)
    assert texts(desk) == ["one", "two"]
    # The old artifact has the old version; only a new bake has the new one.
    assert desk.state() == "stale"


def test_an_expired_memory_leaves_the_prefix_without_any_write(desk: Desk) -> None:
    desk.add("short", expires_at=desk.clock.now + timedelta(seconds=10))
    desk.add("long")
    desk.promote()
    desk.run_jobs()
    assert texts(desk) == ["short", "long"]
    desk.clock.advance(10)
    assert texts(desk) == ["long"]
    assert desk.state() == "stale"


def test_a_label_takes_a_memory_out_of_the_prefix_and_moves_the_epoch(desk: Desk) -> None:
    one, _two = desk.add("one", "two")
    desk.promote()
    desk.run_jobs()
    before = desk.shot()
    changed = desk.mos.update_memory(ADMIN, "c", one.id, MemoryPatch(labels=("hr",)))
    assert (changed.tier, changed.position) == (Tier.PLAINTEXT, 0)
    after = desk.shot()
    assert [memory.text for memory in after.memories] == ["two"]
    assert after.epoch == before.epoch + 1
    assert desk.state() == "stale"
    assert all(one.state is ActivationState.STALE for one in desk.mos.list_artifacts())


def test_only_erasing_and_labels_move_the_epoch(desk: Desk) -> None:
    (one,) = desk.add("one")
    desk.promote()
    desk.mos.update_memory(ADMIN, "c", one.id, MemoryPatch(text="x"))
    desk.mos.archive_memory(ADMIN, "c", one.id)
    desk.mos.restore_memory(ADMIN, "c", one.id)
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
    assert desk.shot().epoch == 1
    desk.mos.erase_memory(ADMIN, "c", one.id, tombstone_key=KEY)
    assert desk.shot().epoch == 2


def test_a_bake_of_an_older_state_is_not_taken_for_the_present_one(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    desk.promote(one.id)
    old = desk.artifact()
    # The plaintext memory gets a label: same prefix, but another epoch and so another scope.
    desk.mos.update_memory(ADMIN, "c", two.id, MemoryPatch(labels=("hr",)))
    desk.mos.record_artifact(old)
    assert desk.mos.list_artifacts("c")[0].state is ActivationState.STALE
    assert desk.state() == "baking"
    desk.mos.record_artifact(desk.artifact(name="new"))
    assert desk.state() == "ready"


def test_two_heads_of_one_composition_count_together(desk: Desk) -> None:
    desk.add("one")
    desk.promote()
    plain = desk.artifact(name="plain")
    desk.mos.record_artifact(plain)
    desk.clock.advance(1)
    with_tools = replace(desk.artifact(name="tools"), tokens=164)
    desk.mos.record_artifact(with_tools)
    activation = desk.mos.get_cube(ADMIN, "c").activation
    assert (activation.tokens, activation.bytes) == (164, 8192)
    assert [record.id for record in desk.mos.list_artifacts()] == [plain.id, with_tools.id]


def test_the_reply_to_a_promotion_and_the_list_of_jobs_agree(desk: Desk) -> None:
    desk.add("one")
    job = desk.mos.promote(ADMIN, "c", to=Tier.ACTIVATION)
    assert desk.mos.list_jobs(ADMIN, cube_id="c", state=JobState.QUEUED).items == [job]


def test_an_earlier_artifact_is_ready_again_when_its_composition_is_back(desk: Desk) -> None:
    one, two = desk.add("one", "two")
    desk.promote(one.id)
    desk.run_jobs()
    desk.promote(two.id)
    assert desk.state() == "baking"
    desk.run_jobs()
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION, memory_ids=[two.id])
    assert desk.state() == "ready"
