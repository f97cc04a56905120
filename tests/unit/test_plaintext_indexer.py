"""Following the catalog: what is indexed, what is computed, and how embedders change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from index_kit import folder_in_memory
from indexer_kit import Bench, CountingEmbedder, Disk, FakeIndex, FakeStore, eventually, running

from memos_vllm.domain.finding import AUTHOR_PREFIX
from memos_vllm.domain.memory import MemoryPatch, Source, Tier
from memos_vllm.domain.search import SearchQuery
from memos_vllm.errors import (
    ConfigurationError,
    Conflict,
    InvalidRequest,
    NotFound,
    TooLarge,
    Unavailable,
)
from memos_vllm.plaintext import follower, indexer
from memos_vllm.plaintext.embedders.base import Vectors


@pytest.fixture
def desk() -> Iterator[Desk]:
    with folder_in_memory() as folder, open_desk(folder) as opened:
        yield opened


@pytest.fixture
def bench(desk: Desk) -> Bench:
    return Bench(desk)


def vectors_of(desk: Desk, key: str) -> int:
    ((number,),) = desk.sql(f"SELECT count(*) FROM memory_vectors WHERE embedder = '{key}'")
    assert isinstance(number, int)
    return number


def outbox_length(desk: Desk) -> int:
    ((number,),) = desk.sql("SELECT count(*) FROM index_outbox")
    assert isinstance(number, int)
    return number


def test_every_change_reaches_the_index(bench: Bench) -> None:
    desk = bench.desk
    first, second, third = desk.add("one", "two", "three")
    bench.settle()
    bench.check()
    desk.mos.update_memory(ADMIN, "c", first.id, MemoryPatch(text="one more", tags=("t",)))
    desk.mos.archive_memory(ADMIN, "c", second.id)
    desk.mos.erase_memory(ADMIN, "c", third.id, tombstone_key=KEY)
    desk.promote(first.id)
    bench.settle()
    bench.check()
    desk.mos.delete_cube(ADMIN, "c")
    bench.settle()
    assert bench.points() == {}


def test_a_text_is_embedded_once_whatever_becomes_of_its_memory(bench: Bench) -> None:
    desk = bench.desk
    first, second = desk.add("one", "two")
    bench.settle()
    desk.mos.update_memory(ADMIN, "c", first.id, MemoryPatch(tags=("t",), metadata={"n": 1}))
    desk.promote(first.id)
    desk.mos.archive_memory(ADMIN, "c", second.id)
    bench.settle()
    desk.mos.demote(ADMIN, "c", from_tier=Tier.ACTIVATION)
    desk.mos.restore_memory(ADMIN, "c", second.id)
    desk.mos.reindex_cube(ADMIN, "c")
    bench.settle()
    bench.reopen()
    bench.settle()
    bench.crash()
    bench.disk.points.clear()  # the index is lost and built again
    bench.settle()
    bench.check()
    assert bench.embedder.texts == {"one": 1, "two": 1}
    desk.mos.update_memory(ADMIN, "c", first.id, MemoryPatch(text="three"))
    bench.settle()
    assert bench.embedder.texts == {"one": 1, "two": 1, "three": 1}


def test_another_author_is_known_by_name_without_embedding_anew(bench: Bench) -> None:
    (memory,) = bench.desk.add("I bought a bicycle", source=Source(author="Ana"))
    bench.settle()
    patch = MemoryPatch(source=Source(author="Bo"))
    bench.desk.mos.update_memory(ADMIN, "c", memory.id, patch)
    bench.settle()
    names = bench.desk.sql("SELECT entity FROM memory_entities WHERE entity LIKE 'by:%'")
    assert names == [(f"{AUTHOR_PREFIX}bo",)]
    assert bench.embedder.texts == {"I bought a bicycle": 1}
    bench.check()


@pytest.mark.parametrize("refusal", [InvalidRequest, TooLarge])
def test_a_text_that_the_embedder_refuses_does_not_hold_up_the_others(
    bench: Bench, refusal: type[Exception]
) -> None:
    class Picky(CountingEmbedder):
        def embed(self, texts: object) -> Vectors:
            try:
                return super().embed(texts)  # type: ignore[arg-type]
            except InvalidRequest as error:
                raise refusal(str(error)) from error

    bench.embedder = Picky(refused="poison")
    bench.plaintext = bench._new()
    bench.desk.add("one", "poison two", "three")
    bench.settle()
    bench.check()
    refused = [point for point in bench.points().values() if not point.dense.any()]
    assert len(refused) == 1
    assert bench.embedder.texts == {"one": 1, "three": 1}

    # Nothing was kept in place of its vector: the next look is a fresh one.
    bench.embedder.refused = "\x00"
    bench.desk.mos.reindex_cube(ADMIN, "c")
    bench.settle()
    bench.check()
    assert bench.embedder.texts == {"one": 1, "poison two": 1, "three": 1}


def test_a_text_at_which_the_embedder_breaks_down_is_left_out_after_some_tries(
    bench: Bench,
) -> None:
    class Fragile(CountingEmbedder):
        def embed(self, texts: object) -> Vectors:
            try:
                return super().embed(texts)  # type: ignore[arg-type]
            except InvalidRequest as error:
                raise Unavailable("status 500") from error

    bench.embedder = Fragile(refused="poison")
    bench.plaintext = bench._new()
    bench.desk.add("one", "poison two", "three")
    for _ in range(3):
        with pytest.raises(Unavailable, match="500"):
            bench.step()
    bench.settle()
    bench.check()
    assert bench.embedder.texts["one"] == bench.embedder.texts["three"] == 1


def test_an_embedder_that_is_down_is_never_taken_for_one_that_refuses(bench: Bench) -> None:
    bench.embedder.failure = Unavailable("down")
    bench.desk.add("one", "two")
    for _ in range(20):
        with pytest.raises(Unavailable, match="down"):
            bench.step()
    assert bench.embedder.calls < 40  # not once for each text
    bench.embedder.failure = None
    bench.settle()
    bench.check()
    assert all(point.dense.any() for point in bench.points().values())


def test_the_outbox_stays_until_what_it_led_to_is_durable(bench: Bench) -> None:
    bench.settle()
    bench.desk.add("one", "two")
    bench.settle()
    assert outbox_length(bench.desk) == 2
    bench.crash()
    bench.settle()
    bench.check()
    bench.save()
    assert outbox_length(bench.desk) == 0
    bench.crash()
    bench.settle()
    bench.check()


def test_what_was_done_is_saved_after_a_while_and_at_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.settle()
    with monkeypatch.context() as patch:
        patch.setattr(follower, "SAVE_SECONDS", 0.0)
        bench.desk.add("one")
        bench.step()
        assert outbox_length(bench.desk) == 0
    bench.desk.add("two")
    bench.step()
    assert outbox_length(bench.desk) == 1
    bench.collections.close()
    assert outbox_length(bench.desk) == 0


@pytest.mark.parametrize(("after", "forgets"), [(False, True), (True, False)])
def test_a_failure_of_any_call_in_turn_loses_nothing(
    bench: Bench, after: bool, forgets: bool
) -> None:
    """Whether the call that fails had its effect or not."""
    numbers = count()

    def change() -> None:
        number = next(numbers)
        kept, archived, erased = bench.desk.add(f"a{number}", f"b{number}", f"c{number}")
        bench.desk.mos.archive_memory(ADMIN, "c", archived.id)
        bench.desk.mos.erase_memory(ADMIN, "c", erased.id, tombstone_key=KEY)
        bench.desk.mos.update_memory(ADMIN, "c", kept.id, MemoryPatch(tags=(f"t{number}",)))

    def go_through() -> int:
        """Everything that is ever done to a store, from opening to closing; how many calls."""
        bench.disk.calls = 0
        bench.reopen(CountingEmbedder(f"fake-{next(numbers)}"))
        change()
        bench.settle()
        change()
        bench.desk.mos.reindex_cube(ADMIN, "c")
        bench.settle()
        try:
            bench.save()
        except Unavailable:
            bench.collections.check()
        bench.settle()
        return bench.disk.calls

    bench.disk.after, bench.disk.forgets = after, forgets
    go_through()
    calls = go_through()
    assert calls > 15
    for place in range(1, calls + 1):
        bench.disk.fail_at = place
        go_through()
        bench.disk.fail_at = None
        bench.settle()
        bench.check()


def test_changing_the_embedder_keeps_the_former_collection_answering(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 2)
    desk = bench.desk
    desk.add(*(f"text {number}" for number in range(7)))
    bench.settle()
    former = bench.embedder
    bench.reopen(CountingEmbedder("fake-b", dimension=6))
    bench.step()
    collections = bench.collections
    assert collections.serving is not None
    assert collections.building is not None
    assert collections.serving.embedder.key == "fake-a"

    (late,) = desk.add("late")
    while collections.building is not None:
        bench.step()
        if desk.mos.index_backlog(collections.serving.name).changes == 0:
            found = bench.plaintext.search(ADMIN, ["c"], SearchQuery("late"))
            assert late.id in [hit.memory.id for hit in found.hits]
    bench.settle()
    bench.check()
    assert former.texts == {f"text {number}": 1 for number in range(7)} | {"late": 1}
    assert bench.embedder.texts == former.texts
    assert (vectors_of(desk, "fake-a"), vectors_of(desk, "fake-b")) == (0, 8)
    assert former.closed == 2  # in its own days, and as the former one


def test_a_kill_while_a_collection_is_built_goes_on_where_it_stood(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 2)
    bench.desk.add(*(f"text {number}" for number in range(8)))
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))
    bench.step()
    bench.step()
    bench.save()
    assert sum(bench.embedder.texts.values()) == 4
    bench.crash()
    bench.step()
    assert bench.desk.mos.indexes()[-1].walked is not None
    assert bench.collections.building is not None
    bench.crash(keep=1)
    bench.settle()
    bench.check()
    assert set(bench.embedder.texts.values()) == {1}


def test_back_and_forth_between_embedders_leaves_nothing_behind(bench: Bench) -> None:
    desk = bench.desk
    desk.add("one", "two")
    bench.settle()
    first, second = bench.embedder, CountingEmbedder("fake-b", dimension=3)
    bench.reopen(second)
    bench.step()  # begun, not finished
    bench.reopen(first)
    desk.add("three")
    bench.settle()
    bench.check()
    bench.reopen(second)
    bench.settle()
    bench.check()
    bench.save()
    assert (vectors_of(desk, "fake-a"), vectors_of(desk, "fake-b")) == (0, 3)
    assert outbox_length(desk) == 0


@pytest.mark.parametrize("moment", ["forget_index", "end_walk"])
def test_a_kill_while_collections_are_switched_leaves_nothing_behind(
    bench: Bench, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.desk.add("one", "two")
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    done = getattr(bench.desk.mos, moment)

    def do_and_die(*arguments: object, **options: object) -> None:
        done(*arguments, **options)
        raise Killed

    for stop in (die, do_and_die):
        with monkeypatch.context() as patch:
            patch.setattr(bench.desk.mos, moment, stop)
            with pytest.raises(Killed):
                bench.settle()
        bench.crash()
    bench.settle()
    bench.check()
    bench.save()
    assert vectors_of(bench.desk, "fake-a") == 0
    assert outbox_length(bench.desk) == 0


@pytest.mark.parametrize(
    "failure", [ConfigurationError("no such model"), Unavailable("down"), ValueError("a bug")]
)
def test_a_former_embedder_that_cannot_be_opened_stops_nothing(
    bench: Bench, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.desk.add("one", "two")
    bench.settle()

    def fail(key: str) -> CountingEmbedder:
        raise failure

    bench.reopen(CountingEmbedder("fake-b"))
    monkeypatch.setattr(bench.collections, "_open_former", fail)
    bench.settle()
    bench.check()


def test_a_former_embedder_that_is_not_the_same_any_more_is_not_used(bench: Bench) -> None:
    bench.desk.add("one", "two")
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))
    bench.formers["fake-a"] = other = CountingEmbedder("fake-a of another day")
    bench.step()
    assert bench.collections.serving is None
    assert (other.calls, other.closed) == (0, 1)
    bench.settle()
    bench.check()


def test_an_embedder_that_is_gone_does_not_hold_up_the_one_that_takes_its_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 2)
    bench.desk.add(*(f"text {number}" for number in range(6)))
    bench.settle()
    former = bench.embedder
    bench.reopen(CountingEmbedder("fake-b"))
    bench.step()
    former.failure = Unavailable("the former server is gone")
    calls = former.calls
    bench.desk.add("late")
    bench.step()
    serving = bench.collections.serving
    assert serving is not None
    assert bench.collections.problem_of(serving) == "the former server is gone"
    # Meanwhile a search has what the new collection holds by now.
    assert bench.plaintext.search(ADMIN, ["c"], SearchQuery("text 0")).hits
    while bench.collections.building is not None:
        bench.step()
    bench.check()
    assert former.calls == calls + 1


def test_an_embedder_that_is_not_there_yet_does_not_hold_up_the_former_one(bench: Bench) -> None:
    bench.desk.add("one")
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))
    bench.embedder.failure = Unavailable("the new server is not up yet")
    bench.step()
    (late,) = bench.desk.add("late")
    while bench.step():
        pass
    found = bench.plaintext.search(ADMIN, ["c"], SearchQuery("late"))
    assert found.hits[0].memory.id == late.id
    building = bench.plaintext.status()["building"]
    assert isinstance(building, dict)
    assert building["problem"] == "the new server is not up yet"
    bench.embedder.failure = None
    bench.settle()
    bench.check()


def test_an_embedder_can_be_changed_while_there_is_nothing_to_embed(bench: Bench) -> None:
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))
    bench.settle()
    bench.desk.add("one")
    bench.settle()
    bench.check()


def test_a_former_collection_that_cannot_be_dropped_holds_up_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeStore, name: str) -> None:
        raise Unavailable("not permitted")

    bench.desk.add("one")
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))
    with monkeypatch.context() as patch:
        patch.setattr(FakeStore, "drop", refuse)
        while bench.step():
            pass
        bench.desk.add("two")
        while bench.step():
            pass
        assert len(bench.points()) == 2
    bench.settle()
    bench.check()


def test_the_same_embedder_with_another_dimension_has_another_collection(bench: Bench) -> None:
    bench.desk.add("one", "two")
    bench.settle()
    bench.reopen(CountingEmbedder("fake-a", dimension=7))
    bench.settle()
    bench.check()
    assert vectors_of(bench.desk, "fake-a") == 2


def test_collection_names_are_short_plain_and_apart() -> None:
    keys = ["openai:m@http://h/v1#4", "openai:m@http://h/v2#4", "a" * 300, "a" * 301, "ü"]
    names = {indexer.collection_name(CountingEmbedder(key)) for key in keys}
    names.add(indexer.collection_name(CountingEmbedder(keys[0], dimension=5)))
    assert len(names) == 6
    assert all(len(name) < 120 and name.isascii() for name in names)


def test_a_lost_index_is_built_again_from_the_catalog(bench: Bench) -> None:
    bench.desk.add("one", "two")
    bench.settle()
    bench.crash()
    bench.disk.points.clear()
    bench.disk.dims.clear()
    bench.settle()
    bench.check()
    assert bench.embedder.texts == {"one": 1, "two": 1}


def test_an_index_of_an_earlier_day_is_mended(bench: Bench) -> None:
    """As after a snapshot was put back: what the catalog had seen followed is not there."""
    desk = bench.desk
    memories = desk.add("one", "two", "three")
    bench.settle()
    bench.reopen()
    kept = {name: dict(points) for name, points in bench.disk.points.items()}
    bench.settle()
    desk.add("four", "five")
    desk.mos.erase_memory(ADMIN, "c", memories[0].id, tombstone_key=KEY)
    bench.settle()
    bench.reopen()
    bench.disk.points = kept
    bench.settle()
    bench.check()


def test_an_index_that_the_catalog_does_not_know_is_mended(bench: Bench) -> None:
    """As when only one of the two was put back, or was copied from elsewhere."""
    bench.desk.add("one", "two", "three")
    bench.settle()
    bench.reopen()
    bench.desk.sql("DELETE FROM indexes")
    bench.desk.mos.delete_cube(ADMIN, "c")
    bench.desk.mos.create_cube(ADMIN, cube_id="c")
    bench.desk.add("four")
    bench.desk.sql("DELETE FROM index_outbox")
    bench.settle()
    bench.check()


def test_an_index_that_breaks_while_it_is_built_is_gone_through_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 2)
    bench.desk.add(*(f"text {number}" for number in range(8)))
    bench.step()
    bench.step()
    bench.step()
    bench.save()
    bench.crash()
    (points,) = bench.disk.points.values()
    # It was lost, and what was written after that made it look whole.
    for seq in sorted(points)[:4]:
        del points[seq]
    while bench.collections.serving is None:
        bench.step()
    assert len(bench.points()) == 8  # before it answers, not some time later
    bench.settle()
    bench.check()


def test_an_index_that_broke_is_found_out_also_when_a_cube_waits_to_go(bench: Bench) -> None:
    desk = bench.desk
    desk.mos.create_cube(ADMIN, cube_id="d")
    desk.add("one", "two", "three")
    bench.settle()
    bench.reopen()
    (points,) = bench.disk.points.values()
    del points[min(points)]
    desk.mos.delete_cube(ADMIN, "d")
    bench.settle()
    bench.check()


def test_an_index_that_goes_on_losing_what_it_is_given_does_not_keep_us_busy_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeIndex, "upsert", lambda self, points: None)
    bench.desk.add("one", "two")
    bench.settle()
    assert bench.points() == {}


def test_a_collection_that_someone_else_removed_is_made_anew(bench: Bench) -> None:
    bench.desk.add("one")
    bench.settle()
    bench.save()
    (progress,) = bench.desk.mos.indexes()
    bench.desk.mos.forget_index(progress.name)
    with pytest.raises(NotFound):
        bench.step()
    bench.collections.close()
    bench.settle()
    bench.check()


def test_a_cube_that_someone_waits_for_comes_before_what_others_wrote_earlier(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 2)
    desk = bench.desk
    desk.mos.create_cube(ADMIN, cube_id="d")
    bench.settle()
    serving = bench.collections.serving
    assert serving is not None
    desk.add(*(f"text {number}" for number in range(10)))
    (waited_for,) = desk.add("birch", cube_id="d")
    bench.step()
    assert find(bench, "birch", "d") == []
    bench.step()  # the search has asked for it
    assert find(bench, "birch", "d") == [waited_for.id]
    assert desk.mos.newest_change() == serving.reached(["d"]) > serving.reached(["c"])
    assert serving.reached(["c", "d"]) == serving.reached(["c"])
    desk.mos.erase_memory(ADMIN, "d", waited_for.id, tombstone_key=KEY)
    desk.mos.delete_cube(ADMIN, "d")
    desk.mos.create_cube(ADMIN, cube_id="d")
    desk.add("cedar", cube_id="d")
    serving.hurry(["d"])
    bench.step()
    bench.settle()
    bench.check()
    assert set(bench.embedder.texts.values()) == {1}


def find(bench: Bench, text: str, cube_id: str) -> list[str]:
    found = bench.plaintext.search(ADMIN, [cube_id], SearchQuery(text), catch_up_seconds=0)
    return [hit.memory.id for hit in found.hits]


def test_when_both_collections_fail_it_is_said_and_the_store_is_looked_at(bench: Bench) -> None:
    bench.desk.add("one")
    bench.settle()
    bench.reopen(CountingEmbedder("fake-b"))
    bench.embedder.failure = Unavailable("the new server is down")
    bench.step()
    assert bench.collections.building is not None
    bench.disk.down = True
    bench.desk.add("two")
    with pytest.raises(Unavailable, match="fake index"):
        bench.step()
    bench.collections.check()
    assert bench.collections.serving is None
    bench.disk.down, bench.embedder.failure = False, None
    bench.settle()
    bench.check()


def test_numbers_that_are_used_again_never_bring_back_what_they_stood_for(bench: Bench) -> None:
    desk = bench.desk
    desk.mos.create_cube(ADMIN, cube_id="d")
    (old,) = desk.add("the old one")
    bench.settle()
    desk.mos.erase_memory(ADMIN, "c", old.id, tombstone_key=KEY)
    (new,) = desk.add("the new one", cube_id="d")
    ((seq,),) = desk.sql(f"SELECT seq FROM memories WHERE id = '{new.id}'")
    assert [*bench.points()] == [seq]  # the same number
    bench.settle()
    bench.check()
    desk.mos.delete_cube(ADMIN, "d")
    desk.mos.create_cube(ADMIN, cube_id="d")
    desk.add("the newest one", cube_id="d")
    bench.settle()
    bench.check()


def test_another_dimension_of_the_same_model_is_shown_and_does_not_spin(desk: Desk) -> None:
    """What an embedder says when its server has been given another model."""
    embedder = CountingEmbedder()
    embedder.failure = Conflict("vectors of another dimension")
    disk = Disk()
    desk.add("one")
    with running(desk, lambda: FakeStore(disk), embedder=embedder) as plaintext:
        eventually(lambda: embedder.calls > 1)
        assert plaintext.problem() == "vectors of another dimension"
        assert plaintext.status()["state"] == "vectors of another dimension"
        time.sleep(0.3)
        assert embedder.calls < 10
        embedder.failure = None
        assert plaintext.wait_until_indexed("c", seconds=20)
        assert plaintext.problem() is None


def test_stored_vectors_stay_what_the_embedder_made(bench: Bench) -> None:
    bench.desk.add("one")
    bench.settle()
    (computed,) = (point.dense.copy() for point in bench.points().values())
    bench.desk.mos.reindex_cube(ADMIN, "c")
    bench.settle()
    (stored,) = (point.dense for point in bench.points().values())
    assert np.array_equal(computed, stored)


@pytest.mark.parametrize("opening", ["store", "embedder"])
def test_what_cannot_be_opened_is_tried_again_until_it_can(
    bench: Bench, opening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.desk.add("one")

    def fail() -> object:
        raise Unavailable(f"the {opening} is down")

    with monkeypatch.context() as patch:
        patch.setattr(bench.collections, f"_open_{opening}", fail)
        for _ in range(2):
            with pytest.raises(Unavailable, match=opening):
                bench.step()
            bench.collections.check()
    bench.settle()
    bench.check()
    bench.collections.close()
    assert bench.embedder.closed == 1
    assert bench.disk.open_now == set()
