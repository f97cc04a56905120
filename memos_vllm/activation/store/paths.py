"""The names below a store's root."""

from __future__ import annotations

import re
from pathlib import Path

from blake3 import blake3

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


class StorePaths:
    """Pure: touches no file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.manifests = root / "manifests"
        self.temporaries = root / "tmp"
        self.quarantine = root / "quarantine"
        self.erased = root / "erased"
        self.lock = root / "lock"
        self.claim = root / "claim"

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.data, self.manifests, self.temporaries, self.quarantine, self.erased)

    def manifest(self, key: str) -> Path:
        return self.manifests / f"{key}.json"

    def shard(self, content_digest: str) -> Path:
        return self.data / content_digest[:2] / f"{content_digest}.safetensors"

    def erased_mark(self, scope: str) -> Path:
        # A digest: a scope is any string, and a file name is not.
        return self.erased / blake3(scope.encode()).hexdigest()

    def name_of(self, path: Path) -> str:
        """The path relative to the root, as manifests and reports name it."""
        return path.relative_to(self.root).as_posix()

    def key_of_manifest(self, path: Path) -> str | None:
        """The artifact whose manifest this is, None if the name is not one of ours."""
        is_ours = path.suffix == ".json" and _HEX_DIGEST.fullmatch(path.stem)
        return path.stem if is_ours else None

    def is_shard(self, path: Path) -> bool:
        """Whether the file has a name and a place that `shard` gives."""
        return bool(_HEX_DIGEST.fullmatch(path.stem)) and path == self.shard(path.stem)


def is_key(text: str) -> bool:
    """Whether `text` can be an artifact key: nothing else is made part of a path."""
    return bool(_HEX_DIGEST.fullmatch(text))
