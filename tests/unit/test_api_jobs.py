"""Promote, demote and jobs over HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_harness import Served, error_of, serve

from memos_vllm.api import jobs
from memos_vllm.errors import ContextTooLong, TemplateError

PROMOTE = "/v1/memcubes/acme/promote"
DEMOTE = "/v1/memcubes/acme/demote"
ALL = {"to": "activation", "memory_ids": "all"}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as opened:
        await opened.cube()
        yield opened


async def tiers(served: Served) -> dict[str, int]:
    cube = (await served.client.get("/v1/memcubes/acme")).json()
    counts: dict[str, int] = cube["tiers"]
    return counts


async def test_promote_without_wait_answers_202_with_the_job_and_wakes_the_worker(
    served: Served,
) -> None:
    await served.memories("a", "b")
    reply = await served.client.post(PROMOTE, json=ALL)
    assert reply.status_code == 202
    job = reply.json()
    assert set(job) == {
        "id", "object", "cube_id", "kind", "state", "progress", "message", "error",
        "proofs", "created_at", "updated_at",
    }  # fmt: skip
    assert (job["object"], job["kind"], job["state"]) == ("job", "bake", "queued")
    assert served.gateway.wakes == 1
    assert served.gateway.checked == [("acme", None)]
    assert await tiers(served) == {"plaintext": 0, "activation": 2, "parametric": 0}
    assert (await served.client.get(f"/v1/jobs/{job['id']}")).json() == job


@pytest.mark.parametrize("wait", [True, 30, 2.5])
async def test_promote_that_is_waited_for_answers_200_with_the_finished_job(
    served: Served, wait: Any
) -> None:
    await served.memories("a")
    served.gateway.on_wake = lambda: threading.Timer(0.1, served.finish_jobs).start()
    reply = await served.client.post(PROMOTE, json={**ALL, "wait": wait})
    assert reply.status_code == 200
    assert reply.json()["state"] == "succeeded"


async def test_a_wait_that_times_out_answers_202_with_the_job(served: Served) -> None:
    await served.memories("a")
    reply = await served.client.post(PROMOTE, json={**ALL, "wait": 0.1})
    assert reply.status_code == 202
    assert reply.json()["state"] == "queued"


async def test_all_as_a_member_means_memory_ids_all(served: Served) -> None:
    await served.memories("a")
    reply = await served.client.post(PROMOTE, json={"to": "activation", "all": True})
    assert reply.status_code == 202
    assert (await tiers(served))["activation"] == 1


async def test_named_memories_are_promoted_and_checked_by_the_engine_first(
    served: Served,
) -> None:
    first, second = await served.memories("a", "b")
    body = {"to": "activation", "memory_ids": [second["id"]]}
    assert (await served.client.post(PROMOTE, json=body)).status_code == 202
    assert served.gateway.checked == [("acme", [second["id"]])]
    read = await served.client.get(f"/v1/memcubes/acme/memories/{first['id']}")
    assert read.json()["tier"] == "plaintext"


async def test_demote_of_everything_leaves_nothing_to_bake(served: Served) -> None:
    await served.memories("a", "b")
    await served.client.post(PROMOTE, json=ALL)
    served.finish_jobs()
    body = {"from": "activation", "memory_ids": "all"}
    reply = await served.client.post(DEMOTE, json={**body, "wait": True})
    assert reply.status_code == 200
    assert reply.json()["state"] == "succeeded"
    assert (await tiers(served))["activation"] == 0
    assert (await served.client.post(DEMOTE, json=body)).status_code == 202


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "to"),
        ({"to": "activation"}, None),
        ({"to": "activation", "memory_ids": []}, None),
        ({"to": "activation", "memory_ids": "some"}, None),
        ({"to": "activation", "memory_ids": "all", "all": True}, None),
        ({"to": "activation", "memory_ids": [1]}, None),
        ({"to": "activation", "memory_ids": "all", "wait": "yes"}, None),
        ({"to": "activation", "memory_ids": "all", "wait": -1}, None),
        ({"to": "activation", "memory_ids": "all", "wait": 601}, None),
        ({"to": "activation", "memory_ids": "all", "wait": None}, None),
        ({"to": "activation", "memory_ids": "all", "wiat": True}, "wiat"),
        ({"to": "hot", "memory_ids": "all"}, "to"),
        ({"to": 1, "memory_ids": "all"}, "to"),
        ({"to": "parametric", "memory_ids": "all"}, "to"),
        ({"to": "plaintext", "memory_ids": "all"}, "to"),
        ({"from": "activation", "memory_ids": "all"}, None),
    ],
)
async def test_a_promote_that_makes_no_sense_changes_nothing(
    served: Served, body: dict[str, Any], param: str | None
) -> None:
    await served.memories("a")
    error = error_of(await served.client.post(PROMOTE, json=body), 400)
    if param is not None:
        assert error["param"] == param
    assert (await tiers(served))["activation"] == 0
    assert served.gateway.wakes == 0


@pytest.mark.parametrize("memory_id", ["", "a\x00", "\ud800", "x" * 100_000, "a/b", "é"])
async def test_a_strange_memory_id_is_a_400_or_404(served: Served, memory_id: str) -> None:
    await served.memories("a")
    body = json.dumps({"to": "activation", "memory_ids": [memory_id]}).encode()
    reply = await served.client.post(
        PROMOTE, content=body, headers={"content-type": "application/json"}
    )
    error_of(reply, reply.status_code if reply.status_code == 404 else 400)


async def test_demote_takes_from_and_not_its_python_name(served: Served) -> None:
    await served.memories("a")
    for body in ({"from_": "activation", "memory_ids": "all"}, ALL):
        error_of(await served.client.post(DEMOTE, json=body), 400)


async def test_a_promote_that_names_nothing_or_nobody_is_refused(served: Served) -> None:
    error_of(await served.client.post(PROMOTE, json=ALL), 409)
    body = {"to": "activation", "memory_ids": ["mem_none"]}
    error_of(await served.client.post(PROMOTE, json=body), 404)
    error_of(await served.client.post("/v1/memcubes/none/promote", json=ALL), 404)


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (ContextTooLong(memory_tokens=9000, max_model_len=8192), "context_length_exceeded"),
        (TemplateError("no chat template"), "template_error"),
    ],
)
async def test_a_prefix_that_cannot_be_baked_is_refused_before_anything_changes(
    served: Served, refusal: Exception, code: str
) -> None:
    await served.memories("a")
    served.gateway.refusal = refusal
    before = (await served.client.get("/v1/memcubes/acme")).json()
    error = error_of(await served.client.post(PROMOTE, json=ALL), 400)
    assert error["code"] == code
    assert (await served.client.get("/v1/memcubes/acme")).json() == before


async def test_jobs_are_listed_cancelled_once_and_kept(served: Served) -> None:
    await served.memories("a")
    job = (await served.client.post(PROMOTE, json=ALL)).json()
    listed = (await served.client.get("/v1/memcubes/acme/jobs")).json()
    assert listed["data"] == [job]
    url = f"/v1/jobs/{job['id']}"
    assert (await served.client.delete(url)).json()["state"] == "cancelled"
    assert (await served.client.delete(url)).json()["state"] == "cancelled"
    assert (await served.client.get(url)).json()["state"] == "cancelled"


async def test_a_finished_job_cannot_be_cancelled(served: Served) -> None:
    await served.memories("a")
    job = (await served.client.post(PROMOTE, json=ALL)).json()
    served.finish_jobs()
    error_of(await served.client.delete(f"/v1/jobs/{job['id']}"), 409)


async def test_an_unknown_job_is_a_404_on_every_route(served: Served) -> None:
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/events")]:
        error_of(await served.client.request(method, f"/v1/jobs/job_none{path}"), 404)


async def test_a_cancelled_wait_ends_with_the_cancelled_job(served: Served) -> None:
    await served.memories("a")
    woken = asyncio.Event()
    served.gateway.on_wake = woken.set
    waiting = asyncio.create_task(served.client.post(PROMOTE, json={**ALL, "wait": 20}))
    await asyncio.wait_for(woken.wait(), 5)
    job = (await served.client.get("/v1/memcubes/acme/jobs")).json()["data"][0]
    await served.client.delete(f"/v1/jobs/{job['id']}")
    reply = await asyncio.wait_for(waiting, 5)
    assert (reply.status_code, reply.json()["state"]) == (200, "cancelled")


def parse_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_events_tell_every_step_and_end_with_done(served: Served) -> None:
    await served.memories("a")
    job = (await served.client.post(PROMOTE, json=ALL)).json()
    following = asyncio.create_task(served.client.get(f"/v1/jobs/{job['id']}/events"))
    await asyncio.sleep(0.1)
    claimed = await asyncio.to_thread(served.mos.claim_job, "w", lease_seconds=30)
    assert claimed is not None
    await asyncio.sleep(0.4)
    await asyncio.to_thread(served.finish_jobs)
    await asyncio.to_thread(
        served.mos.finish_job, claimed.id, "w", state=claimed.state.SUCCEEDED, message="baked"
    )
    reply = await asyncio.wait_for(following, 5)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = parse_events(reply.text)
    assert [name for name, _ in events] == ["progress"] * (len(events) - 1) + ["done"]
    states = [event["state"] for _, event in events]
    assert states[0] == "queued"
    assert "running" in states
    assert states[-1] == "succeeded"


async def test_events_of_a_job_whose_cube_is_deleted_end_with_an_error(served: Served) -> None:
    await served.memories("a")
    job = (await served.client.post(PROMOTE, json=ALL)).json()
    following = asyncio.create_task(served.client.get(f"/v1/jobs/{job['id']}/events"))
    await asyncio.sleep(0.1)
    await served.client.delete("/v1/memcubes/acme")
    events = parse_events((await asyncio.wait_for(following, 5)).text)
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["code"] == "not_found"


async def test_a_quiet_stream_is_kept_alive(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_KEEPALIVE_SECONDS", 0.05)
    await served.memories("a")
    job = (await served.client.post(PROMOTE, json=ALL)).json()
    following = asyncio.create_task(served.client.get(f"/v1/jobs/{job['id']}/events"))
    await asyncio.sleep(0.5)
    await served.client.delete(f"/v1/jobs/{job['id']}")
    assert ": still running\n\n" in (await asyncio.wait_for(following, 5)).text
