"""The servers that take part, of which one runs at a time.

An idle vLLM worker spins for a second, on the very core that another server's worker is pinned
to. So all but the one that is asked are stopped (SIGSTOP), and none is measured beside another.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import httpx

from memos_vllm.bench.record import Footprint
from memos_vllm.bench.situations import Server
from memos_vllm.bench.streams import ChatFailed, expecting_answer
from memos_vllm.interrupts import undisturbed
from memos_vllm.process import ServerProcess, memos_command, plain_vllm_command

SERVED = "bench"
_REQUEST_SECONDS = 600.0
_START_SECONDS = 420.0
_RESET_SECONDS = 60.0
# Timers that ran out while a server was stopped all fire when it goes on: Ray's, vLLM's, ours.
_SETTLE_SECONDS = 1.0


class Startable(Protocol):
    """A server with all that it needs beside it."""

    @property
    def url(self) -> str: ...
    def start(self, *, timeout_seconds: float) -> object: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def paused(self) -> contextlib.AbstractContextManager[None]: ...
    def pids(self) -> Sequence[int]: ...


class Fleet:
    """Starts servers, lets one of them run, and ends them all.

    Args:
        servers: not started yet.
    """

    def __init__(self, servers: Mapping[Server, Startable]) -> None:
        self._servers = dict(servers)
        self._clients: dict[Server, httpx.Client] = {}
        self._paused: dict[Server, contextlib.ExitStack] = {}

    def __contains__(self, server: Server) -> bool:
        return server in self._clients

    def url(self, server: Server) -> str:
        return self._servers[server].url

    def start(self, server: Server) -> None:
        """Start a server while the others stand still.

        Raises:
            ServerFailed: with the end of its log; the others are left as they are.
        """
        self._pause_all()
        self._servers[server].start(timeout_seconds=_START_SECONDS)
        self._clients[server] = httpx.Client(
            base_url=self._servers[server].url,
            timeout=_REQUEST_SECONDS,
            trust_env=False,
            # A server that was stopped closes its old connections when it goes on.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def restart(self, server: Server, *, between: Callable[[], None] = lambda: None) -> None:
        """Kill -9 a server and start it anew.

        Args:
            between: called while it is down.
        """
        self._let_run(server)
        self._servers[server].kill()
        between()
        self._clients.pop(server).close()
        self.start(server)

    def client(self, server: Server) -> httpx.Client:
        """A client of the server, which runs from now on as the only one.

        Raises:
            ServerFailed: it did not come back after a restart, nor does it now.
        """
        if server not in self._clients:
            self.start(server)
        self._pause_all(but=server)
        self._let_run(server)
        return self._clients[server]

    def empty_pool(self, server: Server) -> None:
        """Have vLLM forget its prefixes, and memory what it keeps of them in the pool.

        Raises:
            ChatFailed: it keeps refusing to, as while blocks are being saved.
        """
        client = self.client(server)
        path = "/reset_prefix_cache"
        deadline = time.monotonic() + _RESET_SECONDS
        while time.monotonic() < deadline:
            with expecting_answer(path):
                reply = client.post(path)
            if reply.status_code == httpx.codes.OK and reply.json()["success"]:
                return
            time.sleep(0.05)
        raise ChatFailed("the block pool cannot be emptied: vLLM keeps refusing to")

    def footprint(self, server: Server, *, pool_bytes: int) -> Footprint:
        """What the server has taken of the machine's memory so far."""
        pids = self._servers[server].pids()
        return Footprint(
            server=server,
            peak_bytes=sum(_kibibytes(pid, "status", "VmHWM:") for pid in pids) * 1024,
            proportional_bytes=sum(_kibibytes(pid, "smaps_rollup", "Pss:") for pid in pids) * 1024,
            pool_bytes=pool_bytes,
        )

    def stop(self) -> None:
        """End all of them, whatever would end this process meanwhile."""
        with undisturbed():
            self._stop()

    def _stop(self) -> None:
        for stack in self._paused.values():
            stack.close()
        self._paused.clear()
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        with contextlib.ExitStack() as ending:
            # One that does not end must not keep the others alive.
            for started in self._servers.values():
                ending.callback(started.stop)

    def _pause_all(self, *, but: Server | None = None) -> None:
        for server in self._clients:
            if server is not but and server not in self._paused:
                self._paused[server] = stack = contextlib.ExitStack()
                stack.enter_context(self._servers[server].paused())

    def _let_run(self, server: Server) -> None:
        if (stack := self._paused.pop(server, None)) is not None:
            stack.close()
            time.sleep(_SETTLE_SECONDS)


def server_options(*, pool_blocks: int, max_model_len: int, extra: Sequence[str]) -> list[str]:
    """What every server is started with, so that they differ in nothing but memory."""
    return [
        *("--served-model-name", SERVED, "--enable-prompt-tokens-details"),
        *("--num-gpu-blocks-override", str(pool_blocks), "--max-model-len", str(max_model_len)),
        *("--max-num-seqs", "32", "--enforce-eager"),
        *extra,
    ]


def server_environment() -> dict[str, str]:
    """The environment of every server."""
    return {
        # More than a pool of the benchmark needs; vLLM takes what the blocks come to.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        # With a connector vLLM chooses other cores than without: all get all of them.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        # /reset_prefix_cache empties the pool, and nothing else.
        "VLLM_SERVER_DEV_MODE": "1",
    }


def our_servers(folder: Path, model: str, options: Sequence[str]) -> dict[Server, Startable]:
    """Plain vLLM, and memory with each kind of artifact.

    Args:
        folder: for data and logs.
    """
    environment = server_environment()

    def memos(server: Server, *more: str) -> ServerProcess:
        data = str(data_dir(folder, server))
        return ServerProcess(
            memos_command(model, "--data-dir", data, *more, *options),
            log_path=folder / f"{server}.log",
            environment=environment,
        )

    return {
        Server.PLAIN: ServerProcess(
            plain_vllm_command(model, *options),
            log_path=folder / "plain.log",
            environment=environment,
        ),
        Server.MEMOS: memos(Server.MEMOS),
        Server.MEMOS_INT8: memos(Server.MEMOS_INT8, "--artifact-dtype", "int8"),
        Server.MEMOS_INT4: memos(Server.MEMOS_INT4, "--artifact-dtype", "int4"),
    }


def data_dir(folder: Path, server: Server) -> Path:
    return folder / f"{server}-data"


def drop_page_cache(folder: Path) -> None:
    """Have the kernel forget what it holds of the files below; they are read from disk next.

    Files of a memory file system stay where they are.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            # What is gone meanwhile need not be forgotten.
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(Path(root) / name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def _kibibytes(pid: int, file: str, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    return 0
