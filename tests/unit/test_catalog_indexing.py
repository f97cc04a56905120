"""The outbox and what an indexer keeps: nothing that changed is ever missed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import Database

from memos_vllm.domain.indexing import DerivedMemory, IndexBacklog
from memos_vllm.domain.memory import Memory, MemoryPatch, Tier
from memos_vllm.errors import NotFound

INDEX = "words-v1"


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    with open_desk(tmp_path, database) as opened:
        opened.mos.start_index(INDEX, embedder="words", dimension=2, anew=True)
        opened.mos.end_walk(INDEX)
        yield opened


def follow(desk: Desk) -> list[tuple[str, int | None]]:
    """Read what is new and say that it was followed."""
    entries = desk.mos.outbox(INDEX, limit=100)
    if entries:
        desk.mos.advance_index(INDEX, applied=entries[-1].seq)
    return [(entry.cube_id, entry.memory_seq) for entry in entries]


def seq_of(desk: Desk, memory: Memory) -> int:
    ((seq,),) = desk.sql(f"SELECT seq FROM memories WHERE id = '{memory.id}'")
    assert isinstance(seq, int)
    return seq


def derived(seq: int, *, cube_id: str = "c", entities: tuple[str, ...] = ()) -> DerivedMemory:
    vector = np.array([0.6, 0.8], "<f2").tobytes()
    return DerivedMemory(seq, cube_id, b"d" * 32, vector, entities)  # type: ignore[arg-type]


def test_every_change_of_a_memory_is_in_the_outbox(desk: Desk) -> None:
    (memory,) = desk.add("one")
    here = ("c", seq_of(desk, memory))
    assert follow(desk) == [here]
    desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(text="two"))
    assert follow(desk) == [here]
    desk.mos.update_memory(ADMIN, "c", memory.id, MemoryPatch(tags=("t",)))
    assert follow(desk) == [here]
    desk.mos.archive_memory(ADMIN, "c", memory.id)
    assert follow(desk) == [here]
    desk.mos.restore_memory(ADMIN, "c", memory.id)
    assert follow(desk) == [here]
    desk.promote(memory.id)
    assert follow(desk) == [here]
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION, memory_ids=[memory.id])
    assert follow(desk) == [here]
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    assert follow(desk) == [here]
    assert follow(desk) == []


def test_a_refused_change_leaves_no_entry(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.add("one", cube_id="other")
    assert follow(desk) == []


def test_a_deleted_cube_is_one_entry_whatever_waited_before(desk: Desk) -> None:
    desk.add("one", "two", "three")
    desk.mos.delete_cube(ADMIN, "c")
    assert follow(desk) == [("c", None)]


def test_entries_are_dropped_once_every_collection_followed_them(desk: Desk) -> None:
    desk.mos.start_index("other", embedder="other", dimension=2, anew=True)
    desk.add("one")
    follow(desk)
    assert desk.sql("SELECT count(*) FROM index_outbox") == [(1,)]
    entry = desk.mos.outbox("other", limit=10)[-1]
    desk.mos.advance_index("other", applied=entry.seq)
    assert desk.sql("SELECT count(*) FROM index_outbox") == [(0,)]


def test_an_emptied_outbox_never_gives_a_number_twice(desk: Desk) -> None:
    desk.add("one")
    follow(desk)
    desk.reopen()
    desk.add("two")
    assert len(follow(desk)) == 1


def test_a_new_collection_walks_through_what_was_there_before(desk: Desk) -> None:
    memories = desk.add("one", "two", "three")
    progress = desk.mos.start_index("late", embedder="late", dimension=2, anew=True)
    assert not progress.complete
    assert desk.mos.outbox("late", limit=10) == []
    seqs = [seq_of(desk, memory) for memory in memories]
    assert desk.mos.index_backlog("late") == IndexBacklog(changes=0, memories=3)
    assert desk.mos.next_to_walk("late", limit=2) == seqs[:2]
    desk.mos.advance_index("late", walked=seqs[1])
    assert desk.mos.next_to_walk("late", limit=2) == seqs[2:]
    desk.mos.end_walk("late")
    assert desk.mos.next_to_walk("late", limit=2) == []
    assert all(progress.complete for progress in desk.mos.indexes())


def test_a_lost_collection_starts_again_from_the_first_memory(desk: Desk) -> None:
    (memory,) = desk.add("one")
    follow(desk)
    again = desk.mos.start_index(INDEX, embedder="words", dimension=2, anew=True)
    assert not again.complete
    assert desk.mos.next_to_walk(INDEX, limit=5) == [seq_of(desk, memory)]


def test_only_active_memories_are_given_to_the_index_with_their_stored_vectors(
    desk: Desk,
) -> None:
    kept, archived = desk.add("one", "two")
    desk.mos.archive_memory(ADMIN, "c", archived.id)
    seqs = [seq_of(desk, kept), seq_of(desk, archived)]
    desk.mos.keep_derived([derived(seqs[0])], embedder="words")
    (found,) = desk.mos.memories_to_index([*seqs, 999], embedder="words")
    assert (found.memory.text, found.digest) == ("one", b"d" * 32)
    assert found.vector == derived(seqs[0]).vector
    (other,) = desk.mos.memories_to_index(seqs, embedder="another")
    assert (other.digest, other.vector) == (None, None)


def test_nothing_is_kept_of_a_memory_that_is_gone(desk: Desk) -> None:
    (memory,) = desk.add("one")
    seq = seq_of(desk, memory)
    desk.mos.keep_derived([derived(seq, entities=("leeds",))], embedder="words")
    desk.mos.erase_memory(ADMIN, "c", memory.id, tombstone_key=KEY)
    desk.mos.keep_derived([derived(seq, entities=("leeds",))], embedder="words")
    assert desk.sql("SELECT count(*) FROM memory_vectors") == [(0,)]
    assert desk.sql("SELECT count(*) FROM memory_entities") == [(0,)]


def test_vectors_of_an_embedder_go_with_its_last_collection(desk: Desk) -> None:
    (memory,) = desk.add("one")
    desk.mos.keep_derived([derived(seq_of(desk, memory))], embedder="words")
    desk.mos.forget_index(INDEX)
    assert desk.sql("SELECT count(*) FROM memory_vectors") == [(0,)]


def test_reindexing_a_cube_drops_it_and_takes_each_active_memory_in_again(desk: Desk) -> None:
    kept, archived = desk.add("one", "two")
    desk.mos.archive_memory(ADMIN, "c", archived.id)
    follow(desk)
    assert desk.mos.reindex_cube(ADMIN, "c") == 1
    assert follow(desk) == [("c", None), ("c", seq_of(desk, kept))]
    assert desk.mos.queue_reindex(ADMIN, "c").id == desk.mos.queue_reindex(ADMIN, "c").id
