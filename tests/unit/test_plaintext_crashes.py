"""Killed, failing, and side by side: what was acknowledged is indexed, and nothing else is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from catalog_kit import ADMIN, KEY, START, Desk, open_desk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from index_kit import folder_in_memory
from indexer_kit import (
    LONG_SECONDS,
    Bench,
    CountingEmbedder,
    active_memories,
    edge_folder,
    eventually,
    expected,
    indexed,
    kill,
    running,
)

from memos_vllm.domain.access import Role
from memos_vllm.domain.filters import HasTier, matches
from memos_vllm.domain.memory import Memory, MemoryPatch, NewMemory, Tier
from memos_vllm.domain.scope import FilterFields
from memos_vllm.domain.search import SearchQuery
from memos_vllm.errors import MemosError, Unavailable
from memos_vllm.plaintext import follower
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.store import PlaintextStore

CUBES = ["c", "d"]
WORDS = ["apple", "birch", "cedar", "daisy"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
Handle = tuple[str, str]


class IndexMachine(RuleBasedStateMachine):
    """Two cubes under any changes, and an index that is stopped, killed and failing on the way."""

    memories = Bundle("memories")

    @initialize()
    def start(self) -> None:
        self.opened = ExitStack()
        patch = self.opened.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(follower, "BATCH", 3)
        folder = self.opened.enter_context(folder_in_memory())
        self.bench = Bench(self.opened.enter_context(open_desk(folder)))
        self.desk.mos.create_cube(ADMIN, cube_id="d")
        self.reader = self.desk.grant("reader", Role.READER, labels=["red"])
        self.generations = 0

    @property
    def desk(self) -> Desk:
        return self.bench.desk

    @rule(target=memories, said=st.lists(texts, min_size=1, max_size=3), data=st.data())
    def add(self, said: list[str], data: st.DataObject) -> object:
        cube_id = data.draw(st.sampled_from(CUBES))
        labels = data.draw(st.sampled_from([(), (), ("red",), ("blue",)]))
        expires = data.draw(st.sampled_from([None, None, START + timedelta(days=1)]))
        if expires is not None and expires <= self.desk.clock.now:
            expires = None
        added = self.desk.mos.add_memories(
            ADMIN, cube_id, [NewMemory(text, labels=labels, expires_at=expires) for text in said]
        )
        return multiple(*((cube_id, one.id) for one in added))

    def do(self, action: Callable[[], object]) -> None:
        """A change that the state of the memory may forbid: then nothing changes."""
        with suppress(MemosError):
            action()

    @rule(handle=memories, text=texts)
    def edit(self, handle: Handle, text: str) -> None:
        self.do(lambda: self.desk.mos.update_memory(ADMIN, *handle, MemoryPatch(text=text)))

    @rule(handle=memories, labels=st.sampled_from([(), ("red",), ("blue",)]))
    def relabel(self, handle: Handle, labels: tuple[str, ...]) -> None:
        self.do(lambda: self.desk.mos.update_memory(ADMIN, *handle, MemoryPatch(labels=labels)))

    @rule(handle=memories)
    def archive_or_restore(self, handle: Handle) -> None:
        self.do(lambda: self.desk.mos.archive_memory(ADMIN, *handle))
        self.do(lambda: self.desk.mos.restore_memory(ADMIN, *handle))

    @rule(handle=memories)
    def archive(self, handle: Handle) -> None:
        self.do(lambda: self.desk.mos.archive_memory(ADMIN, *handle))

    @rule(handle=memories)
    def promote(self, handle: Handle) -> None:
        cube_id, memory_id = handle
        self.do(lambda: self.desk.promote(memory_id, cube_id=cube_id))

    @rule(cube_id=st.sampled_from(CUBES))
    def demote(self, cube_id: str) -> None:
        self.desk.mos.demote(ADMIN, cube_id, from_tier=Tier.ACTIVATION)

    @rule(handle=consumes(memories))
    def erase(self, handle: Handle) -> None:
        self.do(lambda: self.desk.mos.erase_memory(ADMIN, *handle, tombstone_key=KEY))

    @rule(cube_id=st.sampled_from(CUBES))
    def delete_and_make_again(self, cube_id: str) -> None:
        self.desk.mos.delete_cube(ADMIN, cube_id)
        self.desk.mos.create_cube(ADMIN, cube_id=cube_id)
        if cube_id == "c":
            self.desk.sql(
                "INSERT INTO grants SELECT 'c', 'reader', 'reader', '[\"red\"]', 'local', "
                "created_at FROM cubes WHERE id = 'c'"
            )

    @rule(cube_id=st.sampled_from(CUBES))
    def reindex(self, cube_id: str) -> None:
        self.desk.mos.reindex_cube(ADMIN, cube_id)

    @rule(days=st.sampled_from([0.4, 1.1]))
    def time_goes_by(self, days: float) -> None:
        self.desk.clock.advance(days * 86_400)

    @rule()
    def step(self) -> None:
        self.bench.step()

    @rule(cube_id=st.sampled_from(CUBES))
    def hurry(self, cube_id: str) -> None:
        serving = self.bench.collections.serving
        if serving is not None:
            serving.hurry([cube_id])
            self.bench.step()

    @rule()
    def save(self) -> None:
        self.bench.save()

    @rule(
        place=st.integers(1, 6),
        after=st.booleans(),
        forgets=st.booleans(),
        steps=st.integers(1, 3),
    )
    def fail_somewhere(self, place: int, after: bool, forgets: bool, steps: int) -> None:
        disk = self.bench.disk
        disk.fail_at, disk.after, disk.forgets = disk.calls + place, after, forgets
        for _ in range(steps):
            try:
                self.bench.step()
            except Unavailable:
                self.bench.collections.check()
        disk.fail_at = None

    @rule(keep=st.integers(0, 4))
    def be_killed(self, keep: int) -> None:
        self.bench.crash(keep=keep)

    @rule()
    def be_killed_between_flush_and_saying_so(self) -> None:
        serving = self.bench.collections.serving
        if serving is not None:
            serving.index.flush()
        self.bench.crash()

    @rule()
    def restart(self) -> None:
        self.bench.reopen()

    @rule()
    def change_the_embedder(self) -> None:
        self.generations += 1
        self.bench.reopen(CountingEmbedder(f"fake-{self.generations % 3}"))

    @rule()
    def come_to_rest(self) -> None:
        self.bench.settle()
        self.bench.check()

    @invariant()
    def a_search_finds_only_what_is_true(self) -> None:
        plaintext = self.bench.plaintext
        now = self.desk.clock.now
        for actor, labels in ((ADMIN, None), (self.reader, {"red"})):
            for where in (None, HasTier((Tier.PLAINTEXT,))):
                query = SearchQuery("apple daisy", where=where)
                try:
                    found = plaintext.search(actor, ["c"], query, catch_up_seconds=0)
                except Unavailable:
                    continue
                for hit in found.hits:
                    one = self.desk.mos.get_memory(ADMIN, "c", hit.memory.id)
                    assert (one.text, one.version) == (hit.memory.text, hit.memory.version)
                    assert one.state == "active"
                    assert one.expires_at is None or one.expires_at > now
                    assert labels is None or labels.issuperset(one.labels)
                    assert where is None or matches(where, FilterFields.of(one))

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.settle()
            self.bench.check()
            self.opened.close()


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(
    max_examples=8,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check_index(desk: Desk, store: Callable[[], EdgeStore], name: str) -> None:
    """A closed index on the disk is what the catalog says."""
    opened = store()
    try:
        assert indexed(opened.open(name, dim=4)) == expected(desk)
    finally:
        opened.close()


_WRITER = """
import random, sys
from pathlib import Path
from catalog_kit import ADMIN, KEY, Desk
from indexer_kit import CountingEmbedder
from memos_vllm.domain.memory import MemoryPatch, NewMemory
from memos_vllm.plaintext import follower
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.store import PlaintextStore

catalog, folder, seed = sys.argv[1:]
follower.SAVE_SECONDS = 0.05
mos = Desk(catalog).mos
plaintext = PlaintextStore(
    mos,
    store=lambda: EdgeStore(Path(folder) / "qdrant"),
    embedder=CountingEmbedder,
    former_embedder=CountingEmbedder,
)
plaintext.start()
chosen, alive = random.Random(int(seed)), []
for number in range(10**6):
    verb = chosen.random()
    if verb < 0.6 or not alive:
        batch = [NewMemory(f"text {seed} {number} {n}") for n in range(chosen.randrange(1, 30))]
        alive += [memory.id for memory in mos.add_memories(ADMIN, "c", batch)]
    elif verb < 0.8:
        patch = MemoryPatch(text=f"text {seed} {number}")
        mos.update_memory(ADMIN, "c", chosen.choice(alive), patch)
    else:
        gone = alive.pop(chosen.randrange(len(alive)))
        mos.erase_memory(ADMIN, "c", gone, tombstone_key=KEY)
    plaintext.wake()
    print(number, plaintext.opened, flush=True)
"""


def start_kit(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that runs `code` and has the tests' own modules."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def said(child: subprocess.Popen[str]) -> str:
    """The next line of a process that must be alive."""
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, "the process has ended"
    return line


def test_kill_9_of_the_process_at_any_moment_leaves_nothing_out() -> None:
    chosen = random.Random(5)
    with folder_in_memory() as folder, open_desk(folder) as desk:
        for seed in range(2):
            child = start_kit(_WRITER, desk.url, str(folder), str(seed))
            assert child.stdout is not None
            while not said(child).endswith("True\n"):
                pass
            for _ in range(chosen.randrange(5, 40)):
                said(child)
            time.sleep(chosen.uniform(0, 0.1))
            child.kill()
            child.wait()
            child.stdout.close()
        with running(desk, lambda: EdgeStore(folder / "qdrant")) as plaintext:
            assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
            (progress,) = desk.mos.indexes()
        assert len(active_memories(desk)) > 10
        check_index(desk, lambda: EdgeStore(folder / "qdrant"), progress.name)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with folder_in_memory() as folder, open_desk(folder) as opened:
        yield opened


@pytest.fixture
def store() -> Iterator[Callable[[], EdgeStore]]:
    with edge_folder() as opened:
        yield opened


def edge_pid(plaintext: PlaintextStore) -> int | None:
    store = plaintext._collections._store
    return store.pid if isinstance(store, EdgeStore) else None


def test_kill_9_of_the_index_s_own_process_leaves_nothing_out(
    desk: Desk, store: Callable[[], EdgeStore]
) -> None:
    chosen = random.Random(6)
    with running(desk, store) as plaintext:
        memories = desk.add("the first one")
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        for turn in range(4):
            for number in range(chosen.randrange(1, 8)):
                memories += desk.add(*(f"text {turn} {number} {n}" for n in range(10)))
                gone = memories.pop(chosen.randrange(len(memories)))
                desk.mos.archive_memory(ADMIN, "c", gone.id)
                plaintext.wake()
            time.sleep(chosen.uniform(0, 0.1))
            eventually(lambda: edge_pid(plaintext) is not None)
            kill(edge_pid(plaintext))
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        (progress,) = desk.mos.indexes()
        assert desk.sql("SELECT count(*) FROM indexes WHERE walked IS NULL") == [(1,)]
    check_index(desk, store, progress.name)


def test_the_outbox_never_goes_on_over_writes_that_a_killed_process_had_not_flushed(
    desk: Desk, store: Callable[[], EdgeStore]
) -> None:
    bench = Bench(desk)
    bench._open_store = store  # type: ignore[assignment, method-assign]
    bench.plaintext = bench._new()
    for turn in range(3):
        memories = desk.add(*(f"text {turn} {number}" for number in range(20)))
        bench.step()
        bench.step()
        if turn:
            desk.mos.erase_memory(ADMIN, "c", memories[0].id, tombstone_key=KEY)
        bench.step()
        kill(edge_pid(bench.plaintext))  # between upsert and flush
        bench.save()
        assert desk.sql("SELECT count(*) FROM index_outbox") == [(0,)]
        assert indexed(bench.index) == expected(desk)
    bench.collections.close()


@pytest.mark.parametrize("found_by", ["a write", "a search"])
def test_an_index_found_broken_when_its_process_was_killed_is_built_again(
    desk: Desk, store: Callable[[], EdgeStore], found_by: str
) -> None:
    with running(desk, store) as plaintext:
        desk.add(*(f"text {number}" for number in range(30)))
        assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        edge = plaintext._collections._store
        assert isinstance(edge, EdgeStore)
        for path in Path(edge._worker._arguments[0]).rglob("segment.json"):
            path.write_text("{")
        kill(edge.pid)
        if found_by == "a write":
            desk.add("one more")
            assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        else:
            with pytest.raises(Unavailable):
                plaintext.search(ADMIN, ["c"], SearchQuery("text"))
            eventually(lambda: plaintext.opened and _finds(plaintext, "text"))
            assert plaintext.wait_until_indexed("c", seconds=LONG_SECONDS)
        eventually(lambda: plaintext.problem() is None)
        (progress,) = desk.mos.indexes()
    check_index(desk, store, progress.name)


def _finds(plaintext: PlaintextStore, text: str) -> bool:
    try:
        return bool(plaintext.search(ADMIN, ["c"], SearchQuery(text)).hits)
    except Unavailable:
        return False


_OTHER = """
import sys, time
from pathlib import Path
from catalog_kit import Desk
from indexer_kit import CountingEmbedder
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.store import PlaintextStore

catalog, folder = sys.argv[1:]
plaintext = PlaintextStore(
    Desk(catalog).mos,
    store=lambda: EdgeStore(Path(folder)),
    embedder=CountingEmbedder,
    former_embedder=CountingEmbedder,
)
plaintext.start()
while plaintext.problem() is not None:
    time.sleep(0.02)
print(plaintext._collections._store.pid, flush=True)
time.sleep(60)
"""


def test_a_second_process_waits_and_takes_over_when_the_first_is_gone(desk: Desk) -> None:
    with folder_in_memory() as folder:
        first = start_kit(_OTHER, desk.url, str(folder))
        assert first.stdout is not None
        holder = int(first.stdout.readline())
        with running(desk, lambda: EdgeStore(folder, wait_seconds=0.1)) as plaintext:
            eventually(lambda: f"another process (pid {holder})" in str(plaintext.problem()))
            (memory,) = desk.add("written here, indexed there")
            with pytest.raises(Unavailable, match=f"not available.*pid {holder}"):
                plaintext.search(ADMIN, ["c"], SearchQuery("written"))
            (progress,) = desk.mos.indexes()
            eventually(lambda: not desk.mos.index_backlog(progress.name).changes)
            first.kill()
            first.wait()
            first.stdout.close()
            eventually(lambda: plaintext.problem() is None)
            found = plaintext.search(ADMIN, ["c"], SearchQuery("written"))
            assert [hit.memory.id for hit in found.hits] == [memory.id]


def test_any_changes_and_kills_over_the_real_index(
    desk: Desk, store: Callable[[], EdgeStore]
) -> None:
    chosen = random.Random(7)
    desk.mos.create_cube(ADMIN, cube_id="d")
    bench = Bench(desk)
    bench._open_store = store  # type: ignore[assignment, method-assign]
    bench.plaintext = bench._new()
    alive: list[Memory] = []
    for turn in range(60):
        cube_id = chosen.choice(CUBES)
        verb = chosen.randrange(11)
        if verb < 3 or not alive:
            alive += desk.add(*chosen.choices(WORDS, k=5), cube_id=cube_id)
        elif verb < 5:
            gone = alive.pop(chosen.randrange(len(alive)))
            desk.mos.erase_memory(ADMIN, gone.cube_id, gone.id, tombstone_key=KEY)
        elif verb == 5:
            one = chosen.choice(alive)
            desk.mos.update_memory(ADMIN, one.cube_id, one.id, MemoryPatch(text=f"text {turn}"))
        elif verb == 6:
            desk.mos.delete_cube(ADMIN, cube_id)
            desk.mos.create_cube(ADMIN, cube_id=cube_id)
            alive = [one for one in alive if one.cube_id != cube_id]
        elif verb == 7:
            desk.mos.reindex_cube(ADMIN, cube_id)
        elif verb == 8 and turn % 3 == 0:
            bench.reopen(CountingEmbedder(f"fake-{turn}"))
        elif verb == 9 and turn % 3 == 0 and (pid := edge_pid(bench.plaintext)) is not None:
            os.kill(pid, signal.SIGKILL)
        elif verb == 10:
            bench.save()
        bench.step()
    bench.settle()
    assert indexed(bench.index) == expected(desk)
    bench.collections.close()
