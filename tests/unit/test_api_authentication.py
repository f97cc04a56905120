"""Who gets in, as whom and how soon no longer; on every route, socket and spelling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import error_of
from fastapi import FastAPI
from keys_kit import Guarded, bearer, guarded
from starlette.testclient import TestClient, WebSocketDenialResponse

from memos_vllm.api import authentication
from memos_vllm.api.authentication import GRACE_SECONDS
from memos_vllm.api.middleware import MemosGuard
from memos_vllm.control.keys import LEASE_SECONDS
from memos_vllm.domain.keys import draw_key
from memos_vllm.errors import Unavailable

STRANGER = draw_key().token


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as opened:
        yield opened


# --- before and after the first key ----------------------------------------------------------


async def test_before_the_first_key_everyone_is_the_local_administrator(server: Guarded) -> None:
    assert await server.who() == "local"
    # Clients of plain vLLM have to send something.
    assert await server.who("EMPTY") == "local"
    assert await server.who(STRANGER, "EMPTY") == "local"
    assert (await server.get("/sleep")).status_code == 200


async def test_from_the_first_key_on_every_route_but_health_needs_one(server: Guarded) -> None:
    assert await server.who() == "local"
    key = server.key("ops")
    server.advance(LEASE_SECONDS)

    assert await server.who(key) == "ops"
    for path in ("/v1/memcubes", "/v1/models", "/metrics", "/docs", "/openapi.json", "/no/such"):
        error_of(await server.get(path), 401)
    assert (await server.get("/health")).status_code == 200


async def test_whoever_shows_a_key_is_looked_up_at_once(server: Guarded) -> None:
    assert await server.who() == "local"
    key = server.key("ops")
    assert await server.who(key) == "ops"
    assert await server.who() == "401"


async def test_the_server_stays_closed_whatever_the_catalog_says_later(server: Guarded) -> None:
    server.key("ops")
    assert await server.who() == "401"
    server.desk.sql("DELETE FROM api_keys")
    server.advance(10 * GRACE_SECONDS)
    assert await server.who() == "401"


async def test_a_server_whose_keys_are_all_revoked_is_closed(server: Guarded) -> None:
    key = server.key("ops", expires_at=server.desk.clock.now + timedelta(seconds=5))
    server.advance(60)
    assert await server.who() == "401"
    assert await server.who(key) == "401"


# --- one answer ------------------------------------------------------------------------------


async def test_missing_unknown_revoked_and_expired_keys_get_one_answer(server: Guarded) -> None:
    server.key("ops")
    expired = server.key("late", expires_at=server.desk.clock.now + timedelta(seconds=1))
    revoked = server.key("gone")
    server.desk.mos.revoke_key(authentication.LOCAL_ADMIN, revoked[:12])
    server.advance(5)

    replies = [await server.get("/v1/memcubes", *keys) for keys in ((), (STRANGER,))]
    replies += [await server.get("/v1/memcubes", key) for key in (expired, revoked)]

    assert len({(reply.status_code, reply.content) for reply in replies}) == 1
    error = error_of(replies[0], 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "Authorization: Bearer KEY" in error["message"]
    assert {reply.headers["WWW-Authenticate"] for reply in replies} == {"Bearer"}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic {key}",
        b"{key}",
        b"Bearer {key} {key}",
        b"Bearer {key}, Bearer {key}",
        b"Bearer\t{key}",
        b"Bearer {key}x",
        b"Bearer \xff{key}",
        b'Bearer "{key}"',
        b"Bearer {short}",
        b"Bearer " + b"A" * 100_000,
    ],
)
async def test_malformed_headers_are_refused(server: Guarded, header: bytes) -> None:
    key = server.key("ops").encode()
    sent = header.replace(b"{key}", key).replace(b"{short}", key[:-1])
    reply = await server.client.get("/v1/memcubes", headers=[(b"Authorization", sent)])
    error_of(reply, 401)
    assert await server.who(key.decode()) == "ops"


async def test_two_keys_are_refused_even_if_both_are_good(server: Guarded) -> None:
    key, other = server.key("ops"), server.key("alice")
    assert await server.who(key, other) == "401"
    assert await server.who(key, key) == "401"


async def test_the_scheme_is_read_in_any_case_and_the_key_is_not(server: Guarded) -> None:
    key = server.key("ops")
    for scheme, status in (("bearer", 200), ("BEARER", 200), ("Bearer ", 200)):
        header = [("authorization", f"{scheme} {key}")]
        reply = await server.client.get("/v1/principals/me", headers=header)
        assert reply.status_code == status
    assert await server.who(key.upper()) == "401"


SPELLINGS = (
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/V1/Models",
    "/v1/%6dodels",
    "/%2e%2e/v1/models",
    "/health/",
    "/health%2f..%2fv1/models",
    "//health",
    "/HEALTH",
    "/health;x",
    "/health%00",
    "/x/health",
)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "DELETE", "TRACE", "BREW"])
async def test_no_spelling_and_no_method_gets_past_the_guard(server: Guarded, method: str) -> None:
    server.key("ops")
    for path in SPELLINGS:
        url = httpx.URL("http://t").copy_with(raw_path=path.encode())
        assert (await server.client.request(method, url)).status_code == 401, path


async def test_a_root_path_hides_no_route(server: Guarded) -> None:
    key = server.key("ops")
    server.app.root_path = "/llm"
    assert (await server.get("/llm/health")).status_code == 200
    for path in ("/llm/v1/models", "/v1/models", "/llm/llm/health", "/llm"):
        assert (await server.get(path)).status_code == 401
    assert (await server.get("/llm/v1/models", key)).status_code == 200


async def test_health_is_open_to_questions_only(server: Guarded) -> None:
    server.key("ops")
    assert (await server.client.post("/health", json={})).status_code == 401
    assert (await server.client.options("/health")).status_code == 401


async def test_a_preflight_passes_only_where_origins_are_allowed(server: Guarded) -> None:
    from fastapi.middleware.cors import CORSMiddleware

    server.key("ops")
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert (await server.client.options("/v1/completions", headers=asked)).status_code == 401

    server.app.user_middleware.append(_middleware(CORSMiddleware, server.app))
    server.app.middleware_stack = None
    server.app.state.args.allowed_origins = ["https://app.example"]
    allowed = await server.client.options("/v1/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    plain = await server.client.options("/v1/completions", headers={"Origin": asked["Origin"]})
    assert plain.status_code == 401


def _middleware(kind: Any, app: FastAPI) -> Any:
    from starlette.middleware import Middleware

    return Middleware(kind, allow_origins=["https://app.example"])


def test_sockets_need_a_key_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with guarded(tmp_path) as server:
            key = server.key("ops")
            await asyncio.to_thread(talk, server.app, key)

    def talk(app: FastAPI, key: str) -> None:
        client = TestClient(app)
        with pytest.raises(WebSocketDenialResponse) as refused:
            client.websocket_connect("/v1/realtime").__enter__()
        assert error_of(refused.value, 401)["code"] == "invalid_api_key"
        headers = dict(bearer(key))
        with client.websocket_connect("/v1/realtime", headers=headers) as socket:
            assert socket.receive_text() == "ops"

    asyncio.run(run())


# --- leases, and a catalog that is down ------------------------------------------------------


async def test_the_catalog_is_asked_once_a_second_for_a_key(server: Guarded) -> None:
    key = server.key("ops")
    await server.who(key)
    server.mos.asked.clear()
    for _ in range(50):
        assert (await server.get("/metrics", key)).status_code == 200
        assert (await server.get("/metrics", STRANGER)).status_code == 401
    assert server.mos.questions == 1
    server.advance(LEASE_SECONDS)
    await server.get("/metrics", key)
    assert server.mos.questions == 2


async def test_many_requests_at_once_are_one_question(server: Guarded) -> None:
    key = server.key("ops")
    server.mos.before = lambda: time.sleep(0.05)
    replies = await asyncio.gather(*(server.get("/metrics", key) for _ in range(30)))
    assert {reply.status_code for reply in replies} == {200}
    assert server.mos.questions == 1


async def test_a_revocation_applies_within_a_second(server: Guarded) -> None:
    server.key("ops")
    key = server.key("alice")
    assert await server.who(key) == "alice"
    server.desk.mos.revoke_key(authentication.LOCAL_ADMIN, key[:12])
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "401"


async def test_a_key_ends_at_its_time_even_within_a_lease(server: Guarded) -> None:
    server.key("ops")
    key = server.key("alice", expires_at=server.desk.clock.now + timedelta(seconds=0.5))
    assert await server.who(key) == "alice"
    server.advance(0.6)
    assert await server.who(key) == "401"


async def test_known_keys_go_on_for_a_minute_while_the_catalog_is_down(server: Guarded) -> None:
    key, other = server.key("ops"), server.key("alice")
    assert await server.who(key) == "ops"
    assert (await server.get("/metrics", STRANGER)).status_code == 401
    server.mos.failure = Unavailable("the disk is gone")

    for _ in range(3):
        server.advance(GRACE_SECONDS / 3)
        assert await server.who(key) == "ops"
    # Who was not seen before, or was refused, is not believed to be anybody.
    for unknown in (other, STRANGER):
        reply = await server.get("/metrics", unknown)
        error_of(reply, 503)
        assert int(reply.headers["Retry-After"]) >= 1
    # Without any key there is nothing to look up.
    assert await server.who() == "401"
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "503"

    server.mos.failure = None
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "ops"


async def test_a_catalog_that_is_down_is_not_asked_by_every_request(server: Guarded) -> None:
    key = server.key("ops")
    await server.who(key)
    server.mos.failure = Unavailable("down")
    server.advance(LEASE_SECONDS)
    server.mos.asked.clear()
    for _ in range(20):
        assert (await server.get("/metrics", key)).status_code == 200
    assert server.mos.questions == 1


async def test_a_catalog_that_hangs_holds_a_known_key_up_for_a_moment_only(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "_LOOKUP_SECONDS", 0.05)
    key = server.key("ops")
    await server.who(key)
    server.advance(LEASE_SECONDS)
    server.mos.before = lambda: time.sleep(0.5)
    server.mos.away = True
    begun = time.monotonic()
    assert (await server.get("/metrics", key)).status_code == 200
    assert (await server.get("/metrics", key)).status_code == 200
    assert time.monotonic() - begun < 0.4


async def test_a_catalog_that_is_only_slow_decides_all_the_same(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have revoked the key, or have got its first one, a moment ago."""
    monkeypatch.setattr(authentication, "_LOOKUP_SECONDS", 0.4)
    assert await server.who() == "local"
    server.mos.before = lambda: time.sleep(1.0)
    server.advance(LEASE_SECONDS)
    assert await server.who() == "503"

    await asyncio.sleep(1.1)
    server.mos.before = lambda: None
    key = server.key("ops")
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "ops"
    server.mos.before = lambda: time.sleep(1.0)
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "503"
    # Nor is it asked again by everyone.
    server.mos.asked.clear()
    assert await server.who(key) == "503"
    assert server.mos.questions == 0
    server.mos.before = lambda: None
    await asyncio.sleep(1.1)
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "ops"


async def test_a_catalog_that_is_back_by_now_is_asked_again(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "_LOOKUP_SECONDS", 0.4)
    key = server.key("ops")
    await server.who(key)
    server.advance(LEASE_SECONDS)
    server.mos.before = lambda: time.sleep(1.0)
    server.mos.asked.clear()
    waiting = [asyncio.create_task(server.get("/metrics", key)) for _ in range(10)]
    await asyncio.sleep(0.2)
    server.mos.before = lambda: None
    server.advance(2 * LEASE_SECONDS)
    replies = await asyncio.gather(*waiting)
    assert {reply.status_code for reply in replies} == {200}
    # Once more for all of them, not by each.
    assert server.mos.questions <= 3


async def test_that_the_catalog_is_down_is_not_believed_when_it_took_long_to_say(
    server: Guarded,
) -> None:
    key = server.key("ops")
    await server.who(key)
    server.advance(LEASE_SECONDS)
    server.mos.failure = Unavailable("the catalog does not answer Mos")
    server.mos.before = lambda: server.advance(1.5 * LEASE_SECONDS)
    assert await server.who(key) == "503"
    server.advance(LEASE_SECONDS)
    server.mos.before = lambda: None
    assert await server.who(key) == "ops"


async def test_an_open_server_stays_open_while_the_catalog_is_down(server: Guarded) -> None:
    assert await server.who() == "local"
    server.mos.failure = Unavailable("down")
    server.advance(10 * GRACE_SECONDS)
    assert await server.who() == "local"


async def test_a_server_that_never_saw_its_catalog_lets_nobody_in(server: Guarded) -> None:
    server.mos.failure = Unavailable("down")
    assert await server.who() == "503"
    assert (await server.get("/health")).status_code == 503


async def test_without_the_plugin_only_health_answers() -> None:
    app = FastAPI()
    app.add_api_route("/health", lambda: {}, methods=["GET"])
    app.add_api_route("/v1/models", lambda: {}, methods=["GET"])
    app.add_middleware(MemosGuard)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/health")).status_code == 200
        assert (
            "memos plugin has not started"
            in error_of(await client.get("/v1/models"), 503)["message"]
        )


async def test_a_flood_of_made_up_keys_is_bounded_and_forgets_nobody(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authentication, "_MAX_REMEMBERED", 50)
    key = server.key("ops")
    await server.who(key)
    for _ in range(3):
        made_up = [draw_key().token for _ in range(300)]
        replies = await asyncio.gather(*(server.get("/metrics", token) for token in made_up))
        assert {reply.status_code for reply in replies} == {401, 503}
    assert len(server.authenticator._refused) == 50
    assert len(server.authenticator._asked) == 0
    server.mos.asked.clear()
    assert await server.who(key) == "ops"
    assert server.mos.questions == 0


async def test_uses_are_recorded_off_the_request_and_once_a_minute(server: Guarded) -> None:
    key = server.key("ops")
    for _ in range(30):
        await server.who(key)
        # What is looked up while a note is on its way is as old as before it.
        if (recording := server.authenticator._recording) is not None:
            await recording
        server.advance(3)
    assert server.mos.asked.count("note_key_uses") == 2
    (listed,) = server.desk.mos.list_keys(authentication.LOCAL_ADMIN).items
    assert listed.last_used_at is not None


async def test_a_failing_note_of_use_fails_no_request(server: Guarded) -> None:
    key = server.key("ops")
    await server.who(key)

    def fail_notes() -> None:
        if server.mos.asked[-1] == "note_key_uses":
            raise Unavailable("down")

    server.mos.before = fail_notes
    server.advance(120)
    assert await server.who(key) == "ops"
    await asyncio.sleep(0.05)
    server.advance(LEASE_SECONDS)
    assert await server.who(key) == "ops"


# --- administrators and others ---------------------------------------------------------------


async def test_routes_that_are_not_in_the_table_are_for_administrators(server: Guarded) -> None:
    admin, user = server.key("ops"), server.key("alice")
    for path in ("/sleep", "/of/a/later/vllm"):
        assert (await server.get(path, admin)).status_code == 200
        error = error_of(await server.get(path, user), 403)
        assert (error["type"], error["code"]) == ("permission_error", "forbidden")
    for path in ("/metrics", "/v1/models", "/v1/memcubes"):
        assert (await server.get(path, user)).status_code == 200
    assert (await server.get("/no/such/route", user)).status_code == 404


async def test_each_key_sees_its_own_cubes(server: Guarded) -> None:
    server.key("ops")
    alice, bob = server.key("alice"), server.key("bob")
    made = await server.client.post(
        "/v1/memcubes", json={"id": "notes"}, headers=dict(bearer(alice))
    )
    assert made.status_code == 201, made.text
    assert made.json()["owner"] == "alice"
    assert (await server.get("/v1/memcubes/notes", alice)).status_code == 200
    mine, others = (await server.get("/v1/memcubes/notes", bob)), None
    others = await server.get("/v1/memcubes/other", bob)
    assert mine.status_code == others.status_code == 404
    assert mine.text.replace("notes", "other") == others.text


# --- models that are hidden ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "header"),
    [
        ("/v1/completions", b'{"model": "memos-acme", "prompt": "x"}', None),
        ("/v1/completions", b'{"model": "memos\\u002dacme"}', None),
        ("/v1/completions", b'{"model": "\\u006demos-acme"}', None),
        ("/v1/completions", b'{"m\\u006fdel": "memos-acme"}', None),
        ("/v1/completions", b'{"model": "smol", "model": "memos-acme"}', None),
        ("/v1/completions", b'{"model": "memos-acme", "model": "smol"}', None),
        ("/v1/completions", '{"model": "memos-acme"}'.encode("utf-16"), None),
        ("/invocations", b'{"model": "memos-acme"}', None),
        ("/invocations", b'{"model": "smol"}', "memos-acme"),
    ],
)
async def test_adapters_of_ours_do_not_exist_for_others(
    server: Guarded, path: str, body: bytes, header: str | None
) -> None:
    admin, user = server.key("ops"), server.key("alice")
    extra = {} if header is None else {"X-Amzn-SageMaker-Adapter-Identifier": header}
    sent = {"content-type": "application/json", **extra}
    refused = await server.client.post(path, content=body, headers={**sent, **dict(bearer(user))})
    assert refused.status_code == 404
    assert refused.json() == {
        "error": {
            "message": "The model `memos-acme` does not exist. Valid aliases: smol.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }
    passed = await server.client.post(path, content=body, headers={**sent, **dict(bearer(admin))})
    assert passed.json() == {"principal": "ops", "bytes": len(body)}


async def test_adapters_of_ours_do_not_exist_in_forms(server: Guarded) -> None:
    admin, user = server.key("ops"), server.key("alice")
    path, files = "/v1/audio/transcriptions", {"file": ("a.wav", b"memos-" * 100)}
    for model, key, status in (
        ("memos-acme", user, 404),
        ("memos-acme", admin, 200),
        ("smol", user, 200),
    ):
        reply = await server.client.post(
            path, data={"model": model, "prompt": "memos-x"}, files=files, headers=dict(bearer(key))
        )
        assert reply.status_code == status, (model, key)
    encoded = await server.client.post(
        path,
        content=b"model=%6demos-acme",
        headers={"content-type": "application/x-www-form-urlencoded", **dict(bearer(user))},
    )
    assert encoded.status_code == 404


async def test_words_that_begin_like_an_adapter_pass_in_prompts(server: Guarded) -> None:
    server.key("ops")
    user = server.key("alice")
    body = {"model": "smol", "prompt": "memos-acme", "x": {"model": "memos-acme"}}
    reply = await server.client.post("/v1/completions", json=body, headers=dict(bearer(user)))
    assert reply.status_code == 200
