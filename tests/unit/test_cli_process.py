"""The command line as a process: start-up, pipes, signals, terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, live_server

from memos_vllm import MOS

COMMAND = [sys.executable, "-m", "memos_vllm.cli.main"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path) as server:
        with MOS(server.url) as mos:
            mos.create_cube("acme").add(
                [f"Memory {number}. " + "x" * 2000 for number in range(200)]
            )
        yield server


def environment(live: LiveServer | None = None, **extra: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    named = {} if live is None else {"MEMOS_URL": live.url}
    return {**inherited, "PYTHONPATH": str(ROOT), "TERM": "xterm", **named, **extra}


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
        **options,  # type: ignore[call-overload]
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from memos_vllm.cli.main import main\n"
        "sys.argv = ['memos-vllm', '--help']\n"
        "try: main()\n"
        "except SystemExit as error: assert error.code == 0\n"
        "heavy = {'torch', 'vllm', 'ray', 'numpy', 'httpx', 'pydantic', 'sqlalchemy', 'fastapi',"
        " 'qdrant_client', 'qdrant_edge', 'onnxruntime', 'tokenizers', 'pypdf', 'docx'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment(),
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"
    for name in ("serve", "demo", "cube", "memory", "chat", "models", "doctor", "audit"):
        assert f"\n  {name} " in done.stdout


def test_importing_the_client_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, memos_vllm; memos_vllm.MOS; "
        "heavy = {'torch', 'vllm', 'ray', 'sqlalchemy', 'fastapi', 'numpy', 'qdrant_client'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment(),
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["memory", "--help"], 0),
        (["--nonsense"], 2),
        (["cube"], 2),
        (["cube", "list", "--url", "http://127.0.0.1:9"], 1),
        (["cube", "list", "--url", "not a url"], 1),
        (["memory", "add", "acme", "missing.md"], 1),
    ],
)
def test_exit_codes_tell_done_from_failed_from_misused(arguments: list[str], code: int) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")


def test_a_reader_that_goes_away_is_no_traceback(live: LiveServer) -> None:
    process = subprocess.Popen(
        [*COMMAND, "memory", "list", "acme", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(live),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 1
    process.stderr.close()
    assert errors == b""


def test_a_short_answer_to_a_reader_that_is_gone_is_no_complaint_at_exit_either(
    live: LiveServer,
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "cube", "list"],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        env=environment(live),
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_output_without_unicode_spells_characters_out(live: LiveServer) -> None:
    with MOS(live.url) as mos:
        (memory,) = mos.cube("acme").add("five … days")
    done = subprocess.run(
        [*COMMAND, "memory", "show", "acme", memory.id],
        capture_output=True,
        timeout=60,
        check=True,
        env=environment(live, PYTHONIOENCODING="ascii"),
    )
    assert rb"five \u2026 days" in done.stdout


def test_ctrl_c_exits_130_in_the_middle_of_an_answer(live: LiveServer) -> None:
    live.pace_seconds = 5
    process = subprocess.Popen(
        [*COMMAND, "chat", "acme", "How long?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(live),
    )
    assert process.stdout is not None
    assert process.stdout.read(8) == "Refunds "
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "interrupted"


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *arguments: str, live: LiveServer) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environment(live),
        )
        os.close(theirs)
        self.shown = ""

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self._ours, 4096).decode()

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        try:
            while chunk := os.read(self._ours, 4096):
                self.shown += chunk.decode()
        except OSError:
            # Linux says EIO when the other side has closed the terminal.
            pass
        os.close(self._ours)
        return self._process.wait(timeout=30)


def test_chat_on_a_terminal_is_a_conversation_until_ctrl_d(live: LiveServer) -> None:
    terminal = Terminal("chat", "acme", live=live)
    terminal.read_until("> ")
    terminal.type("How long?\n")
    terminal.read_until("source resident")
    assert "\x1b[2mmemory: 640 tokens" in terminal.shown
    terminal.type("And returns?\n")
    while len(live.chats) < 2:
        time.sleep(0.01)
    terminal.type("\x04")
    assert terminal.end() == 0
    roles = [message["role"] for message in live.chats[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert live.chats[1]["messages"][1]["content"] == "Refunds take five working days."


def test_turns_of_a_conversation_are_remembered_in_one_session(live: LiveServer) -> None:
    terminal = Terminal("chat", "acme", "--remember", "fast", live=live)
    terminal.read_until("> ")
    for count in (1, 2):
        terminal.type("How long?\n")
        while len(live.chats) < count:
            time.sleep(0.01)
    terminal.type("\x04")
    assert terminal.end() == 0
    first, second = (chat["memos"] for chat in live.chats)
    assert first["remember"] == {"mode": "fast"}
    assert first["session_id"] == second["session_id"] != ""


def test_documents_on_a_terminal_show_a_bar_and_leave_a_line_each(
    live: LiveServer, tmp_path: Path
) -> None:
    for name in ("a.md", "b.txt"):
        (tmp_path / name).write_text("text")
    terminal = Terminal(
        "memory", "add", "acme", str(tmp_path / "a.md"), str(tmp_path / "b.txt"), live=live
    )
    assert terminal.end() == 0
    lines = terminal.shown.splitlines()
    assert lines[-2].endswith("a.md: 1 chunk")
    assert lines[-1].endswith("b.txt: 1 chunk")


def test_a_terminal_is_asked_before_a_cube_is_deleted(live: LiveServer) -> None:
    terminal = Terminal("cube", "delete", "acme", live=live)
    terminal.read_until("Delete cube acme with 200 memories for good? [y/N]")
    terminal.type("n\n")
    assert terminal.end() == 1
    assert "nothing was changed" in terminal.shown
    terminal = Terminal("cube", "delete", "acme", "--yes", live=live)
    assert terminal.end() == 0
    with MOS(live.url) as mos:
        assert list(mos.cubes()) == []


def test_tables_on_a_terminal_keep_ids_whole(live: LiveServer) -> None:
    with MOS(live.url) as mos:
        memories = list(mos.cube("acme").memories(limit=3))
    terminal = Terminal("memory", "list", "acme", "--limit", "3", live=live)
    assert terminal.end() == 0
    assert "version" in terminal.shown
    for memory in memories:
        assert memory.id in terminal.shown


def test_promote_on_a_terminal_shows_a_bar_and_leaves_one_line(live: LiveServer) -> None:
    terminal = Terminal("cube", "promote", "acme", live=live)
    assert terminal.end() == 0
    assert "acme: activation" in terminal.shown.splitlines()[-1]


def test_json_is_not_wrapped_or_coloured_on_a_terminal(live: LiveServer) -> None:
    terminal = Terminal("cube", "show", "acme", "--json", live=live)
    assert terminal.end() == 0
    assert json.loads(terminal.shown)["id"] == "acme"
