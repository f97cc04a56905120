"""Keys over HTTP, with the Python client and from the command line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import error_of
from keys_kit import Guarded, bearer, guarded
from typer.testing import CliRunner, Result

from memos_vllm.api import keys
from memos_vllm.api.log_redaction import redact_server_logs
from memos_vllm.cli.main import app as command
from memos_vllm.client import ApiConflict, ApiNotFound, ApiUnauthorized, AsyncMOS
from memos_vllm.control import keys as control_keys
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.keys import digest_of, draw_key, is_token, public_part


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded(tmp_path) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """These servers have clocks of their own."""
    monkeypatch.setattr(keys, "LEASE_SECONDS", 0.0)
    monkeypatch.setattr(control_keys, "LEASE_SECONDS", 0.0)


# --- over HTTP -------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_lets_its_principal_in(server: Guarded) -> None:
    made = await server.client.post("/v1/keys", json={"principal": "ops"})
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    key = made.json()
    assert (key["object"], key["admin"], key["created_by"]) == ("key", True, "local")

    listed = await server.get("/v1/keys", key["key"])
    (found,) = listed.json()["data"]
    # This very request is the first use, which is noted beside it, before or after.
    assert found | {"last_used_at": None} == {n: key[n] for n in key if n != "key"}
    me = await server.get("/v1/principals/me", key["key"])
    assert me.json() == {"id": "ops", "object": "principal", "kind": "user", "admin": True}


async def test_only_administrators_manage_keys(server: Guarded) -> None:
    admin, user = server.key("ops"), server.key("alice")
    made = {"principal": "eve", "admin": True}
    for reply in (
        await server.client.post("/v1/keys", json=made, headers=dict(bearer(user))),
        await server.get("/v1/keys", user),
        await server.client.delete(f"/v1/keys/{admin[:12]}", headers=dict(bearer(user))),
        await server.client.delete("/v1/keys/key_none", headers=dict(bearer(user))),
    ):
        assert error_of(reply, 403)["code"] == "forbidden"
    assert await server.who(admin) == "ops"


async def test_a_revoked_key_is_answered_as_revoked_and_refused_a_second_later(
    server: Guarded,
) -> None:
    admin, user = server.key("ops"), server.key("alice")
    assert await server.who(user) == "alice"
    gone = await server.client.delete(f"/v1/keys/{user[:12]}", headers=dict(bearer(admin)))
    assert (gone.status_code, gone.json()["state"]) == (200, "revoked")
    server.advance(1)
    assert await server.who(user) == "401"
    unknown = await server.client.delete("/v1/keys/key_none", headers=dict(bearer(admin)))
    error_of(unknown, 404)


async def test_a_revocation_is_answered_when_every_lease_on_the_key_has_run_out(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LEASE_SECONDS", 0.3)

    async def seconds(method: str, path: str, **options: Any) -> float:
        begun = time.monotonic()
        assert (await server.client.request(method, path, **options)).is_success
        return time.monotonic() - begun

    # So is the making of the first key, which closes the server.
    assert await seconds("POST", "/v1/keys", json={"principal": "ops"}) >= 0.3
    admin = dict(bearer(server.key("root", admin=True)))
    assert await seconds("POST", "/v1/keys", json={"principal": "b"}, headers=admin) < 0.3
    user = server.key("alice")
    assert await seconds("DELETE", f"/v1/keys/{user[:12]}", headers=admin) >= 0.3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "principal"),
        ({"principal": "Not Plain"}, "principal"),
        ({"principal": "system"}, "principal"),
        ({"principal": 7}, "principal"),
        ({"principal": "a", "admin": "yes"}, "admin"),
        ({"principal": "a", "kind": "local"}, "kind"),
        ({"principal": "a", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"principal": "a", "expires_at": "tomorrow"}, "expires_at"),
        ({"principal": "a", "key": "mos_mine"}, "key"),
    ],
)
async def test_what_no_key_can_be_made_of_is_a_bad_request(
    server: Guarded, body: dict[str, object], param: str
) -> None:
    error = error_of(await server.client.post("/v1/keys", json=body), 400)
    assert error["param"] == param
    assert not server.desk.mos.has_keys()


async def test_an_idempotency_key_is_refused_because_a_key_is_never_kept(server: Guarded) -> None:
    reply = await server.client.post(
        "/v1/keys", json={"principal": "ops"}, headers={"Idempotency-Key": "once"}
    )
    assert error_of(reply, 400)["param"] == "Idempotency-Key"
    assert not server.desk.mos.has_keys()


async def test_no_key_is_logged_or_stored(
    server: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = await server.client.post("/v1/keys", json={"principal": "ops"})
    token = made.json()["key"]
    await server.get("/v1/memcubes", token)
    await server.get("/v1/memcubes", token[:-1] + "_")
    assert token[:-1] not in caplog.text
    assert token[:-1].encode() not in server.desk.stored_bytes()


def test_the_web_servers_log_shows_no_key(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = draw_key().token
    redact_server_logs()
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # A server of an earlier test has set them up for itself.
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.DEBUG, logger=name)
    logging.getLogger("uvicorn.error").debug("< %s: %s", "Authorization", f"Bearer {token}")
    access = ("127.0.0.1:1", "DELETE", f"/v1/keys/{token}", "1.1", 401)
    logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', *access)
    assert token not in caplog.text
    assert f"Bearer {public_part(token)}_…" in caplog.text
    assert f"/v1/keys/{public_part(token)}_… HTTP/1.1" in caplog.text


# --- the Python client -----------------------------------------------------------------------


async def test_the_client_makes_lists_and_revokes_keys(server: Guarded) -> None:
    transport = httpx.ASGITransport(app=server.app)
    async with AsyncMOS("http://t", transport=transport) as first:
        made = await first.create_key("ops")
        assert made.token not in repr(made)
    async with AsyncMOS("http://t", made.token, transport=transport) as mos:
        assert (await mos.whoami()).admin
        soon = datetime.now(UTC) + timedelta(days=365 * 100)
        bot = await mos.create_key("bot", kind="agent", expires_at=soon)
        assert (bot.info.kind, bot.info.admin, bot.info.expires_at) == ("agent", False, soon)
        assert [key.principal async for key in mos.api_keys()] == ["ops", "bot"]
        with pytest.raises(ApiConflict):
            await mos.create_key("bot", admin=True)
        # A whole key is cut to its public part before it is sent anywhere.
        assert (await mos.revoke_key(bot.token)).state == "revoked"
        with pytest.raises(ApiNotFound):
            await mos.revoke_key("key_none")
    async with AsyncMOS("http://t", transport=transport) as nobody:
        with pytest.raises(ApiUnauthorized, match="a valid key is needed"):
            await nobody.whoami()


async def test_the_client_takes_its_key_from_the_environment(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = server.key("ops"), server.key("alice")
    monkeypatch.setenv("MEMOS_API_KEY", key)
    transport = httpx.ASGITransport(app=server.app)
    async with AsyncMOS("http://t", transport=transport) as mos:
        assert (await mos.whoami()).id == "ops"
    async with AsyncMOS("http://t", other, transport=transport) as mos:
        assert (await mos.whoami()).id == "alice"
    async with AsyncMOS("http://t", "", transport=transport) as mos:
        with pytest.raises(ApiUnauthorized):
            await mos.whoami()


# --- the command line ------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a data folder that is not there yet, and expects an exit code."""
    monkeypatch.setenv("MEMOS_DATA_DIR", str(tmp_path / "data"))
    # For other commands; these two must not send this one to a server.
    monkeypatch.setenv("MEMOS_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MEMOS_API_KEY", "mos_other")

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(command, ["keys", *arguments])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return invoke


def test_the_first_key_is_made_before_any_server_ran(run: Run, tmp_path: Path) -> None:
    made = run("create", "ops")
    token = made.stdout.strip()
    assert is_token(token)
    assert "ops (administrator)" in made.stderr
    mos = Mos.open(f"sqlite:///{tmp_path}/data/catalog.sqlite")
    holder = mos.authenticate(digest_of(token))
    mos.close()
    assert holder is not None
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0


def test_keys_are_listed_and_revoked_on_the_data_folder(run: Run) -> None:
    run("create", "ops")
    made = json.loads(run("create", "bot", "--kind", "agent", "--expires", "30d", "--json").stdout)
    assert (made["principal"], made["kind"], made["state"]) == ("bot", "agent", "active")
    lived = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert lived == pytest.approx(timedelta(days=30), abs=timedelta(minutes=1))
    assert run("revoke", made["prefix"]).stdout == f"revoked {made['id']} of bot\n"
    listed = json.loads(run("list", "--json").stdout)["data"]
    assert [(key["principal"], key["state"]) for key in listed] == [
        ("ops", "active"),
        ("bot", "revoked"),
    ]
    assert all("key" not in key for key in listed)
    assert "ops\tadmin\tactive" in run("list").stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["create", "local"], 1),
        (["create", "ops", "--no-admin"], 1),
        (["revoke", "key_none"], 1),
        (["create"], 2),
        (["create", "ops", "--expires", "soon"], 2),
        (["create", "ops", "--expires", "999999w"], 2),
        (["create", "ops", "--kind", "local"], 2),
        (["list", "--url", "http://127.0.0.1:1", "--data-dir", "x"], 2),
        (["list", "--url", "http://127.0.0.1:1"], 1),
        (["list", "--api-key", "mos_x"], 1),
        (["list", "--catalog-url", "nonsense"], 1),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_an_exit_code(
    run: Run, arguments: list[str], code: int
) -> None:
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_keys_of_a_named_server_are_asked_over_http(tmp_path: Path) -> None:
    from live_server import live_server

    with live_server(tmp_path) as live:
        made = CliRunner().invoke(command, ["keys", "create", "ops", "--url", live.url])
        assert is_token(made.stdout.strip()), made.output
        listed = CliRunner().invoke(command, ["keys", "list", "--url", live.url, "--json"])
        (key,) = json.loads(listed.stdout)["data"]
        done = CliRunner().invoke(command, ["keys", "revoke", key["id"], "--url", live.url])
        assert done.stdout == f"revoked {key['id']} of ops\n"
        assert live.mos.list_keys(LOCAL_ADMIN).items[0].state == "revoked"
