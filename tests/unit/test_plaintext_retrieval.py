"""Searches, over the real embedded index and the real default embedder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest

from memos_vllm.domain.filters import Filter, parse_filter
from memos_vllm.domain.finding import AUTHOR_PREFIX, Facts, Link
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.scope import FilterFields, Scope
from memos_vllm.plaintext.embedders import Embedder, Vectors, create_embedder
from memos_vllm.plaintext.entities import entities_of
from memos_vllm.plaintext.index.base import Hit, IndexPoint, IndexQuery, VectorIndex
from memos_vllm.plaintext.index.qdrant_edge import EdgeStore
from memos_vllm.plaintext.names import author_and_text
from memos_vllm.plaintext.retrieval import RankedMemory, Retriever
from memos_vllm.plaintext.terms import document_terms

NOW = datetime(2025, 6, 1, tzinfo=UTC)
_cubes = count(1)
_seqs = count(1)


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    opened = create_embedder("minilm-l6-v2-int8")
    assert opened is not None
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorIndex]:
    folder: Path = tmp_path_factory.mktemp("index")
    store = EdgeStore(folder)
    yield store.open("memories", dim=384)
    store.close()


@dataclass
class Cube:
    """Memories in the real index, and their edges in a dictionary in place of the catalog."""

    embedder: Embedder
    index: VectorIndex
    cube_id: CubeId = field(default_factory=lambda: CubeId(f"talk-{next(_cubes)}"))
    said: dict[int, str] = field(default_factory=dict)
    made: dict[int, Vectors] = field(default_factory=dict)
    known: dict[int, Facts] = field(default_factory=dict)
    entities: dict[int, tuple[str, ...]] = field(default_factory=dict)
    edges: list[Link] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        *texts: str,
        by: str | None = None,
        tags: tuple[str, ...] = (),
        age_days: float = 0.0,
        hits: int = 0,
        chain: bool = False,
    ) -> list[int]:
        """The numbers of new memories; with `chain`, each leads to the one behind it."""
        seqs = [next(_seqs) for _ in texts]
        at = NOW - timedelta(days=age_days)
        bodies = [author_and_text(by, text)[1] for text in texts]
        for seq, text, body, dense in zip(
            seqs, texts, bodies, self.embedder.embed(bodies), strict=True
        ):
            fields = FilterFields(at.timestamp(), at.timestamp(), tags=tags)
            terms = document_terms(f"{body}\n{by or ''}")
            self.index.upsert([IndexPoint(seq, 1, self.cube_id, dense, terms, fields)])
            self.said[seq], self.made[seq] = text, dense
            self.known[seq] = Facts(at, hits, None)
            self.entities[seq] = entities_of(text, author=by)
        if chain:
            for earlier, later in pairwise(seqs):
                self.link(earlier, later, "next")
        return seqs

    def link(self, origin: int, target: int, kind: str, weight: float = 1.0) -> None:
        self.edges += [
            Link(origin, target, kind, weight, True),
            Link(target, origin, kind, weight, False),
        ]

    def links(
        self,
        seqs: Sequence[int],
        *,
        fan_out: int,
        mentioning: Sequence[int] = (),
        max_mentions: int = 0,
    ) -> list[Link]:
        self.calls["links"] += 1
        assert len(seqs) == len(set(seqs)) <= 64
        found = [link for link in self.edges if link.origin in seqs]
        for seq in mentioning:
            for entity in self.entities[seq]:
                sharing = [other for other, keys in self.entities.items() if entity in keys]
                if not entity.startswith(AUTHOR_PREFIX) and 2 <= len(sharing) <= max_mentions:
                    found += [
                        Link(seq, other, "mentions", 1.0, True, entity)
                        for other in sharing
                        if other != seq
                    ][:fan_out]
        return found

    def facts(self, seqs: Sequence[int]) -> Mapping[int, Facts]:
        self.calls["facts"] += 1
        return {seq: self.known[seq] for seq in seqs}

    def authors(self, names: Sequence[str]) -> set[str]:
        self.calls["authors"] += 1
        there = {key for keys in self.entities.values() for key in keys}
        return {name for name in names if AUTHOR_PREFIX + name in there}

    def authored(self, names: Collection[str], seqs: Sequence[int]) -> set[int]:
        self.calls["authored"] += 1
        keys = {AUTHOR_PREFIX + name for name in names}
        return {seq for seq in seqs if keys & set(self.entities[seq])}

    def vectors(self, seqs: Sequence[int]) -> Vectors:
        self.calls["vectors"] += 1
        return np.stack([self.made[seq] for seq in seqs])

    def texts(self, seqs: Sequence[int]) -> Mapping[int, str]:
        return {seq: self.said[seq] for seq in seqs}

    def search(
        self,
        query: str,
        *,
        top_k: int = 10,
        hops: int = 1,
        where: Filter | None = None,
        embedder: Embedder | str | None = "own",
        reranker: ByLength | None = None,
    ) -> list[RankedMemory]:
        retriever = Retriever(
            embedder=self.embedder if isinstance(embedder, str) else embedder,
            index=self.index,
            graph=self,
            reranker=reranker,
        )
        scope = Scope((self.cube_id,), None, NOW.timestamp())
        found = retriever.search(query, scope=scope, where=where, top_k=top_k, hops=hops)
        assert_sound(found, top_k=top_k, hops=hops)
        return found

    def order(self, query: str, *, top_k: int = 10) -> list[int]:
        return [entry.seq for entry in self.search(query, top_k=top_k)]


def assert_sound(found: Sequence[RankedMemory], *, top_k: int, hops: int) -> None:
    """What holds for every ranking."""
    assert len(found) <= top_k
    assert len({entry.seq for entry in found}) == len(found)
    scores = [entry.score for entry in found]
    assert scores == sorted(scores, reverse=True)
    for entry in found:
        assert 0.0 <= entry.score <= 1.0
        assert sum(entry.components.values()) == pytest.approx(entry.score, abs=1e-9)
        if entry.via is not None:
            assert 1 <= len(entry.via) <= hops
            assert entry.via[-1].target == entry.seq


class ByLength:
    """A reranker that likes short texts."""

    key = "by-length"

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        return [-float(len(text)) for text in texts]

    def close(self) -> None: ...


@pytest.fixture
def cube(embedder: Embedder, index: VectorIndex) -> Cube:
    return Cube(embedder, index)


FILLER = (
    "The kettle needs a new fuse.",
    "Our street was dug up again this morning.",
    "Chess club meets on Thursdays.",
    "The printer jams on thick paper.",
    "Rain is expected until Sunday.",
)


def test_a_memory_is_found_by_its_meaning(cube: Cube) -> None:
    cube.add(*FILLER)
    (wanted,) = cube.add("We adopted a kitten from the shelter.")
    assert cube.order("Do they own any pets?")[0] == wanted


def test_a_memory_is_found_by_a_word_that_means_nothing(cube: Cube) -> None:
    cube.add(*FILLER, "Error KX-4470 is harmless.", "Error KX-4472 was fixed long ago.")
    (wanted,) = cube.add("Reset the drum after KX4471.")
    assert cube.order("KX4471")[0] == wanted


def test_what_the_named_person_said_comes_before_what_was_said_to_them(cube: Cube) -> None:
    cube.add("Ana, you look great! How is Ana today?", "Tell me more, Ana.", by="Ben Moss")
    cube.add("My brother bought a violin.", by="Ben Moss")
    (wanted,) = cube.add("I finally bought a cello.", by="Ana Roth")
    found = cube.search("Which instrument did Ana buy?")
    assert found[0].seq == wanted
    assert found[0].components["author"] > 0
    assert "author" not in cube.search("Which instrument was bought?")[0].components


class Listening:
    """The real embedder, and what it was asked."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.heard: list[str] = []

    def embed_query(self, text: str) -> Vectors:
        self.heard.append(text)
        return self.embedder.embed_query(text)


def test_the_name_of_an_author_is_not_embedded_and_stays_a_term(cube: Cube) -> None:
    (wanted,) = cube.add("I sold it.", by="Ana Roth")
    listening = Listening(cube.embedder)
    retriever = Retriever(embedder=listening, index=cube.index, graph=cube)
    scope = Scope((cube.cube_id,), None, NOW.timestamp())
    (found,) = retriever.search("What did Ana sell to Ben?", scope=scope)
    assert listening.heard == ["What did sell to Ben?"]
    without_name = retriever.search("What did anyone sell to Ben?", scope=scope)[0]
    assert found.seq == wanted
    assert (found.bm25 or 0.0) > (without_name.bm25 or 0.0)


def test_a_name_that_is_no_authors_is_a_word_like_any_other(cube: Cube) -> None:
    cube.add(*FILLER, "Someone bought a cello.")
    (wanted,) = cube.add("Ana bought a cello.")
    found = cube.search("Which instrument did Ana buy?")
    assert found[0].seq == wanted
    assert "author" not in found[0].components
    assert cube.calls["authored"] == 0


def test_a_neighbour_of_a_match_comes_with_it_and_says_why(cube: Cube) -> None:
    _, answer = cube.add("Where did you spend the holidays?", "In a hut, up north.", chain=True)
    cube.add(*FILLER, "A hat is on the table.", "He went up the stairs.")
    query = "holidays spent where"
    linked, alone = cube.search(query, hops=1), cube.search(query, hops=0)
    assert linked[1].seq == answer
    assert linked[1].components["graph"] > 0
    assert all("graph" not in entry.components and entry.via is None for entry in alone)
    (hop,) = linked[1].via or ()
    assert (hop.kind, hop.forward, hop.target) == ("next", True, answer)


def test_hops_bound_how_far_a_match_reaches(cube: Cube) -> None:
    chain = cube.add("We are building a wooden boat.", *FILLER[:3], chain=True)
    cube.add(*[f"Ship number {n} is made of steel." for n in range(60)])
    for hops in range(4):
        found = {entry.seq: entry for entry in cube.search("wooden boat", hops=hops, top_k=200)}
        reached = [seq for seq in chain[1:] if found[seq].components.get("graph")]
        assert reached == chain[1 : 1 + hops]


def test_a_match_with_very_many_edges_does_not_ask_for_all_of_theirs(cube: Cube) -> None:
    (hub,) = cube.add("We are building a wooden boat.")
    for seq in cube.add(*[f"Plank {n}" for n in range(150)]):
        cube.link(hub, seq, "part-of")
    # `links` above takes no more than 64 at once.
    assert cube.order("wooden boat")[0] == hub
    assert cube.search("wooden boat", hops=3)


def test_memories_that_mention_something_rare_are_linked(cube: Cube) -> None:
    cube.add(*FILLER)
    _, linked = cube.add("Who painted the fence? Quimby did.", "Quimby sneezes.")
    entry = next(e for e in cube.search("painting a fence") if e.seq == linked)
    assert entry.components["graph"] > 0


def test_a_filter_holds_for_what_edges_lead_to(cube: Cube) -> None:
    (match,) = cube.add("The ferry leaves at noon.", tags=("open",))
    (hidden,) = cube.add("Tickets are sold on board.", tags=("closed",))
    cube.link(match, hidden, "next")
    where = parse_filter({"tags": "open"})
    assert [entry.seq for entry in cube.search("ferry", where=where)] == [match]
    assert hidden in cube.order("ferry")


def test_another_cube_is_never_reached(cube: Cube, embedder: Embedder, index: VectorIndex) -> None:
    other = Cube(embedder, index)
    (foreign,) = other.add("The ferry leaves at noon.")
    (own,) = cube.add("The ferry is late.")
    cube.entities[foreign] = ()
    cube.link(own, foreign, "next")
    assert cube.order("ferry") == [own]


def test_a_near_copy_makes_room_for_something_else(cube: Cube) -> None:
    copies = cube.add(*["The museum opens at nine o'clock on weekdays."] * 3)
    (other,) = cube.add("On weekends the museum opens at ten.")
    cube.add(*FILLER)
    found = cube.search("When does the museum open on weekdays?")
    assert [entry.seq for entry in found[:2]] == [copies[0], other]
    assert {entry.seq for entry in found[2:4]} == set(copies[1:])
    assert all(entry.components["duplicate"] < 0 for entry in found[2:4])


def test_what_was_superseded_comes_after_what_took_its_place(cube: Cube) -> None:
    (old,) = cube.add("The office is in Harbour Street 4.")
    (new,) = cube.add("The new address is Mill Lane 9.")
    cube.add(*FILLER)
    cube.link(new, old, "supersedes")
    found = cube.search("In which street is the office?")
    assert [entry.seq for entry in found[:2]] == [new, old]
    assert found[1].components["superseded"] < 0


def test_of_equal_matches_the_newer_and_the_more_used_come_first(cube: Cube) -> None:
    (old,) = cube.add("Lunch: lentil soup with bread.", age_days=400)
    (used,) = cube.add("Lunch: lentil stew with bread.", age_days=400, hits=30)
    (new,) = cube.add("Lunch: lentil soup with rolls.", age_days=0)
    found = {entry.seq: entry.components for entry in cube.search("lentil lunch", hops=0)}
    assert found[new]["recency"] > found[old]["recency"] == pytest.approx(0, abs=1e-4)
    assert found[used]["usage"] > found[old]["usage"] == 0


def test_a_reranker_orders_the_best(cube: Cube) -> None:
    cube.add("The bakery on the corner sells rye bread.", "Bread is cheap at the bakery.")
    (short,) = cube.add("A bakery!")
    found = cube.search("Which bread does the bakery sell?", reranker=ByLength())
    assert found[0].seq == short
    assert found[0].components["rerank"] > 0


def test_without_an_embedder_words_alone_decide(cube: Cube) -> None:
    cube.add(*FILLER)
    (wanted,) = cube.add("We adopted a kitten.")
    (found,) = cube.search("kitten", embedder=None)
    assert (found.seq, found.cosine) == (wanted, None)
    assert "dense" not in found.components
    assert cube.search("pets", embedder=None) == []


@pytest.mark.parametrize("query", ["the of and", "?!", "🙂"])
def test_a_query_without_terms_is_searched_by_meaning(cube: Cube, query: str) -> None:
    cube.add(*FILLER)
    found = cube.search(query)
    assert len(found) == len(FILLER)
    assert all(entry.bm25 is None for entry in found)


def test_an_empty_cube_has_nothing(cube: Cube) -> None:
    assert cube.search("anything") == []


def test_top_k_cuts_and_may_exceed_what_is_there(cube: Cube) -> None:
    seqs = cube.add(*[f"Note number {n} about gardens." for n in range(90)])
    assert set(cube.order("gardens", top_k=10_000)) == set(seqs)
    assert len(cube.order("gardens", top_k=1)) == 1


def test_the_beginning_of_a_longer_ranking_is_the_shorter_one(cube: Cube) -> None:
    cube.add(*FILLER, *[f"Note number {n} about gardens." for n in range(20)], chain=True)
    assert cube.order("garden notes", top_k=20)[:5] == cube.order("garden notes", top_k=5)


@dataclass
class Counting:
    """The real index, and how often it was asked."""

    index: VectorIndex
    calls: Counter[str] = field(default_factory=Counter)

    def search(self, query: IndexQuery, *, dense_limit: int, sparse_limit: int) -> list[Hit]:
        self.calls["index"] += 1
        return self.index.search(query, dense_limit=dense_limit, sparse_limit=sparse_limit)

    def score(self, seqs: Sequence[int], query: IndexQuery) -> list[Hit]:
        self.calls["index"] += 1
        return self.index.score(seqs, query)


@pytest.mark.parametrize("hops", [0, 1, 2, 3])
def test_a_search_asks_few_times_however_much_is_there(cube: Cube, hops: int) -> None:
    texts = [f"Day {n}: we watered the garden and the {n}th tree." for n in range(150)]
    cube.add(*texts, by="Ana", chain=True)
    counting = Counting(cube.index)
    retriever = Retriever(embedder=cube.embedder, index=counting, graph=cube)  # type: ignore[arg-type]
    scope = Scope((cube.cube_id,), None, NOW.timestamp())
    assert retriever.search("Which tree did Ana water?", scope=scope, hops=hops)
    assert counting.calls["index"] <= 2
    assert cube.calls["links"] <= hops
    assert all(cube.calls[name] == 1 for name in ("facts", "authors", "authored", "vectors"))
