"""Heads of prompts, and what a chat request may say about memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memos_vllm.api.error_table import error_response
from memos_vllm.engine.heads import (
    _MAX_HEADS,
    HeadCache,
    KnownHead,
    Prober,
    head_digest,
    is_usual,
    variant_key,
)
from memos_vllm.engine.options import (
    MemoryOptions,
    RememberMode,
    RememberOptions,
    RetrieveOptions,
    parse_cube_ids,
    parse_options,
)
from memos_vllm.engine.protocol import MemoryChatRequest
from memos_vllm.errors import InvalidRequest

HEAD = list(range(100, 140))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


class Template:
    """Renders the two probe chats; its opening can move, as one with a date does."""

    def __init__(self, opening: list[int] | None = None) -> None:
        self.opening = opening or [1]
        self.probes = 0

    async def probe(self) -> tuple[list[int], list[int]]:
        self.probes += 1
        return [*self.opening, *HEAD, 7, 8, 9], [*self.opening, *HEAD, 17, 18]

    def prompt(self, tail: int = 50) -> list[int]:
        return [*self.opening, *HEAD, tail, tail + 1]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def find(
    cache: HeadCache,
    key: str,
    prompt: list[int],
    probe: Prober,
    *,
    usual: bool,
    known: Sequence[KnownHead] = (),
) -> tuple[int, bool]:
    async def heads() -> Sequence[KnownHead]:
        return known

    return await cache.find(key, prompt, probe, usual=usual, known=heads)


def request(**fields: Any) -> MemoryChatRequest:
    return MemoryChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    )


async def test_a_head_is_probed_once_and_found_in_every_prompt() -> None:
    template, cache = Template(), HeadCache(clock=Clock())
    for tail in range(5):
        assert await find(cache, "k", template.prompt(tail), template.probe, usual=True) == (
            41,
            True,
        )
    assert (template.probes, cache.misses) == (1, 0)


async def test_variants_have_heads_of_their_own() -> None:
    one, other, cache = Template([1]), Template([2, 3]), HeadCache(clock=Clock())
    assert await find(cache, "a", one.prompt(), one.probe, usual=True) == (41, True)
    assert await find(cache, "b", other.prompt(), other.probe, usual=True) == (42, True)
    assert await find(cache, "a", one.prompt(), one.probe, usual=True) == (41, True)
    assert (one.probes, other.probes) == (1, 1)


async def test_an_unusual_head_goes_to_the_store_from_its_second_use_on() -> None:
    template, cache = Template(), HeadCache(clock=Clock())
    saves = [
        (await find(cache, "k", template.prompt(), template.probe, usual=False))[1] for _ in "abc"
    ]
    assert saves == [False, True, True]


async def test_a_date_that_changes_is_found_again_after_a_while() -> None:
    template, clock = Template([1, 20]), Clock()
    missed: list[int] = []
    cache = HeadCache(clock=clock, on_miss=lambda: missed.append(1))
    await find(cache, "k", template.prompt(), template.probe, usual=True)
    template.opening = [1, 21]
    # What is still common counts as memory, and is not kept in the store.
    assert await find(cache, "k", template.prompt(), template.probe, usual=True) == (1, False)
    assert (template.probes, cache.misses, len(missed)) == (1, 1, 1)
    clock.now += 61.0
    assert await find(cache, "k", template.prompt(), template.probe, usual=True) == (42, True)
    assert (template.probes, cache.misses) == (2, 1)


async def test_a_template_that_never_repeats_itself_is_not_probed_with_every_request() -> None:
    template, clock = Template(), Clock()
    cache = HeadCache(clock=clock)
    for second in range(600):
        clock.now = float(second)
        template.opening = [1, second]
        found, saves = await find(cache, "k", template.prompt(), template.probe, usual=True)
        assert found in {1, 42}
        assert saves is (found == 42)
    assert template.probes <= 10


async def test_the_cache_of_heads_is_bounded_and_drops_the_one_unused_longest() -> None:
    template, cache = Template(), HeadCache(clock=Clock())
    await find(cache, "first", template.prompt(), template.probe, usual=True)
    for index in range(_MAX_HEADS + 10):
        await find(cache, str(index), template.prompt(), template.probe, usual=True)
        await find(cache, "first", template.prompt(), template.probe, usual=True)
    assert len(cache._heads) == _MAX_HEADS
    assert template.probes == 1 + _MAX_HEADS + 10


async def test_a_prompt_shorter_than_its_head_is_a_miss() -> None:
    template, cache = Template(), HeadCache(clock=Clock())
    await find(cache, "k", template.prompt(), template.probe, usual=True)
    assert await find(cache, "k", template.prompt()[:9], template.probe, usual=True) == (9, False)


async def test_a_head_that_an_artifact_was_made_of_needs_no_probe() -> None:
    template, cache = Template(), HeadCache(clock=Clock())
    prompt = template.prompt()
    known = [(41, head_digest(prompt[:41])), (20, head_digest(prompt[:20])), (9, head_digest([5]))]
    assert await find(cache, "k", prompt, template.probe, usual=True, known=known) == (41, True)
    assert template.probes == 0


async def test_heads_that_do_not_open_the_prompt_or_fill_it_are_not_taken() -> None:
    template, cache = Template(), HeadCache(clock=Clock())
    prompt = template.prompt()
    known = [(41, head_digest(HEAD)), (len(prompt), head_digest(prompt)), (10**6, "0"), (0, "0")]
    assert await find(cache, "k", prompt, template.probe, usual=True, known=known) == (41, True)
    assert template.probes == 1


async def test_a_probe_that_fails_leaves_nothing_behind() -> None:
    async def failing() -> tuple[list[int], list[int]]:
        raise InvalidRequest("the template refuses")

    template, cache = Template(), HeadCache(clock=Clock())
    with pytest.raises(InvalidRequest):
        await find(cache, "k", template.prompt(), failing, usual=True)
    assert await find(cache, "k", template.prompt(), template.probe, usual=True) == (41, True)


def test_the_key_of_a_variant_follows_what_templates_see_and_nothing_else() -> None:
    plain = variant_key("block", request())
    same = [request(temperature=0.3), request(messages=[{"role": "user", "content": "y"}])]
    assert {variant_key("block", other) for other in same} == {plain}
    different = [
        variant_key("other block", request()),
        variant_key("block", request(tools=[TOOL])),
        variant_key("block", request(tools=[TOOL], tool_choice="required")),
        variant_key("block", request(chat_template_kwargs={"enable_thinking": False})),
        variant_key("block", request(chat_template_kwargs={"enable_thinking": True})),
        variant_key("block", request(reasoning_effort="high")),
        variant_key("block", request(documents=[{"title": "t"}])),
        variant_key("block", request(add_special_tokens=True)),
    ]
    assert len({plain, *different}) == 1 + len(different)


def test_a_plain_chat_is_usual_and_one_with_template_options_is_not() -> None:
    assert is_usual(request())
    assert is_usual(request(temperature=1.0, max_tokens=3, stream=True, tool_choice="none"))
    assert not is_usual(request(tools=[TOOL]))
    assert not is_usual(request(chat_template_kwargs={"enable_thinking": False}))
    assert not is_usual(request(documents=[{"title": "t"}]))


# --- memcube_id and its alias ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("memcube_id", "alias", "ids"),
    [
        ("a", None, ["a"]),
        (None, "a", ["a"]),
        ("a", "a", ["a"]),
        (["a"], None, ["a"]),
        (["b", "a", "b"], None, ["b", "a"]),
        (["a", "b"], ["a", "b"], ["a", "b"]),
        ([str(index) for index in range(8)], None, [str(index) for index in range(8)]),
    ],
)
def test_cubes_are_named_by_a_string_or_a_list(memcube_id: Any, alias: Any, ids: list[str]) -> None:
    assert parse_cube_ids(memcube_id, alias) == ids


@pytest.mark.parametrize(
    ("memcube_id", "alias", "message"),
    [
        (None, None, "needs memcube_id"),
        ("a", "b", "different cubes"),
        (["a"], "a", "different cubes"),
        ([], None, "names 0 cubes"),
        (["a"] * 9, None, "names 9 cubes; send 1 to 8"),
        (7, None, "not int"),
        (True, None, "not bool"),
        (1.5, None, "not float"),
        ({"id": "a"}, None, "not dict"),
        ([["a"]], None, "not list"),
        (["a", None], None, "not list"),
        (["a", 3], None, "not list"),
        ("", None, ""),
        ("a/b", None, ""),
        ("../a", None, ""),
        ("A", None, ""),
        (".a", None, ""),
        ("a\n", None, ""),
        ("a" * 65, None, ""),
        ("\ud800", None, ""),
        ("é", None, ""),
        (["a", ""], None, ""),
    ],
)
def test_other_ways_to_name_cubes_are_refused(memcube_id: Any, alias: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message or None) as caught:
        parse_cube_ids(memcube_id, alias)
    assert error_response(caught.value).status_code == 400


# --- the memos object -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (None, MemoryOptions()),
        ({}, MemoryOptions()),
        ({"activation": False}, MemoryOptions(activation=False)),
        ({"session_id": "call-17"}, MemoryOptions(session_id="call-17")),
        ({"session_id": None, "retrieve": None}, MemoryOptions()),
        ({"retrieve": False, "adapter": True, "remember": False}, MemoryOptions(retrieve=None)),
        (
            {"retrieve": {"top_k": 5, "max_tokens": 800}},
            MemoryOptions(retrieve=RetrieveOptions(top_k=5, max_tokens=800)),
        ),
        ({"retrieve": {}}, MemoryOptions(retrieve=RetrieveOptions())),
        ({"remember": True}, MemoryOptions(remember=RememberOptions())),
        (
            {"remember": {"mode": "fine"}},
            MemoryOptions(remember=RememberOptions(RememberMode.FINE)),
        ),
    ],
)
def test_the_memos_object_is_read(value: Any, options: MemoryOptions) -> None:
    assert parse_options(value) == options


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "memos"),
        ("yes", "memos"),
        (True, "memos"),
        (0, "memos"),
        ({"colour": 1}, "memos.colour"),
        ({"activation": 1}, "memos.activation"),
        ({"activation": "true"}, "memos.activation"),
        ({"activation": None}, "memos.activation"),
        ({"adapter": "name"}, "memos.adapter"),
        ({"remember": 0}, "memos.remember"),
        ({"remember": "fine"}, "memos.remember"),
        ({"remember": {"mode": "slow"}}, "memos.remember.mode"),
        ({"remember": {"mode": ["fine"]}}, "memos.remember.mode"),
        ({"retrieve": True}, "memos.retrieve"),
        ({"retrieve": []}, "memos.retrieve"),
        ({"retrieve": {"k": 1}}, "memos.retrieve"),
        ({"retrieve": {"top_k": 0}}, "memos.retrieve.top_k"),
        ({"retrieve": {"top_k": True}}, "memos.retrieve.top_k"),
        ({"retrieve": {"top_k": 1.0}}, "memos.retrieve.top_k"),
        ({"retrieve": {"top_k": 1001}}, "memos.retrieve.top_k"),
        ({"retrieve": {"max_tokens": -1}}, "memos.retrieve.max_tokens"),
        ({"retrieve": {"max_tokens": 10**30}}, "memos.retrieve.max_tokens"),
        ({"session_id": ""}, "memos.session_id"),
        ({"session_id": 7}, "memos.session_id"),
        ({"session_id": "x" * 257}, "memos.session_id"),
        ({"session_id": ["a"]}, "memos.session_id"),
    ],
)
def test_what_the_memos_object_cannot_mean_is_refused_by_name(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_options(value)
    assert caught.value.param == param
    assert error_response(caught.value).status_code == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(first=json_values, second=json_values)
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused_as_the_callers_doing(first: Any, second: Any) -> None:
    for parse in (lambda: parse_cube_ids(first, second), lambda: parse_options(first)):
        status = 200
        try:
            parse()
        except InvalidRequest as error:
            status = error_response(error).status_code
        assert status in {200, 400}
