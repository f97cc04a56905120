"""A server's `run/` folder: one server at a time, and nothing left of one that was killed.

    lock          flock of the supervisor; its pid is inside
    run.json      the run that is on, or was when its supervisor was killed
    control.json  where its actors are found, once they are there

What a killed run left behind is found again, and nothing of anyone else's is ever touched: each of
its processes has the run's id in its environment, but those of vLLM whose titles have overwritten
that; they are of the session of the run's server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from memos_vllm.config import RUN_VARIABLE
from memos_vllm.errors import ConfigurationError
from memos_vllm.folder_lock import FolderLock

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FILE_MODE = 0o600
# How vLLM calls its engine and its workers.
_VLLM_TITLE = b"VLLM::"
# Whoever stopped a server may start it again before its last process is gone.
_LOCK_SECONDS = 10.0
_END_SECONDS = 10.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Address:
    """Where the actors of a run are found."""

    run: str
    ray: str
    namespace: str


@dataclass(frozen=True, slots=True)
class _Note:
    """What has to be cleaned up after a run."""

    run: str
    ray_folder: str
    server: int = 0


class RunFolder:
    """The folder of this run, as its supervisor has it.

    Raises:
        Unavailable: another server has this data folder; the message names its process.
        ConfigurationError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FolderLock(folder, what="data folder's", wait_seconds=_LOCK_SECONDS)
        self._reap_former()
        self.run = secrets.token_hex(16)
        self._server = 0
        # The path of a Unix socket has at most 107 bytes: not below the data folder.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="memos-ray-"))
        self._note()

    def note_server(self, pid: int) -> None:
        """Remember the session in which vLLM's server runs, for whoever has to clean up."""
        self._server = pid
        self._note()

    def publish(self, address: Address) -> None:
        """Tell this run's servers where the actors are."""
        self._write("control.json", address)

    def close(self) -> None:
        """End what is left of the run, and let another begin."""
        _end_processes(self.run, self._server)
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        for name in ("control.json", "run.json"):
            (self._folder / name).unlink(missing_ok=True)
        self._lock.release()

    def _reap_former(self) -> None:
        former = _read(self._folder / "run.json", _Note)
        if former is None:
            return
        ended = _end_processes(former.run, former.server)
        logger.warning("the former server here was killed; ended %d processes of it", ended)
        left = Path(former.ray_folder)
        if left.name.startswith("memos-ray-"):
            shutil.rmtree(left, ignore_errors=True)
        (self._folder / "control.json").unlink(missing_ok=True)

    def _note(self) -> None:
        self._write("run.json", _Note(self.run, str(self.ray_folder), self._server))

    def _write(self, name: str, content: _Note | Address) -> None:
        temporary = self._folder / f".{name}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
        with os.fdopen(fd, "w") as file:
            json.dump(asdict(content), file)
        temporary.replace(self._folder / name)


def log_folders(folder: Path) -> list[Path]:
    """Where logs of the present run lie: Ray's folder, and the run's own."""
    note = _read(folder / "run.json", _Note)
    return [folder] if note is None else [folder, Path(note.ray_folder)]


def wait_for_address(folder: Path, run: str, *, seconds: float) -> Address:
    """Where the actors of this run are, once its supervisor has started them.

    Raises:
        ConfigurationError: they are not there in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = _read(folder / "control.json", Address)
        if found is not None and found.run == run:
            return found
        time.sleep(_POLL_SECONDS)
    raise ConfigurationError(
        f"memory's control plane did not start within {seconds:.0f} s; the lines above say why"
    )


def _end_processes(run: str, server: int) -> int:
    """Kill every process of a run but this one, and wait until they are gone; their number."""
    ended: set[int] = set()
    deadline = time.monotonic() + _END_SECONDS
    while (left := list(_processes_of(run, server))) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended.update(left)
        time.sleep(_POLL_SECONDS)
    return len(ended)


def _processes_of(run: str, server: int) -> Iterator[int]:
    marker = f"{RUN_VARIABLE}={run}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        # A process that has ended, and waits for its parent to notice, shows neither.
        with contextlib.suppress(OSError):
            marked = marker in (folder / "environ").read_bytes().split(b"\0")
            titled = (folder / "cmdline").read_bytes().startswith(_VLLM_TITLE)
            if pid != os.getpid() and (marked or (titled and os.getsid(pid) == server)):
                yield pid


def _read(path: Path, kind: type[T]) -> T | None:
    """What one of the files says; None when it is not there, or no longer whole."""
    try:
        return kind(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
