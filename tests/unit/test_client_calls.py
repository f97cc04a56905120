"""The calls of MOS and AsyncMOS: what goes out, what comes back, and when they try again."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import client_fakes as fakes
import httpx
import pytest
from client_fakes import Script, reply

from memos_vllm import MOS, AsyncMOS
from memos_vllm.client import (
    ApiBadRequest,
    ApiConflict,
    ApiNotFound,
    ApiRateLimited,
    ApiStaleVersion,
    ApiTooLarge,
    ApiUnauthorized,
    ApiUnavailable,
    AsyncCube,
    Cube,
    JobFailed,
    JobTimeout,
    ReplyTimeout,
    ServerUnreachable,
    UnexpectedReply,
)
from memos_vllm.errors import ApiError, ConfigurationError, InvalidRequest

Connect = Callable[..., Any]


@pytest.fixture(params=["blocking", "awaited"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes a client of either kind over a script of answers."""
    if request.param == "blocking":
        yield fakes.client
        return
    loop = asyncio.new_event_loop()
    yield lambda script, **options: fakes.waited_client(script, loop, **options)
    loop.close()


def test_create_cube_sends_only_what_was_given_and_returns_a_handle(connect: Connect) -> None:
    script = Script(reply(201, fakes.cube_json("acme")))
    cube = connect(script).create_cube("acme", name="Acme")
    assert cube.id == "acme"
    assert script.paths == ["POST /v1/memcubes"]
    assert script.body() == {"id": "acme", "name": "Acme"}


def test_a_cube_is_read_into_a_typed_object_that_keeps_the_raw_answer(connect: Connect) -> None:
    info = connect(Script(reply(200, fakes.cube_json(later_field=1)))).get_cube("acme")
    assert (info.memories.active, info.memories.archived) == (2, 1)
    assert (info.activation.state, info.activation.resident_tokens) == ("ready", 512)
    assert info.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert info.raw["later_field"] == 1


def test_cubes_follows_the_cursor_to_the_last_page(connect: Connect) -> None:
    script = Script(
        reply(200, fakes.list_json(fakes.cube_json("a"), fakes.cube_json("b"), cursor="n/2=")),
        reply(200, fakes.list_json(fakes.cube_json("c"))),
    )
    assert [cube.id for cube in connect(script).cubes()] == ["a", "b", "c"]
    assert script.paths == [
        "GET /v1/memcubes?limit=200",
        "GET /v1/memcubes?limit=200&cursor=n%2F2%3D",
    ]


def test_a_limit_counts_items_over_all_pages(connect: Connect) -> None:
    script = Script(
        reply(200, fakes.list_json(fakes.memory_json("m1"), fakes.memory_json("m2"), cursor="x")),
        reply(200, fakes.list_json(fakes.memory_json("m3"), fakes.memory_json("m4"), cursor="y")),
    )
    found = list(connect(script).cube("acme").memories(tag="a&b", query="wie geht’s", limit=3))
    assert [memory.id for memory in found] == ["m1", "m2", "m3"]
    assert script.requests[0].url.params["q"] == "wie geht’s"
    assert script.requests[0].url.params["tag"] == "a&b"
    assert [request.url.params["limit"] for request in script.requests] == ["3", "1"]


def test_a_list_that_repeats_its_cursor_is_refused_rather_than_read_for_ever(
    connect: Connect,
) -> None:
    page = fakes.list_json(fakes.cube_json(), cursor="same")
    with pytest.raises(UnexpectedReply, match="never end"):
        list(connect(Script(reply(200, page), reply(200, page))).cubes())


def test_add_takes_texts_and_objects_and_fills_in_what_they_share(connect: Connect) -> None:
    script = Script(reply(201, fakes.list_json(fakes.memory_json("m1"), fakes.memory_json("m2"))))
    expires = datetime(2030, 1, 1, tzinfo=UTC)
    added = (
        connect(script)
        .cube("acme")
        .add(
            ["One.", {"text": "Two.", "tags": ["own"], "expires_at": expires}],
            tags=["shared"],
            source={"kind": "handbook"},
            reason="first filling",
        )
    )
    assert [memory.id for memory in added] == ["m1", "m2"]
    assert script.body() == {
        "memories": [
            {"tags": ["shared"], "source": {"kind": "handbook"}, "text": "One."},
            {
                "tags": ["own"],
                "source": {"kind": "handbook"},
                "text": "Two.",
                "expires_at": "2030-01-01T00:00:00Z",
            },
        ],
        "reason": "first filling",
    }


def test_add_of_one_text_returns_a_list_of_one(connect: Connect) -> None:
    script = Script(reply(201, fakes.list_json(fakes.memory_json())))
    (memory,) = connect(script).cube("acme").add("Refunds take five working days.")
    assert memory.text == "Refunds take five working days."
    assert memory.hits == 4


def test_an_update_sends_what_was_given_and_null_only_where_asked(connect: Connect) -> None:
    script = Script(reply(200, fakes.memory_json(version=2)), reply(200, fakes.memory_json()))
    cube = connect(script).cube("acme")
    assert cube.update_memory("mem_1", text="Six days.", version=1).version == 2
    assert script.body() == {"text": "Six days."}
    assert script.requests[0].headers["If-Match"] == "1"
    cube.update_memory("mem_1", expires_at=None)
    assert script.body() == {"expires_at": None}
    assert "If-Match" not in script.requests[1].headers


def test_the_life_of_a_memory_uses_the_routes_of_the_contract(connect: Connect) -> None:
    memory = fakes.memory_json()
    script = Script(
        reply(200, memory),
        reply(201, memory),
        reply(200, memory),
        reply(200, memory),
        reply(200, fakes.list_json({"version": 1}, {"version": 2})),
        reply(200, fakes.erased_json("mem_1")),
        reply(200, {"id": "acme", "deleted": True}),
    )
    mos = connect(script)
    cube = mos.cube("acme")
    cube.memory("mem_1")
    cube.merge(["mem_1", "mem_2"], text="Both.")
    cube.archive("mem_1")
    cube.restore("mem_1")
    assert [version["version"] for version in cube.history("mem_1")] == [1, 2]
    erased = cube.erase("mem_1")
    assert erased is not None
    assert (erased.id, erased.job_id, erased.derived) == ("mem_1", "job_1", ("mem_2",))
    assert mos.delete_cube("acme", version=7) is None
    assert script.paths == [
        "GET /v1/memcubes/acme/memories/mem_1",
        "POST /v1/memcubes/acme/merge",
        "POST /v1/memcubes/acme/memories/mem_1/archive",
        "POST /v1/memcubes/acme/memories/mem_1/restore",
        "GET /v1/memcubes/acme/memories/mem_1/history?limit=200",
        "DELETE /v1/memcubes/acme/memories/mem_1?erase=true",
        "DELETE /v1/memcubes/acme",
    ]
    assert script.requests[-1].headers["If-Match"] == "7"
    assert json.loads(script.requests[1].content) == {
        "memory_ids": ["mem_1", "mem_2"],
        "text": "Both.",
    }


def test_promote_waits_by_reading_the_job_until_it_has_ended(connect: Connect) -> None:
    script = Script(
        reply(202, fakes.job_json("queued")),
        reply(200, fakes.job_json("running")),
        reply(200, fakes.job_json("succeeded", progress=1)),
    )
    job = connect(script).cube("acme").promote("all", to="activation", wait=True)
    assert (job.state, job.progress) == ("succeeded", 1.0)
    assert script.paths == ["POST /v1/memcubes/acme/promote", *["GET /v1/jobs/job_1"] * 2]
    assert script.body(0) == {"to": "activation", "memory_ids": "all"}


def test_promote_without_wait_returns_the_queued_job(connect: Connect) -> None:
    script = Script(reply(202, fakes.job_json("queued")))
    job = connect(script).cube("acme").promote(["mem_1"], to="activation")
    assert job.state == "queued"
    assert script.body()["memory_ids"] == ["mem_1"]


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (fakes.job_json("failed", error="the store is full"), "failed: the store is full"),
        (fakes.job_json("cancelled"), "was cancelled"),
    ],
)
def test_a_waited_for_job_that_does_not_succeed_raises_with_the_reason(
    connect: Connect, ended: dict[str, object], says: str
) -> None:
    script = Script(reply(202, ended))
    with pytest.raises(JobFailed, match=says) as caught:
        connect(script).cube("acme").demote(wait=True)
    assert caught.value.job.id == "job_1"
    assert script.body() == {"from": "activation", "memory_ids": "all"}


def test_waiting_for_a_job_stops_at_the_deadline(connect: Connect) -> None:
    script = Script(*[reply(200, fakes.job_json("running")) for _ in range(50)])
    seen: list[str] = []
    with pytest.raises(JobTimeout, match=r"still running after 0\.05 s"):
        connect(script).wait_for_job(
            "job_1", timeout_seconds=0.05, on_progress=lambda job: seen.append(job.state)
        )
    assert len(seen) == len(script.requests) >= 2


def test_memory_ids_that_are_one_text_are_refused_before_they_are_sent(connect: Connect) -> None:
    with pytest.raises(InvalidRequest, match="list of memory ids"):
        connect(Script()).cube("acme").promote("mem_1", to="activation")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ApiBadRequest),
        (401, ApiUnauthorized),
        (403, ApiUnauthorized),
        (404, ApiNotFound),
        (409, ApiConflict),
        (412, ApiStaleVersion),
        (413, ApiTooLarge),
        (422, ApiBadRequest),
        (429, ApiRateLimited),
        (500, ApiError),
    ],
)
def test_each_status_has_its_error_with_the_servers_message(
    connect: Connect, status: int, kind: type[ApiError]
) -> None:
    body = fakes.error_json("the text is blank; give one", code="invalid", param="text")
    with pytest.raises(kind, match="the text is blank; give one") as caught:
        connect(Script(reply(status, body))).cube("acme").add("x")
    assert type(caught.value) is kind
    assert (caught.value.status_code, caught.value.code) == (status, "invalid")
    assert caught.value.param == "text"


def test_a_rate_limit_says_when_to_come_back(connect: Connect) -> None:
    with pytest.raises(ApiRateLimited) as caught:
        connect(Script(reply(429, fakes.error_json("slow down"), Retry_After="7"))).status()
    assert caught.value.retry_after_seconds == 7


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.ReadError("reset")])
def test_a_broken_connection_is_tried_again(connect: Connect, failure: Exception) -> None:
    script = Script(failure, failure, reply(200, fakes.cube_json()))
    assert connect(script).get_cube("acme").id == "acme"
    assert len(script.requests) == 3


def test_after_the_last_attempt_the_error_says_where_no_server_answers(connect: Connect) -> None:
    script = Script(*[httpx.ConnectError("refused") for _ in range(3)])
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:8000.*memos-vllm serve"):
        connect(script).get_cube("acme")
    assert script.paths == ["GET /v1/memcubes/acme"] * 3


def test_a_503_with_retry_after_is_waited_for(connect: Connect) -> None:
    busy = reply(503, fakes.error_json("starting"), Retry_After="0")
    script = Script(busy, reply(200, fakes.cube_json()))
    assert connect(script).get_cube("acme").id == "acme"


def test_a_503_that_asks_for_too_long_a_wait_is_raised_at_once(connect: Connect) -> None:
    script = Script(reply(503, fakes.error_json("the catalog is down"), Retry_After="60"))
    with pytest.raises(ApiUnavailable, match="the catalog is down") as caught:
        connect(script).get_cube("acme")
    assert caught.value.retry_after_seconds == 60
    assert len(script.requests) == 1


def test_a_repeated_post_carries_the_same_idempotency_key_and_another_call_another(
    connect: Connect,
) -> None:
    added = fakes.list_json(fakes.memory_json())
    script = Script(httpx.ReadError("reset"), reply(201, added), reply(201, added))
    cube = connect(script).cube("acme")
    cube.add("One.")
    cube.add("One.")
    keys = [request.headers["Idempotency-Key"] for request in script.requests]
    assert keys[0] == keys[1] != keys[2]


def test_calls_that_may_not_be_repeated_are_sent_once(connect: Connect) -> None:
    for call in (
        lambda mos: mos.cube("acme").update_memory("mem_1", text="x"),
        lambda mos: mos.chat("hello", model="m"),
    ):
        script = Script(httpx.ReadError("reset"))
        with pytest.raises(ServerUnreachable, match="broke"):
            call(connect(script))
        assert len(script.requests) == 1


def test_a_delete_whose_answer_was_lost_counts_as_done_when_nothing_is_left(
    connect: Connect,
) -> None:
    gone = reply(404, fakes.error_json("memcube 'acme' does not exist"))
    assert connect(Script(httpx.ReadError("reset"), gone)).delete_cube("acme") is None
    erasing = connect(Script(httpx.ReadError("reset"), gone))
    assert erasing.cube("acme").erase("mem_1") is None
    with pytest.raises(ApiNotFound):
        connect(Script(gone)).delete_cube("acme")


def test_a_late_answer_is_a_timeout_and_not_tried_again(connect: Connect) -> None:
    script = Script(httpx.ReadTimeout("slow"))
    with pytest.raises(ReplyTimeout, match="within 3 s"):
        connect(script, timeout=3).get_cube("acme")
    assert len(script.requests) == 1


def test_chat_has_its_own_longer_timeout(connect: Connect) -> None:
    script = Script(reply(200, fakes.chat_json()), reply(200, fakes.cube_json()))
    mos = connect(script, timeout=3, chat_timeout=300)
    mos.chat("hello", model="m")
    mos.get_cube("acme")
    waits = [request.extensions["timeout"]["read"] for request in script.requests]
    assert waits == [300, 3]


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, b"<html>welcome</html>"),
        reply(200, ["a", "list"]),
        reply(200, {"id": "acme"}),
        reply(200, fakes.cube_json(version="three")),
        reply(200, fakes.cube_json(created_at="yesterday")),
        reply(302, None, Location="/login"),
    ],
)
def test_an_answer_of_some_other_server_is_named_as_such(
    connect: Connect, answer: httpx.Response
) -> None:
    with pytest.raises(UnexpectedReply):
        connect(Script(answer)).get_cube("acme")


def test_a_server_without_memos_is_told_from_a_cube_that_does_not_exist(connect: Connect) -> None:
    with pytest.raises(ApiNotFound, match="is it a memos-vllm server"):
        connect(Script(reply(404, {"detail": "Not Found"}))).get_cube("acme")


def test_health_reads_a_503_as_an_answer(connect: Connect) -> None:
    parts = {"catalog": "ready", "engine": "loading weights"}
    body = {**fakes.error_json("not ready"), "status": "not_ready", "parts": parts}
    health = connect(Script(reply(503, body))).health()
    assert not health.ready
    assert health.parts == parts
    assert connect(Script(reply(200))).health().ready


def test_a_server_without_search_is_ready_and_degraded(connect: Connect) -> None:
    parts = {"catalog": "ready", "engine": "ready", "plaintext": "the index is down"}
    health = connect(Script(reply(200, {"status": "degraded", "parts": parts}))).health()
    assert (health.ready, health.degraded) == (True, True)
    assert health.parts["plaintext"] == "the index is down"
    assert not connect(Script(reply(200))).health().degraded


def test_ids_are_quoted_so_that_they_cannot_name_another_route(connect: Connect) -> None:
    script = Script(*[reply(404, fakes.error_json("no"))] * 2)
    mos = connect(script)
    for cube_id in ("a/../b", "a?x=1#y"):
        with pytest.raises(ApiNotFound):
            mos.get_cube(cube_id)
    assert script.paths == ["GET /v1/memcubes/a%2F..%2Fb", "GET /v1/memcubes/a%3Fx%3D1%23y"]
    for empty in ("", ".", ".."):
        with pytest.raises(InvalidRequest, match="not a cube id"):
            mos.delete_cube(empty)


@pytest.mark.parametrize("value", [float("nan"), object(), "\ud800"])
def test_what_has_no_json_form_is_refused_before_it_is_sent(
    connect: Connect, value: object
) -> None:
    with pytest.raises(InvalidRequest):
        connect(Script()).cube("acme").add("x", metadata={"field": value})


def test_a_time_without_a_zone_is_refused(connect: Connect) -> None:
    with pytest.raises(InvalidRequest, match="time zone"):
        connect(Script()).cube("acme").add("x", expires_at=datetime(2030, 1, 1))


def test_the_key_goes_into_the_header_and_into_no_message(connect: Connect) -> None:
    script = Script(reply(401, fakes.error_json("unknown key")))
    mos = connect(script, api_key="secret-key")
    with pytest.raises(ApiUnauthorized) as caught:
        mos.status()
    assert script.requests[0].headers["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in f"{caught.value} {mos!r}"


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel"])
def test_a_key_that_cannot_travel_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(ConfigurationError, match="copied whole") as caught:
        MOS(fakes.URL, key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://me:pw@host", "http://h:99999999"]
)
def test_an_address_that_names_no_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        MOS(url)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_openai_style_address_works_too(suffix: str) -> None:
    script = Script(reply(200, fakes.cube_json()))
    mos = MOS(f"http://host/memory{suffix}", transport=httpx.MockTransport(script))
    mos.get_cube("acme")
    assert str(script.requests[0].url) == "http://host/memory/v1/memcubes/acme"


def test_a_proxy_from_the_environment_is_not_asked_for_this_machines_own_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    assert MOS("http://127.0.0.1:8000")._http._mounts == {}
    assert MOS("http://memory.example")._http._mounts != {}


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    for blocking, awaited in ((MOS, AsyncMOS), (Cube, AsyncCube)):
        names = {name for name in dir(blocking) if not name.startswith("_")} - {"close"}
        assert names == {name for name in dir(awaited) if not name.startswith("_")} - {"aclose"}
        for name in names:
            left, right = getattr(blocking, name), getattr(awaited, name)
            assert list(inspect.signature(left).parameters) == list(
                inspect.signature(right).parameters
            )
            assert inspect.getdoc(left), f"{name} says nothing about itself"


def test_closing_either_client_closes_its_connections() -> None:
    with MOS(fakes.URL) as mos:
        pass
    assert mos._http.is_closed

    async def use() -> AsyncMOS:
        async with AsyncMOS(fakes.URL) as waited:
            return waited

    assert asyncio.run(use())._http.is_closed
