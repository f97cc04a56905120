"""Noticing files that other processes added to or removed from a folder, cheaply."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

# A change in the same clock tick as our stat leaves the folder's mtime as we saw it, so a
# folder that changed this recently is listed again (coarse or foreign clocks included).
_SETTLED_NANOSECONDS = 2_000_000_000


class FolderWatch:
    """What `folder` held at the last look. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._settled_mtime: int | None = None
        self._known: dict[str, tuple[int, int, int]] = {}

    def changes(self) -> tuple[list[str], list[str]]:
        """Names written (new or replaced) and names removed since the last call."""
        with self._lock:
            mtime = self._folder.stat().st_mtime_ns
            if mtime == self._settled_mtime:
                return [], []
            found = self._list()
            written = [name for name, seen in found.items() if self._known.get(name) != seen]
            removed = [name for name in self._known if name not in found]
            self._known = found
            settled = time.time_ns() - mtime > _SETTLED_NANOSECONDS
            self._settled_mtime = mtime if settled else None
            return written, removed

    def _list(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found[entry.name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return found
