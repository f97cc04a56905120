"""What is under a label is not there for who lacks it: two catalogs, told apart by nobody.

One catalog holds labelled memories of every kind, its twin never had them. Whoever lacks the labels
drives every route of both, and the two transcripts must be equal, once ids and times are numbered
in the order in which they appear. A cube's own version, time of change and ETag are left out: they
move with every change, also hidden ones, and ARCHITECTURE.md says so.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import zstandard
from api_harness import Served, serve
from api_plaintext_kit import form

from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.fact import NewFact
from memos_vllm.domain.job import JobState
from memos_vllm.domain.memory import Edge, MemoryPatch, NewMemory
from memos_vllm.domain.turn import NewTurn

SECRETS = ("hr", "legal")
# In what is under a label, and nowhere else.
MARKS = ("zanzibar", "secret-tag", "hr.md")
UNKNOWN = "mem_zzzzzzzzzzzzzzzzzzzzzzzzz"
LATER = datetime(2040, 1, 1, tzinfo=UTC)
HANDBOOK = "# Refunds\n\nRefunds take five working days.\n\n## Desk\n\nThe desk is in Leeds.\n"
# Vary with the run and not with what is in the catalog.
_NUMBERED = re.compile(r"(?:mem|job)_[0-9a-z]{25}|\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|\+00:00)")
_OWN = frozenset({"version", "updated_at"})


@dataclass
class World:
    """A catalog with the labelled memories of some labels, and what its owner knows."""

    served: Served
    shown: list[str] = field(default_factory=list)
    hidden: dict[str, list[str]] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)


def add(world: World, text: str, **fields: Any) -> str:
    (memory,) = world.served.mos.add_memories(LOCAL_ADMIN, "c", [NewMemory(text, **fields)])
    return memory.id


def hide(world: World, label: str) -> list[str]:
    """Memories of every kind under a label; the first is there to be pointed at."""
    mos = world.served.mos
    under: dict[str, Any] = {"labels": (label,), "tags": ("secret-tag",)}
    first = add(world, f"zanzibar refunds {label}", **under)
    made = [first]
    for text in ("zanzibar one", "zanzibar two", "zanzibar three", "zanzibar four"):
        made.append(add(world, text, **under, edges=(Edge("about", first),)))
    made.append(mos.merge_memories(LOCAL_ADMIN, "c", made[1:3], reason="zanzibar").id)
    mos.archive_memory(LOCAL_ADMIN, "c", made[3], reason="zanzibar")
    soon = datetime.now(UTC) - timedelta(seconds=5)
    made.append(add(world, "zanzibar over", **under, expires_at=soon))
    mos.update_memory(LOCAL_ADMIN, "c", made[4], MemoryPatch(text="zanzibar edited"))
    turns, job = mos.remember_turn(
        LOCAL_ADMIN,
        "c",
        [NewTurn("user", "zanzibar said")],
        session_id="s",
        read=True,
        labels=[label],
    )
    assert job is not None
    world.jobs.append(job.id)
    claimed = mos.claim_job("w", lease_seconds=30)
    assert claimed is not None
    facts = mos.add_facts(LOCAL_ADMIN, "c", [NewFact("zanzibar fact")], turn_ids=[turns[0].id])
    mos.finish_job(job.id, "w", state=JobState.SUCCEEDED, message="1 facts kept")
    made += [turns[0].id, facts[0].id]
    return made


async def build(world: World, labels: Collection[str]) -> None:
    mos = world.served.mos
    client = world.served.client
    mos.create_cube(LOCAL_ADMIN, cube_id="c")
    for label in SECRETS:
        if label in labels:
            world.hidden[label] = hide(world, label)
    for name, role, held in (
        ("reader", "reader", []),
        ("hr-reader", "reader", ["hr"]),
        ("editor", "editor", []),
        ("hr-editor", "editor", ["hr"]),
    ):
        body = {"role": role, "labels": held}
        assert (await client.put(f"/v1/memcubes/c/grants/{name}", json=body)).status_code == 200
    for number, text in enumerate(("refunds take five days", "the desk is in Leeds", "old note")):
        edges = tuple(
            Edge("about", ids[0]) for label, ids in world.hidden.items() if label in labels
        )
        world.shown.append(add(world, text, tags=("t",), edges=edges))
        for label in labels:
            # Between the others, and leading to them.
            add(world, f"zanzibar {number}", labels=(label,), edges=(Edge("x", world.shown[-1]),))
    mos.add_turns(LOCAL_ADMIN, "c", [NewTurn("user", "hello refunds")], session_id="s")
    for label in labels:
        mos.add_turns(
            LOCAL_ADMIN, "c", [NewTurn("user", "zanzibar")], session_id="s", labels=[label]
        )
    mos.add_turns(LOCAL_ADMIN, "c", [NewTurn("user", "and refunds?")], session_id="s")
    mos.archive_memory(LOCAL_ADMIN, "c", world.shown[2])
    files = [("handbook.md", HANDBOOK, [])]
    files += [(f"{label}.md", f"# Zanzibar\n\nzanzibar {label}\n", [label]) for label in labels]
    for name, text, under in files:
        sent = form([("file", text.encode(), name), ("labels", json.dumps(under).encode(), None)])
        reply = await client.post(
            "/v1/memcubes/c/documents", content=sent, headers={"content-type": _FORM}
        )
        assert reply.status_code == 201, reply.text
    for label in labels:
        add(world, "zanzibar last", labels=(label,))


_FORM = "multipart/form-data; boundary=boundary-of-the-tests"


@dataclass
class Visit:
    """Somebody's calls and what they were answered."""

    world: World
    who: str
    routes: set[tuple[str, str]] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    _numbers: dict[str, str] = field(default_factory=dict)

    async def call(self, method: str, path: str, *, at: str = "c", **fields: Any) -> Any:
        """One call; `path` is the route's, with ids filled in by name."""
        names = {"cube_id": at, **fields.pop("ids", {})}
        self.routes.add((method, path))
        headers = {"x-test-principal": self.who, **fields.pop("headers", {})}
        reply = await self.world.served.client.request(
            method, path.format(**names), headers=headers, **fields
        )
        self.note(f"{method} {path} {reply.status_code}")
        self.raw.append(reply.text)
        try:
            body = reply.json()
        except ValueError:
            self.note(reply.text)
            return None
        self.note(json.dumps(self._comparable(body), sort_keys=True))
        return body

    async def take_over(self) -> None:
        """All that copies a cube into one of the caller's own, and a look at what arrived."""
        reply = await self.world.served.client.get(
            "/v1/memcubes/c/export", headers={"x-test-principal": self.who}
        )
        self.routes.add(("GET", CUBE + "/export"))
        assert reply.status_code == 200
        unpacked = zstandard.ZstdDecompressor().stream_reader(reply.content).read()
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            for member in archive:
                if member.name.endswith(".jsonl") and "vectors" not in member.name:
                    content = archive.extractfile(member)
                    assert content is not None
                    self.raw.append(content.read().decode())
                    self.note(member.name)
                    for line in self.raw[-1].splitlines():
                        self.note(json.dumps(self._comparable(json.loads(line)), sort_keys=True))
        await self.call("POST", "/v1/memcubes/import", params={"id": "in"}, content=reply.content)
        await self.call("POST", CUBE + "/clone", json={"id": "copy"})
        await self.call("POST", "/v1/memcubes", json={"id": "kept"})
        await self.call("POST", CUBE + "/keep", at="kept", json={"from": "c", "memory_ids": "all"})
        for own in ("in", "copy", "kept"):
            for path in ("", "/memories", "/stats"):
                await self.call("GET", CUBE + path, at=own)
            await self.call("GET", CUBE + "/diff", at=own, params={"with": "c"})

    def note(self, line: str) -> None:
        def number(match: re.Match[str]) -> str:
            return self._numbers.setdefault(match[0], f"<{len(self._numbers)}>")

        self.lines.append(_NUMBERED.sub(number, line))

    def _comparable(self, value: Any) -> Any:
        """A reply without what is the cube's own; scores, which move with the clock, go apart."""
        if isinstance(value, list):
            return [self._comparable(one) for one in value]
        if isinstance(value, float):
            self.scores.append(value)
            return "a number"
        if not isinstance(value, dict):
            return value
        own = _OWN if value.get("object") in ("memcube", "memcube.stats") else ()
        # A sealed number; whether there is one at all is compared.
        shown = {"next_cursor": bool(value["next_cursor"])} if "next_cursor" in value else {}
        if "memory_ids" in value:
            # From former ids to new ones; sorted by ids it has another order in each run.
            shown["memory_ids"] = len(value["memory_ids"])
        return {key: self._comparable(one) for key, one in value.items() if key not in own} | shown


CUBE = "/v1/memcubes/{cube_id}"
ONE = CUBE + "/memories/{memory_id}"


async def read_everything(visit: Visit, target: str) -> None:
    """Every route that reads; `target` is the id of something hidden, or of nothing at all."""
    call, shown = visit.call, visit.world.shown
    await call("GET", "/v1/memcubes")
    for path in (CUBE, CUBE + "/stats", CUBE + "/jobs", CUBE + "/grants", CUBE + "/audit"):
        await call("GET", path)
    await call("GET", CUBE + "/audit/export")
    for path in ("/v1/audit", "/v1/audit/export", "/v1/audit/verify"):
        await call("GET", path)
    for query in (
        {},
        {"state": "active"},
        {"state": "archived"},
        {"state": "merged"},
        {"tier": "plaintext"},
        {"tag": "t"},
        {"tag": "secret-tag"},
        {"q": "refunds"},
        {"q": "zanzibar"},
    ):
        page = await call("GET", CUBE + "/memories", params=query)
        limit = max(1, len(page["data"]))
        await call("GET", CUBE + "/memories", params={**query, "limit": limit})
    cursor: str | None = None
    while True:
        query = {"limit": 1} if cursor is None else {"limit": 1, "cursor": cursor}
        page = await call("GET", CUBE + "/memories", params=query)
        if (cursor := page["next_cursor"]) is None:
            break
    for memory_id in (*shown, target):
        await call("GET", ONE, ids={"memory_id": memory_id})
        await call("GET", ONE + "/history", ids={"memory_id": memory_id})
    for query in ("refunds", "zanzibar", "Leeds desk"):
        for hops in (0, 2):
            body = {"query": query, "hops": hops, "explain": True, "top_k": 50}
            await call("POST", CUBE + "/search", json=body)
    body = {"query": "zanzibar", "filter": {"tags": "secret-tag"}}
    await call("POST", CUBE + "/search", json=body)
    job = visit.world.jobs[0] if visit.world.jobs and target != UNKNOWN else _JOB
    await call("GET", "/v1/jobs/{job_id}", ids={"job_id": job})
    await call("GET", "/v1/jobs/{job_id}/events", ids={"job_id": job})
    await call("DELETE", "/v1/jobs/{job_id}", ids={"job_id": job})


_JOB = "job_zzzzzzzzzzzzzzzzzzzzzzzzz"


async def write_everything(visit: Visit, target: str) -> None:
    """Every route that writes, at something hidden and at what is shown."""
    call, shown = visit.call, visit.world.shown
    hidden = {"memory_id": target}
    edge = [{"kind": "about", "target": target}]
    for labels in (["hr"], ["legal"], ["new"]):
        body = {"memories": [{"text": "x", "labels": labels}]}
        await call("POST", CUBE + "/memories", json=body)
        await call("PATCH", ONE, ids={"memory_id": shown[0]}, json={"labels": labels})
    await call("POST", CUBE + "/memories", json={"memories": [{"text": "x", "edges": edge}]})
    await call("PATCH", ONE, ids={"memory_id": shown[0]}, json={"edges": edge})
    await call("PATCH", ONE, ids=hidden, json={"text": "y", "labels": []})
    await call("PATCH", ONE, ids=hidden, json={"text": "y"}, headers={"If-Match": "99"})
    await call("DELETE", ONE, ids=hidden)
    await call("DELETE", ONE, ids=hidden, params={"erase": "true"})
    for verb in ("/archive", "/restore"):
        await call("POST", ONE + verb, ids=hidden)
    await call("POST", CUBE + "/merge", json={"memory_ids": [shown[0], target]})
    await call("POST", CUBE + "/promote", json={"to": "activation", "memory_ids": [target]})
    await call("POST", CUBE + "/demote", json={"from": "activation", "memory_ids": [target]})
    body = {"from": "c", "memory_ids": [target]}
    await call("POST", CUBE + "/keep", at="kept", json=body)
    await call("POST", CUBE + "/move", json={"owner": "x"})
    await call("PUT", CUBE + "/grants/{principal}", ids={"principal": "x"}, json={"role": "owner"})
    await call("DELETE", CUBE + "/grants/{principal}", ids={"principal": "x"})
    await call("PATCH", CUBE, json={"name": "n"})
    await call("DELETE", CUBE)
    for text in ("refunds again", "refunds at last"):
        turn = {"messages": [{"role": "user", "content": text}], "session_id": "s"}
        await call("POST", CUBE + "/turns", json=turn)
    for _ in range(2):
        sent = form([("file", HANDBOOK.encode(), "handbook.md")])
        await call("POST", CUBE + "/documents", content=sent, headers={"content-type": _FORM})
    sent = form([("file", b"# Zanzibar\n\nzanzibar text\n", "legal.md")])
    await call("POST", CUBE + "/documents", content=sent, headers={"content-type": _FORM})
    await call("PATCH", ONE, ids={"memory_id": shown[0]}, json={"edges": [], "text": "refunds"})
    await call("POST", CUBE + "/merge", json={"memory_ids": shown[:2], "reason": "one"})
    key = {"Idempotency-Key": "key-1"}
    for _ in range(2):
        body = {"memories": [{"text": "twice"}]}
        await call("POST", CUBE + "/memories", json=body, headers=key)
    await call("POST", CUBE + "/promote", json={"to": "activation", "memory_ids": "all"})
    await call("POST", CUBE + "/demote", json={"from": "activation", "memory_ids": "all"})
    await call("POST", CUBE + "/reindex")
    await call("POST", "/v1/memcubes", json={"id": "c"})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    found = tmp_path / "whole", tmp_path / "twin"
    for folder in found:
        folder.mkdir()
    return found


@asynccontextmanager
async def opened(folder: Path, labels: Collection[str]) -> AsyncIterator[World]:
    async with serve(folder, search=True) as served:
        world = World(served)
        await build(world, labels)
        assert served.plaintext.wait_until_indexed("c", seconds=30)
        yield world


@pytest.mark.parametrize(
    ("who", "held"),
    [("reader", ()), ("hr-reader", ("hr",)), ("editor", ()), ("hr-editor", ("hr",))],
)
async def test_a_catalog_is_the_same_as_one_that_never_held_what_is_hidden(
    folders: tuple[Path, Path], who: str, held: tuple[str, ...]
) -> None:
    transcripts = []
    hidden: list[str] = []
    for number, labels in enumerate((SECRETS, held)):
        async with opened(folders[number], labels) as world:
            visit = Visit(world, who)
            target = UNKNOWN if number else world.hidden["legal"][0]
            for label in set(world.hidden) - set(held):
                hidden += [one for one in world.hidden[label] if one != target]
            await read_everything(visit, target)
            await visit.take_over()
            await write_everything(visit, target)
            assert world.served.plaintext.wait_until_indexed("c", seconds=30)
            await read_everything(visit, target)
            assert _every_route(world.served) <= visit.routes
            transcripts.append(visit)
    seen, expected = transcripts
    for line, wanted in zip(seen.lines, expected.lines, strict=True):
        assert line == wanted
    assert seen.scores == pytest.approx(expected.scores, abs=1e-4)
    told, asked = ("\n".join(visit.raw).lower() for visit in transcripts)
    assert not [one for one in hidden if one in told]
    if not held:
        # As often as the caller said it itself, which the twin repeats, too.
        assert [told.count(mark) for mark in MARKS] == [asked.count(mark) for mark in MARKS]


def _every_route(served: Served) -> set[tuple[str, str]]:
    """Every route but those that speak of no cube."""
    page = served.app.openapi()
    return {
        (method.upper(), path)
        for path, methods in page["paths"].items()
        for method in methods
        if not path.startswith(("/health", "/v1/memos/status", "/v1/keys", "/v1/principals"))
    }
