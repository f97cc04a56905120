"""What every index of plaintext memory must do, over each of them."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from index_kit import (
    DIM,
    NOW,
    PlainIndex,
    close,
    fields,
    filters,
    folder_in_memory,
    inverse_frequency,
    new_cube,
    new_seq,
    point,
    scope,
    scopes,
    scores_of,
    sparse,
    term_weights,
    unit,
    vectors,
)
from qdrant_shim import Shim, running

from memos_vllm.domain.filters import AllOf, AnyOf, HasTag, MetadataIs, Not
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.scope import Scalar
from memos_vllm.errors import ConfigurationError, Unavailable
from memos_vllm.plaintext.index.base import (
    IndexedVersion,
    IndexPoint,
    IndexQuery,
    IndexStore,
    SparseVector,
    VectorIndex,
)
from memos_vllm.plaintext.index.edge_host import EdgeHost
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.index.qdrant_server import ServerStore

_PROPERTY = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextmanager
def _edge() -> Iterator[IndexStore]:
    with folder_in_memory() as folder:
        yield EdgeHost(folder / "qdrant")


@contextmanager
def _edge_in_a_process() -> Iterator[IndexStore]:
    with folder_in_memory() as folder:
        yield EdgeStore(folder / "qdrant")


@contextmanager
def _over_the_wire() -> Iterator[IndexStore]:
    with running(Shim()) as shim:
        yield ServerStore(shim.url)


@contextmanager
def _real_server() -> Iterator[IndexStore]:
    def connect() -> ServerStore:
        return ServerStore(
            os.environ["QDRANT_URL"],
            api_key=os.environ.get("QDRANT_API_KEY"),
            namespace=namespace,
        )

    namespace = f"memos-test-{secrets.token_hex(4)}"
    yield connect()
    cleaning = connect()
    for name in cleaning.collections():
        cleaning.drop(name)
    cleaning.close()


_STORES = {
    "edge": _edge,
    "edge in a process": _edge_in_a_process,
    "server over the wire": _over_the_wire,
    "real server": _real_server,
}


@pytest.fixture(
    scope="module",
    params=[
        "edge",
        "edge in a process",
        "server over the wire",
        pytest.param(
            "real server",
            marks=pytest.mark.skipif("QDRANT_URL" not in os.environ, reason="QDRANT_URL not set"),
        ),
    ],
)
def store(request: pytest.FixtureRequest) -> Iterator[IndexStore]:
    with _STORES[request.param]() as opened:
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def index(store: IndexStore) -> Iterator[VectorIndex]:
    opened = store.open("contract", dim=DIM)
    yield opened
    opened.close()


def search(index: VectorIndex, query: IndexQuery, *, limit: int = 1000) -> list[int]:
    return [hit.seq for hit in index.search(query, dense_limit=limit, sparse_limit=limit)]


def test_a_memory_found_both_ways_is_one_hit_with_both_scores(index: VectorIndex) -> None:
    cube = new_cube()
    both = point(cube, unit(1, 0), sparse(t1=1.0))
    only_near = point(cube, unit(1, 1), sparse(t2=1.0))
    index.upsert([both, only_near])

    hits = index.search(
        IndexQuery(scope(cube), unit(1, 0), sparse(t1=1.0)), dense_limit=10, sparse_limit=10
    )

    assert [hit.seq for hit in hits] == [both.seq, only_near.seq]
    assert hits[0].dense == pytest.approx(1.0, abs=1e-5)
    assert hits[0].sparse == pytest.approx(inverse_frequency([both, only_near], 1), abs=1e-5)
    assert hits[1].dense == pytest.approx(0.5**0.5, abs=1e-5)
    assert hits[1].sparse is None


def test_what_words_alone_find_comes_after_what_is_near(index: VectorIndex) -> None:
    cube = new_cube()
    near = [point(cube, unit(1, place)) for place in range(3)]
    by_terms = point(cube, unit(0, 0, 1), sparse(t1=1.0))
    index.upsert([*near, by_terms])
    query = IndexQuery(scope(cube), unit(1, 0), sparse(t1=1.0))

    hits = index.search(query, dense_limit=2, sparse_limit=5)

    assert [hit.seq for hit in hits] == [near[0].seq, near[1].seq, by_terms.seq]
    assert hits[2].dense is None
    assert hits[2].sparse is not None


def test_idf_counts_nothing_that_the_caller_may_not_see(index: VectorIndex) -> None:
    mine, other = new_cube(), new_cube()
    seen = [point(mine, terms=sparse(t1=1.0)), point(mine, terms=sparse(t2=1.0))]
    index.upsert(seen)
    query = IndexQuery(scope(mine, labels=[]), None, sparse(t1=1.0))
    before = scores_of(index.search(query, dense_limit=0, sparse_limit=9), "sparse")

    index.upsert([point(other, terms=sparse(t1=1.0)) for _ in range(5)])
    index.upsert([point(mine, terms=sparse(t1=1.0), labels=("secret",)) for _ in range(5)])
    after = scores_of(index.search(query, dense_limit=0, sparse_limit=9), "sparse")

    assert before == after == pytest.approx({seen[0].seq: inverse_frequency(seen, 1)}, abs=1e-5)


def test_idf_counts_what_has_expired_and_what_has_no_words(index: VectorIndex) -> None:
    cube = new_cube()
    alive = point(cube, terms=sparse(t1=1.0))
    expired = point(cube, terms=sparse(t1=1.0), expires_at=NOW)
    wordless = point(cube)
    index.upsert([alive, expired, wordless])

    hits = index.search(
        IndexQuery(scope(cube), None, sparse(t1=2.0)), dense_limit=0, sparse_limit=9
    )

    expected = 2 * inverse_frequency([alive, expired, wordless], 1)
    assert scores_of(hits, "sparse") == pytest.approx({alive.seq: expected}, abs=1e-5)


def test_only_cubes_of_the_scope_are_searched(index: VectorIndex) -> None:
    cubes = [new_cube() for _ in range(20)]
    points = [point(cube) for cube in cubes]
    index.upsert(points)

    for wanted in (cubes[:1], cubes[:3], cubes):
        found = search(index, IndexQuery(scope(*wanted), unit(1)))
        assert sorted(found) == [point.seq for point in points[: len(wanted)]]


def test_limits_hold_over_all_cubes_together(index: VectorIndex) -> None:
    cubes = [new_cube(), new_cube()]
    points = [point(cubes[place % 2], unit(1, place), sparse(t1=1.0)) for place in range(6)]
    index.upsert(points)

    hits = index.search(IndexQuery(scope(*cubes), unit(1)), dense_limit=3, sparse_limit=0)
    assert [hit.seq for hit in hits] == [point.seq for point in points[:3]]
    query = IndexQuery(scope(*cubes), None, sparse(t1=1.0))
    assert len(index.search(query, dense_limit=3, sparse_limit=4)) == 4


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        (1, 1.0, True),
        (2.0, 2, True),
        (-0.0, 0, True),
        (1, True, False),
        (True, 1, False),
        (1, "1", False),
        ("True", True, False),
        (2**53 + 1, 2**53, False),
        (2**53 + 1, 2**53 + 1, True),
        ("x" * 200, "x" * 200, True),
        ("x" * 200, "x" * 199 + "y", False),
    ],
)
def test_metadata_is_equal_by_value_and_kind(
    index: VectorIndex, stored: Scalar, asked: Scalar, found: bool
) -> None:
    held = point(new_cube(), metadata={"k": (stored,)})
    index.upsert([held])
    query = IndexQuery(scope(held.cube_id), unit(1), where=MetadataIs("k", (asked,)))
    assert bool(search(index, query)) == found


def test_a_scope_without_cubes_finds_nothing(index: VectorIndex) -> None:
    stored = point(new_cube(), terms=sparse(t1=1.0))
    index.upsert([stored])
    query = IndexQuery(scope(), unit(1), sparse(t1=1.0))

    assert search(index, query) == []
    assert index.score([stored.seq], query) == []


@pytest.mark.parametrize(
    ("granted", "visible"),
    [
        (None, ["", "red", "red blue"]),
        ([], [""]),
        (["red"], ["", "red"]),
        (["red", "blue", "x"], ["", "red", "red blue"]),
    ],
)
def test_a_memory_is_seen_only_with_all_of_its_labels(
    index: VectorIndex, granted: list[str] | None, visible: list[str]
) -> None:
    cube = new_cube()
    points = {text: point(cube, labels=tuple(text.split())) for text in ("", "red", "red blue")}
    index.upsert(list(points.values()))
    query = IndexQuery(scope(cube, labels=granted), unit(1))

    expected = sorted(points[text].seq for text in visible)
    assert sorted(search(index, query)) == expected
    scored = index.score([point.seq for point in points.values()], query)
    assert sorted(hit.seq for hit in scored) == expected


def test_a_memory_is_gone_at_the_moment_it_expires(index: VectorIndex) -> None:
    cube = new_cube()
    stored = point(cube, expires_at=NOW + 5)
    index.upsert([stored])

    assert search(index, IndexQuery(scope(cube, now=NOW + 4.999), unit(1))) == [stored.seq]
    assert search(index, IndexQuery(scope(cube, now=NOW + 5), unit(1))) == []


def test_score_gives_every_part_to_exactly_the_points_asked_for(index: VectorIndex) -> None:
    cube, other = new_cube(), new_cube()
    points = [
        point(cube, unit(1, 0), sparse(t1=1.0), tags=("a",)),
        point(cube, unit(0, 1), sparse(t2=1.0), tags=("a",)),
        point(cube, unit(1, 1), sparse(t1=1.0), tags=("b",)),
        point(other, unit(1, 0), sparse(t1=1.0), tags=("a",)),
    ]
    not_asked = point(cube, unit(1, 0), tags=("a",))
    index.upsert([*points, not_asked])
    query = IndexQuery(scope(cube), unit(1, 0), sparse(t1=1.0), HasTag(("a",)))

    hits = {hit.seq: hit for hit in index.score([p.seq for p in points] + [10**9], query)}

    assert sorted(hits) == [points[0].seq, points[1].seq]
    assert hits[points[1].seq].dense == pytest.approx(0.0, abs=1e-5)
    assert hits[points[1].seq].sparse == 0.0
    idf = inverse_frequency([*points[:3], not_asked], 1)
    assert hits[points[0].seq].sparse == pytest.approx(idf, abs=1e-5)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("terms", [None, SparseVector.empty(), sparse(t1=1.0)])
def test_score_answers_with_any_part_missing(
    index: VectorIndex, dense: bool, terms: SparseVector | None
) -> None:
    stored = point(new_cube(), terms=sparse(t1=1.0))
    index.upsert([stored])
    query = IndexQuery(scope(stored.cube_id), unit(1) if dense else None, terms)

    (hit,) = index.score([stored.seq], query)

    assert (hit.dense is not None) == dense
    assert (hit.sparse is not None) == (terms is not None)
    assert (hit.version, hit.cube_id) == (1, stored.cube_id)


def test_an_empty_query_finds_nothing(index: VectorIndex) -> None:
    stored = point(new_cube(), terms=sparse(t1=1.0))
    index.upsert([stored])
    here = scope(stored.cube_id)

    assert search(index, IndexQuery(here)) == []
    assert search(index, IndexQuery(here, None, SparseVector.empty())) == []
    assert search(index, IndexQuery(here, None, sparse(t9=1.0))) == []
    assert search(index, IndexQuery(here, unit(1), sparse(t1=1.0)), limit=0) == []
    assert index.score([], IndexQuery(here, unit(1))) == []


def test_all_of_nothing_is_everything_and_any_of_nothing_is_nothing(index: VectorIndex) -> None:
    stored = point(new_cube())
    index.upsert([stored])
    here = scope(stored.cube_id)
    assert search(index, IndexQuery(here, unit(1), where=AllOf(()))) == [stored.seq]
    assert search(index, IndexQuery(here, unit(1), where=AnyOf(()))) == []


def test_a_vector_of_zeros_is_stored_and_near_to_nothing(index: VectorIndex) -> None:
    stored = point(new_cube(), np.zeros(DIM, np.float32), sparse(t1=1.0))
    index.upsert([stored])
    query = IndexQuery(scope(stored.cube_id), unit(1), sparse(t1=1.0))

    (hit,) = index.search(query, dense_limit=5, sparse_limit=5)

    assert hit.dense == pytest.approx(0.0, abs=1e-5)
    assert hit.sparse is not None


def test_another_dimension_is_refused_with_both_numbers(
    index: VectorIndex, store: IndexStore
) -> None:
    cube = new_cube()
    wrong = unit(1, dim=DIM + 3)
    with pytest.raises(ConfigurationError, match=f"{DIM + 3} dimensions.*{DIM}"):
        index.upsert([point(cube), point(cube, wrong)])
    assert index.count(cube_id=cube) == 0
    with pytest.raises(ConfigurationError, match=f"{DIM + 3} dimensions.*{DIM}"):
        index.search(IndexQuery(scope(cube), wrong), dense_limit=1, sparse_limit=1)
    with pytest.raises(ConfigurationError, match="not finite"):
        index.upsert([point(cube, unit(1) * np.float32(np.nan))])

    store.open("narrow", dim=DIM).close()
    with pytest.raises(ConfigurationError, match=f"{DIM} dimensions.*{DIM + 3}"):
        store.open("narrow", dim=DIM + 3)


def test_a_later_version_takes_the_place_of_an_earlier_one(index: VectorIndex) -> None:
    cube, elsewhere = new_cube(), new_cube()
    first = point(cube, unit(1, 0), sparse(t1=1.0), tags=("old",), metadata={"k": (1,)})
    index.upsert([first])
    index.upsert([point(cube, unit(0, 1), sparse(t2=1.0), seq=first.seq, version=2)])

    here = scope(cube)
    (hit,) = index.search(
        IndexQuery(here, unit(0, 1), sparse(t1=1.0)), dense_limit=1, sparse_limit=1
    )
    assert (hit.version, hit.sparse) == (2, None)
    assert hit.dense == pytest.approx(1.0, abs=1e-5)
    assert search(index, IndexQuery(here, unit(1), where=HasTag(("old",)))) == []

    index.upsert([point(elsewhere, seq=first.seq, version=3)])
    assert search(index, IndexQuery(here, unit(1))) == []
    assert index.versions(cube_id=elsewhere) == [IndexedVersion(first.seq, 3, elsewhere)]


def test_deleted_points_and_cubes_are_not_found(index: VectorIndex) -> None:
    cube, other = new_cube(), new_cube()
    points = [point(cube) for _ in range(3)]
    kept = point(other)
    index.upsert([*points, kept])

    index.delete([points[0].seq, 10**9])
    index.delete([])
    assert sorted(search(index, IndexQuery(scope(cube), unit(1)))) == [p.seq for p in points[1:]]
    index.delete_cube(cube)
    assert search(index, IndexQuery(scope(cube, other), unit(1))) == [kept.seq]


def test_versions_are_listed_in_order_page_by_page(index: VectorIndex) -> None:
    cube = new_cube()
    points = [point(cube, version=place + 1) for place in range(7)]
    index.upsert(points[::-1])

    pages, after = [], 0
    while page := index.versions(after=after, limit=3, cube_id=cube):
        pages.append([(entry.seq, entry.version) for entry in page])
        after = page[-1].seq
    assert pages == [
        [(p.seq, p.version) for p in points[start : start + 3]] for start in range(0, 7, 3)
    ]
    assert index.count(cube_id=cube) == 7
    everything = index.versions(limit=100_000)
    assert {entry.seq for entry in everything}.issuperset(p.seq for p in points)
    assert index.count() == len(everything)


def test_searches_go_on_beside_a_writer(index: VectorIndex) -> None:
    cube = new_cube()
    stored = [point(cube, unit(1, place)) for place in range(20)]
    index.upsert(stored)
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                found = search(index, IndexQuery(scope(cube), unit(1, 0)), limit=5)
                assert found[0] == stored[0].seq
        except BaseException as error:  # noqa: BLE001 told by the assertion below
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(10):
        index.upsert([point(cube, unit(0, 1)) for _ in range(10)])
        index.flush()
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []


@_PROPERTY
@given(
    stored=st.lists(st.tuples(fields, vectors, term_weights), min_size=1, max_size=8),
    wheres=st.lists(filters, min_size=8, max_size=8),
    seen=scopes,
)
def test_filters_mean_what_the_reference_says(
    index: VectorIndex, stored: list[tuple], wheres: list, seen: tuple
) -> None:
    cube = new_cube()
    plain = PlainIndex()
    plain.upsert([point(cube, d, t, **_as_dict(f)) for f, d, t in stored])
    index.upsert(list(plain.points.values()))
    labels, now = seen
    try:
        for where in wheres:
            for condition in (where, Not(where)):
                query = IndexQuery(
                    scope(cube, labels=labels, now=now), unit(1, 2), sparse(t1=1.0), condition
                )
                hits = index.search(query, dense_limit=50, sparse_limit=50)
                assert close(scores_of(hits, "dense"), plain.dense_scores(query))
                assert close(scores_of(hits, "sparse"), plain.sparse_scores(query))
    finally:
        index.delete_cube(cube)


def _as_dict(found: object) -> dict[str, object]:
    return {name: getattr(found, name) for name in type(found).__dataclass_fields__}  # type: ignore[attr-defined]


def test_any_order_of_writes_gives_what_a_plain_index_gives(index: VectorIndex) -> None:
    class Machine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.plain = PlainIndex()
            self.cubes = [new_cube(), new_cube()]
            self.seqs = [new_seq() for _ in range(6)]

        @rule(
            which=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
            cube=st.integers(0, 1),
            version=st.integers(1, 9),
            made=st.tuples(fields, vectors, term_weights),
        )
        def upsert(self, which: list[int], cube: int, version: int, made: tuple) -> None:
            found, dense, terms = made
            points = [
                IndexPoint(self.seqs[place], version, self.cubes[cube], dense, terms, found)
                for place in which
            ]
            self.plain.upsert(points)
            index.upsert(points)

        @rule(which=st.lists(st.integers(0, 5), max_size=3))
        def delete(self, which: list[int]) -> None:
            self.plain.delete([self.seqs[place] for place in which])
            index.delete([self.seqs[place] for place in which])

        @rule(cube=st.integers(0, 1))
        def delete_cube(self, cube: int) -> None:
            self.plain.delete_cube(self.cubes[cube])
            index.delete_cube(self.cubes[cube])

        @rule(dense=vectors, terms=term_weights, seen=scopes, limit=st.integers(1, 7))
        def search(self, dense: np.ndarray, terms: SparseVector, seen: tuple, limit: int) -> None:
            query = IndexQuery(scope(*self.cubes, labels=seen[0], now=seen[1]), dense, terms)
            hits = index.search(query, dense_limit=limit, sparse_limit=limit)
            assert len({hit.seq for hit in hits}) == len(hits)
            for part, expected in (
                ("dense", self.plain.dense_scores(query)),
                ("sparse", self.plain.sparse_scores(query)),
            ):
                found = scores_of(hits, part)
                best = sorted(expected.values(), reverse=True)[:limit]
                assert sorted(found.values(), reverse=True) == pytest.approx(best, abs=1e-4)
                assert close(found, {seq: expected[seq] for seq in found})
            scored = index.score(self.seqs, query)
            assert close(scores_of(scored, "dense"), self.plain.dense_scores(query))
            zeros = dict.fromkeys(self.plain.dense_scores(query), 0.0)
            assert close(scores_of(scored, "sparse"), zeros | self.plain.sparse_scores(query))

        @invariant()
        def holds_what_it_should(self) -> None:
            if hasattr(self, "plain"):
                held = [entry for cube in self.cubes for entry in index.versions(cube_id=cube)]
                assert sorted(held, key=lambda entry: entry.seq) == self.plain.versions()

        def teardown(self) -> None:
            for cube in getattr(self, "cubes", ()):
                index.delete_cube(cube)

    Machine.TestCase.settings = settings(
        max_examples=5, stateful_step_count=12, deadline=None, database=None
    )
    Machine.TestCase().runTest()


def test_a_collection_that_is_opened_again_holds_what_was_written(store: IndexStore) -> None:
    first = store.open("again", dim=DIM)
    assert first.opened_empty
    stored = point(new_cube(), unit(1, 2), sparse(t1=1.0))
    first.upsert([stored])
    first.flush()
    first.close()
    first.close()

    second = store.open("again", dim=DIM)
    assert not second.opened_empty
    query = IndexQuery(scope(stored.cube_id), unit(1, 2), sparse(t1=1.0))
    (hit,) = second.search(query, dense_limit=1, sparse_limit=1)
    assert hit.dense == pytest.approx(1.0, abs=1e-5)
    second.close()


def test_a_closed_collection_says_so(store: IndexStore) -> None:
    closed = store.open("closed", dim=DIM)
    closed.close()
    with pytest.raises(Unavailable, match="is closed"):
        closed.count()


def test_collections_are_listed_and_dropped(store: IndexStore) -> None:
    for name in ("drop-b", "drop-a"):
        store.open(name, dim=DIM).close()
    assert [name for name in store.collections() if name.startswith("drop")] == ["drop-a", "drop-b"]

    store.drop("drop-a")
    store.drop("drop-a")
    assert [name for name in store.collections() if name.startswith("drop")] == ["drop-b"]
    again = store.open("drop-a", dim=DIM + 1)
    assert again.opened_empty
    again.close()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 200, "ü"])
def test_a_name_that_no_folder_or_route_takes_is_refused(store: IndexStore, name: str) -> None:
    with pytest.raises(ConfigurationError, match="collection name"):
        store.open(name, dim=DIM)


def test_two_collections_hold_the_same_numbers_apart(store: IndexStore) -> None:
    cube = CubeId("shared")
    one, two = store.open("one", dim=DIM), store.open("two", dim=DIM * 2)
    one.upsert([point(cube, seq=1)])
    two.upsert([point(cube, unit(1, dim=DIM * 2), seq=1, version=5)])

    assert one.versions(cube_id=cube) == [IndexedVersion(1, 1, cube)]
    assert two.versions(cube_id=cube) == [IndexedVersion(1, 5, cube)]
    one.close()
    two.close()
