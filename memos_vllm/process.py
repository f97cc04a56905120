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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from memos_vllm.errors import MemosError

_POLL_SECONDS = 0.25
_STOP_SECONDS = 30.0
_LOG_TAIL_LINES = 25
_SHARED_MEMORY = Path("/dev/shm")
# Places in what /proc says of a process, counted from its state.
_STATE, _PARENT, _BEGAN = 0, 1, 19


class ServerFailed(MemosError):
    """The child ended, or was not ready in time; the message ends with its last log lines."""


class ServerProcess:
    """One server and every process that it starts.

    What vLLM leaves behind when it is killed, sockets and shared memory, is removed.

    Args:
        command: the argument vector; the port is appended as `port_option`.
        log_path: where stdout and stderr go; appended to, so restarts share it.
        environment: added to this process's.
        health_path: answers 200 when it is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        port_option: str = "--port",
        health_path: str = "/health",
    ) -> None:
        self._command = list(command)
        self._port_option = port_option
        self._health_path = health_path
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
                [*self._command, self._port_option, str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={
                    "VLLM_RPC_BASE_PATH": str(self._sockets),
                    # Ray's sockets and logs; killed, it cannot remove them either.
                    **self._environment,
                    "TMPDIR": str(self._sockets),
                },
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
        # Noted while it lives: afterwards nobody can tell whose children were left.
        family = family_of(self._child.pid)
        segments = _shared_segments(family)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_STOP_SECONDS)
        self._kill(family)
        _remove(segments)

    def wait_until_ended(self, *, timeout_seconds: float = 60.0) -> None:
        """Until it has ended by itself.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        assert self._child is not None, "not started"
        self._child.wait(timeout_seconds)
        self.kill()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes meanwhile: idle ones of vLLM spin, and would disturb another
        server that is being measured."""
        if self._child is None:
            yield
            return
        family = family_of(self._child.pid)
        signal_all(family, signal.SIGSTOP)
        try:
            # A process that runs on another core takes the signal a moment later.
            deadline = time.monotonic() + _STOP_SECONDS
            while any(one.state() not in "TtZX" for one in family) and time.monotonic() < deadline:
                time.sleep(0.001)
            yield
        finally:
            signal_all(family, signal.SIGCONT)

    def kill(self) -> None:
        """Kill -9 it and all its children, and wait until they are gone."""
        if self._child is not None:
            self._kill(family_of(self._child.pid))

    def _kill(self, family: Sequence[Process]) -> None:
        assert self._child is not None
        segments = _shared_segments(family)
        deadline = time.monotonic() + _STOP_SECONDS
        while family := [one for one in _with_children(family) if one.is_alive()]:
            if time.monotonic() >= deadline:
                break
            # One that was being started meanwhile belongs to one of these.
            signal_all(family, signal.SIGKILL)
            self._child.poll()
            time.sleep(0.02)
        self._child.wait()
        _remove(segments)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        self._child = None

    def pids(self) -> list[int]:
        """It and every process that it or its children have started."""
        assert self._child is not None, "not started"
        return [one.pid for one in family_of(self._child.pid)]

    def shared_memory(self) -> list[Path]:
        """Segments that its processes have mapped; vLLM's stay behind when it is killed."""
        assert self._child is not None, "not started"
        return _shared_segments(family_of(self._child.pid))

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
                    if client.get(self._health_path).status_code == httpx.codes.OK:
                        return
                time.sleep(_POLL_SECONDS)
        raise ServerFailed(f"the server was not ready in time:\n{self.log_tail()}")


def memos_command(model: str, *options: str) -> list[str]:
    """The argument vector of `memos-vllm serve` in this Python."""
    return [sys.executable, "-m", "memos_vllm.cli.main", "serve", model, *options]


def plain_vllm_command(model: str, *options: str, python: str | Path = sys.executable) -> list[str]:
    """The argument vector of vLLM's own server, without us, in this or another Python."""
    module = "vllm.entrypoints.openai.api_server"
    return [str(python), "-m", module, "--model", model, "--host", "127.0.0.1", *options]


def free_port() -> int:
    """A port of the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _shared_segments(family: Iterable[Process]) -> list[Path]:
    """Shared memory and semaphores that these processes have mapped: killed, they cannot remove
    them."""
    inodes = set()
    for process in family:
        with contextlib.suppress(OSError):
            for line in (process.folder / "maps").read_text().splitlines():
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
    """Remove them, but none that a living process has mapped: a cache server lends its own."""
    left = [segment for segment in segments if segment.exists()]
    if not left:
        return
    in_use = set(_shared_segments(_every_process()))
    for segment in left:
        if segment not in in_use:
            segment.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one with the same number by the time at which it began."""

    pid: int
    began: str

    @property
    def folder(self) -> Path:
        return Path("/proc") / str(self.pid)

    def state(self) -> str:
        """One letter, as ps shows it; "X" when it is gone."""
        fields = _stat(self.pid)
        return fields[_STATE] if fields and fields[_BEGAN] == self.began else "X"

    def is_alive(self) -> bool:
        """Whether it has not ended; one that nobody has asked for its exit code has."""
        return self.state() not in "ZX"


def family_of(pid: int) -> list[Process]:
    """A process and all that it or its children have started, as far as they live."""
    fields = _stat(pid)
    return _with_children([Process(pid, fields[_BEGAN])]) if fields else []


def _with_children(family: Sequence[Process]) -> list[Process]:
    found = {one.pid: one for one in family}
    parents = _every_process()
    before = -1
    while before != len(found):
        before = len(found)
        found |= {one.pid: one for one, parent in parents.items() if parent in found}
    return list(found.values())


def _every_process() -> dict[Process, int]:
    """All processes of this machine, each with its parent's pid."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(folder.name)):
            parents[Process(int(folder.name), fields[_BEGAN])] = int(fields[_PARENT])
    return parents


def signal_all(family: Iterable[Process], number: signal.Signals) -> None:
    """Send each of them a signal; those that have ended meanwhile are left alone."""
    for one in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, number)


def _stat(pid: int) -> list[str]:
    """What /proc says of a process from its state on; nothing when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
