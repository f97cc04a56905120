"""What was deleted from an embedded index is in none of its files once they were rewritten."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_search import files_holding, vector_forms
from index_kit import DIM, folder_in_memory, point, scope

from memos_vllm.domain.ids import CubeId
from memos_vllm.errors import Unavailable
from memos_vllm.plaintext.index.base import DenseVector, IndexQuery, SparseVector
from memos_vllm.plaintext.index.edge_host import EdgeHost
from memos_vllm.plaintext.index.qdrant_edge import EdgeIndex, EdgeStore

CUBE = CubeId("cube")
_TERM = 0x5EC20000


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as found:
        yield found / "qdrant"


@pytest.fixture
def store(folder: Path) -> Iterator[EdgeStore]:
    opened = EdgeStore(folder)
    yield opened
    opened.close()


def vector(seed: int) -> DenseVector:
    """A vector whose bytes are nobody else's."""
    drawn = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return drawn / np.float32(np.linalg.norm(drawn))


def fill(index: EdgeIndex, *, points: int) -> None:
    index.upsert([point(CUBE, vector(seq), terms(seq), seq=seq) for seq in range(1, points + 1)])
    index.flush()


def terms(seq: int) -> SparseVector:
    """A term that only this memory has."""
    return SparseVector(np.array([_TERM + seq], np.uint32), np.ones(1, np.float32))


def traces(folder: Path, seq: int) -> list[str]:
    term = [np.array(_TERM + seq, kind).tobytes() for kind in ("<u4", ">u4")]
    return files_holding(folder, *vector_forms(vector(seq)), *term)


def nearest(index: EdgeIndex, seq: int) -> list[int]:
    query = IndexQuery(scope(CUBE), dense=vector(seq))
    return [hit.seq for hit in index.search(query, dense_limit=1, sparse_limit=0)]


@pytest.mark.parametrize("points", [5, 1500])
def test_the_bytes_of_a_deleted_vector_are_gone_and_all_others_are_found(
    store: EdgeStore, folder: Path, points: int
) -> None:
    index = store.open("a", dim=DIM)
    fill(index, points=points)
    index.delete([3])
    index.flush()
    # Deleted, and still in a segment and in the log: this is what purging is for.
    assert traces(folder, 3)
    assert index.purge()
    assert traces(folder, 3) == []
    assert [one.seq for one in index.versions(limit=points)] == [
        seq for seq in range(1, points + 1) if seq != 3
    ]
    assert nearest(index, 4) == [4]
    assert traces(folder, 4)
    index.close()
    again = store.open("a", dim=DIM)
    assert (again.count(), traces(folder, 3)) == (points - 1, [])


def test_what_replaced_vectors_said_is_gone_once_they_are_deleted(
    store: EdgeStore, folder: Path
) -> None:
    index = store.open("a", dim=DIM)
    fill(index, points=4)
    for seed in (100, 101):
        index.upsert([point(CUBE, seq=2, dense=vector(seed))])
        index.flush()
    index.delete([2])
    index.flush()
    index.purge()
    assert [traces(folder, seed) for seed in (2, 100, 101)] == [[], [], []]


def test_what_is_written_while_a_purge_runs_is_kept(folder: Path) -> None:
    host = EdgeHost(folder)
    index = host.open("a", dim=DIM)
    index.upsert([point(CUBE, seq=seq, dense=vector(seq)) for seq in range(1, 6)])
    index.delete([3])
    purge = threading.Thread(target=index.purge)
    purge.start()
    while index._touched is None and purge.is_alive():
        time.sleep(0.001)
    index.upsert([point(CUBE, seq=9, dense=vector(9))])
    index.delete([4])
    purge.join()
    assert [one.seq for one in index.versions()] == [1, 2, 5, 9]
    # Numbers of changes go on: what comes now is not taken for older than what is there.
    index.delete([5])
    index.upsert([point(CUBE, seq=1, version=2)])
    assert [(one.seq, one.version) for one in index.versions()] == [(1, 2), (2, 1), (9, 1)]
    assert len(list((folder / "a").glob("g*"))) == 1
    host.close()


def test_a_purge_whose_process_was_killed_is_not_taken_for_done(
    store: EdgeStore, folder: Path
) -> None:
    index = store.open("a", dim=DIM)
    fill(index, points=1500)
    index.delete([3])
    ended: list[str] = []

    def purge() -> None:
        try:
            index.purge()
        except Unavailable as error:
            ended.append(str(error))

    while not ended:
        # Now and then it is done before the kill, and another one has to be begun.
        before = set(os.listdir(folder / "a"))
        thread = threading.Thread(target=purge)
        thread.start()
        while thread.is_alive() and before >= set(os.listdir(folder / "a")):
            time.sleep(0.001)
        assert store.pid is not None
        os.kill(store.pid, signal.SIGKILL)
        thread.join()
    assert "cut off" in ended[0]
    assert index.count() == 1499
    index.purge()
    assert traces(folder, 3) == []
