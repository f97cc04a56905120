"""What is left of a server process after it was stopped or killed: nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memos_vllm.process import ServerProcess, family_of

# Answers /health, and holds what vLLM's processes hold: shared memory and a socket.
SERVER = """
import http.server, os, pathlib, signal, socket, sys
from multiprocessing import get_context, resource_tracker, shared_memory

folder = pathlib.Path(os.environ["VLLM_RPC_BASE_PATH"])
segment = shared_memory.SharedMemory(create=True, size=4096)
# vLLM's segments outlive the tracker of a process that was killed.
resource_tracker.unregister(segment._name, "shared_memory")
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(folder / "rpc"))
semaphore = get_context("spawn").Semaphore()
resource_tracker.unregister(semaphore._semlock.name, "semaphore")
names = [segment.name, "sem." + semaphore._semlock.name.lstrip("/")]
pathlib.Path(sys.argv[1]).write_text(" ".join([str(folder), *names]))

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Health).serve_forever()
"""

# Its child is not told that it ends, as an engine whose API server went first.
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
{SERVER}"""


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_sockets_and_shared_memory_go_with_the_server(tmp_path: Path, end: str) -> None:
    note = tmp_path / "note"
    server = ServerProcess(
        [sys.executable, "-c", SERVER, str(note)], log_path=tmp_path / "server.log"
    )
    server.start(timeout_seconds=30)
    folder, *names = note.read_text().split()
    left = [Path(folder, "rpc"), *(Path("/dev/shm", name) for name in names)]
    assert [path.exists() for path in left] == [True] * 3
    getattr(server, end)()
    assert [path.exists() for path in left] == [False] * 3
    assert not Path(folder).exists()


def test_a_paused_server_goes_on_where_it_was(tmp_path: Path) -> None:
    server = ServerProcess(
        [sys.executable, "-c", SERVER, str(tmp_path / "note")], log_path=tmp_path / "server.log"
    )
    with server:
        state = Path(f"/proc/{server.pid}/stat")
        with server.paused():
            assert state.read_text().rpartition(")")[2].split()[0] == "T"
        assert state.read_text().rpartition(")")[2].split()[0] != "T"


def test_a_child_that_outlives_the_stopped_server_is_ended_too(tmp_path: Path) -> None:
    server = ServerProcess(
        [sys.executable, "-c", PARENT, str(tmp_path / "note")], log_path=tmp_path / "server.log"
    )
    server.start(timeout_seconds=30)
    family = family_of(server.pid)
    assert len(family) > 1
    server.stop()
    assert [one for one in family if one.is_alive()] == []
