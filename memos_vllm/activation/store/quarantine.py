"""What was found bad is moved aside with the reason beside it, up to a cap."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from memos_vllm.activation.store.durable import write_file
from memos_vllm.activation.store.paths import StorePaths

_REASON_SUFFIX = ".reason.json"
_MAX_FILES = 256


class Quarantine:
    """The folder of bad files. Its caller holds the store's lock."""

    def __init__(self, paths: StorePaths, *, budget_bytes: int, clock: Callable[[], float]) -> None:
        self._paths = paths
        self._budget_bytes = budget_bytes
        self._clock = clock

    def take(self, path: Path, reason: str, *, scope: str | None) -> bool:
        """Move one file in; answers whether it was there. `scope` None: not known.

        The caller logs the reason: once for all files of an artifact.
        """
        name = f"{int(self._clock() * 1000):015d}-{secrets.token_hex(4)}-{path.name}"
        destination = self._paths.quarantine / name
        try:
            os.rename(path, destination)
        except FileNotFoundError:
            return False
        note = {
            "file": self._paths.name_of(path),
            "reason": reason,
            "moved_at": self._clock(),
            "scope": scope,
        }
        # Without room for the note the file is still out of the way, and the log has the reason.
        with contextlib.suppress(OSError):
            write_file(
                self._paths.temporaries,
                destination.with_name(name + _REASON_SUFFIX),
                json.dumps(note, indent=1).encode(),
            )
        return True

    def trim(self) -> None:
        """Drop the oldest files beyond the cap."""
        files = self._files()
        total = sum(size for _, size in files)
        while files and (total > self._budget_bytes or len(files) > _MAX_FILES):
            path, size = files.pop(0)
            self._drop(path)
            total -= size

    def drop_scope(self, scope: str) -> None:
        """Erase the files of one scope, and those whose scope nobody can tell any more."""
        for path, _ in self._files():
            if self._scope_of(path) in {scope, None}:
                self._drop(path)

    def usage(self) -> tuple[int, int]:
        """Files and bytes."""
        files = self._files()
        return len(files), sum(size for _, size in files)

    def _files(self) -> list[tuple[Path, int]]:
        """Files with sizes, oldest first: names begin with the time."""
        found = []
        with os.scandir(self._paths.quarantine) as entries:
            for entry in entries:
                if not entry.name.endswith(_REASON_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((Path(entry.path), entry.stat().st_size))
        return sorted(found)

    def _scope_of(self, path: Path) -> str | None:
        try:
            note = json.loads(path.with_name(path.name + _REASON_SUFFIX).read_bytes())
            scope = note["scope"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return scope if isinstance(scope, str) else None

    def _drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        path.with_name(path.name + _REASON_SUFFIX).unlink(missing_ok=True)
