"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600
# Content-addressed files are never written again, not even by us.
SEALED_FILE_MODE = 0o400

# Filesystems without it (ZFS, some NFS): a full disk is then found by the write itself.
_FALLOCATE_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


def make_folder(path: Path) -> None:
    """Create a folder of mode 0700 that survives a power cut; mend the mode of an old one."""
    try:
        path.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        if path.stat().st_mode & 0o777 != FOLDER_MODE:
            path.chmod(FOLDER_MODE)
    else:
        fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make renames and unlinks in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview | bytes, *, offset: int) -> None:
    """`pwrite` until nothing is left."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


class TemporaryFile:
    """An unfinished file that its writer's death leaves recognisable.

    The writer holds an flock on it. A lock says more than a recorded pid and start time: it
    is right across pid namespaces and reboots, and the kernel drops it however a process ends.
    """

    def __init__(self, folder: Path) -> None:
        while True:
            self.path = folder / f"{os.getpid()}-{secrets.token_hex(8)}.tmp"
            self.fd = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE
            )
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A scan may have taken it for abandoned between open and flock.
                if os.fstat(self.fd).st_nlink > 0:
                    return
            except BlockingIOError:
                pass
            except BaseException:
                self.remove()
                raise
            self.remove()

    def preallocate(self, size_bytes: int) -> None:
        """Reserve the space now, so that a full disk is found before any work."""
        try:
            os.posix_fallocate(self.fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in _FALLOCATE_UNSUPPORTED:
                raise

    def publish(self, destination: Path, *, mode: int) -> None:
        """Flush, rename to `destination` (replacing it), flush its folder; the file is closed.

        Raises:
            OSError: and neither name exists, or the old file is still at `destination`.
        """
        try:
            os.fchmod(self.fd, mode)
            os.fsync(self.fd)
            os.rename(self.path, destination)
        except BaseException:
            self.remove()
            raise
        self._close()
        try:
            fsync_folder(destination.parent)
        except BaseException:
            destination.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Delete and close; harmless when published or removed already."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def write_file(temporaries: Path, destination: Path, data: bytes) -> None:
    """Put `data` at `destination` in one step.

    Raises:
        OSError: and what was at `destination` before is still there.
    """
    temporary = TemporaryFile(temporaries)
    try:
        write_all(temporary.fd, data, offset=0)
    except BaseException:
        temporary.remove()
        raise
    temporary.publish(destination, mode=FILE_MODE)


def remove_if_abandoned(path: Path) -> bool:
    """Delete a temporary file unless a living writer holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


class FolderLock:
    """Mutual exclusion of the processes and threads that change a folder; reentrant."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        self._threads = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._threads:
            if self._depth == 0:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        with self._threads:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
