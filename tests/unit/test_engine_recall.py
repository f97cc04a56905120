"""Which found memories go into a chat's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any, cast

import pytest

from memos_vllm.domain.access import LOCAL_ADMIN, Principal
from memos_vllm.domain.filters import HasTier
from memos_vllm.domain.ids import CubeId, MemoryId, PrincipalId
from memos_vllm.domain.indexing import IndexBacklog
from memos_vllm.domain.memory import Lineage, Memory, MemoryState, Source, Tier, Usage
from memos_vllm.domain.search import SearchHit, SearchQuery, SearchResult
from memos_vllm.engine.options import RetrieveOptions
from memos_vllm.engine.recall import Recall, Recalled, query_text, source_line, text_of
from memos_vllm.errors import ConfigurationError, InvalidRequest, MemosError, NotFound, Unavailable
from memos_vllm.plaintext.store import PlaintextStore

NOW = datetime(2025, 5, 8, tzinfo=UTC)
ASKED = [{"role": "user", "content": "When do I get my money back for the parcel?"}]
_ids = count(1)


def memory(text: str, *, source: Source | None = None, **fields: Any) -> Memory:
    values: dict[str, Any] = {
        "id": MemoryId(f"mem_{next(_ids)}"),
        "cube_id": CubeId("c"),
        "text": text,
        "tags": (),
        "labels": (),
        "metadata": {},
        "source": source or Source(),
        "state": MemoryState.ACTIVE,
        "tier": Tier.PLAINTEXT,
        "version": 1,
        "lineage": Lineage(),
        "edges": (),
        "created_by": PrincipalId("local"),
        "created_at": NOW,
        "updated_at": NOW,
        "expires_at": None,
        "usage": Usage(),
    }
    return Memory(**{**values, **fields})


def hit(found: Memory | str, score: float = 0.5) -> SearchHit:
    return SearchHit(memory(found) if isinstance(found, str) else found, score, {"sparse": score})


class FakeStore:
    """A search that answers the same to all, or fails; it notes what it was asked."""

    def __init__(self, *hits: SearchHit, failure: MemosError | None = None) -> None:
        self._hits = hits
        self._failure = failure
        self.asked: list[tuple[Principal, Sequence[str], SearchQuery, float]] = []

    def search(
        self,
        actor: Principal,
        cube_ids: Sequence[str],
        query: SearchQuery,
        *,
        catch_up_seconds: float,
    ) -> SearchResult:
        self.asked.append((actor, cube_ids, query, catch_up_seconds))
        if self._failure is not None:
            raise self._failure
        return SearchResult(self._hits, IndexBacklog(0, 0))


def words(text: str) -> int:
    return len(text.split())


async def recall(
    store: FakeStore,
    messages: Sequence[Any] = ASKED,
    options: RetrieveOptions | None = None,
    *,
    known: Sequence[str] = (),
    max_tokens: int = 1000,
) -> Recalled:
    return await Recall(cast("PlaintextStore", store), count_tokens=words).for_chat(
        LOCAL_ADMIN,
        ["c", "d"],
        messages,
        options or RetrieveOptions(),
        known_texts=known,
        max_tokens=max_tokens,
    )


def texts(found: Recalled) -> list[str]:
    return [item.text for item in found.memories]


async def test_the_question_is_searched_for_in_the_plaintext_tier_of_all_cubes() -> None:
    store = FakeStore(hit("one", 0.9), hit("two", 0.8))
    found = await recall(store, options=RetrieveOptions(top_k=3))
    assert texts(found) == ["one", "two"]
    assert [item.score for item in found.memories] == [0.9, 0.8]
    assert found.problem is None
    ((actor, cube_ids, query, wait_seconds),) = store.asked
    assert (actor, cube_ids) == (LOCAL_ADMIN, ["c", "d"])
    assert (query.text, query.top_k) == (ASKED[0]["content"], 3)
    assert query.where == HasTier((Tier.PLAINTEXT,))
    assert wait_seconds < 5


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "You help."}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": 7}],
        [{"role": "user"}],
        ["hello"],
        [{"role": "user", "content": "x" + " " * 5000}],
    ],
)
async def test_a_chat_that_asks_nothing_searches_for_nothing(messages: list[Any]) -> None:
    store = FakeStore(hit("one"))
    assert await recall(store, messages) == Recalled()
    assert store.asked == []


@pytest.mark.parametrize(
    "failure",
    [
        Unavailable("the index is down"),
        InvalidRequest("the embedder refuses this text"),
        ConfigurationError("the embedder made a vector of 3 dimensions"),
    ],
)
async def test_a_chat_goes_on_without_search_and_is_told_why(failure: MemosError) -> None:
    assert await recall(FakeStore(failure=failure)) == Recalled(problem=str(failure))


async def test_a_cube_that_is_gone_by_now_is_no_detail() -> None:
    with pytest.raises(NotFound):
        await recall(FakeStore(failure=NotFound("memcube", "c")))


async def test_what_matches_hardly_or_much_less_than_the_best_is_left_out() -> None:
    found = await recall(FakeStore(hit("one", 0.8), hit("two", 0.21), hit("three", 0.19)))
    assert texts(found) == ["one", "two"]
    assert texts(await recall(FakeStore(hit("one", 0.11), hit("two", 0.09)))) == ["one"]
    assert texts(await recall(FakeStore(hit("one", 0.09)))) == []


async def test_nothing_that_the_prefix_or_another_note_says_is_repeated() -> None:
    store = FakeStore(hit("Refunds take\nFIVE days."), hit("Two."), hit("  two.  "))
    assert texts(await recall(store, known=["refunds  take five days."])) == ["Two."]


async def test_what_was_promoted_meanwhile_is_left_to_the_prefix() -> None:
    store = FakeStore(hit(memory("one", tier=Tier.ACTIVATION)), hit("two"))
    assert texts(await recall(store)) == ["two"]


async def test_a_superseded_fact_is_left_out_beside_what_took_its_place() -> None:
    old = memory("Ada lives in Leeds.")
    new = memory("Ada lives in York.", lineage=Lineage(supersedes=(old.id,)))
    assert texts(await recall(FakeStore(hit(old, 0.9), hit(new, 0.8)))) == [new.text]
    assert texts(await recall(FakeStore(hit(old, 0.9)))) == [old.text]


async def test_notes_fit_into_the_token_budget_and_smaller_ones_fill_it() -> None:
    long, short = "word " * 30, "two words"
    store = FakeStore(hit(short, 0.9), hit(long, 0.8), hit("last one here", 0.7))
    found = await recall(store, max_tokens=20)
    assert texts(found) == [short, "last one here"]
    assert [item.tokens for item in found.memories] == [2 + 4, 3 + 4]
    assert sum(item.tokens for item in found.memories) <= 20
    # A request's own limit counts instead, whether it is smaller or larger.
    assert texts(await recall(store, options=RetrieveOptions(max_tokens=6))) == [short]
    everything = await recall(store, options=RetrieveOptions(max_tokens=99), max_tokens=1)
    assert len(everything.memories) == 3
    assert texts(await recall(store, max_tokens=0)) == []


async def test_tokens_are_counted_with_the_source_and_not_beyond_a_full_budget() -> None:
    counted: list[str] = []

    def count_tokens(text: str) -> int:
        counted.append(text)
        return 6

    source = Source(kind="chunk", title="Handbook", locator="page 7")
    store = FakeStore(hit(memory("one", source=source)), hit("two"), hit("three"))
    found = await Recall(cast("PlaintextStore", store), count_tokens=count_tokens).for_chat(
        LOCAL_ADMIN, ["c"], ASKED, RetrieveOptions(), known_texts=[], max_tokens=12
    )
    assert [(item.title, item.text) for item in found.memories] == [("Handbook, page 7", "one")]
    assert counted == ["Handbook, page 7\none"]


@pytest.mark.parametrize(
    ("said", "query"),
    [
        (["Where is my parcel, please, and when does it come?"], None),
        (["Where is it?"], "Where is it?"),
        (["Where is my parcel?", "And when?"], "Where is my parcel?\nAnd when?"),
        (["One two.", "And?", "So what?"], "And?\nSo what?"),
        (
            ["First.", "", "When will my refund reach my bank?"],
            "When will my refund reach my bank?",
        ),
        (["a\x00b"], "a b"),
    ],
)
def test_a_short_question_is_asked_together_with_the_one_before(
    said: list[str], query: str | None
) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You help."}]
    for text in said:
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "I see."},
        ]
    assert query_text(messages) == (said[-1] if query is None else query)


def test_of_a_very_long_message_the_end_is_searched_for() -> None:
    text = "word " * 5000 + "When is my refund due?"
    query = query_text([{"role": "user", "content": text}])
    assert text.endswith(query)
    assert len(query) == 4000


def test_text_parts_count_and_others_do_not() -> None:
    parts = [
        {"type": "text", "text": "One."},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": None},
        "stray",
        {"type": "text", "text": "Two."},
    ]
    assert text_of(parts) == "One.\nTwo."


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (Source(), ""),
        (Source(kind="chunk", title="Handbook", locator="page 7"), "Handbook, page 7"),
        (Source(kind="chunk", uri="a.md", locator="page 7"), "a.md, page 7"),
        (Source(kind="note", locator="page 7"), ""),
        (
            Source(kind="turn", author="Ada", created_at=NOW, locator="turn 3", uri="chat"),
            "Ada, 8 May 2025",
        ),
        (Source(author="Ada", created_at=datetime(1, 1, 1, tzinfo=UTC)), "Ada, 1 January 1"),
    ],
)
def test_a_source_is_one_line(source: Source, line: str) -> None:
    assert source_line(source) == line
