"""Archives through both clients and the command line, over the real routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import client_fakes as fakes
import httpx
import pytest
from api_harness import FakeCartridges
from live_server import LiveServer, live_server
from typer.testing import CliRunner, Result

from memos_vllm import MOS, AsyncMOS
from memos_vllm.cli.main import app
from memos_vllm.client import ApiBadRequest, ApiConflict, ServerUnreachable, UnexpectedReply

Run = Callable[..., Result]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    with live_server(folder) as server:
        server.gateway.cartridges = FakeCartridges(folder)
        yield server


@pytest.fixture
def run(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("MEMOS_URL", live.url)

    def invoke(*arguments: str, code: int = 0, stdin: bytes | None = None) -> Result:
        result = CliRunner().invoke(app, ["cube", *arguments], input=stdin)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return invoke


def texts(mos: MOS, cube_id: str) -> list[str]:
    return [memory.text for memory in mos.cube(cube_id).memories()]


def test_a_cube_goes_into_a_file_and_comes_back(live: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "acme.memcube"
    seen: list[int] = []
    with MOS(live.url) as mos:
        cube = mos.create_cube("acme")
        added = cube.add(["one", "two"])
        assert cube.export(path, on_bytes=seen.append) == path
        assert seen[-1] == path.stat().st_size
        again = mos.import_cube(path, id="acme-2", on_bytes=seen.append)
        assert seen[-1] == path.stat().st_size
        assert again.arrival is not None
        assert list(again.arrival.memory_ids) == [memory.id for memory in added]
        assert texts(mos, "acme-2") == ["one", "two"]
        with pytest.raises(ApiConflict):
            mos.import_cube(path)
        copy = cube.clone("copy", name="Copy")
        assert (copy.id, copy.info().name) == ("copy", "Copy")
        copy.add("three")
        (entry,) = mos.diff("acme", "copy")
        assert entry.there is not None
        assert (entry.kind, entry.there.text) == ("only_there", "three")
        assert cube.move("local").owner == "local"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["acme.memcube"]


def test_the_awaited_client_does_the_same(live: LiveServer, tmp_path: Path) -> None:
    async def go() -> None:
        async with AsyncMOS(live.url) as mos:
            cube = await mos.create_cube("acme")
            await cube.add(["one", "two"])
            path = await cube.export(tmp_path / "a.memcube", include=["plaintext"])
            again = await mos.import_cube(path, id="b", trust_artifacts=False)
            assert (await again.info()).memories.active == 2
            assert (await cube.clone("c")).arrival is not None
            assert [entry async for entry in mos.diff("b", "c")] == []

    asyncio.run(go())


def test_what_arrives_damaged_is_never_put_in_the_files_place(tmp_path: Path) -> None:
    path = tmp_path / "acme.memcube"
    path.write_bytes(b"the former one")
    script = fakes.Script(fakes.reply(200, b"no archive at all"))
    with pytest.raises(UnexpectedReply, match="no whole archive"):
        fakes.client(script).cube("acme").export(path)

    def broken(request: httpx.Request) -> httpx.Response:
        def stream() -> Iterator[bytes]:
            yield b"some"
            raise httpx.ReadError("gone")

        return httpx.Response(200, content=stream())

    with pytest.raises(ServerUnreachable, match="nothing was written"):
        fakes.client(fakes.Script(broken)).cube("acme").export(path)
    assert path.read_bytes() == b"the former one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_import_that_meets_a_busy_server_is_sent_again_whole(tmp_path: Path) -> None:
    path = tmp_path / "acme.memcube"
    path.write_bytes(bytes(300_000))
    sent: list[int] = []
    arrival = fakes.cube_json("acme", origin="acme", memory_ids={}, warnings=["w"])

    def take(status: int, body: Any) -> Callable[[httpx.Request], httpx.Response]:
        def answer(request: httpx.Request) -> httpx.Response:
            sent.append(len(request.read()))
            return fakes.reply(status, body, Retry_After="0")

        return answer

    script = fakes.Script(take(503, fakes.error_json("busy")), take(201, arrival))
    cube = fakes.client(script).import_cube(path)
    assert sent == [300_000, 300_000]
    assert cube.arrival is not None
    assert cube.arrival.warnings == ("w",)
    one, two = (request.headers["idempotency-key"] for request in script.requests)
    assert one == two


def test_a_file_that_is_no_archive_is_refused_by_the_server(
    live: LiveServer, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"hello, this is no archive")
    with MOS(live.url) as mos, pytest.raises(ApiBadRequest, match=r"no \.memcube archive"):
        mos.import_cube(path)


def test_the_commands_move_cubes_through_files_and_pipes(
    run: Run, live: LiveServer, tmp_path: Path
) -> None:
    run("create", "acme")
    with MOS(live.url) as mos:
        mos.cube("acme").add("only words")
    file = tmp_path / "out.memcube"
    assert f"{file}: " in run("export", "acme", str(file)).stdout
    assert "is there already" in run("export", "acme", str(file), code=2).stderr
    said = json.loads(run("export", "acme", str(file), "--force", "--json").stdout)
    assert (said["id"], said["bytes"]) == ("acme", file.stat().st_size)
    piped = run("export", "acme", "-").stdout_bytes
    assert run("import", "-", "--id", "b", stdin=piped).stdout == (
        "b: 1 memories with new ids, activation none\n"
    )
    said = json.loads(run("import", str(file), "--id", "c", "--json").stdout)
    assert (said["id"], said["ids_mapped"]) == ("c", 1)
    assert "exists already" in run("import", str(file), code=1).stderr
    with MOS(live.url) as mos:
        mos.cube("acme").add("since then")
    assert run("import", str(file), "--replace").stdout == (
        "acme: 1 memories with the ids they had, activation none\n"
    )
    assert run("clone", "acme", "d").stdout.startswith("d: 1 memories")
    assert run("diff", "acme", "d").stdout == ""
    with MOS(live.url) as mos:
        mos.cube("d").add("more\x1b[31m words")
    assert "more\\x1b[31m words" in run("diff", "acme", "d").stdout
    assert run("diff", "acme", "d").stdout.startswith("+ mem_")
    assert json.loads(run("diff", "acme", "d", "--json").stdout)["data"][0]["kind"] == "only_there"
    assert run("move", "acme", "local").stdout == "acme belongs to local\n"
    run("move", "acme", "nobody", code=1)
