"""The folder of embedded collections: who may use it, and which shard of a collection is current.

    DIR/lock                  flock of the process that has it open; its pid is inside
    DIR/<collection>/CURRENT  JSON; names the generation to open
    DIR/<collection>/g000001/ a shard of Qdrant Edge

CURRENT is written once its generation is whole, so whatever it does not name is left over from a
crash and is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

# Raised when payloads or vectors are written another way: older collections are built anew.
LAYOUT = 1
_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
_GENERATION = re.compile(r"g\d+")


@dataclass(frozen=True, slots=True)
class Current:
    """What a collection's CURRENT file says."""

    generation: str
    dim: int
    layout: int = LAYOUT


class CollectionFolder:
    """One collection's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def current(self) -> Current | None:
        """What is current; None when nothing is, or the file cannot be read as ours."""
        try:
            current = Current(**json.loads((self.path / "CURRENT").read_bytes()))
            whole = _GENERATION.fullmatch(current.generation) is not None
        except (OSError, ValueError, TypeError):
            return None
        return current if whole and self.generation(current.generation).is_dir() else None

    def generation(self, name: str) -> Path:
        """The folder of a generation."""
        return self.path / name

    def new_generation(self) -> Path:
        """A path for the next generation; nothing is there yet."""
        self.path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        numbers = [int(path.name[1:]) for path in self._generations()]
        return self.path / f"g{max(numbers, default=0) + 1:06d}"

    def make_current(self, generation: Path, *, dim: int) -> None:
        """From now on, also after a power cut, `generation` is what is opened."""
        data = json.dumps(asdict(Current(generation.name, dim))).encode()
        temporary = self.path / "CURRENT.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(self.path / "CURRENT")
        self._sync()

    def remove_others(self, keep: Path) -> None:
        """Remove every generation but `keep`."""
        for path in self._generations():
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the collection; what a crash leaves of it is not a collection any more."""
        (self.path / "CURRENT").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _generations(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return [path for path in self.path.iterdir() if _GENERATION.fullmatch(path.name)]

    def _sync(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
