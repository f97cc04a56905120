"""Documents, turns, search and reindex from the command line and the client to the real index."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_harness import build_app
from fastapi import FastAPI
from live_server import LiveServer, live_server
from typer.testing import CliRunner, Result

from memos_vllm import MOS, AsyncMOS
from memos_vllm.api.gateway import EngineGateway
from memos_vllm.cli.main import app
from memos_vllm.client import ApiBadRequest
from memos_vllm.client.documents import MAX_DOCUMENT_BYTES
from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.store import PlaintextStore

Run = Callable[..., Result]

HANDBOOK = """\
# Handbook

## Refunds

Refunds take five working days.

## Returns

Parcels go to the depot in Leeds.
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The live server with a real search by words; one, as opening its index takes a while."""
    folder = tmp_path_factory.mktemp("search")
    stores: list[PlaintextStore] = []

    def build(mos: Callable[[], Mos], gateway: Callable[[], EngineGateway]) -> FastAPI:
        store = open_plaintext(ServerSettings(data_dir=folder, embedder="none"), mos())
        store.start()
        stores.append(store)
        return build_app(mos, gateway, lambda: store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("live_server.build_app", build)
        with live_server(folder) as server:
            try:
                yield server
            finally:
                stores[0].close()


@pytest.fixture
def live(shared: LiveServer) -> Iterator[LiveServer]:
    """The shared server with an empty cube."""
    with MOS(shared.url) as mos:
        mos.create_cube("acme")
        yield shared
        mos.delete_cube("acme")


@pytest.fixture
def run(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("MEMOS_URL", live.url)

    def invoke(*arguments: str, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=stdin)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return invoke


def test_a_document_is_added_found_changed_and_left_alone(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "handbook.md"
    file.write_text(HANDBOOK)
    assert " added " in run("memory", "add", "acme", str(file), "--tag", "book").stdout
    found = run("memory", "search", "acme", "how long do refunds take?", "--tag", "book").stdout
    assert found.splitlines()[0].endswith("Refunds take five working days.")
    assert "Handbook" in found
    assert " unchanged " in run("memory", "add", "acme", str(file)).stdout
    file.write_text(HANDBOOK.replace("Leeds", "York"))
    assert "1 changed" in run("memory", "add", "acme", str(file)).stdout
    found = run("memory", "search", "acme", "which depot in York?").stdout
    assert "the depot in York" in found.splitlines()[0]


def test_a_folder_with_a_bad_file_gives_the_good_ones(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\nnot really")
    (folder / "good.html").write_text("<html><body><p>Refunds take five days.</p></body></html>")
    (folder / "other.txt").write_bytes(b"caf\xe9 au lait")
    result = run("memory", "add", "acme", str(folder), "--json", code=1)
    outcomes = {
        Path(document["uri"]).name: document["outcome"]
        for document in json.loads(result.stdout)["data"]
    }
    assert outcomes == {"good.html": "added", "broken.pdf": "failed", "other.txt": "failed"}
    assert "Refunds take five days." in run("memory", "search", "acme", "refunds").stdout


def test_turns_are_found_with_their_speaker_and_the_turns_beside_them(run: Run) -> None:
    talk = [
        {"role": "user", "name": "Ada", "content": "Where is the zeppelin?", "created_at": when}
        for when in ("2026-01-02T03:04:05Z",)
    ] + [{"role": "assistant", "content": "In the hangar."}]
    run("memory", "add-turns", "acme", "-", "--session", "s", stdin=json.dumps(talk))
    first, second = run("memory", "search", "acme", "zeppelin", "--explain").stdout.split("0.")[:2]
    assert first == ""
    assert "Ada, 2026-01-02\tWhere is the zeppelin?" in second
    found = json.loads(run("memory", "search", "acme", "zeppelin", "--json").stdout)["data"]
    assert [hit["memory"]["text"] for hit in found] == ["Where is the zeppelin?", "In the hangar."]
    (hop,) = found[1]["via"]
    assert (hop["kind"], hop["origin"]) == ("next", found[0]["memory"]["id"])


def test_a_filter_that_the_command_line_lets_pass_is_one_that_the_server_takes(run: Run) -> None:
    run("memory", "add", "acme", "Refunds take five days.", "--tag", "a")
    where = '{"or": [{"tier": "plaintext"}, {"not": {"metadata": {"year": {"gte": 2020}}}}]}'
    found = run("memory", "search", "acme", "refunds", "--filter", where, "--tag", "a").stdout
    assert "Refunds take five days." in found
    assert run("memory", "search", "acme", "refunds", "--tag", "b").stdout == ""


def test_reindex_queues_a_job_and_waits_for_it(run: Run) -> None:
    run("memory", "add", "acme", "Refunds take five days.")
    assert json.loads(run("cube", "reindex", "acme", "--json").stdout)["state"] == "succeeded"
    assert run("cube", "reindex", "acme").stdout.startswith("acme: ")
    assert "does not exist" in run("cube", "reindex", "nobody", code=1).stderr


def test_both_clients_search_what_they_have_added(live: LiveServer) -> None:
    with MOS(live.url) as mos:
        cube = mos.cube("acme")
        document = cube.add_document(
            HANDBOOK.encode(), filename="händbook.md", metadata={"year": 2026}, labels=["open"]
        )
        assert (document.outcome, document.uri) == ("added", "händbook.md")
        assert len(document.memories) == document.chunks
        (hit, *_) = cube.search("how long do refunds take?", top_k=3, explain=True)
        assert hit.memory.text == "Refunds take five working days."
        assert hit.memory.metadata["year"] == 2026
        assert hit.scores["sparse"] > 0
        assert len(hit.scores) > len(cube.search("refunds")[0].scores)
        with pytest.raises(ApiBadRequest, match="top_k"):
            cube.search("refunds", top_k=0)
        with pytest.raises(ApiBadRequest, match="filter"):
            cube.search("refunds", filter={"colour": "red"})
        with pytest.raises(ApiBadRequest, match="empty"):
            cube.add_document(b"", filename="a.txt")

    async def use() -> list[str]:
        async with AsyncMOS(live.url) as mos:
            cube = mos.cube("acme")
            await cube.add_turns([{"role": "user", "content": "Refunds are slow."}])
            return [hit.memory.text for hit in await cube.search("slow refunds", top_k=1)]

    assert asyncio.run(use()) == ["Refunds are slow."]


def test_the_client_takes_documents_as_large_as_the_server_does() -> None:
    from memos_vllm.api.documents import MAX_FILE_BYTES

    assert MAX_DOCUMENT_BYTES == MAX_FILE_BYTES
