"""The embedded index: Qdrant Edge in a process of its own.

Edge holds the GIL in every call: 25 ms for a scan of 100,000 points, 35 ms for a flush, a second to
load. In the process that serves requests, each would hold up every stream. And a crash of native
code restarts that process, and not the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from memos_vllm.domain.ids import CubeId
from memos_vllm.errors import MemosError, Unavailable
from memos_vllm.plaintext.index.base import Hit, IndexedVersion, IndexPoint, IndexQuery
from memos_vllm.plaintext.index.edge_calls import Answer, Call, Opened, receive, send

logger = logging.getLogger(__name__)

_WORKER = "memos_vllm.plaintext.index.edge_worker"
# Loading a million points takes 10 s on a busy disk; what takes this long has hung.
_START_SECONDS = 120.0
_CLOSE_SECONDS = 30.0
_POLL_SECONDS = 0.05


class EdgeStore:
    """An `IndexStore` in a folder of this machine.

    Its process is started again when it ends; nothing that was written is lost by that.

    Args:
        wait_seconds: how long a process that is about to let go of the folder is waited for: after
            a crash of the server, its index is still being flushed.
        answer_seconds: a process that is silent for as long has hung, and is replaced.
    Raises:
        Unavailable: another process has the folder open.
        ConfigurationError: the folder cannot be used.
    """

    def __init__(
        self, folder: Path, *, wait_seconds: float = 5.0, answer_seconds: float = 120.0
    ) -> None:
        self._worker = _Worker(folder, wait_seconds, answer_seconds)
        self._calls = threading.Lock()
        self._open: dict[str, EdgeIndex] = {}
        self._closed = False
        with self._calls, _ending_at_once():
            self._worker.start()

    @property
    def pid(self) -> int | None:
        """The process that holds the folder, None while there is none."""
        return self._worker.pid

    def open(self, name: str, *, dim: int) -> EdgeIndex:
        opened: Opened = self.call(Call("open", (name,), {"dim": dim}))
        index = EdgeIndex(self, name, dim=dim, opened_empty=opened.empty)
        self._open[name] = index
        return index

    def collections(self) -> list[str]:
        return cast("list[str]", self.call(Call("collections")))

    def drop(self, name: str) -> None:
        self.call(Call("drop", (name,)))

    def close(self) -> None:
        with self._calls:
            self._closed = True
            self._open.clear()
            self._worker.stop()

    def forget(self, name: str) -> None:
        """A collection was closed: a new process need not open it."""
        self._open.pop(name, None)

    def call(self, call: Call) -> Any:
        """The answer of the process, started again once if it has ended.

        Raises:
            MemosError: what the call raised there.
            Unavailable: the process ends whenever it is started.
        """
        with self._calls:
            if self._closed:
                raise Unavailable("the index is closed")
            if self._worker.pid is not None:
                with contextlib.suppress(_WorkerEnded):
                    return self._worker.ask(call)
                logger.warning("memos: the process of the embedded index ended and is started anew")
            with _ending_at_once():
                self._start_again()
                return self._worker.ask(call)

    def _start_again(self) -> None:
        self._worker.start()
        for index in list(self._open.values()):
            opened: Opened = self._worker.ask(Call("open", (index.name,), {"dim": index.dim}))
            index.reopened(made_anew=opened.made_anew)


class EdgeIndex:
    """A `VectorIndex` in the store's process."""

    def __init__(self, store: EdgeStore, name: str, *, dim: int, opened_empty: bool) -> None:
        self.name = name
        self.dim = dim
        self.opened_empty = opened_empty
        self._store = store
        self._lost = False
        self._closed = False

    def reopened(self, *, made_anew: bool) -> None:
        """A new process has opened the collection, or had to make it anew."""
        self._lost = self._lost or made_anew

    def search(
        self,
        query: IndexQuery,
        *,
        dense_limit: int,
        sparse_limit: int,
    ) -> list[Hit]:
        found = self._call(
            "search",
            query,
            dense_limit=dense_limit,
            sparse_limit=sparse_limit,
        )
        return cast("list[Hit]", found)

    def score(self, seqs: Sequence[int], query: IndexQuery) -> list[Hit]:
        found = self._call("score", list(seqs), query)
        return cast("list[Hit]", found)

    def versions(
        self, *, after: int = 0, limit: int = 1000, cube_id: CubeId | None = None
    ) -> list[IndexedVersion]:
        found = self._call("versions", after=after, limit=limit, cube_id=cube_id)
        return cast("list[IndexedVersion]", found)

    def count(self, *, cube_id: CubeId | None = None) -> int:
        return cast("int", self._call("count", cube_id=cube_id))

    def upsert(self, points: Sequence[IndexPoint]) -> None:
        self._call("upsert", list(points))

    def delete(self, seqs: Sequence[int]) -> None:
        self._call("delete", list(seqs))

    def delete_cube(self, cube_id: CubeId) -> None:
        self._call("delete_cube", cube_id)

    def flush(self) -> None:
        self._call("flush")

    def optimize(self) -> None:
        self._call("start_optimizing")
        while self.optimizing():
            time.sleep(_POLL_SECONDS)

    def optimizing(self) -> bool:
        return cast("bool", self._call("optimizing"))

    def purge(self) -> bool:
        # Not while the store optimises: what it copied then may hold what was deleted since.
        while (before := self._call("start_purging")) is None:
            time.sleep(_POLL_SECONDS)
        while self.optimizing():
            time.sleep(_POLL_SECONDS)
        if self._call("generation") == before:
            raise Unavailable(f"purging the index '{self.name}' was cut off; try again")
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._store.forget(self.name)
        # What a process that has ended could not flush is in its log.
        with contextlib.suppress(Unavailable):
            self._store.call(Call("close", collection=self.name))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self._closed:
            raise Unavailable(f"the index '{self.name}' is closed")
        answer = self._store.call(Call(method, arguments, options, collection=self.name))
        if self._lost:
            raise Unavailable(
                f"the index '{self.name}' was broken when its process was started again, and is "
                "empty now until it is filled from the catalog"
            )
        return answer


class _WorkerEnded(Exception):
    """The process is gone, or had to be killed."""


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    try:
        yield
    except _WorkerEnded as error:
        raise Unavailable(
            "the process of the embedded index ends as soon as it is used; the server's log may "
            "say why, and the machine's whether memory ran out"
        ) from error


class _Worker:
    """The process and the socket to it. Not thread-safe."""

    def __init__(self, folder: Path, wait_seconds: float, answer_seconds: float) -> None:
        self._arguments = [str(folder), str(wait_seconds)]
        self._answer_seconds = answer_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; raises what opening the folder raised there."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _WORKER, str(theirs.fileno()), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C on the terminal is the server's to handle; it closes us in order.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise _WorkerEnded from error
        self._connection = Connection(ours.detach())
        _wait_at_most(_START_SECONDS, self._connection)
        try:
            self._receive()
        except MemosError:
            self.stop()
            raise
        _wait_at_most(self._answer_seconds, self._connection)

    def ask(self, call: Call) -> Any:
        """The answer to a call; raises what it raised there, or `_WorkerEnded`."""
        assert self._connection is not None
        try:
            send(self._connection, call)
        except OSError as error:
            self._kill()
            raise _WorkerEnded from error
        return self._receive()

    def stop(self) -> None:
        """Let the process close its collections and wait until it has ended."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()
            self._process = None

    def _receive(self) -> Any:
        assert self._connection is not None
        try:
            answer: Answer = receive(self._connection)
        except (EOFError, OSError) as error:
            self._kill()
            raise _WorkerEnded from error
        if answer.error is not None:
            raise answer.error
        return answer.value

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _wait_at_most(seconds: float, connection: Connection) -> None:
    """Let reading from a connection fail after so long: cheaper than a poll before each answer."""
    timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
