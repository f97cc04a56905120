"""Text to terms, dates, and what of a memory is indexed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.domain.ids import CubeId, MemoryId, PrincipalId
from memos_vllm.domain.memory import Lineage, Memory, MemoryState, Source, Tier, Usage
from memos_vllm.plaintext.dates import date_terms, written
from memos_vllm.plaintext.document import MAX_PROSE_CHARS, indexed_text
from memos_vllm.plaintext.index.base import SparseVector
from memos_vllm.plaintext.terms import (
    MAX_QUERY_TERMS,
    STOP_WORDS,
    document_terms,
    query_terms,
    stem,
    terms_of,
)

NOW = datetime(2025, 6, 1, tzinfo=UTC)


def shared(one: str, other: str) -> set[str]:
    return set(terms_of(one)) & set(terms_of(other))


def weights(vector: SparseVector) -> dict[int, float]:
    return dict(zip(vector.indices.tolist(), vector.values.tolist(), strict=True))


def match(query: str, text: str) -> float:
    document = weights(document_terms(text))
    return sum(v * document.get(term, 0.0) for term, v in weights(query_terms(query)).items())


def memory(text: str, **fields: Any) -> Memory:
    values: dict[str, Any] = {
        "tags": (),
        "labels": (),
        "metadata": {},
        "source": Source(),
        "expires_at": None,
    }
    return Memory(
        id=MemoryId("mem_1"),
        cube_id=CubeId("cube"),
        text=text,
        state=MemoryState.ACTIVE,
        tier=Tier.PLAINTEXT,
        version=1,
        lineage=Lineage(),
        edges=(),
        created_by=PrincipalId("p"),
        created_at=NOW,
        updated_at=NOW,
        usage=Usage(),
        **(values | fields),
    )


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("painting", "She paints every evening"),
        ("Which CAFÉS are open?", "a small cafe by the river"),
        ("the dog's collar", "dogs wear collars"),
        ("It\u2019s Ana\u2019s bicycle", "Ana rides"),
        ("\uff21\uff42\uff43 code", "the code was abc"),
        ("retry_limit", "set retry limit to 3"),
        ("version 1,000.5", "1000.5 is the version"),
        ("東京タワー", "昨日、東京に行った"),
        ("Привет мир", "ПРИВЕТ всем"),
        ("कुत्ते को खाना", "मेरे कुत्ते सो रहे हैं"),
        ("김치찌개", "오늘 김치를 먹었다"),
        ("straße", "STRASSE"),
    ],
)
def test_a_word_meets_itself_in_another_form(query: str, text: str) -> None:
    assert shared(query, text)
    assert match(query, text) > 0


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("Where did she go and what was it?", "He is what they were, isn't it?"),
        ("дом", "дым"),
        ("कमल", "किताब"),
        ("犬", "猫"),
    ],
)
def test_texts_that_share_only_function_words_or_nothing_do_not_meet(query: str, text: str) -> None:
    assert not shared(query, text)


def test_a_word_with_vowel_signs_stays_one_term() -> None:
    assert list(terms_of("हिन्दी")) == ["हिन्दी"]


@pytest.mark.parametrize(
    "text",
    ["8 May 2023", "8th of May, 2023", "May 8, 2023", "may 8th 2023", "2023-05-08", "8 May. 2023"],
)
def test_a_day_has_the_same_terms_however_it_is_written(text: str) -> None:
    assert set(date_terms(text.lower())) == {"date:2023-05", "date:05-08", "date:2023-05-08"}


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("in december 2024", ["date:2024-12"]),
        ("on 3 june", ["date:06-03"]),
        ("2024-12", ["date:2024-12"]),
        ("may i go?", []),
        ("2024-13-01 and 2024-05-45", []),
        ("39 june", []),
        ("08/05/2023", []),
        ("555-2024-12-9999", []),
    ],
)
def test_what_a_date_leaves_out_gives_no_term(text: str, terms: list[str]) -> None:
    assert date_terms(text) == terms


def test_a_written_day_is_read_back() -> None:
    assert "date:2024-02-29" in date_terms(written(date(2024, 2, 29)).lower())


def test_a_longer_text_weighs_a_word_less_and_a_repeated_word_weighs_more() -> None:
    alone = match("bicycle", "a bicycle")
    assert match("bicycle", "a bicycle " + "among many other things " * 50) < alone
    assert alone < match("bicycle", "bicycle bicycle bicycle") < 3 * alone


def test_a_query_holds_counts_and_at_most_256_terms() -> None:
    assert sorted(query_terms("lamp lamp shade").values.tolist()) == [1.0, 2.0]
    long = query_terms(" ".join(f"lamp{i}" for i in range(1000)) + " shade" * 5)
    assert len(long.indices) == MAX_QUERY_TERMS
    assert long.values.max() == 5.0


@pytest.mark.parametrize("text", ["", "   ", "?!…", "the of and", "🙂"])
def test_a_text_without_terms_has_an_empty_vector(text: str) -> None:
    assert document_terms(text).indices.size == query_terms(text).indices.size == 0


def test_the_number_of_a_term_is_the_same_in_every_process() -> None:
    # Stored in indexes: a change here needs every memory indexed again.
    assert query_terms("bicycle").indices.tolist() == [2610799294]
    assert query_terms("東京").indices.tolist() == [1168149181]


@given(st.text(max_size=300))
def test_any_text_gives_finite_weights_and_no_term_twice(text: str) -> None:
    for vector in (document_terms(text), query_terms(text)):
        assert vector.indices.dtype == np.uint32
        assert vector.values.dtype == np.float32
        assert len(set(vector.indices.tolist())) == len(vector.indices) == len(vector.values)
        assert (vector.values > 0).all()
        assert np.isfinite(vector.values).all()


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_every_term_of_a_text_is_found_by_the_text_itself(text: str) -> None:
    assert set(query_terms(text).indices.tolist()) <= set(document_terms(text).indices.tolist())


@pytest.mark.parametrize("piece", ["x", "8 ", "may ", "a_", "'", "東", "1,", "e\u0301", "2024-"])
def test_64_kib_of_anything_take_no_longer_than_their_length(piece: str) -> None:
    text = (piece * 65536)[:65536]
    start = time.perf_counter()
    document_terms(text)
    assert time.perf_counter() - start < 2.0


@pytest.fixture
def hasty_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads take turns all the time, and no stem is remembered."""
    monkeypatch.setattr("memos_vllm.plaintext.terms.stem", stem.__wrapped__)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_do_not_disturb_each_other() -> None:
    text = "nationalities conditional paintings hopefulness gardening organizations " * 20
    alone = list(terms_of(text))
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(list(terms_of(text)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 8


def test_stop_words_are_in_the_form_that_texts_are_brought_to() -> None:
    assert all(word == word.lower().strip() for word in STOP_WORDS)


def test_the_author_is_a_term_and_is_not_embedded() -> None:
    text = indexed_text(memory("I planted a pear tree.", source=Source("turn", author="Ana Roth")))
    assert text.dense == "I planted a pear tree."
    assert shared(text.sparse, "roth")


def test_a_label_in_the_text_is_an_author_too() -> None:
    text = indexed_text(memory("Ana Roth: I planted a pear tree."))
    assert text.dense == "I planted a pear tree."
    assert shared(text.sparse, "roth")


def test_the_time_of_the_source_is_found_by_its_date() -> None:
    source = Source("turn", created_at=datetime(2024, 3, 9, 23, 0, tzinfo=UTC))
    text = indexed_text(memory("We moved house.", source=source))
    assert "date:2024-03-09" in shared(text.sparse, "on March 9th, 2024")
    assert "2024" not in text.dense


def test_a_chunk_is_read_under_its_title_and_headings() -> None:
    source = Source("chunk", title="Bread book", locator="page 12, Rye > Sourdough")
    text = indexed_text(memory("Feed it twice a day.", source=source, tags=("baking",)))
    assert text.dense == "Bread book. Rye > Sourdough\nFeed it twice a day."
    assert shared(text.sparse, "baking")


@pytest.mark.parametrize("locator", ["turn 7", "page 3", "p. 4-5", "Seite 12"])
def test_the_number_of_a_place_is_not_indexed(locator: str) -> None:
    text = indexed_text(memory("Feed it twice a day.", source=Source(locator=locator)))
    assert text.dense == text.sparse == "Feed it twice a day."


def test_metadata_counts_where_it_is_prose() -> None:
    metadata = {
        "role": "user",
        "session_id": "session 1",
        "n": 3,
        "pictures": [{"caption": "a grey cat on a wall", "id": "img-77"}],
        "title": "灰色の猫",
    }
    text = indexed_text(memory("Look!", metadata=metadata))
    assert text.dense == "Look! a grey cat on a wall 灰色の猫"
    assert text.sparse == text.dense


def test_long_metadata_does_not_drown_the_text() -> None:
    text = indexed_text(memory("Short.", metadata={"notes": "many words " * 500}))
    assert len(text.dense) <= len("Short. ") + MAX_PROSE_CHARS


@given(
    st.text(min_size=1, max_size=80).filter(str.strip),
    st.none() | st.text(min_size=1, max_size=20).filter(str.strip),
)
def test_what_is_embedded_is_never_blank(text: str, author: str | None) -> None:
    assert indexed_text(memory(text, source=Source(author=author))).dense.strip()
