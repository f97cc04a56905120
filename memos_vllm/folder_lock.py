"""A folder that one process at a time may use."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from memos_vllm.errors import ConfigurationError, Unavailable

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_POLL_SECONDS = 0.05


class FolderLock:
    """Keeps other processes out of a folder until `release`, or until this process ends.

    `DIR/lock` is locked by the process that has the folder; its pid is inside.

    Args:
        what: the folder is, in messages.
        wait_seconds: how long a process that is about to end is waited for.
    Raises:
        Unavailable: another process has the folder; the message names it.
        ConfigurationError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, what: str, wait_seconds: float) -> None:
        try:
            folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
            self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise ConfigurationError(
                f"the {what} {folder} cannot be used: {error.strerror}; "
                "mend its permissions or name another folder"
            ) from error
        deadline = time.monotonic() + wait_seconds
        while not self._taken():
            if time.monotonic() >= deadline:
                holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._fd)
                raise Unavailable(
                    f"the {what} {folder} is open in another process (pid {holder}); "
                    "stop that process, or give this one another data folder"
                )
            time.sleep(_POLL_SECONDS)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let others in; releasing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
