"""Searches while the index lags, is down or is being changed: true, in time, and discreet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from catalog_kit import ADMIN, KEY, Desk, open_desk
from databases import SQLITE, Database
from index_kit import folder_in_memory
from indexer_kit import (
    LONG_SECONDS,
    Bench,
    CountingEmbedder,
    Disk,
    FakeIndex,
    FakeStore,
    child_pids,
    edge_folder,
    eventually,
    running,
)
from model_server import running_server

from memos_vllm.config import ServerSettings
from memos_vllm.domain.access import Principal, Role
from memos_vllm.domain.filters import HasTag, HasTier
from memos_vllm.domain.memory import MemoryPatch, Tier
from memos_vllm.domain.search import SearchQuery
from memos_vllm.errors import InvalidRequest, NotFound, Unavailable
from memos_vllm.plaintext import follower
from memos_vllm.plaintext import store as plaintext_store
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.embedders.base import Vectors
from memos_vllm.plaintext.embedders.minilm import MINILM_KEY as MINILM
from memos_vllm.plaintext.store import PlaintextStore

SECRET = "the vault opens with 4711"


@pytest.fixture
def desk(database: Database) -> Iterator[Desk]:
    with folder_in_memory() as folder, open_desk(folder, database) as opened:
        yield opened


@pytest.fixture
def bench(desk: Desk) -> Bench:
    return Bench(desk)


class SlowEmbedder(CountingEmbedder):
    """Takes a moment for every batch."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        time.sleep(0.05)
        return super().embed(texts)


def find(
    plaintext: PlaintextStore,
    text: str,
    *,
    actor: Principal = ADMIN,
    cube_id: str = "c",
    where: object = None,
    seconds: float = 0.0,
    top_k: int = 10,
) -> list[str]:
    """The texts that a search finds, without waiting."""
    query = SearchQuery(text, top_k=top_k, where=where)  # type: ignore[arg-type]
    found = plaintext.search(actor, [cube_id], query, catch_up_seconds=seconds)
    return [hit.memory.text for hit in found.hits]


def test_an_index_that_lags_never_shows_what_is_no_more(bench: Bench) -> None:
    desk = bench.desk
    archived, erased, edited, expired = desk.add("apple one", "apple two", "apple three", "apple 4")
    bench.settle()
    assert len(find(bench.plaintext, "apple")) == 4
    desk.mos.archive_memory(ADMIN, "c", archived.id)
    desk.mos.erase_memory(ADMIN, "c", erased.id, tombstone_key=KEY)
    desk.mos.update_memory(ADMIN, "c", edited.id, MemoryPatch(text="birch"))
    soon = desk.clock.now.replace(year=2027)
    desk.mos.update_memory(ADMIN, "c", expired.id, MemoryPatch(expires_at=soon))
    desk.clock.now = soon
    assert find(bench.plaintext, "apple") == ["birch"]


def test_an_index_that_lags_never_shows_what_was_labelled_meanwhile(bench: Bench) -> None:
    reader = bench.desk.grant("reader", Role.READER, labels=["red"])
    first, second = bench.desk.add("apple one", "apple two", labels=("red",))
    bench.settle()
    assert len(find(bench.plaintext, "apple", actor=reader)) == 2
    bench.desk.mos.update_memory(ADMIN, "c", first.id, MemoryPatch(labels=("red", "blue")))
    assert find(bench.plaintext, "apple", actor=reader) == [second.text]


def test_an_index_that_lags_never_shows_what_does_not_pass_the_filter_any_more(
    bench: Bench,
) -> None:
    promoted, tagged, other = bench.desk.add("apple one", "apple two", "apple three", tags=("t",))
    bench.settle()
    bench.desk.promote(promoted.id)
    bench.desk.mos.update_memory(ADMIN, "c", tagged.id, MemoryPatch(tags=()))
    plain = HasTier((Tier.PLAINTEXT,))
    assert sorted(find(bench.plaintext, "apple", where=plain)) == [other.text, tagged.text]
    assert sorted(find(bench.plaintext, "apple", where=HasTag(("t",)))) == [
        promoted.text,
        other.text,
    ]


def test_a_cube_made_again_under_the_same_id_shows_nothing_of_the_former_one(
    bench: Bench,
) -> None:
    """Also where SQLite gives its memories the numbers of the former ones."""
    desk = bench.desk
    desk.add("apple one", "apple two")
    before = desk.sql("SELECT seq FROM memories ORDER BY seq")
    bench.settle()
    desk.mos.delete_cube(ADMIN, "c")
    with pytest.raises(NotFound):
        find(bench.plaintext, "apple")
    desk.mos.create_cube(ADMIN, cube_id="c")
    assert find(bench.plaintext, "apple") == []
    desk.add("birch", "cedar")
    if desk.database is SQLITE:
        assert desk.sql("SELECT seq FROM memories ORDER BY seq") == before
    assert set(find(bench.plaintext, "apple")) <= {"birch", "cedar"}
    bench.settle()
    bench.check()


def test_what_is_erased_while_a_search_ranks_is_not_in_its_answer(bench: Bench) -> None:
    desk = bench.desk
    kept, erased = desk.add("apple one", "apple two")
    bench.settle()

    class Slow:
        def score(self, query: str, texts: Sequence[str]) -> Vectors:
            done = desk.mos.erase_memory(ADMIN, "c", erased.id, tombstone_key=KEY)
            # The search keeps no state of the catalog open while it waits for a reranker.
            assert done.versions == 1
            return CountingEmbedder(dimension=len(texts)).vector(query)

    bench.plaintext._reranker = Slow()
    assert find(bench.plaintext, "apple") == [kept.text]


def test_rights_are_asked_for_again_after_waiting(desk: Desk) -> None:
    reader = desk.grant("reader", Role.READER)
    disk, hold = Disk(), threading.Event()
    with running(desk, lambda: _stuck(disk, hold)) as plaintext, ThreadPoolExecutor(1) as pool:
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        desk.add("apple")
        found = pool.submit(find, plaintext, "apple", actor=reader, seconds=LONG_SECONDS)
        time.sleep(0.1)
        desk.mos.delete_cube(ADMIN, "c")
        desk.mos.create_cube(ADMIN, cube_id="c")
        desk.add("apple of another owner")
        hold.set()
        with pytest.raises(NotFound):
            found.result(timeout=LONG_SECONDS)


def _stuck(disk: Disk, hold: threading.Event) -> FakeStore:
    """A store whose writes wait for `hold`."""
    store = FakeStore(disk)
    opened = store.open

    def open_stuck(name: str, *, dim: int) -> FakeIndex:
        index = opened(name, dim=dim)
        write = index._write

        def wait_and_write(change: object) -> None:
            assert hold.wait(LONG_SECONDS)
            write(change)  # type: ignore[arg-type]

        index._write = wait_and_write  # type: ignore[method-assign]
        return index

    store.open = open_stuck  # type: ignore[method-assign]
    return store


def test_a_search_right_after_a_write_finds_it(desk: Desk) -> None:
    with edge_folder() as store, running(desk, store) as plaintext:
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        for number in range(20):
            desk.add(f"apple {number}")
            assert f"apple {number}" in find(plaintext, f"apple {number}", seconds=LONG_SECONDS)


def test_a_stuck_index_is_waited_for_no_longer_than_allowed(desk: Desk) -> None:
    disk, hold = Disk(), threading.Event()
    with running(desk, lambda: _stuck(disk, hold)) as plaintext:
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        desk.add("apple", "birch")
        started = time.monotonic()
        found = plaintext.search(ADMIN, ["c"], SearchQuery("apple"), catch_up_seconds=0.3)
        assert 0.3 <= time.monotonic() - started < 2
        assert (found.hits, found.backlog.changes) == ((), 2)
        assert not plaintext.wait_until_indexed("c", seconds=0.1)
        hold.set()


def test_what_others_go_on_writing_is_not_waited_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 2)
    disk, over = Disk(), threading.Event()

    def write() -> None:
        while not over.is_set():
            desk.add(*("birch" for _ in range(20)))
            time.sleep(0.1)

    with running(desk, lambda: FakeStore(disk), embedder=SlowEmbedder()) as plaintext:
        eventually(lambda: plaintext._collections.serving is not None)
        desk.add("apple")
        writing = threading.Thread(target=write)
        writing.start()
        try:
            started = time.monotonic()
            assert "apple" in find(plaintext, "apple", seconds=LONG_SECONDS)
            assert time.monotonic() - started < LONG_SECONDS / 3
            assert plaintext.backlog("c") > 0
        finally:
            over.set()
            writing.join()


def test_many_searches_beside_writes_end_and_find_what_was_there(desk: Desk) -> None:
    with edge_folder() as store, running(desk, store) as plaintext:
        desk.add(*(f"apple {number}" for number in range(5)))

        def search(number: int) -> int:
            return len(find(plaintext, "apple", seconds=LONG_SECONDS))

        eventually(lambda: plaintext._collections.serving is not None)
        with ThreadPoolExecutor(16) as pool:
            searches = pool.map(search, range(60), timeout=LONG_SECONDS)
            for number in range(30):
                desk.add(f"birch {number}")
            assert min(searches) >= 5


def test_a_dead_store_refuses_searches_takes_writes_and_comes_back_with_all(desk: Desk) -> None:
    disk = Disk()
    with running(desk, lambda: FakeStore(disk)) as plaintext:
        eventually(lambda: plaintext._collections.serving is not None)
        disk.down = True
        desk.add("apple")
        eventually(lambda: plaintext.problem() is not None)
        started = time.monotonic()
        with pytest.raises(Unavailable, match="fake index is down") as refused:
            find(plaintext, "apple", seconds=LONG_SECONDS)
        assert time.monotonic() - started < 2
        assert refused.value.retry_after_seconds > 0
        eventually(lambda: plaintext._collections.serving is None)
        with pytest.raises(Unavailable, match=r"search is not available: .*is down"):
            find(plaintext, "apple")
        assert plaintext.status()["state"] == "the fake index is down"
        desk.add("apple again")
        disk.down = False
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        assert len(find(plaintext, "apple")) == 2
        assert plaintext.problem() is None


def test_a_switch_of_collections_breaks_off_no_search(bench: Bench) -> None:
    """The one under way ends first, and the next asks the new collection."""
    bench.desk.add("apple")
    bench.settle()
    former = bench.embedder
    bench.reopen(CountingEmbedder("fake-b"))
    bench.step()
    assert bench.collections.building is not None
    asked, answer = threading.Event(), threading.Event()
    embed = former.embed_query

    def embed_slowly(text: str) -> Vectors:
        asked.set()
        assert answer.wait(LONG_SECONDS)
        assert former.closed == 1, "closed under way"
        return embed(text)

    former.embed_query = embed_slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        search = pool.submit(find, bench.plaintext, "apple")
        assert asked.wait(LONG_SECONDS)
        settling = pool.submit(bench.settle)
        eventually(lambda: bench.collections.building is None)
        assert find(bench.plaintext, "apple") == ["apple"]
        answer.set()
        assert search.result(LONG_SECONDS) == ["apple"]
        settling.result(LONG_SECONDS)
    assert former.closed == 2
    bench.check()


def test_closing_in_the_middle_of_a_long_walk_takes_one_batch_and_leaves_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BATCH", 5)
    desk.add(*(f"text {number}" for number in range(600)))
    before = child_pids()
    with edge_folder() as store:
        embedder = SlowEmbedder()
        with running(desk, store, embedder=embedder) as plaintext:
            eventually(lambda: embedder.calls > 2)
            calls, started = embedder.calls, time.monotonic()
            plaintext.close()
            assert embedder.calls <= calls + 1
            assert time.monotonic() - started < 5
        assert child_pids() == before
        assert "memos-indexer" not in [thread.name for thread in threading.enumerate()]
        assert embedder.closed == 1
        store().close()  # nobody holds the folder
        with pytest.raises(Unavailable, match="the index is closed"):
            find(plaintext, "text")
    assert sum(embedder.texts.values()) < 200


def test_a_store_that_never_opened_can_be_closed(desk: Desk) -> None:
    def fail() -> FakeStore:
        raise Unavailable("no such server")

    opened = PlaintextStore(
        desk.mos, store=fail, embedder=CountingEmbedder, former_embedder=CountingEmbedder
    )
    opened.close()
    opened.close()
    with running(desk, fail) as plaintext:
        pass
    with running(desk, fail) as plaintext:
        eventually(lambda: plaintext.opened)
        with pytest.raises(Unavailable, match="no such server"):
            find(plaintext, "apple")


def test_problems_say_nothing_of_memories(desk: Desk) -> None:
    class Talkative(CountingEmbedder):
        def embed(self, texts: Sequence[str]) -> Vectors:
            raise RuntimeError(f"cannot embed {texts}")

    disk = Disk()
    desk.add(SECRET)
    embedder = Talkative()
    with running(desk, lambda: FakeStore(disk), embedder=embedder) as plaintext:
        eventually(lambda: plaintext.problem() is not None and plaintext.opened)
        eventually(lambda: "failed" in str(plaintext.problem()))
        shown = f"{plaintext.problem()} {plaintext.status()}"
        assert "the indexer failed: RuntimeError" in shown
        assert "4711" not in shown


def test_an_api_key_is_sent_to_no_server_but_the_one_that_is_set(desk: Desk) -> None:
    """A former embedder may stand at someone else's address."""
    with folder_in_memory() as folder, running_server() as former, running_server() as present:
        for server, key in ((former, "former key"), (present, "present key")):
            embedder, asked = f"openai:m@{server.url}/v1", len(former.seen)
            settings = ServerSettings(data_dir=folder, embedder=embedder, embedder_api_key=key)
            plaintext = open_plaintext(settings, desk.mos)
            desk.add("apple")
            plaintext.start()
            try:
                assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
                eventually(lambda: len(desk.mos.indexes()) == 1)
            finally:
                plaintext.close()
        assert {seen.authorization for seen in former.seen[:asked]} == {"Bearer former key"}
        # It was asked whether it can answer meanwhile.
        assert {seen.authorization for seen in former.seen[asked:]} == {None}
        assert {seen.authorization for seen in present.seen} == {"Bearer present key"}


def test_the_real_embedder_comes_and_goes_without_a_gap(desk: Desk) -> None:
    desk.add("A train left Leeds at noon", "Cats sleep all day")
    with folder_in_memory() as folder:
        for embedder in ("none", MINILM, "none"):
            settings = ServerSettings(data_dir=folder, embedder=embedder)
            with closing(open_plaintext(settings, desk.mos)) as plaintext:
                plaintext.start()
                assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
                # By words, the former collection can answer this as well as the new one.
                assert find(plaintext, "train")[0] == "A train left Leeds at noon"
                only = [embedder]
                eventually(lambda only=only: [one.embedder for one in desk.mos.indexes()] == only)
                by_meaning = ["Cats sleep all day"] if embedder == MINILM else []
                assert find(plaintext, "feline")[:1] == by_meaning
            assert desk.sql("SELECT DISTINCT embedder FROM memory_vectors") == [(embedder,)]
            assert len([path for path in (folder / "qdrant").iterdir() if path.is_dir()]) == 1


def test_an_answer_of_too_much_text_is_refused_before_it_is_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.desk.add(*(f"apple {number} {'é' * 100}" for number in range(9)))
    bench.settle()
    monkeypatch.setattr(plaintext_store, "MAX_ANSWER_BYTES", 1500)
    with pytest.raises(InvalidRequest, match="ask for fewer than 10") as refused:
        find(bench.plaintext, "apple")
    assert refused.value.param == "top_k"
    assert len(find(bench.plaintext, "apple", top_k=5)) == 5
