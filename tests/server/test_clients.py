"""The openai client, curl, our Python clients and our command line, all against one server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from cube_kit import QUESTION, ask, chat_body, fresh_id, make_cube, notes_of, text_of

from memos_vllm import MOS, AsyncMOS
from memos_vllm.process import ServerProcess

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def cube(server: ServerProcess) -> Iterator[str]:
    with httpx.Client(base_url=server.url, timeout=180.0, trust_env=False) as client:
        yield make_cube(client, "clients")[0]


@pytest.fixture
def expected(http: httpx.Client, cube: str) -> str:
    """What every client must be told.

    In bfloat16 an answer may depend on how much was cached, so all of it is before anyone asks.
    """
    ask(http, cube)
    return text_of(ask(http, cube))


def test_the_openai_client_chats_with_a_cube(
    server: ServerProcess, cube: str, expected: str
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        reply = client.chat.completions.create(
            model="smol", messages=MESSAGES, **GREEDY, extra_body={"memcube_id": cube}
        )
        memos: Any = reply.model_extra["memos"] if reply.model_extra else None

    assert reply.choices[0].message.content == expected
    assert memos["activation"]["source"] == "resident"


def test_the_openai_client_streams_and_finds_memos_at_the_end(
    server: ServerProcess, cube: str, expected: str
) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks = list(
                client.chat.completions.create(
                    model="smol",
                    messages=MESSAGES,
                    stream=True,
                    **GREEDY,
                    **options,
                    extra_body={"memcube_id": [cube]},
                )
            )
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == expected
            memos: Any = (chunks[-1].model_extra or {})["memos"]
            assert memos["cubes"][0]["id"] == cube


async def test_the_async_openai_client_chats_and_streams(
    server: ServerProcess, cube: str, expected: str
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        reply = await client.chat.completions.create(
            model="smol", messages=MESSAGES, **GREEDY, extra_body={"memcube_id": cube}
        )
        stream: Any = await client.chat.completions.create(
            model="smol", messages=MESSAGES, stream=True, **GREEDY, extra_body={"memcube_id": cube}
        )
        chunks = [chunk async for chunk in stream]

    assert reply.choices[0].message.content == expected
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].model_extra["memos"]["activation"]["source"] == "resident"


def test_the_openai_client_shows_our_errors_as_its_own(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(
                model="smol", messages=MESSAGES, extra_body={"memcube_id": "nobody"}
            )
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(
                model="smol", messages=MESSAGES, extra_body={"memcube_id": []}
            )

    assert missing.value.code == "not_found"
    assert wrong.value.param == "memcube_id"


def test_curl_chats_with_a_cube(server: ServerProcess, cube: str, expected: str) -> None:
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "--noproxy", "*"),
            f"{server.url}/v1/chat/completions",
            *("-H", "Content-Type: application/json"),
            *("-d", json.dumps(chat_body(cube))),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert text_of(json.loads(done.stdout)) == expected


def test_mos_makes_fills_promotes_and_asks_a_cube(server: ServerProcess) -> None:
    cube_id = fresh_id("mos")
    with MOS(server.url) as mos:
        cube = mos.create_cube(cube_id, name="Desks")
        added = cube.add(notes_of(cube_id, "red", "green"), tags=["desk"])
        cube.promote("all", to="activation", wait=True)
        cube.chat(MESSAGES, options=GREEDY)
        reply = cube.chat(MESSAGES, options=GREEDY)
        with cube.chat_stream(MESSAGES, options=GREEDY) as stream:
            streamed = "".join(stream)
        assert reply.memos is not None
        assert stream.memos is not None
        assert reply.memos.activation.source == "resident"
        assert stream.memos.activation.source == "resident"
        assert streamed == reply.text
        assert cube.info().tiers.activation == len(added) == 2
        cube.delete()


async def test_async_mos_does_the_same(server: ServerProcess) -> None:
    cube_id = fresh_id("amos")
    async with AsyncMOS(server.url) as mos:
        cube = await mos.create_cube(cube_id)
        await cube.add(notes_of(cube_id, "red", "green"))
        await cube.promote("all", to="activation", wait=True)
        await cube.chat(MESSAGES, options=GREEDY)
        reply = await cube.chat(MESSAGES, options=GREEDY)
        stream = cube.chat_stream(MESSAGES, options=GREEDY)
        streamed = "".join([delta async for delta in stream])
        assert reply.memos is not None
        assert stream.memos is not None
        assert streamed == reply.text
        assert stream.memos.activation.source == "resident"
        await cube.delete()


def test_the_command_line_makes_fills_promotes_and_asks_a_cube(server: ServerProcess) -> None:
    cube_id = fresh_id("cli")
    red, green = notes_of(cube_id, "red", "green")

    assert command_line(server, "cube", "create", cube_id).strip() == cube_id
    command_line(server, "memory", "add", cube_id, "--text", red, "--text", green)
    promoted = command_line(server, "cube", "promote", cube_id)
    chat = ("chat", cube_id, QUESTION, "--max-tokens", "4", "--temperature", "0")
    command_line(server, *chat)
    answer = command_line(server, *chat)
    raw = command_line(server, *chat, "--json")
    shown = json.loads(command_line(server, "cube", "show", cube_id, "--json"))

    assert f"{cube_id}: activation ready" in promoted
    assert "source resident" in answer
    assert answer.startswith(text_of(json.loads(raw)))
    assert shown["activation"]["resident_tokens"] > 0
    unknown = command_line(server, "chat", "nobody", "Hi", status=1)
    assert unknown.strip() == "error: memcube 'nobody' does not exist"


def command_line(server: ServerProcess, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "memos_vllm.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "MEMOS_URL": server.url},
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr
