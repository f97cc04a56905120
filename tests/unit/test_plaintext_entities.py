"""What memories mention, who said them, and whom a query names."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_vllm.domain.finding import AUTHOR_PREFIX
from memos_vllm.plaintext.entities import MAX_ENTITIES, entities_of
from memos_vllm.plaintext.names import (
    MAX_CANDIDATES,
    MAX_NAME_WORDS,
    author_and_text,
    author_names,
    named_in,
)


def mentioned(text: str, author: str | None = None) -> list[str]:
    return [key for key in entities_of(text, author=author) if not key.startswith(AUTHOR_PREFIX)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("We flew to Lisbon in spring.", "the lisbon tram was late"),
        ("Invoice 48213 is still open", "did anyone pay 48213?"),
        ("my neighbour repairs accordions", "An accordion costs a fortune"),
        ("Er spielt Akkordeon", "das akkordeon ist rot"),
        ("昨日ラーメンを食べた", "ラーメンが好き"),
        ("Мы были в Самарканде", "о Самарканде"),
    ],
)
def test_memories_about_one_thing_share_a_key(one: str, other: str) -> None:
    assert set(mentioned(one)) & set(mentioned(other))


def test_a_name_within_a_sentence_comes_before_other_words() -> None:
    keys = mentioned("Yesterday an extraordinarily complicated journey brought us to Oslo at last.")
    assert keys[0] == "oslo"


def test_function_words_and_short_words_are_no_keys() -> None:
    assert mentioned("He is at it, so we do as they did.") == []
    assert mentioned("An ox, an ax: go!") == []


def test_a_word_in_katakana_and_a_run_of_characters_are_keys() -> None:
    assert set(mentioned("昨日ラーメンを食べた")) == {"ラーメン", "昨日"}


def test_what_stands_far_down_a_long_text_is_not_looked_at() -> None:
    assert mentioned("so " * 4000 + "Zanzibar") == []


def test_a_long_text_has_few_keys_and_keeps_the_names() -> None:
    words = " ".join(f"ordinary{'abcdefghij'[i % 10] * (i % 7 + 1)}" for i in range(500))
    keys = mentioned(f"{words} and then Zanzibar, {words}")
    assert len(keys) == MAX_ENTITIES
    assert keys[0] == "zanzibar"


def test_who_said_it_is_a_key_for_each_word_of_the_name() -> None:
    keys = entities_of("It rains.", author="Ana María de la Vega")
    assert [key for key in keys if key.startswith(AUTHOR_PREFIX)] == [
        "by:ana",
        "by:maria",
        "by:de",
        "by:la",
    ]


@given(st.text(max_size=400), st.none() | st.text(max_size=80))
def test_keys_are_few_short_different_and_always_the_same(text: str, author: str | None) -> None:
    keys = entities_of(text, author=author)
    assert keys == entities_of(text, author=author)
    assert len(keys) == len(set(keys)) <= MAX_ENTITIES + MAX_NAME_WORDS
    assert all(0 < len(key) <= 64 for key in keys)


def test_64_kib_cost_no_more_than_a_page() -> None:
    start = time.perf_counter()
    entities_of("wordy Nouns, " * 5000)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("author", "text", "said_by", "said"),
    [
        ("Ana", "Hello there", "Ana", "Hello there"),
        ("Ana", "Ana: Hello there", "Ana", "Hello there"),
        ("Ana", "Ben: Hello there", "Ana", "Ben: Hello there"),
        ("user", "Ben: Hello there", "Ben", "Hello there"),
        ("Assistant", "Hello there", None, "Hello there"),
        (None, "Ana Roth: Hello there", "Ana Roth", "Hello there"),
        (None, "小明：你好", "小明", "你好"),
        (None, "Ana: Hello\nBen: Hi", None, "Ana: Hello\nBen: Hi"),
        (None, "at 10:30 we met", None, "at 10:30 we met"),
        (None, "see https://example.org", None, "see https://example.org"),
        (None, "todo: water the plants", None, "todo: water the plants"),
        (None, "Ana: ", None, "Ana: "),
    ],
)
def test_who_said_a_text(author: str | None, text: str, said_by: str | None, said: str) -> None:
    assert author_and_text(author, text) == (said_by, said)


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool", "User"])
def test_a_role_is_no_name(role: str) -> None:
    assert author_names(role) == ()
    assert entities_of("Hello", author=role) == ("hello",)


def without(query: str, *authors: str) -> str:
    named = named_in(query)
    names = {name for author in authors for name in author_names(author)}
    return named.without(names & set(named.candidates))


@pytest.mark.parametrize(
    ("query", "left"),
    [
        ("What did Ana buy?", "What did buy?"),
        ("What is Ana's hobby?", "What is hobby?"),
        ("What is Ana\u2019s hobby?", "What is hobby?"),
        ("what did ana buy", "what did buy"),
        ("ANA bought what?", "bought what?"),
        ("Banana bread by Ana", "Banana bread by"),
        ("Where are Ana and Ben, said Ana?", "Where are and Ben, said ?"),
        ("Who is Roth?", "Who is ?"),
        ("Ana", "Ana"),
        ("What did Anna buy?", "What did Anna buy?"),
    ],
)
def test_a_named_author_is_taken_out_of_a_query(query: str, left: str) -> None:
    assert without(query, "Ana Roth") == left


def test_a_name_in_a_script_without_blanks_is_taken_out() -> None:
    assert without("小明买了什么", "小明") == "买了什么"


@pytest.mark.parametrize(
    "query",
    ["Where will Ana go?", "where will they go", "What will I and Ben do?", "Does Ana hope to go?"],
)
def test_a_word_in_lower_case_is_no_name_where_others_have_capitals(query: str) -> None:
    assert without(query, "Will Hope") == query


def test_of_many_words_that_may_be_names_the_first_are_looked_up() -> None:
    candidates = named_in(" ".join(f"Name{n}" for n in range(200))).candidates
    assert list(candidates) == [f"name{n}" for n in range(MAX_CANDIDATES)]


def test_a_name_that_is_also_a_function_word_counts_with_its_capital() -> None:
    assert without("What did Will buy in May?", "Will") == "What did buy in May?"


@given(st.text(max_size=300))
def test_any_query_has_few_candidates_and_loses_nothing_without_a_name(query: str) -> None:
    named = named_in(query)
    assert len(named.candidates) <= MAX_CANDIDATES
    assert named.without(()).split() == query.split()
    assert named.without(named.candidates) or not query.strip()
