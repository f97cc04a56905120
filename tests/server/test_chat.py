"""Chats with a cube on a real server: what goes in, what comes back, where `memos` stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cube_kit import (
    BLOCK_TOKENS,
    activation,
    ask,
    chat_body,
    drop_prefix_cache,
    fresh_id,
    make_cube,
    metric,
    move,
    notes_of,
    plainly_cached,
    promote_all,
    prompt_of,
    stream,
    text_of,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "open_desk",
            "description": "Open a desk.",
            "parameters": {"type": "object", "properties": {"color": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def cube(server: Any) -> Iterator[str]:
    """A promoted cube for the tests that only read; its KV is resident."""
    with httpx.Client(base_url=server.url, timeout=180.0, trust_env=False) as client:
        cube_id, _ = make_cube(client, "chat")
        # In bfloat16 an answer may depend on how much was cached; from here on, all of it.
        ask(client, cube_id)
        yield cube_id


# --- naming cubes --------------------------------------------------------------------------


def test_a_cube_is_named_by_a_string_a_list_or_the_alias(http: httpx.Client, cube: str) -> None:
    by_string = ask(http, cube)
    by_list = ask(http, [cube])
    by_alias = ask(http, None, mem_cube_id=cube)
    repeated = ask(http, [cube, cube])

    for reply in (by_string, by_list, by_alias, repeated):
        assert [named["id"] for named in reply["memos"]["cubes"]] == [cube]
        assert activation(reply)["tokens"] == activation(by_string)["tokens"] > BLOCK_TOKENS
        assert text_of(reply) == text_of(by_string)


def test_the_memos_object_has_the_fields_of_the_contract(http: httpx.Client, cube: str) -> None:
    version = http.get(f"/v1/memcubes/{cube}").json()["version"]

    memos = ask(http, cube)["memos"]

    assert set(memos) == {"cubes", "activation", "retrieved", "adapter"}
    assert memos["cubes"] == [{"id": cube, "version": version}]
    assert set(memos["activation"]) == {"tokens", "cached_tokens", "source"}
    assert (memos["retrieved"], memos["adapter"]) == ([], None)


def test_a_cube_without_activation_memory_answers_with_source_none(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "plaintext", promote=False)

    unsearched = {"retrieve": False}

    for reply in (ask(http, cube_id), ask(http, cube_id, memos=unsearched)):
        assert activation(reply) == {"tokens": 0, "cached_tokens": 0, "source": "none"}
    assert "desk number" not in prompt_of(http, cube_id, memos=unsearched)


def test_activation_false_leaves_nothing_in_the_cache(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "off")
    off = {"activation": False}

    first = ask(http, cube_id, memos=off)
    second = ask(http, cube_id, memos=off)

    for reply in (first, second):
        assert activation(reply)["source"] == "none"
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# --- where the KV came from ----------------------------------------------------------------


def test_baked_memory_is_resident_and_otherwise_loaded_from_the_store(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "life")
    other, _ = make_cube(http, "other", promote=False)

    baked = ask(http, cube_id)
    # A list of cubes has a salt of its own, so it shares the artifact and not the blocks.
    in_a_list = ask(http, [cube_id, other])
    drop_prefix_cache(http)
    loaded = ask(http, cube_id)
    resident = ask(http, cube_id)

    assert activation(baked)["source"] == "resident"
    assert activation(in_a_list)["source"] == "store"
    assert activation(loaded)["source"] == "store"
    assert activation(resident)["source"] == "resident"
    whole_blocks = activation(loaded)["tokens"] // BLOCK_TOKENS * BLOCK_TOKENS
    assert activation(loaded)["cached_tokens"] == whole_blocks
    # With the same blocks cached the answers are the same, wherever these came from.
    assert activation(baked)["cached_tokens"] == whole_blocks
    assert text_of(baked) == text_of(loaded)


def test_a_chat_that_comes_before_the_bake_still_has_the_memory(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "hasty", promote=False)
    move(http, cube_id, "promote", to="activation", memory_ids="all")

    early = ask(http, cube_id, return_token_ids=True)
    promote_all(http, cube_id)
    late = ask(http, cube_id, return_token_ids=True)

    assert early["prompt_token_ids"] == late["prompt_token_ids"]
    assert activation(early)["tokens"] == activation(late)["tokens"] > BLOCK_TOKENS
    assert activation(early)["source"] in {"computed", "resident", "store"}
    assert activation(late)["source"] == "resident"


def test_cached_tokens_agree_with_what_vllm_counts(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "count")
    drop_prefix_cache(http)

    loaded = ask(http, cube_id)
    resident = ask(http, cube_id, question="Where is the red desk?")

    for reply, source in ((loaded, "store"), (resident, "resident")):
        used = activation(reply)
        assert used["source"] == source
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        # Whole blocks, of which the last one may also hold tokens that are not memory.
        assert used["cached_tokens"] == min(cached, used["tokens"])
        assert cached % BLOCK_TOKENS == 0 < cached


def test_what_the_connector_did_is_counted_in_the_metrics(http: httpx.Client, cube: str) -> None:
    def resident() -> float:
        return metric(http, "memos_requests_total", kind="resident")

    # An earlier test may have dropped the prefix cache.
    ask(http, cube)
    before = resident()
    ask(http, cube)
    ask(http)

    assert resident() == before + 1


def test_what_a_chat_waited_for_the_control_plane_is_measured(
    http: httpx.Client, cube: str
) -> None:
    def waits() -> float:
        return metric(http, "memos_chat_wait_seconds_count", part="rights")

    before = waits()
    ask(http, cube)
    ask(http)
    assert waits() == before + 1


# --- streams -------------------------------------------------------------------------------


def test_a_stream_without_usage_ends_with_a_chunk_of_its_own(http: httpx.Client, cube: str) -> None:
    *chunks, last = stream(http, cube)

    assert last["choices"] == []
    assert activation(last)["source"] == "resident"
    assert "usage" not in last
    assert {last["id"], last["model"]} == {chunks[0]["id"], chunks[0]["model"]}
    assert not any("memos" in chunk for chunk in chunks)
    assert streamed_text(chunks) == text_of(ask(http, cube))


def test_a_stream_with_usage_carries_memos_on_the_usage_chunk(
    http: httpx.Client, cube: str
) -> None:
    *chunks, last = stream(http, cube, stream_options={"include_usage": True})

    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert activation(last)["source"] == "resident"
    assert not any("memos" in chunk or chunk["choices"] == [] for chunk in chunks)


def test_a_stream_with_continuous_usage_carries_memos_once_at_the_end(
    http: httpx.Client, cube: str
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}

    *chunks, last = stream(http, cube, stream_options=options)

    assert all(chunk["usage"] for chunk in chunks)
    assert last["usage"]["completion_tokens"] == 4
    assert activation(last)["source"] == "resident"
    assert not any("memos" in chunk for chunk in chunks)


# --- vLLM's own options keep working -------------------------------------------------------


def test_several_choices_share_the_memory(http: httpx.Client, cube: str) -> None:
    reply = ask(http, cube, n=3, temperature=1.0, seed=7)
    *chunks, last = stream(http, cube, n=2, temperature=1.0, seed=7)

    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert activation(reply)["source"] == "resident"
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
    assert activation(last)["source"] == "resident"


def test_logprobs_stop_and_one_token_work(http: httpx.Client, cube: str) -> None:
    reply = ask(http, cube, logprobs=True, top_logprobs=2, max_tokens=1)
    stopped = ask(http, cube, max_tokens=8, stop=[" "])

    (entry,) = reply["choices"][0]["logprobs"]["content"]
    assert len(entry["top_logprobs"]) == 2
    assert reply["usage"]["completion_tokens"] == 1
    assert activation(reply)["source"] == "resident"
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["stop_reason"] == " "
    assert " " not in text_of(stopped)


def test_prompt_logprobs_compute_every_token_and_say_so(http: httpx.Client, cube: str) -> None:
    reply = ask(http, cube, prompt_logprobs=1, max_tokens=1)

    assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]
    assert activation(reply)["source"] == "computed"
    assert activation(reply)["cached_tokens"] == 0


def test_token_ids_and_echo_show_the_memory_in_the_prompt(http: httpx.Client, cube: str) -> None:
    prompt = prompt_of(http, cube)
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The desk"}]
    echoed = ask(
        http,
        cube,
        messages=answered,
        echo=True,
        add_generation_prompt=False,
        continue_final_message=True,
    )

    assert f"The red of {cube} desk number 1 opens" in prompt
    assert prompt.index("[Note 1]") < prompt.index("[Note 3]") < prompt.index("When does")
    assert text_of(echoed).startswith("The desk")
    # vLLM asks for prompt logprobs to echo, and these want every token computed.
    assert activation(echoed)["source"] == "computed"


def test_a_callers_system_text_stays_and_so_does_the_models_default(
    http: httpx.Client, cube: str
) -> None:
    own = [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Hello"},
    ]

    assert "Answer in French." in prompt_of(http, cube, messages=own)
    assert "named SmolLM" in prompt_of(http, cube)
    assert "named SmolLM" not in prompt_of(http, cube, messages=own)


def test_structured_output_obeys_its_schema(http: httpx.Client, cube: str) -> None:
    schema = {
        "type": "object",
        "properties": {"open": {"type": "boolean"}},
        "required": ["open"],
        "additionalProperties": False,
    }
    reply = ask(
        http,
        cube,
        max_tokens=24,
        response_format={"type": "json_schema", "json_schema": {"name": "d", "schema": schema}},
    )

    assert re.fullmatch(r'\s*\{\s*"open"\s*:\s*(true|false)\s*\}\s*', text_of(reply))
    assert activation(reply)["source"] == "resident"


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_tools_work_beside_memory(http: httpx.Client, cube: str, choice: str) -> None:
    reply = ask(http, cube, tools=TOOLS, tool_choice=choice)

    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert activation(reply)["source"] == "resident"


@pytest.mark.parametrize("streamed", [False, True])
def test_beam_search_keeps_to_the_cubes_own_cache(http: httpx.Client, streamed: bool) -> None:
    cube_id, _ = make_cube(http, "beam")
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 2}
    if streamed:
        *chunks, last = stream(http, cube_id, stream_options={"include_usage": True}, **beams)
        choices = {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    else:
        last = ask(http, cube_id, **beams)
        choices = {choice["index"] for choice in last["choices"]}

    assert choices == {0, 1}
    assert activation(last)["source"] == "resident"
    tokens = ask(http, cube_id, return_token_ids=True, max_tokens=1)["prompt_token_ids"]
    assert plainly_cached(http, tokens) == 0


def test_a_plain_request_of_the_same_tokens_finds_nothing_of_a_cube(
    http: httpx.Client,
) -> None:
    cube_id, _ = make_cube(http, "private")
    tokens = ask(http, cube_id, return_token_ids=True, max_tokens=1)["prompt_token_ids"]

    assert plainly_cached(http, tokens) == 0
    # The question is fair: the same tokens are found once a plain request has computed them.
    assert plainly_cached(http, tokens) > 0


# --- without memory, nothing is different --------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"temperature": 0.9, "seed": 11, "logprobs": True, "top_logprobs": 1},
        {"memcube_id": None, "mem_cube_id": None, "memos": None},
        {"cache_salt": ""},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_plain_chat_is_what_vllms_own_route_answers(
    http: httpx.Client, options: dict[str, Any]
) -> None:
    """`/invocations` calls vLLM's own chat route, which ours replaces at its usual address."""
    headers = {"X-Request-Id": "same"}
    body = {**chat_body(question="Say yes."), **options}
    without_memory = {name: value for name, value in body.items() if "mem" not in name}

    ours = http.post("/v1/chat/completions", json=body, headers=headers)
    theirs = http.post("/invocations", json=without_memory, headers=headers)

    assert ours.status_code == theirs.status_code
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert _without_time(ours.text) == _without_time(theirs.text)


def test_a_callers_own_cache_salt_still_separates_caches(http: httpx.Client) -> None:
    text = " ".join(notes_of(fresh_id("salted"), "one", "two"))

    def cached(salt: str | None) -> int:
        extra = {} if salt is None else {"cache_salt": salt}
        usage = ask(http, None, question=text, max_tokens=1, **extra)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert (cached("mine"), cached("mine") > 0) == (0, True)
    assert (cached("yours"), cached(None)) == (0, 0)


def test_a_callers_cache_salt_does_not_reach_a_cube(http: httpx.Client) -> None:
    cube_id, _ = make_cube(http, "unsalted")

    reply = ask(http, cube_id, cache_salt="mine")

    assert activation(reply)["source"] == "resident"
    assert "mine" not in str(reply)


def test_the_model_list_shows_no_cube(http: httpx.Client, cube: str) -> None:
    listed = http.get("/v1/models").json()["data"]

    assert [model["id"] for model in listed] == ["smol"]
    assert cube not in str(listed)


def test_the_api_page_documents_every_route_with_an_example(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    ours = {
        (method, path): operation
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
        if path.startswith(("/v1/memcubes", "/v1/memos", "/v1/jobs", "/v1/audit"))
    }

    assert http.get("/docs").status_code == 200
    assert len(ours) >= 20
    for route, operation in ours.items():
        assert operation["summary"], route
        done = [code for code in operation["responses"] if code.startswith("2")]
        assert done, route
        for code in done:
            (content,) = operation["responses"][code]["content"].values()
            assert "example" in content or "examples" in content, (route, code)
    chat = described["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    fields = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    for field in ("memcube_id", "memos"):
        assert fields[field]["examples"], field


def streamed_text(chunks: list[dict[str, Any]]) -> str:
    deltas = (choice["delta"] for chunk in chunks for choice in chunk["choices"])
    return "".join(delta.get("content") or "" for delta in deltas)


def _without_time(text: str) -> str:
    return re.sub(r'"created":\s*\d+', '"created":0', text)
