"""The embedded index: its folder, its process, crashes of both, and optimising."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_kit import (
    DIM,
    PlainIndex,
    close,
    folder_in_memory,
    new_cube,
    point,
    scope,
    scores_of,
    sparse,
    unit,
)

from memos_vllm.domain.filters import HasTag
from memos_vllm.domain.ids import CubeId
from memos_vllm.errors import ConfigurationError, Unavailable
from memos_vllm.folder_lock import FolderLock
from memos_vllm.plaintext.index import edge_collection, edge_folder, qdrant_edge
from memos_vllm.plaintext.index.base import IndexPoint, IndexQuery
from memos_vllm.plaintext.index.edge_host import EdgeHost
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore

CUBE = CubeId("cube")


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as found:
        yield found / "data" / "qdrant"


@pytest.fixture
def host(folder: Path) -> Iterator[EdgeHost]:
    opened = EdgeHost(folder)
    yield opened
    opened.close()


def fill(folder: Path, *, points: int = 3) -> None:
    """A closed collection `a` with points 1, 2, …"""
    opened = EdgeHost(folder)
    index = opened.open("a", dim=DIM)
    index.upsert([point(CUBE, seq=seq) for seq in range(1, points + 1)])
    opened.close()


def reopened(folder: Path) -> tuple[bool, int]:
    """Whether `a` is empty when it is opened, and that it can be used."""
    opened = EdgeHost(folder)
    index = opened.open("a", dim=DIM)
    before = index.count()
    index.upsert([point(CUBE, seq=1000)])
    assert index.count() == before + 1
    index.delete([1000])
    opened.close()
    return index.opened_empty, before


def current(folder: Path) -> Path:
    named = json.loads((folder / "a" / "CURRENT").read_text())
    return folder / "a" / named["generation"]


def test_a_second_process_is_told_who_has_the_folder(host: EdgeHost, folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match=f"open in another process .pid {os.getpid()}"):
        FolderLock(folder, what="index folder", wait_seconds=0.2)
    assert time.monotonic() - started < 2


def test_a_folder_that_is_let_go_in_time_is_taken(folder: Path) -> None:
    first = FolderLock(folder, what="index folder", wait_seconds=0)
    threading.Timer(0.2, first.release).start()
    second = FolderLock(folder, what="index folder", wait_seconds=5)
    first.release()
    second.release()


def test_the_lock_of_a_killed_process_is_taken_over(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from memos_vllm.folder_lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]), what='folder', wait_seconds=0)\n"
        "print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(Unavailable, match=f"pid {child.pid}"):
        FolderLock(folder, what="index folder", wait_seconds=0)
    child.kill()
    child.wait()
    child.stdout.close()
    FolderLock(folder, what="index folder", wait_seconds=0).release()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="mend its permissions"):
        EdgeHost(tmp_path / "qdrant")


def test_a_file_in_the_folder_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "qdrant").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        EdgeHost(tmp_path / "qdrant")


def _torn_shard(folder: Path) -> None:
    for path in current(folder).rglob("segment.json"):
        path.write_text("{")


def _no_shard(folder: Path) -> None:
    current(folder).rename(folder / "elsewhere")


def _no_current(folder: Path) -> None:
    (folder / "a" / "CURRENT").unlink()


def _torn_current(folder: Path) -> None:
    (folder / "a" / "CURRENT").write_bytes(b'{"generation": "g0')


def _foreign_current(folder: Path) -> None:
    current(folder).rename(folder / "elsewhere")
    said = json.loads((folder / "a" / "CURRENT").read_text())
    (folder / "a" / "CURRENT").write_text(json.dumps(said | {"generation": "../elsewhere"}))


def _older_layout(folder: Path) -> None:
    said = json.loads((folder / "a" / "CURRENT").read_text())
    (folder / "a" / "CURRENT").write_text(json.dumps(said | {"layout": 0}))


@pytest.mark.parametrize(
    "breaking",
    [_torn_shard, _no_shard, _no_current, _torn_current, _foreign_current, _older_layout],
)
def test_a_broken_collection_is_made_new_and_says_so(folder: Path, breaking: object) -> None:
    fill(folder)
    breaking(folder)  # type: ignore[operator]
    assert reopened(folder) == (True, 0)
    assert len(list((folder / "a").glob("g*"))) == 1


def test_what_a_crash_left_unfinished_is_removed(folder: Path) -> None:
    fill(folder)
    unfinished = folder / "a" / "g000009"
    (unfinished / "segments").mkdir(parents=True)
    assert reopened(folder) == (False, 3)
    assert not unfinished.exists()


def test_a_crash_between_making_a_collection_and_filling_it_leaves_it_empty(folder: Path) -> None:
    fill(folder, points=0)
    assert reopened(folder) == (True, 0)


def test_a_collection_is_open_once(host: EdgeHost) -> None:
    opened = host.open("a", dim=DIM)
    with pytest.raises(Unavailable, match="open already"):
        host.open("a", dim=DIM)
    with pytest.raises(Unavailable, match="close it before it is dropped"):
        host.drop("a")
    opened.close()
    host.drop("a")
    assert host.collections() == []


_WRITER = """
import random, sys
from pathlib import Path
from index_kit import DIM, point, sparse, unit
from memos_vllm.domain.ids import CubeId
from memos_vllm.plaintext.index.edge_host import EdgeHost
index = EdgeHost(Path(sys.argv[1])).open("a", dim=DIM)
chosen = random.Random(int(sys.argv[2]))
for version in range(1, 10**6):
    seqs = chosen.sample(range(1, 200), 20)
    if version % 3:
        index.upsert([
            point(CubeId("cube"), unit(seq, version), sparse(t1=float(version)), seq=seq,
                  version=version, tags=(f"v{version}",))
            for seq in seqs
        ])
    else:
        index.delete(seqs)
        version = 0
    print(version, *seqs, flush=True)
    if chosen.random() < 0.2:
        index.flush()
        print("flushed", flush=True)
"""


def test_what_was_flushed_survives_kill_9_and_no_point_is_torn(folder: Path) -> None:
    fill(folder, points=0)
    chosen = random.Random(4)
    for seed in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(folder), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(chosen.randrange(20, 80))]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().splitlines(keepends=True)
        child.stdout.close()
        child.wait()

        flushed = max(place for place, line in enumerate(lines) if line.startswith("flushed"))
        later: set[int] = set()
        for line in lines[flushed + 1 :]:
            if line.endswith("\n"):
                later.update(int(seq) for seq in line.split()[1:])
        written: dict[int, int] = {}
        for line in lines[:flushed]:
            if not line.startswith("flushed"):
                version, *seqs = (int(word) for word in line.split())
                written.update(dict.fromkeys(seqs, version))

        opened = EdgeHost(folder)
        index = opened.open("a", dim=DIM)
        held = {entry.seq: entry.version for entry in index.versions(limit=1000)}
        # The write under way at the kill may be there or not: at most one of 20 points.
        unlike = [seq for seq in written if seq not in later and held.get(seq, 0) != written[seq]]
        assert len(unlike) <= 20
        for seq, version in held.items():
            query = IndexQuery(
                scope(CUBE), unit(seq, version), sparse(t1=1.0), HasTag((f"v{version}",))
            )
            (hit,) = index.score([seq], query)
            assert hit.dense == pytest.approx(1.0, abs=1e-5)
            assert hit.sparse is not None
            assert hit.sparse > 0
        index.delete(list(held))
        opened.close()


@pytest.fixture
def store(folder: Path) -> Iterator[EdgeStore]:
    opened = EdgeStore(folder)
    yield opened
    opened.close()


def test_a_killed_process_is_started_again_with_all_that_was_written(store: EdgeStore) -> None:
    index = store.open("a", dim=DIM)
    store.open("unused", dim=DIM).close()
    index.upsert([point(CUBE, seq=7)])
    former = store.pid
    assert former is not None
    os.kill(former, signal.SIGKILL)

    assert [entry.seq for entry in index.versions()] == [7]
    assert store.pid not in (None, former)


def test_a_process_that_cannot_be_started_is_unavailable_and_comes_back(
    store: EdgeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = store.open("a", dim=DIM)
    assert store.pid is not None
    with monkeypatch.context() as patch:
        patch.setattr(qdrant_edge, "_WORKER", "memos_vllm.no_such_module")
        os.kill(store.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(Unavailable, match="ends as soon as it is used"):
                index.count()
    assert index.count() == 0


def test_a_store_whose_process_cannot_be_started_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(qdrant_edge, "_WORKER", "memos_vllm.no_such_module")
        with pytest.raises(Unavailable, match="ends as soon as it is used"):
            EdgeStore(folder)
        patch.setattr(qdrant_edge.sys, "executable", str(folder / "no-python"))
        with pytest.raises(Unavailable, match="ends as soon as it is used"):
            EdgeStore(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        EdgeStore(folder)


def test_a_collection_found_broken_by_a_new_process_is_not_taken_for_whole(
    store: EdgeStore, folder: Path
) -> None:
    index = store.open("a", dim=DIM)
    index.upsert([point(CUBE)])
    assert store.pid is not None
    os.kill(store.pid, signal.SIGKILL)
    _torn_shard(folder)

    for _ in range(2):
        with pytest.raises(Unavailable, match="until it is filled"):
            index.count()


def test_a_process_that_hangs_is_replaced(folder: Path) -> None:
    store = EdgeStore(folder, answer_seconds=0.5)
    index = store.open("a", dim=DIM)
    hung = store.pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    assert index.count() == 0
    assert store.pid != hung
    store.close()


def test_the_process_ends_with_the_one_that_started_it(folder: Path) -> None:
    # What that one forked has the socket too, and may live on.
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from memos_vllm.plaintext.index.qdrant_edge import EdgeStore\n"
        "store = EdgeStore(Path(sys.argv[1]))\n"
        "forked = os.fork()\n"
        "if forked: print(store.pid, forked, flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    worker, forked = (int(word) for word in child.stdout.readline().split())
    child.kill()
    child.wait()
    child.stdout.close()
    try:
        second = EdgeStore(folder)
        assert second.pid != worker
        second.close()
    finally:
        os.kill(forked, signal.SIGKILL)


def test_a_store_in_use_elsewhere_cannot_be_opened(store: EdgeStore, folder: Path) -> None:
    with pytest.raises(Unavailable, match=f"another process .pid {store.pid}"):
        EdgeStore(folder, wait_seconds=0)


def test_a_closed_store_says_so(folder: Path) -> None:
    store = EdgeStore(folder)
    index = store.open("a", dim=DIM)
    store.close()
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        index.count()
    index.close()


def test_optimising_from_outside_waits_until_it_is_done(store: EdgeStore, folder: Path) -> None:
    index = store.open("a", dim=DIM)
    index.upsert([point(CUBE, unit(1, seq), seq=seq) for seq in range(1, 50)])
    before = current(folder)
    index.optimize()
    assert current(folder) != before
    assert index.count() == 49


def test_writes_while_a_copy_is_optimised_are_in_it(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = host.open("a", dim=DIM)
    plain = PlainIndex()
    gone = new_cube()

    def upsert(cube: CubeId, seqs: range, version: int) -> None:
        points = [
            point(cube, unit(1, seq, version), sparse(t1=1.0), seq=seq, version=version)
            for seq in seqs
        ]
        plain.upsert(points)
        index.upsert(points)

    upsert(CUBE, range(1, 400), 1)
    upsert(gone, range(600, 700), 1)
    former = edge_collection.EdgeCollection._run_optimizer

    def optimise_slowly(self: edge_collection.EdgeCollection, path: Path) -> None:
        former(self, path)
        upsert(CUBE, range(200, 550), 2)
        plain.delete_cube(gone)
        index.delete_cube(gone)
        upsert(gone, range(610, 620), 3)
        plain.delete(range(1, 20))
        index.delete(range(1, 20))

    monkeypatch.setattr(edge_collection.EdgeCollection, "_run_optimizer", optimise_slowly)
    index.optimize()

    assert index.versions(limit=10_000) == plain.versions()
    query = IndexQuery(scope(CUBE, gone), unit(1, 3), sparse(t1=1.0))
    hits = index.search(query, dense_limit=1000, sparse_limit=1000)
    assert close(scores_of(hits, "dense"), plain.dense_scores(query))
    assert close(scores_of(hits, "sparse"), plain.sparse_scores(query))
    index.close()
    assert reopened_versions(host) == len(plain.points)
    assert len(list((folder / "a").glob("g*"))) == 1


def wait_until_optimised(index: edge_collection.EdgeCollection) -> None:
    deadline = time.monotonic() + 20
    while index.optimizing():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reopened_versions(host: EdgeHost) -> int:
    return host.open("a", dim=DIM).count()


def test_a_collection_with_a_large_cube_is_optimised_once_a_third_has_changed(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_collection, "FULL_SCAN_POINTS", 50)
    index = host.open("a", dim=DIM)

    def optimised_by(points: list[IndexPoint]) -> bool:
        before = current(folder)
        index.upsert(points)
        index.flush()
        wait_until_optimised(index)
        return current(folder) != before

    assert not optimised_by([point(CUBE, seq=seq) for seq in range(1, 51)])
    # It is looked at again a quarter of 50 later.
    assert not optimised_by([point(CUBE, seq=51)])
    assert optimised_by([point(CUBE, seq=seq) for seq in range(52, 301)])
    assert not optimised_by([point(CUBE, seq=seq) for seq in range(301, 350)])
    assert index.count() == 349
    assert optimised_by([point(CUBE, seq=seq) for seq in range(350, 600)])


def test_what_was_written_meanwhile_is_optimised_next(
    host: EdgeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_collection, "FULL_SCAN_POINTS", 50)
    index = host.open("a", dim=DIM)
    former = edge_collection.EdgeCollection._run_optimizer
    runs: list[Path] = []

    def write_meanwhile(self: edge_collection.EdgeCollection, path: Path) -> None:
        runs.append(path)
        if len(runs) == 1:
            index.upsert([point(CUBE, seq=seq) for seq in range(101, 301)])
        former(self, path)

    monkeypatch.setattr(edge_collection.EdgeCollection, "_run_optimizer", write_meanwhile)
    index.upsert([point(CUBE, seq=seq) for seq in range(1, 101)])
    index.flush()
    wait_until_optimised(index)

    assert len(runs) == 2
    assert index.count() == 300


def test_less_than_a_third_is_optimised_once_the_writing_has_stopped(
    host: EdgeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_collection, "FULL_SCAN_POINTS", 900)
    monkeypatch.setattr(edge_collection, "_QUIET_SECONDS", 0.05)
    index = host.open("a", dim=DIM)
    former = edge_collection.EdgeCollection._run_optimizer
    written = [300, 3]
    runs: list[int] = []

    def write_meanwhile(self: edge_collection.EdgeCollection, path: Path) -> None:
        first = 2000 + 500 * len(runs)
        index.upsert([point(CUBE, seq=first + more) for more in range(written[len(runs)])])
        runs.append(index.count())
        former(self, path)

    monkeypatch.setattr(edge_collection.EdgeCollection, "_run_optimizer", write_meanwhile)
    index.upsert([point(CUBE, seq=seq) for seq in range(1, 1001)])
    index.flush()
    wait_until_optimised(index)

    assert runs == [1300, 1303]


def test_small_cubes_are_not_optimised_until_most_of_the_disk_is_stale(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_collection, "FULL_SCAN_POINTS", 50)
    index = host.open("a", dim=DIM)
    before = current(folder)
    points = [point(CubeId(f"small-{seq % 9}"), seq=seq) for seq in range(1, 100)]
    for _ in range(2):
        index.upsert(points)
        index.flush()
        assert not index.optimizing()
    assert current(folder) == before
    index.upsert(points)
    index.flush()
    wait_until_optimised(index)
    assert current(folder) != before
    assert index.count() == 99


def test_an_optimiser_that_fails_leaves_the_collection_as_it_was(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = host.open("a", dim=DIM)
    index.upsert([point(CUBE)])
    before = current(folder)
    with monkeypatch.context() as patch:
        patch.setattr(edge_collection, "_OPTIMIZER", "memos_vllm.no_such_module")
        with pytest.raises(Unavailable, match=r"ended with status 1.*no_such_module"):
            index.optimize()
        index.start_optimizing()
        with pytest.raises(Unavailable, match="ended with status 1"):
            wait_until_optimised(index)
    assert current(folder) == before
    assert index.count() == 1
    assert len(list((folder / "a").glob("g*"))) == 1


def test_a_copy_that_finds_no_room_leaves_the_collection_as_it_was(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = host.open("a", dim=DIM)
    index.upsert([point(CUBE)])

    def copy_a_part(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(edge_collection.shutil, "copytree", copy_a_part)
        with pytest.raises(Unavailable, match=r"could not be optimised.*No space left"):
            index.optimize()
    assert len(list((folder / "a").glob("g*"))) == 1
    index.upsert([point(CUBE)])
    index.optimize()
    assert index.count() == 2


def test_trouble_with_what_was_replaced_leaves_the_optimised_one(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = host.open("a", dim=DIM)
    index.upsert([point(CUBE)])
    before = current(folder)
    with monkeypatch.context() as patch:
        patch.setattr(edge_folder.CollectionFolder, "remove_others", failing)
        with pytest.raises(Unavailable, match="could not be optimised"):
            index.optimize()
    assert current(folder) != before
    index.close()
    assert reopened_versions(host) == 1


def failing(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_closing_ends_an_optimiser(
    host: EdgeHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "endless_optimizer.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(edge_collection, "_OPTIMIZER", "endless_optimizer")
    index = host.open("a", dim=DIM)
    index.upsert([point(CUBE)])
    index.start_optimizing()
    while index._optimizer is None:
        time.sleep(0.01)
    started = time.monotonic()
    index.close()
    assert time.monotonic() - started < 5
    assert len(list((folder / "a").glob("g*"))) == 1
