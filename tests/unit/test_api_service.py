"""Health, status, audit, the OpenAPI page, and what happens when something breaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import FakeGateway, Served, build_app, error_of, serve

from memos_vllm import errors
from memos_vllm.api.error_table import ERROR_TABLE, error_body, error_response, error_row
from memos_vllm.api.gateway import EngineGateway
from memos_vllm.api.middleware import guard_counters
from memos_vllm.control.mos import Mos


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as opened:
        await opened.cube()
        yield opened


async def test_health_names_every_part(served: Served) -> None:
    reply = await served.client.get("/health")
    assert reply.status_code == 200
    parts = {"catalog": "ready", "engine": "ready", "plaintext": "ready"}
    assert reply.json() == {"status": "ready", "parts": parts}


async def test_a_server_whose_search_is_down_keeps_its_traffic_and_says_so(served: Served) -> None:
    served.plaintext.trouble = "the Qdrant server does not answer"
    reply = await served.client.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (200, "degraded")
    assert reply.json()["parts"]["plaintext"] == "the Qdrant server does not answer"
    served.plaintext.opened = False
    error_of(await served.client.get("/health"), 503)


async def test_health_of_a_part_that_is_down_is_a_503_that_names_it(served: Served) -> None:
    served.gateway.parts = {"engine": "ready", "artifact store": "disk is full"}
    reply = await served.client.get("/health")
    error = error_of(reply, 503)
    assert "artifact store: disk is full" in error["message"]
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["status"] == "not_ready"
    assert reply.json()["parts"]["artifact store"] == "disk is full"


async def test_while_parts_start_everything_answers_503_and_health_names_them() -> None:
    def no_mos() -> Mos:
        raise errors.Unavailable("the catalog is being migrated", retry_after_seconds=3)

    def no_gateway() -> EngineGateway:
        raise errors.Unavailable("the engine is loading its weights")

    transport = httpx.ASGITransport(app=build_app(no_mos, no_gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        health = await client.get("/health")
        assert health.json()["parts"] == {
            "catalog": "the catalog is being migrated",
            "engine": "the engine is loading its weights",
            "plaintext": "ready",
        }
        cubes = await client.get("/v1/memcubes")
        error_of(cubes, 503)
        assert cubes.headers["retry-after"] == "3"
        error_of(await client.get("/v1/memos/status"), 503)


async def test_cubes_can_be_read_while_the_engine_starts(served: Served) -> None:
    def no_gateway() -> EngineGateway:
        raise errors.Unavailable("the engine is loading its weights")

    app = build_app(lambda: served.mos, no_gateway)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/v1/memcubes/acme")).status_code == 200
        # Nothing may be deleted whose files could not be.
        error_of(await client.delete("/v1/memcubes/acme"), 503)
        assert (await client.get("/v1/memcubes/acme")).status_code == 200


async def test_status_holds_the_engines_report_and_what_was_refused(served: Served) -> None:
    status = (await served.client.get("/v1/memos/status")).json()
    assert status["model"] == "fake"
    assert status["object"] == "memos.status"
    assert status["version"]
    assert status["guard"] == guard_counters


async def test_audit_tells_of_every_change_in_pages_and_verifies(served: Served) -> None:
    await served.memories("a secret text")
    page = (await served.client.get("/v1/memcubes/acme/audit?limit=1")).json()
    assert len(page["data"]) == 1
    assert page["next_cursor"]
    everything = (await served.client.get("/v1/memcubes/acme/audit")).json()["data"]
    assert {entry["action"] for entry in everything} == {"cube.create", "memory.add"}
    assert set(everything[0]) == {
        "object", "seq", "at", "actor", "action", "cube_id", "subject", "details",
        "previous_hash", "hash",
    }  # fmt: skip
    assert "a secret text" not in str(everything)
    verdict = (await served.client.get("/v1/audit/verify")).json()
    assert verdict["ok"] is True
    assert verdict["entries"] == 2
    assert verdict["bad_seq"] is None


async def test_an_unexpected_failure_is_a_500_that_tells_nothing_and_logs_everything(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("secret path /home/me")

    monkeypatch.setattr(served.mos, "get_cube", broken)
    reply = await served.client.get("/v1/memcubes/acme")
    error = error_of(reply, 500)
    assert "secret" not in reply.text
    assert error["code"] == "internal_error"
    assert "secret path" in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidRequest("m", param="p"), 400, "invalid_request"),
        (errors.ContextTooLong(memory_tokens=9, max_model_len=8), 400, "context_length_exceeded"),
        (errors.TemplateError("m"), 400, "template_error"),
        (errors.NotFound("memcube", "x"), 404, "not_found"),
        (errors.Conflict("m"), 409, "conflict"),
        (errors.StaleVersion(expected=1, found=2), 412, "stale_version"),
        (errors.TooLarge("m"), 413, "too_large"),
        (errors.Unavailable("m"), 503, "unavailable"),
        (errors.ArtifactMissing("a", "m"), 500, "internal_error"),
        (errors.TicketRejected("m"), 500, "internal_error"),
        (errors.ConfigurationError("m"), 500, "internal_error"),
        (RuntimeError("m"), 500, "internal_error"),
    ],
)
def test_every_error_has_its_status_and_code(error: Exception, status: int, code: str) -> None:
    assert (error_row(error).status, error_row(error).code) == (status, code)
    assert error_response(error).status_code == status


def test_an_error_that_quotes_half_a_surrogate_pair_can_still_be_answered() -> None:
    reply = error_response(errors.InvalidRequest("bad \ud800", param="\ud800"))
    assert b"bad ?" in bytes(reply.body)


def test_the_error_table_and_body_keep_their_shape() -> None:
    assert error_body("m", kind="t", code="c") == {
        "error": {"message": "m", "type": "t", "param": None, "code": "c"}
    }
    assert all(issubclass(kind, errors.MemosError) for kind in ERROR_TABLE)


ROUTES = {
    ("put", "/v1/memcubes/{cube_id}/grants/{principal}"),
    ("delete", "/v1/memcubes/{cube_id}/grants/{principal}"),
    ("get", "/v1/memcubes/{cube_id}/grants"),
    ("get", "/v1/memcubes/{cube_id}/audit/export"),
    ("get", "/v1/audit"),
    ("get", "/v1/audit/export"),
    ("post", "/v1/memcubes/{cube_id}/merge"),
    ("post", "/v1/memcubes/{cube_id}/keep"),
    ("get", "/v1/memcubes/{cube_id}/export"),
    ("post", "/v1/memcubes/import"),
    ("post", "/v1/memcubes/{cube_id}/clone"),
    ("post", "/v1/memcubes/{cube_id}/move"),
    ("get", "/v1/memcubes/{cube_id}/diff"),
    ("post", "/v1/memcubes"),
    ("get", "/v1/memcubes"),
    ("get", "/v1/memcubes/{cube_id}"),
    ("patch", "/v1/memcubes/{cube_id}"),
    ("delete", "/v1/memcubes/{cube_id}"),
    ("get", "/v1/memcubes/{cube_id}/stats"),
    ("post", "/v1/memcubes/{cube_id}/memories"),
    ("get", "/v1/memcubes/{cube_id}/memories"),
    ("get", "/v1/memcubes/{cube_id}/memories/{memory_id}"),
    ("patch", "/v1/memcubes/{cube_id}/memories/{memory_id}"),
    ("delete", "/v1/memcubes/{cube_id}/memories/{memory_id}"),
    ("post", "/v1/memcubes/{cube_id}/memories/{memory_id}/archive"),
    ("post", "/v1/memcubes/{cube_id}/memories/{memory_id}/restore"),
    ("get", "/v1/memcubes/{cube_id}/memories/{memory_id}/history"),
    ("post", "/v1/memcubes/{cube_id}/promote"),
    ("post", "/v1/memcubes/{cube_id}/demote"),
    ("get", "/v1/memcubes/{cube_id}/jobs"),
    ("post", "/v1/memcubes/{cube_id}/documents"),
    ("post", "/v1/memcubes/{cube_id}/turns"),
    ("post", "/v1/memcubes/{cube_id}/search"),
    ("post", "/v1/memcubes/{cube_id}/reindex"),
    ("get", "/v1/jobs/{job_id}"),
    ("delete", "/v1/jobs/{job_id}"),
    ("get", "/v1/jobs/{job_id}/events"),
    ("get", "/v1/memcubes/{cube_id}/audit"),
    ("get", "/v1/audit/verify"),
    ("post", "/v1/keys"),
    ("get", "/v1/keys"),
    ("delete", "/v1/keys/{key_id}"),
    ("get", "/v1/principals/me"),
    ("get", "/v1/memos/status"),
    ("get", "/health"),
}


async def test_the_openapi_page_has_every_route_with_a_summary_and_an_example(
    served: Served,
) -> None:
    page = (await served.client.get("/openapi.json")).json()
    found = set()
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            found.add((method, path))
            assert operation["summary"], path
            assert operation["description"], path
            assert "422" not in operation["responses"], path
            contents = [
                content
                for status, answer in operation["responses"].items()
                if status.startswith("2")
                for content in answer.get("content", {}).values()
            ]
            assert any("example" in content for content in contents), (method, path)
            if "application/json" in operation.get("requestBody", {}).get("content", {}):
                assert "examples" in str(page["components"]["schemas"]), path
    assert found == ROUTES


def test_the_api_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, memos_vllm.api.routes, memos_vllm.api.middleware;"
        "assert not {'torch', 'vllm', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_fake_gateway_is_a_gateway() -> None:
    gateway: EngineGateway = FakeGateway()
    assert gateway.resident_tokens("x") == 0
