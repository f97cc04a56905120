"""Sharing and the audit log from the command line and from Python, against the real routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from live_server import LiveServer, live_server
from typer.testing import CliRunner, Result

from memos_vllm import MOS, AsyncMOS
from memos_vllm.cli.main import app
from memos_vllm.client import ApiConflict, ApiNotFound

Run = Callable[..., Result]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path) as server:
        yield server


@pytest.fixture
def run(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("MEMOS_URL", live.url)

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return invoke


def test_a_cube_is_shared_and_taken_back(run: Run) -> None:
    run("cube", "create", "acme")
    shared = run("cube", "share", "acme", "ann", "--role", "editor", "--label", "hr")
    assert shared.stdout == "ann is editor of acme with hr\n"
    lines = [line.split("\t") for line in run("cube", "grants", "acme").stdout.splitlines()]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        ("ann", "editor", "hr"),
        ("local", "owner", ""),
    ]
    found = json.loads(run("cube", "grants", "acme", "--json").stdout)["data"]
    assert [grant["principal"] for grant in found] == ["ann", "local"]
    assert json.loads(run("cube", "share", "acme", "bob", "--json").stdout)["role"] == "reader"
    assert run("cube", "unshare", "acme", "ann").stdout == "ann has no role on acme any more\n"
    assert json.loads(run("cube", "unshare", "acme", "bob", "--json").stdout)["deleted"]
    assert "last owner" in run("cube", "unshare", "acme", "local", code=1).stderr
    run("cube", "share", "acme", "ann", "--role", "boss", code=2)


def test_the_log_is_shown_exported_and_verified_from_the_file(run: Run, tmp_path: Path) -> None:
    run("cube", "create", "acme")
    run("cube", "create", "other")
    assert [line.split("\t")[5] for line in run("audit", "tail").stdout.splitlines()] == [
        "acme",
        "other",
    ]
    assert len(run("audit", "tail", "acme", "--action", "cube.create").stdout.splitlines()) == 1
    assert run("audit", "tail", "acme", "--actor", "ann").stdout == ""
    path = tmp_path / "log.jsonl"
    run("audit", "export", "-o", str(path))
    assert run("audit", "export").stdout == path.read_text()
    assert run("audit", "verify", str(path)).stdout == "the audit log is whole\n"
    assert len(run("audit", "export", "--cube", "acme").stdout.splitlines()) == 1
    run("audit", "export", "--cube", "nobody", "-o", str(path), code=1)
    path.write_text(path.read_text().replace("other", "third"))
    broken = run("audit", "verify", str(path), "--json", code=1)
    assert json.loads(broken.stdout)["bad_seq"] == 2
    run("audit", "export", "--cube", "acme", "-o", str(path))
    assert "where the log ends" in run("audit", "verify", str(path), code=1).stderr


def test_python_shares_a_cube_and_reads_the_log(live: LiveServer) -> None:
    with MOS(live.url) as mos:
        cube = mos.create_cube("acme")
        grant = cube.share("ann", role="reader", labels=["hr"])
        assert (grant.principal, grant.role, grant.labels) == ("ann", "reader", ("hr",))
        assert [one.principal for one in cube.grants()] == ["ann", "local"]
        cube.unshare("ann")
        with pytest.raises(ApiNotFound):
            cube.unshare("ann")
        with pytest.raises(ApiConflict):
            cube.unshare("local")
        now = datetime.now(UTC)
        actions = [entry["action"] for entry in mos.audit(actor="local", until=now)]
        assert actions == ["grant.delete", "grant.put", "cube.create"]
        assert list(cube.audit(since=now)) == []
        whole = b"".join(mos.export_audit())
        assert len(whole.splitlines()) == 4
        assert len(b"".join(cube.export_audit()).splitlines()) == 3
        with pytest.raises(ApiNotFound):
            next(mos.cube("nobody").export_audit())

    async def asynchronously() -> bytes:
        async with AsyncMOS(live.url) as mos:
            await mos.cube("acme").share("bob", role="auditor")
            assert [one.principal async for one in mos.cube("acme").grants()] == ["bob", "local"]
            assert len([part async for part in mos.cube("acme").export_audit()]) > 0
            return b"".join([part async for part in mos.export_audit()])

    assert asyncio.run(asynchronously()).startswith(whole.rpartition(b"{")[0])
