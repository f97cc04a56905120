"""Search, documents, turns, reindex and chat on the command line, over a scripted server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import client_fakes as fakes
import httpx
import pytest
from client_fakes import Script, reply
from typer.testing import CliRunner, Result

from memos_vllm.cli import output
from memos_vllm.cli.main import app
from memos_vllm.cli.searching import source_line

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command against scripted answers and expects an exit code."""

    def invoke(script: Script, *arguments: str, code: int = 0, stdin: str | None = None) -> Result:
        monkeypatch.setattr("memos_vllm.client.MOS", lambda url, key: fakes.client(script))
        result = CliRunner().invoke(app, list(arguments), input=stdin)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return invoke


# --- search -----------------------------------------------------------------------------------


def hit(memory_id: str, text: str, **changes: object) -> dict[str, object]:
    found = fakes.hit_json(**changes)
    source = {"kind": "chunk", "title": "Handbook", "locator": "page 7"}
    return {**found, "memory": fakes.memory_json(memory_id, text=text, source=source)}


def test_search_prints_a_line_a_hit_with_its_score_and_source(run: Run) -> None:
    script = Script(reply(200, fakes.list_json(hit("m2", "Five\nworking  days."))))
    result = run(script, "memory", "search", "acme", "how long?", "--top-k", "3", "--hops", "0")
    assert result.stdout == "0.81\tm2\tHandbook, page 7\tFive working days.\n"
    assert result.stderr == ""
    assert script.body() == {"query": "how long?", "top_k": 3, "hops": 0}


def test_search_explains_the_parts_of_a_score_and_the_way_to_a_hit(run: Run) -> None:
    scores = {"dense": 0.5, "sparse": 0.25, "graph": 0.125, "recency": 0.01}
    via = [fakes.HOP_JSON, {**fakes.HOP_JSON, "origin": "m2", "kind": "next", "forward": True}]
    via[1]["detail"] = None
    body = fakes.list_json(hit("m3", "One.", scores=scores, via=via), hit("m4", "Two."))
    result = run(Script(reply(200, body)), "memory", "search", "acme", "x", "--explain")
    assert result.stdout.splitlines() == [
        "0.81\tm3\tHandbook, page 7\tOne.",
        "    dense 0.500, sparse 0.250, graph 0.125, recency 0.010",
        "    path: mem_1 <-[mentions 0.50 acme]- m2 -[next 0.50]-> m3",
        "0.81\tm4\tHandbook, page 7\tTwo.",
        "    dense 0.740, sparse 0.900, graph 0.000",
    ]


def test_search_with_json_prints_the_servers_answer_whole(run: Run) -> None:
    body = {**fakes.list_json(fakes.hit_json()), "pending": {"changes": 1, "memories": 0}}
    result = run(Script(reply(200, body)), "memory", "search", "acme", "x", "--json")
    assert json.loads(result.stdout) == body
    assert result.stderr == ""


def test_search_says_when_nothing_was_found_and_when_the_index_is_behind(run: Run) -> None:
    body = {**fakes.list_json(), "pending": {"changes": 1200, "memories": 3}}
    result = run(Script(reply(200, body)), "memory", "search", "acme", "x")
    assert result.stdout == ""
    assert "nothing was found" in result.stderr
    assert "1,203 changes are not indexed yet" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (["--tag", "a", "--tag", "b"], {"tags": ["a", "b"]}),
        (["--filter", '{"source": {"kind": "turn"}}'], {"source": {"kind": "turn"}}),
        (
            ["--filter", '{"tier": "plaintext"}', "--tag", "a"],
            {"and": [{"tier": "plaintext"}, {"tags": ["a"]}]},
        ),
    ],
)
def test_filter_and_tags_apply_together(run: Run, arguments: list[str], sent: object) -> None:
    script = Script(reply(200, fakes.list_json()))
    run(script, "memory", "search", "acme", "x", *arguments)
    assert script.body()["filter"] == sent


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([" "], "the query is blank"),
        (["x", "--filter", "{tags: a}"], "the filter is not JSON"),
        (["x", "--filter", '["a"]'], "filter must be"),
        (["x", "--filter", '{"colour": "red"}'], "colour"),
        (["x", "--filter", "[" * 100_000], "the filter is not JSON"),
        (["x", "--top-k", "0"], "top-k"),
        (["x", "--top-k", "10001"], "top-k"),
        (["x", "--hops", "4"], "hops"),
        ([], "QUERY"),
    ],
)
def test_a_search_that_cannot_be_meant_exits_2_and_sends_nothing(
    run: Run, arguments: list[str], says: str
) -> None:
    assert says in run(Script(), "memory", "search", "acme", *arguments, code=2).stderr


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ({"kind": "note", "uri": None}, ""),
        ({"kind": "chunk", "title": "Handbook", "locator": "page 7"}, "Handbook, page 7"),
        ({"kind": "file", "uri": "docs/a.md", "locator": "A > B"}, "docs/a.md, A > B"),
        (
            {"kind": "turn", "author": "Ada", "locator": "turn 3", "created_at": fakes.AT},
            "Ada, 2026-01-02",
        ),
        ({"kind": "chunk", "title": "x" * 99}, "x" * 39 + "…"),
    ],
)
def test_a_source_is_named_in_a_few_words(source: object, line: str) -> None:
    assert source_line(source) == line


def test_on_a_terminal_only_texts_are_cut_and_what_explains_a_row_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda fd: os.terminal_size((40, 20)))
    output.say_table(("id", "text"), [("m1", "x" * 99), ("m2", "y")], below=[["z" * 99]])
    assert capsys.readouterr().out.splitlines() == [
        "\x1b[1mid  text\x1b[0m",
        f"m1  {'x' * 35}…",
        f"    \x1b[2m{'z' * 99}\x1b[0m",
        "m2  y",
    ]


# --- documents --------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with three documents in `docs`."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("a.pdf", "b.html", "c.md"):
        (folder / name).write_text(f"text of {name}")
    return folder


def test_documents_are_sent_one_by_one_and_each_says_what_became_of_it(
    run: Run, docs: Path
) -> None:
    updated = {"outcome": "updated", "chunks": 1204, "added": 1, "changed": 2, "archived": 3}
    script = Script(
        reply(201, fakes.document_json("docs/a.pdf", notes=["page 3 holds no text"])),
        reply(201, fakes.document_json("docs/b.html", **updated)),
        reply(201, fakes.document_json("docs/c.md", outcome="unchanged", chunks=1, added=0)),
    )
    result = run(script, "memory", "add", "acme", "docs", "--tag", "t", "--reason", "import")
    assert result.stdout.splitlines() == [
        "mem_doc added docs/a.pdf: 2 chunks",
        "mem_doc updated docs/b.html: 1,204 chunks (1 new, 2 changed, 3 archived)",
        "mem_doc unchanged docs/c.md: 1 chunk",
    ]
    assert result.stderr.splitlines() == [
        "adding to acme: 0% 0 of 3 files, a.pdf",
        "adding to acme: 33% 1 of 3 files, b.html",
        "adding to acme: 67% 2 of 3 files, c.md",
        "adding to acme: 100% 3 of 3 files",
        "docs/a.pdf: page 3 holds no text",
    ]
    assert script.paths == ["POST /v1/memcubes/acme/documents"] * 3
    sent = script.requests[1].content
    for part in (b'filename="b.html"', b"docs/b.html", b'["t"]', b"import", b"text of b.html"):
        assert part in sent


def test_one_bad_document_is_reported_and_the_others_go_on(run: Run, docs: Path) -> None:
    (docs / "b.html").chmod(0)
    (docs / "b.html").unlink()
    (docs / "b.html").symlink_to(docs / "gone.html")
    script = Script(
        reply(400, fakes.error_json("the PDF needs a password; save it without")),
        reply(201, fakes.document_json("docs/c.md")),
    )
    result = run(script, "memory", "add", "acme", "docs", code=1)
    assert result.stdout == "mem_doc added docs/c.md: 2 chunks\n"
    assert result.stderr.splitlines()[-3:] == [
        "error: docs/a.pdf: the PDF needs a password; save it without",
        "error: docs/b.html: cannot read docs/b.html: No such file or directory",
        "2 of 3 files were not added",
    ]


@pytest.mark.parametrize("status", [400, 409, 413, 500])
def test_an_answer_about_one_file_does_not_end_the_command(
    run: Run, docs: Path, status: int
) -> None:
    script = Script(
        reply(status, fakes.error_json("not this one")),
        *[reply(201, fakes.document_json()) for _ in range(2)],
    )
    result = run(script, "memory", "add", "acme", "docs", code=1)
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "answer",
    [
        reply(404, fakes.error_json("memcube 'acme' does not exist")),
        reply(401, fakes.error_json("unknown key")),
        reply(503, fakes.error_json("the catalog is down"), Retry_After="60"),
    ],
)
def test_an_answer_that_every_file_would_get_ends_the_command_with_what_was_done(
    run: Run, docs: Path, answer: httpx.Response
) -> None:
    script = Script(reply(201, fakes.document_json("docs/a.pdf")), answer)
    result = run(script, "memory", "add", "acme", "docs", code=1)
    assert result.stdout == "mem_doc added docs/a.pdf: 2 chunks\n"
    assert "1 of 3 were added before this:" in result.stderr
    assert len(script.requests) == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    nothing = run(Script(answer), "memory", "add", "acme", "docs", "--json", code=1)
    assert nothing.stdout == ""


def test_with_json_each_document_is_one_object_also_a_bad_one(run: Run, docs: Path) -> None:
    script = Script(
        reply(201, fakes.list_json(fakes.memory_json("mem_text"))),
        reply(201, fakes.document_json("docs/a.pdf")),
        reply(400, fakes.error_json("no text in it")),
        reply(201, fakes.document_json("docs/c.md")),
    )
    result = run(script, "memory", "add", "acme", "docs", "a text", "--json", code=1)
    memory, first, second, third = json.loads(result.stdout)["data"]
    assert (memory["object"], memory["id"]) == ("memory", "mem_text")
    assert (first["outcome"], first["chunks"], second["uri"]) == ("added", 2, "docs/c.md")
    assert third == {
        "object": "document",
        "uri": "docs/b.html",
        "outcome": "failed",
        "error": "no text in it",
    }


def test_a_blank_document_is_left_out_of_a_folder_and_an_error_when_it_is_named(
    run: Run, docs: Path
) -> None:
    (docs / "a.pdf").unlink()
    (docs / "c.md").write_text(" \n")
    result = run(Script(reply(201, fakes.document_json())), "memory", "add", "acme", "docs")
    assert "docs/c.md is blank and was left out" in result.stderr
    result = run(Script(), "memory", "add", "acme", "docs/c.md", code=1)
    assert result.stderr == "error: docs/c.md: docs/c.md is blank\n"


def test_a_single_document_shows_no_progress_in_a_log(run: Run, docs: Path) -> None:
    script = Script(reply(201, fakes.document_json("docs/c.md")))
    assert run(script, "memory", "add", "acme", "docs/c.md").stderr == ""


def test_a_misspelled_file_stops_everything_before_anything_is_sent(run: Run, docs: Path) -> None:
    result = run(Script(), "memory", "add", "acme", "docs/c.md", "docs/d.pdf", code=1)
    assert "there is no file 'docs/d.pdf'" in result.stderr


# --- turns ------------------------------------------------------------------------------------


def talk(count: int) -> str:
    return "".join(f'{{"role": "user", "content": "turn {number}"}}\n' for number in range(count))


def test_add_turns_sends_the_messages_of_a_file_or_of_stdin(run: Run, tmp_path: Path) -> None:
    body = fakes.list_json(fakes.memory_json("m1"), fakes.memory_json("m2"))
    file = tmp_path / "talk.jsonl"
    file.write_text(talk(2))
    for name, stdin in ((str(file), None), ("-", talk(2))):
        script = Script(reply(201, body))
        result = run(script, "memory", "add-turns", "acme", name, "--session", "s", stdin=stdin)
        assert result.stdout == "m1\nm2\n"
        assert script.body()["session_id"] == "s"
        assert [message["content"] for message in script.body()["messages"]] == ["turn 0", "turn 1"]
    printed = run(Script(reply(201, body)), "memory", "add-turns", "acme", str(file), "--json")
    assert [memory["id"] for memory in json.loads(printed.stdout)["data"]] == ["m1", "m2"]


def test_a_session_takes_many_turns_in_several_calls(run: Run) -> None:
    def added(request: httpx.Request) -> httpx.Response:
        messages = json.loads(request.content)["messages"]
        return reply(201, fakes.list_json(*[fakes.memory_json() for _ in messages]))

    script = Script(*[added] * 11)
    result = run(script, "memory", "add-turns", "acme", "-", "--session", "s", stdin=talk(1001))
    assert len(result.stdout.splitlines()) == 1001
    assert len(script.requests) == 11
    assert result.stderr.splitlines()[0] == "adding to acme: 10% 100 of 1001"
    # Without a session, turns of two calls would not be linked.
    refused = run(Script(), "memory", "add-turns", "acme", "-", stdin=talk(1001), code=1)
    assert "give --session" in refused.stderr
    whole = Script(added)
    run(whole, "memory", "add-turns", "acme", "-", stdin=talk(1000))
    assert len(whole.body()["messages"]) == 1000


def test_turns_that_were_added_before_an_error_are_counted(run: Run) -> None:
    script = Script(
        reply(201, fakes.list_json(*[fakes.memory_json() for _ in range(100)])),
        reply(400, fakes.error_json("messages[7].content is blank")),
    )
    result = run(
        script, "memory", "add-turns", "acme", "-", "--session", "s", stdin=talk(150), code=1
    )
    assert "100 of 150 were added before this:" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: messages[7].content is blank"


# --- reindex ----------------------------------------------------------------------------------


def test_reindex_waits_with_plain_lines_and_says_what_was_done(run: Run) -> None:
    job = {"kind": "reindex", "message": "3 changes left"}
    done = {"kind": "reindex", "progress": 1.0, "message": "12 memories indexed anew"}
    script = Script(
        reply(202, fakes.job_json("queued", **job)),
        reply(200, fakes.job_json("running", **job)),
        reply(200, fakes.job_json("succeeded", **done)),
    )
    result = run(script, "cube", "reindex", "acme")
    assert result.stdout == "acme: 12 memories indexed anew\n"
    assert result.stderr.splitlines() == [
        "reindex acme: 50% 3 changes left",
        "reindex acme: 100% 12 memories indexed anew",
    ]
    assert script.paths[0] == "POST /v1/memcubes/acme/reindex"


def test_reindex_that_is_not_waited_for_names_its_job(run: Run) -> None:
    script = Script(reply(202, fakes.job_json("queued", kind="reindex")))
    result = run(script, "cube", "reindex", "acme", "--no-wait")
    assert result.stdout == "acme: reindex job job_1 is queued\n"
    failed = fakes.job_json("failed", kind="reindex", error="the index is down")
    script = Script(reply(202, fakes.job_json("queued")), reply(200, failed))
    assert "the index is down" in run(script, "cube", "reindex", "acme", code=1).stderr


def test_reindex_with_json_prints_the_job(run: Run) -> None:
    script = Script(reply(200, fakes.job_json("succeeded", kind="reindex")))
    assert json.loads(run(script, "cube", "reindex", "acme", "--json").stdout)["id"] == "job_1"


# --- chat -------------------------------------------------------------------------------------


def streamed(memos: object) -> httpx.Response:
    final = {"choices": [], "memos": memos}
    return reply(200, fakes.sse(fakes.delta_json("Five days [3]."), final))


def test_chat_says_what_was_found_and_remembered_and_what_went_wrong(run: Run) -> None:
    script = Script(streamed(fakes.RECALLED_JSON))
    result = run(script, "chat", "acme", "How long?", "--model", "m", "--remember", "fine")
    assert result.stdout == "Five days [3].\n"
    assert result.stderr.splitlines() == [
        "memory: 640 tokens, 512 cached, source resident",
        "found: [3] Handbook, page 7; [4] mem_2",
        "remembered: 2 memories; facts are read by job job_1",
        "warning: the index is behind",
    ]
    assert script.body()["memos"] == {"remember": {"mode": "fine"}}


@pytest.mark.parametrize(
    ("arguments", "memos"),
    [
        ([], None),
        (["--no-retrieve"], {"retrieve": False}),
        (["--top-k", "3"], {"retrieve": {"top_k": 3}}),
        (
            ["--remember", "fast", "--session", "s"],
            {"remember": {"mode": "fast"}, "session_id": "s"},
        ),
    ],
)
def test_chat_options_of_memory_travel_in_the_memos_object(
    run: Run, arguments: list[str], memos: object
) -> None:
    for extra in ([], ["--json"]):
        answer = reply(200, fakes.chat_json()) if extra else streamed(fakes.MEMOS_JSON)
        script = Script(answer)
        run(script, "chat", "acme", "How long?", "--model", "m", *arguments, *extra)
        assert script.body().get("memos") == memos


@pytest.mark.parametrize(
    "arguments",
    [["--top-k", "3", "--no-retrieve"], ["--top-k", "0"], ["--remember", "slow"]],
)
def test_chat_options_that_contradict_exit_2(run: Run, arguments: list[str]) -> None:
    run(Script(), "chat", "acme", "How long?", *arguments, code=2)


def test_control_characters_of_a_source_do_not_reach_the_terminal(run: Run) -> None:
    memos = {
        **fakes.MEMOS_JSON,
        "retrieved": [{"id": "m", "score": 1, "number": 1, "source": "a\x1b[2J\nb"}],
    }
    result = run(Script(streamed(memos)), "chat", "acme", "How long?", "--model", "m")
    assert "found: [1] a\\x1b[2J b" in result.stderr
    assert "\x1b" not in result.stderr
