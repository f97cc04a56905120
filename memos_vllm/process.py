"""A server as a child process: for the demo, the benchmarks and the tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from memos_vllm.errors import MemosError

_POLL_SECONDS = 0.25
_STOP_SECONDS = 30.0
_LOG_TAIL_LINES = 25
_SHARED_MEMORY = Path("/dev/shm")


class ServerFailed(MemosError):
    """The child ended, or was not ready in time; the message ends with its last log lines."""


class ServerProcess:
    """One server and every process that it starts, in a process group of their own.

    What vLLM leaves behind when it is killed, sockets and shared memory, is removed.

    Args:
        command: the argument vector; the port is appended as `--port`.
        log_path: where stdout and stderr go; appended to, so restarts share it.
        environment: added to this process's.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._child: subprocess.Popen[bytes] | None = None
        self._sockets: Path | None = None
        self.log_path = log_path
        self.port = port or free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._child is not None, "not started"
        return self._child.pid

    def start(self, *, timeout_seconds: float = 240.0) -> Self:
        """Start and wait until it answers.

        Raises:
            ServerFailed: it ended or was not ready in time; nothing of it is left.
        """
        # The path of a Unix socket has at most 107 bytes: not below a test's own folder.
        self._sockets = Path(tempfile.mkdtemp(prefix="memos-"))
        with self.log_path.open("ab") as log:
            self._child = subprocess.Popen(
                [*self._command, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={"VLLM_RPC_BASE_PATH": str(self._sockets), **self._environment},
                start_new_session=True,
            )
        try:
            self._wait_until_ready(time.monotonic() + timeout_seconds)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """End it as Ctrl-C does; kill what does not end."""
        if self._child is None:
            return
        segments = _shared_segments(self._child.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_STOP_SECONDS)
        self.kill()
        _remove(segments)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes meanwhile: idle ones of vLLM spin, and would disturb another
        server that is being measured."""
        if self._child is None:
            yield
            return
        os.killpg(self._child.pid, signal.SIGSTOP)
        try:
            # A process that runs on another core takes the signal a moment later.
            deadline = time.monotonic() + _STOP_SECONDS
            while _group_runs(self._child.pid) and time.monotonic() < deadline:
                time.sleep(0.001)
            yield
        finally:
            os.killpg(self._child.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill -9 it and all its children, and wait until they are gone."""
        if self._child is None:
            return
        segments = _shared_segments(self._child.pid)
        # Children stay in the group; vLLM's own start sessions only for nested servers.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        deadline = time.monotonic() + _STOP_SECONDS
        while _group_lives(self._child.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        _remove(segments)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        self._child = None

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.log_path.read_text(errors="replace").splitlines()
            return "\n".join(lines[-_LOG_TAIL_LINES:])
        return ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_ready(self, deadline: float) -> None:
        assert self._child is not None
        # One client: making one loads certificates, which takes longer than the request.
        with httpx.Client(base_url=self.url, timeout=2.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                if self._child.poll() is not None:
                    raise ServerFailed(
                        f"the server ended with exit code {self._child.returncode}:\n"
                        f"{self.log_tail()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == httpx.codes.OK:
                        return
                time.sleep(_POLL_SECONDS)
        raise ServerFailed(f"the server was not ready in time:\n{self.log_tail()}")


def memos_command(model: str, *options: str) -> list[str]:
    """The argument vector of `memos-vllm serve` in this Python."""
    return [sys.executable, "-m", "memos_vllm.cli.main", "serve", model, *options]


def plain_vllm_command(model: str, *options: str) -> list[str]:
    """The argument vector of vLLM's own server, without us."""
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, "--model", model, "--host", "127.0.0.1", *options]


def free_port() -> int:
    """A port of the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; zombies of other parents do not count."""
    return any(state != "Z" for _, state in _members(group))


def _group_runs(group: int) -> bool:
    """Whether a process of the group has not stopped yet."""
    return any(state not in "TtZX" for _, state in _members(group))


def _shared_segments(group: int) -> list[Path]:
    """Shared memory and semaphores that the group's processes have mapped: killed, they cannot
    remove them."""
    inodes = set()
    for process, _ in _members(group):
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                # address, permissions, offset, device, inode, path
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{_SHARED_MEMORY}/"):
                    inodes.add(int(fields[4]))
    # Not by the path: a semaphore is mapped under a name that it had before.
    found = []
    for path in _SHARED_MEMORY.glob("*"):
        with contextlib.suppress(OSError):
            if path.stat().st_ino in inodes:
                found.append(path)
    return found


def _remove(segments: Iterable[Path]) -> None:
    for segment in segments:
        segment.unlink(missing_ok=True)


def _members(group: int) -> Iterator[tuple[Path, str]]:
    """Each process of a group as its folder in /proc, and its state."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield entry.parent, fields[0]
