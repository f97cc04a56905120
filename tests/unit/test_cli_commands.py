"""The commands against the real routes and catalog over a loopback port."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from typer.testing import CliRunner, Result

from memos_vllm import MOS, AsyncMOS
from memos_vllm.cli.main import app
from memos_vllm.client import ApiConflict, ApiNotFound, ApiStaleVersion
from memos_vllm.errors import ConfigurationError

Run = Callable[..., Result]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path) as server:
        yield server


@pytest.fixture
def run(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command against the live server and expects an exit code."""
    monkeypatch.setenv("MEMOS_URL", live.url)

    def invoke(*arguments: str, code: int = 0, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=stdin)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return invoke


def ids(result: Result) -> list[str]:
    return result.stdout.split()


def test_a_cube_is_made_listed_shown_and_deleted(run: Run) -> None:
    assert run("cube", "create", "acme", "--name", "Acme Ltd").stdout == "acme\n"
    assert "acme\t0\tnone\t0\t" in run("cube", "list").stdout
    shown = run("cube", "show", "acme").stdout
    assert "name: Acme Ltd" in shown
    assert "activation: none, 0 tokens" in shown
    assert "memories.active: 0" in run("cube", "stats", "acme").stdout
    assert run("cube", "delete", "acme").stdout == "deleted acme\n"
    assert run("cube", "list").stdout == ""


def test_a_cube_without_an_id_gets_one(run: Run) -> None:
    (cube_id,) = ids(run("cube", "create"))
    assert json.loads(run("cube", "show", cube_id, "--json").stdout)["id"] == cube_id


def test_an_error_is_one_sentence_on_stderr_and_exit_1(run: Run) -> None:
    result = run("cube", "show", "nobody", code=1)
    assert result.stderr == "error: memcube 'nobody' does not exist\n"
    assert result.stdout == ""
    run("cube", "create", "acme")
    assert run("cube", "create", "acme", code=1).stderr.startswith("error: ")
    assert "error: " in run("cube", "create", "Not An Id", code=1).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["cube", "lst"],
        ["cube", "list", "--nonsense"],
        ["cube", "show"],
        ["memory", "add", "acme"],
        ["memory", "add", "acme", "x", "--split", "pages"],
        ["memory", "update", "acme", "mem_1"],
        ["memory", "update", "acme", "mem_1", "--text", "a", "--file", "b"],
        ["memory", "list", "acme", "--limit", "0"],
        ["chat", "acme", " "],
        ["memory", "search", "acme", " "],
        ["memory", "add-turns", "acme"],
    ],
)
def test_misuse_exits_2_before_anything_is_sent(run: Run, arguments: list[str]) -> None:
    assert run(*arguments, code=2).stderr


def test_memories_come_from_texts_files_folders_and_stdin(run: Run, tmp_path: Path) -> None:
    run("cube", "create", "acme")
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# A\none\n# B\ntwo\n")
    (folder / "b.txt").write_text("three")
    added = ids(
        run("memory", "add", "acme", "a text", str(folder), "--split", "headings", "--tag", "t")
    )
    added += ids(run("memory", "add", "acme", "-", stdin="from stdin, with é"))
    listed = json.loads(run("memory", "list", "acme", "--json").stdout)["data"]
    by_id = {memory["id"]: memory for memory in listed}
    texts = [by_id[memory_id]["text"] for memory_id in added]
    assert texts == ["a text", "# A\none", "# B\ntwo", "three", "from stdin, with é"]
    assert by_id[added[2]]["source"]["locator"] == "B"
    assert by_id[added[1]]["tags"] == ["t"]
    found = run("memory", "list", "acme", "--query", "three").stdout.splitlines()
    assert [line.split("\t")[0] for line in found] == [added[3]]
    assert len(run("memory", "list", "acme", "--limit", "2").stdout.splitlines()) == 2


def test_no_text_is_added_when_one_is_bad(run: Run, tmp_path: Path) -> None:
    run("cube", "create", "acme")
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("good")
    bad.write_bytes(b"\xff")
    result = run("memory", "add", "acme", str(good), str(bad), "--split", "none", code=1)
    assert f"{bad} is not UTF-8" in result.stderr
    assert run("memory", "list", "acme").stdout == ""


def test_one_bad_document_keeps_no_other_back(run: Run, tmp_path: Path) -> None:
    run("cube", "create", "acme")
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("good")
    bad.write_bytes(b"\xff")
    result = run("memory", "add", "acme", str(bad), str(good), code=1)
    assert f"error: {bad.as_posix()}: byte 0 of the file" in result.stderr
    assert "1 of 2 files were not added" in result.stderr
    assert result.stdout.endswith(f" added {good.as_posix()}: 1 chunk\n")
    assert "good" in run("memory", "list", "acme").stdout


def test_many_memories_go_in_batches_with_a_line_of_progress_each(run: Run, tmp_path: Path) -> None:
    run("cube", "create", "acme")
    file = tmp_path / "many.md"
    file.write_text("".join(f"# {number}\ntext {number}\n" for number in range(250)))
    result = run("memory", "add", "acme", str(file), "--split", "headings")
    assert len(ids(result)) == 250
    assert result.stderr.splitlines() == [
        "adding to acme: 40% 100 of 250",
        "adding to acme: 80% 200 of 250",
        "adding to acme: 100% 250 of 250",
    ]
    assert len(run("memory", "list", "acme").stdout.splitlines()) == 250


def test_the_life_of_a_memory(run: Run, tmp_path: Path) -> None:
    run("cube", "create", "acme")
    (memory,) = ids(run("memory", "add", "acme", "Five days."))
    (tmp_path / "new.txt").write_text("Six days.")
    run("memory", "update", "acme", memory, "--file", str(tmp_path / "new.txt"), "--reason", "law")
    shown = run("memory", "show", "acme", memory).stdout
    assert "version: 2" in shown
    assert shown.endswith("\n\nSix days.\n")
    stale = run("memory", "update", "acme", memory, "--text", "x", "--if-version", "1", code=1)
    assert "version" in stale.stderr
    assert "archived" in run("memory", "archive", "acme", memory).stdout
    assert "active" in run("memory", "restore", "acme", memory).stdout
    (other,) = ids(run("memory", "add", "acme", "Or seven."))
    new = run("memory", "merge", "acme", memory, other, "--text", "Six or seven days.").stdout
    assert "active at version 1" in new
    assert "state: merged" in run("memory", "show", "acme", memory).stdout
    run("memory", "merge", "acme", other, code=1)
    history = run("memory", "history", "acme", memory).stdout
    assert "law" in history
    assert "Five days." in history
    erased = run("memory", "erase", "acme", memory)
    assert erased.stdout == f"erased {memory}\n"
    # Waited for: the job has ended.
    assert "erase acme: 100%" in erased.stderr
    assert "does not exist" in run("memory", "show", "acme", memory, code=1).stderr


def test_control_characters_of_a_memory_do_not_reach_the_terminal(run: Run) -> None:
    run("cube", "create", "acme")
    (memory,) = ids(run("memory", "add", "acme", "--text", "a\x1b[2Jb\x9b1mc"))
    for command in (["memory", "show", "acme", memory], ["memory", "list", "acme"]):
        printed = run(*command).stdout
        assert "\\x1b[2J" in printed
        assert not {"\x1b", "\x9b"} & set(printed)


def test_promote_waits_and_reports_plain_lines(run: Run, live: LiveServer) -> None:
    run("cube", "create", "acme")
    run("memory", "add", "acme", "Five days.")
    result = run("cube", "promote", "acme")
    assert result.stdout.startswith("acme: activation ")
    assert result.stderr.splitlines()[-1].startswith("bake acme: ")
    assert "tiers: 0 plaintext, 1 activation" in run("cube", "show", "acme").stdout
    assert live.gateway.checked
    assert run("cube", "demote", "acme").stdout.startswith("acme: activation none")


def test_promote_with_json_prints_the_ended_job_and_nothing_else(run: Run) -> None:
    run("cube", "create", "acme")
    (memory,) = ids(run("memory", "add", "acme", "Five days."))
    result = run("cube", "promote", "acme", memory, "--json")
    assert json.loads(result.stdout)["state"] == "succeeded"
    assert result.stderr == ""


def test_a_failed_bake_exits_1_with_the_reason(run: Run, live: LiveServer) -> None:
    live.job_failure = "the store is full"
    run("cube", "create", "acme")
    run("memory", "add", "acme", "Five days.")
    assert "the store is full" in run("cube", "promote", "acme", code=1).stderr


def test_a_promote_that_is_not_waited_for_names_its_job(run: Run, live: LiveServer) -> None:
    live.gateway.on_wake = lambda: None
    run("cube", "create", "acme")
    run("memory", "add", "acme", "Five days.")
    assert "bake job job_" in run("cube", "promote", "acme", "--no-wait").stdout
    late = run("cube", "promote", "acme", "--timeout", "0.1", code=1)
    assert "it goes on in the server" in late.stderr
    assert "parametric" in run("cube", "promote", "acme", "--to", "parametric", code=1).stderr


def test_a_job_is_listed_shown_awaited_and_cancelled(run: Run, live: LiveServer) -> None:
    bake, live.gateway.on_wake = live.gateway.on_wake, lambda: None
    run("cube", "create", "acme")
    run("memory", "add", "acme", "Five days.")
    job = json.loads(run("cube", "promote", "acme", "--no-wait", "--json").stdout)["id"]
    assert run("jobs", "list", "acme").stdout.startswith(f"{job}\tbake\tqueued\t0%\t")
    assert run("jobs", "show", job).stdout.startswith(f"{job}: bake queued, 0%: ")
    bake()
    assert run("jobs", "wait", job).stdout.startswith(f"{job}: bake succeeded, 100%")
    assert "succeeded already" in run("jobs", "cancel", job, code=1).stderr
    live.gateway.on_wake = lambda: None
    run("memory", "add", "acme", "Six days.")
    job = json.loads(run("cube", "promote", "acme", "--no-wait", "--json").stdout)["id"]
    assert json.loads(run("jobs", "cancel", job, "--json").stdout)["state"] == "cancelled"
    run("jobs", "wait", job, code=1)


def test_a_cube_is_renamed_and_keeps_what_others_know(run: Run) -> None:
    for cube in ("acme", "session.1"):
        run("cube", "create", cube)
    assert run("cube", "update", "acme", "--name", "Acme").stdout == "acme: version 2\n"
    assert "name: Acme" in run("cube", "show", "acme").stdout
    run("cube", "update", "acme", code=2)
    run("memory", "add", "session.1", "She moved to Leeds.")
    kept = run("memory", "keep", "acme", "--from", "session.1", "--reason", "said twice")
    assert kept.stdout.endswith(" She moved to Leeds.\n")


def test_chat_streams_the_answer_and_says_what_it_was_built_on(run: Run, live: LiveServer) -> None:
    result = run("chat", "acme", "How long?", "--temperature", "0", "--system", "Be brief.")
    assert result.stdout == "Refunds take five working days.\n"
    assert result.stderr == "memory: 640 tokens, 512 cached, source resident\n"
    (asked,) = live.chats
    assert asked["memcube_id"] == "acme"
    assert asked["model"] == "fake-model"
    assert asked["temperature"] == 0
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]


def test_chat_takes_its_message_from_stdin_and_prints_json(run: Run, live: LiveServer) -> None:
    result = run("chat", "acme", "--json", "--no-activation", stdin="How long?\n")
    assert json.loads(result.stdout)["memos"]["activation"]["source"] == "resident"
    assert live.chats[0]["messages"] == [{"role": "user", "content": "How long?"}]
    assert live.chats[0]["memos"] == {"activation": False}


def test_the_audit_log_is_shown_newest_last_and_verified(run: Run) -> None:
    run("cube", "create", "acme")
    run("memory", "add", "acme", "One.")
    run("memory", "add", "acme", "Two.")
    entries = json.loads(run("audit", "tail", "acme", "-n", "2", "--json").stdout)["data"]
    assert len(entries) == 2
    assert entries[0]["seq"] < entries[1]["seq"]
    assert entries[1]["seq"] == max(
        entry["seq"] for entry in json.loads(run("audit", "tail", "acme", "--json").stdout)["data"]
    )
    assert len(run("audit", "tail", "acme").stdout.splitlines()) == 3
    assert json.loads(run("audit", "verify", "--json").stdout)["ok"] is True


def test_every_command_with_json_prints_one_json_document(run: Run, tmp_path: Path) -> None:
    document, talk = tmp_path / "a.md", tmp_path / "talk.json"
    document.write_text("# A\none\n")
    talk.write_text('[{"role": "user", "content": "Hello"}]')
    for cube in ("acme", "other"):
        json.loads(run("cube", "create", cube, "--json").stdout)
    memory, more = (
        json.loads(run("memory", "add", "acme", text, "--json").stdout)["data"][0]["id"]
        for text in ("One.", "More.")
    )
    for command in (
        ["cube", "list"],
        ["cube", "show", "acme"],
        ["cube", "update", "acme", "--name", "Acme", "--label", "a"],
        ["cube", "stats", "acme"],
        ["cube", "promote", "acme", memory],
        ["cube", "demote", "acme", memory],
        ["cube", "reindex", "acme"],
        ["memory", "list", "acme"],
        ["memory", "show", "acme", memory],
        ["memory", "update", "acme", memory, "--text", "Two."],
        ["memory", "archive", "acme", memory],
        ["memory", "restore", "acme", memory],
        ["memory", "history", "acme", memory],
        ["memory", "add", "acme", str(document)],
        ["memory", "add-turns", "acme", str(talk)],
        ["memory", "merge", "acme", memory, more],
        ["memory", "keep", "other", "--from", "acme"],
        ["jobs", "list", "acme"],
        ["audit", "tail", "acme"],
        ["audit", "verify"],
        ["memory", "erase", "acme", memory],
        ["cube", "delete", "acme"],
    ):
        assert isinstance(json.loads(run(*command, "--json").stdout), dict), command


def test_serve_hands_every_argument_on_as_it_was_typed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    stand_in = types.ModuleType("memos_vllm.engine.supervisor")
    stand_in.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "memos_vllm.engine.supervisor", stand_in)
    arguments = ["m", "-tp", "2", "--json", "--data-dir=x", "--", "--url", "", "--help=all", "m"]
    run("serve", *arguments, code=7)
    assert seen == [arguments]


def test_serve_help_lists_our_options_and_says_that_vllms_work(run: Run) -> None:
    for arguments in (["--help"], ["some/model", "--help"]):
        printed = run("serve", *arguments).stdout
        assert "--data-dir" in printed
        assert "Every option of `vllm serve` works" in printed
    run("serve", code=2)


def test_models_prepare_prints_the_folder_or_json(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def prepare(name: str, *, target: Path | None, progress: Any) -> Path:
        if name == "nothing":
            raise ConfigurationError("there is no model 'nothing'")
        if progress is not None:
            progress("fetching")
        return target or tmp_path / name

    monkeypatch.setattr("memos_vllm.models.prepare.prepare", prepare)
    result = run("models", "prepare", "small")
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'small'}\n", "fetching\n")
    result = run("models", "prepare", "small", "--target", str(tmp_path), "--json")
    assert json.loads(result.stdout) == {"path": str(tmp_path)}
    assert run("models", "prepare", "nothing", code=1).stderr == (
        "error: there is no model 'nothing'\n"
    )


def test_the_python_client_works_against_the_real_routes(live: LiveServer) -> None:
    with MOS(live.url) as mos:
        cube = mos.create_cube("acme", preamble="You know:", labels=["private"])
        assert mos.health().ready
        assert "model" in mos.status()
        with pytest.raises(ApiConflict):
            mos.create_cube("acme")
        first, second = cube.add(["One.", {"text": "Two.", "tags": ["t"]}], metadata={"n": 1})
        assert (first.metadata, second.tags) == ({"n": 1}, ("t",))
        with pytest.raises(ApiStaleVersion):
            cube.update_memory(first.id, text="x", version=first.version + 5)
        with pytest.raises(ApiNotFound):
            cube.memory("mem_unknown")
        assert cube.update(description="All of it").description == "All of it"
        job = cube.promote("all", to="activation", wait=True)
        assert mos.job(job.id) == job
        assert [listed.id for listed in cube.jobs()] == [job.id]
        assert cube.info().tiers.activation == 2
        assert [memory.id for memory in cube.memories(tier="activation")] == [first.id, second.id]
        assert {"created", "added"} & {str(v["change"]) for v in cube.history(first.id)}
        cube.erase(first.id)
        assert cube.stats()["memories"]["active"] == 1
        assert mos.verify_audit()["ok"]
        assert len(list(cube.audit(limit=2))) == 2
        cube.delete()
        assert list(mos.cubes()) == []


def test_the_async_client_works_against_the_real_routes(live: LiveServer) -> None:
    async def use() -> list[str]:
        async with AsyncMOS(live.url) as mos:
            cube = await mos.create_cube("acme")
            await cube.add([f"Memory {number}." for number in range(5)])
            await cube.promote(to="activation", wait=True)
            reply, *_ = await asyncio.gather(*[cube.chat("How long?") for _ in range(5)])
            assert reply.text == "Refunds take five working days."
            return [memory.text async for memory in cube.memories(limit=3)]

    assert asyncio.run(use()) == ["Memory 0.", "Memory 1.", "Memory 2."]
