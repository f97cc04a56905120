"""Parse a file in a process of its own, and leave nothing of that process behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from memos_vllm.errors import InvalidRequest, TooLarge, Unavailable
from memos_vllm.plaintext.ingest import wire
from memos_vllm.plaintext.ingest.document import MIB, IngestLimits, ParsedDocument

_COMMAND = (sys.executable, "-s", "-P", "-m", "memos_vllm.plaintext.ingest.worker")
_READ_BYTES = 64 * 1024
# JSON doubles quotes and backslashes, and adds offsets of sentences.
_ANSWER_BYTES_PER_TEXT_BYTE = 4
_TIME_SIGNALS = (signal.SIGXCPU, signal.SIGALRM)


def parse_isolated(data: bytes, task: wire.Task) -> ParsedDocument:
    """Parse `data` in a fresh process. Blocks; call it from a thread.

    Raises:
        InvalidRequest: the file cannot be read, or not within the time.
        TooLarge: it holds or needs more than the limits allow.
        Unavailable: no process could be started.
    """
    limits = task.limits
    deadline = time.monotonic() + limits.timeout_seconds
    try:
        with _input(data, task) as source, _worker(source) as worker:
            answer = _collect(worker, deadline, limits)
    except OSError as error:
        raise Unavailable(
            f"no process could be started to parse the document ({error.strerror}); try again"
        ) from error
    returncode = worker.returncode
    if -returncode in _TIME_SIGNALS:
        raise _too_slow(limits)
    try:
        return wire.decode_answer(answer)
    except wire.MalformedAnswer as error:
        raise InvalidRequest(
            f"the file cannot be read as {task.kind}: its parser was ended "
            f"({_ending(returncode)}); open it in its own program and save it again, or send its "
            "text as .txt",
            param="file",
        ) from error


@contextlib.contextmanager
def _input(data: bytes, task: wire.Task) -> Iterator[IO[bytes]]:
    """A file without a name that holds the task; a pipe would need a thread to feed it."""
    if hasattr(os, "memfd_create"):
        source: IO[bytes] = os.fdopen(os.memfd_create("memos-ingest"), "w+b")
    else:
        source = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    with source:
        source.write(wire.encode_task(task))
        source.write(data)
        source.seek(0)
        yield source


@contextlib.contextmanager
def _worker(source: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in its own session; at the end its whole group is killed and it is reaped."""
    process = subprocess.Popen(
        _COMMAND,
        stdin=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        cwd="/",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Before it is reaped, while the number of its group cannot be another's. One that has
        # ended by itself keeps the status with which it did.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()
        process.wait()


def _environment() -> dict[str, str]:
    """Nothing of ours but where modules are: no keys, no proxies, no preloaded libraries."""
    folders = [folder for folder in sys.path if os.path.isabs(folder)]
    return {"PYTHONPATH": os.pathsep.join(folders), "LC_ALL": "C.UTF-8"}


def _collect(worker: subprocess.Popen[bytes], deadline: float, limits: IngestLimits) -> bytes:
    """What the worker wrote until it ended."""
    most_bytes = _ANSWER_BYTES_PER_TEXT_BYTE * limits.max_text_bytes + MIB
    pieces: list[bytes] = []
    size = 0
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise _too_slow(limits)
            piece = os.read(worker.stdout.fileno(), _READ_BYTES)
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > most_bytes:
                raise TooLarge(
                    f"the document holds more than {limits.max_text_bytes} bytes of text; split it"
                )
            pieces.append(piece)


def _too_slow(limits: IngestLimits) -> InvalidRequest:
    return InvalidRequest(
        f"the document took longer than {limits.timeout_seconds:g} s to parse; split it, or send "
        "its text as .txt",
        param="file",
    )


def _ending(returncode: int) -> str:
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"
