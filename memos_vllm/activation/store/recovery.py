"""The startup scan: what is good is indexed, what is bad set aside, what is dead swept."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memos_vllm.activation.store.durable import fsync_folder, remove_if_abandoned
from memos_vllm.activation.store.errors import ArtifactUnreadable
from memos_vllm.activation.store.manifest import MAX_MANIFEST_BYTES, decode_manifest
from memos_vllm.activation.store.paths import StorePaths
from memos_vllm.activation.store.quarantine import Quarantine
from memos_vllm.activation.store.shard_file import ShardFile, read_error, read_raw_header
from memos_vllm.activation.store.shard_format import PAGE_BYTES, parse_header
from memos_vllm.activation.store.types import ArtifactManifest
from memos_vllm.errors import ArtifactError

logger = logging.getLogger(__name__)

# A scope carries the epoch that an erase moves, so an erased one never comes back: the mark
# only has to outlive saves that were under way.
_ERASED_MARK_SECONDS = 30 * 86400.0


@dataclass
class Findings:
    """What a scan found; names are relative to the root."""

    good: list[ArtifactManifest] = field(default_factory=list)
    erased: list[ArtifactManifest] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    removed_temporaries: list[str] = field(default_factory=list)
    removed_orphans: list[str] = field(default_factory=list)


class Recovery:
    """One pass over the folder. Its caller holds the store's lock."""

    def __init__(
        self,
        paths: StorePaths,
        *,
        mac_key: bytes,
        quarantine: Quarantine,
        orphan_age_seconds: float,
        now: float,
    ) -> None:
        self._paths, self._mac_key, self._quarantine = paths, mac_key, quarantine
        self._orphan_age_seconds, self._now = orphan_age_seconds, now
        self._named_shards: set[Path] = set()
        self._found = Findings()

    def run(self) -> Findings:
        self._sweep_temporaries()
        for path in _files_below(self._paths.manifests):
            self._judge_manifest(path)
        for path in _files_below(self._paths.data):
            if path not in self._named_shards:
                self._judge_unnamed(path)
        self._quarantine.trim()
        self._sweep_erased_marks()
        return self._found

    def _sweep_temporaries(self) -> None:
        for path in _files_below(self._paths.temporaries):
            if remove_if_abandoned(path):
                self._found.removed_temporaries.append(self._paths.name_of(path))
                logger.info("removed the unfinished file of a dead writer: %s", path.name)

    def _judge_manifest(self, path: Path) -> None:
        key = self._paths.key_of_manifest(path)
        if key is None:
            self._set_aside([path], "no manifest has such a name", scope=None)
            return
        try:
            manifest = read_manifest_file(self._paths, key, mac_key=self._mac_key)
        except ArtifactUnreadable as error:
            # Its shards are not known, so no unnamed shard may be taken for an orphan.
            self._orphan_age_seconds = float("inf")
            logger.warning("skipped for now: %s", error)
            return
        except ArtifactError as error:
            self._set_aside([path], str(error), scope=None)
            return
        if self._paths.erased_mark(manifest.identity.scope).exists():
            self._found.erased.append(manifest)
            return
        shards = [self._paths.shard(entry.content_digest) for entry in manifest.shards]
        self._named_shards.update(shards)
        try:
            check_shards(self._paths, manifest)
        except ArtifactUnreadable as error:
            logger.warning("skipped for now: %s", error)
        except ArtifactError as error:
            self._set_aside([path, *shards], str(error), scope=manifest.identity.scope)
        else:
            self._found.good.append(manifest)

    def _judge_unnamed(self, path: Path) -> None:
        """A shard that no manifest names: being committed right now, or left behind."""
        if not self._paths.is_shard(path):
            self._set_aside([path], "no shard has such a name", scope=None)
            return
        with contextlib.suppress(FileNotFoundError):
            if self._now - path.stat().st_mtime > self._orphan_age_seconds:
                path.unlink()
                self._found.removed_orphans.append(self._paths.name_of(path))
                logger.info("removed a shard that no manifest names: %s", path.name)

    def _sweep_erased_marks(self) -> None:
        for path in _files_below(self._paths.erased):
            with contextlib.suppress(FileNotFoundError):
                if self._now - path.stat().st_mtime > _ERASED_MARK_SECONDS:
                    path.unlink()

    def _set_aside(self, paths: Sequence[Path], reason: str, *, scope: str | None) -> None:
        taken = [path for path in paths if self._quarantine.take(path, reason, scope=scope)]
        if taken:
            self._found.quarantined += map(self._paths.name_of, taken)
            logger.warning("quarantined %s: %s", self._paths.name_of(taken[0]), reason)


def read_manifest_file(paths: StorePaths, key: str, *, mac_key: bytes) -> ArtifactManifest:
    """Read and check one manifest.

    Raises:
        ArtifactMissing, ArtifactCorrupted, ArtifactUnreadable.
    """
    path = paths.manifest(key)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES)
    except OSError as error:
        raise read_error(key, paths.name_of(path), error) from error
    return decode_manifest(data, key=key, mac_key=mac_key)


def check_shards(paths: StorePaths, manifest: ArtifactManifest) -> None:
    """Check sizes, headers, ids and checksum tables; the KV itself is checked when it is read.

    Raises:
        ArtifactMissing, ArtifactCorrupted, ArtifactUnreadable.
    """
    for entry in manifest.shards:
        ShardFile(paths.shard(entry.content_digest), manifest=manifest, entry=entry).close()


def delete_artifact(paths: StorePaths, manifest: ArtifactManifest) -> None:
    """Remove the manifest first, so that no crash leaves one that names missing files."""
    paths.manifest(manifest.key).unlink(missing_ok=True)
    fsync_folder(paths.manifests)
    for entry in manifest.shards:
        paths.shard(entry.content_digest).unlink(missing_ok=True)


def unnamed_shards_of(paths: StorePaths, scope: str, *, named: set[Path]) -> Iterator[Path]:
    """Shards outside `named` that are of this scope, or cannot say of which they are."""
    for path in _files_below(paths.data):
        if path not in named and _scope_of_shard(path) in {scope, None}:
            yield path


def files_of(paths: StorePaths, scope: str) -> list[Path]:
    """Every file whose start or manifest names this scope, finished or not, good or bad."""
    named = scope.encode()
    folders = (paths.manifests, paths.data, paths.temporaries, paths.quarantine)
    return [
        path
        for folder in folders
        for path in _files_below(folder)
        if named in _start_of(path, MAX_MANIFEST_BYTES if path.suffix == ".json" else PAGE_BYTES)
    ]


def _start_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _scope_of_shard(path: Path) -> str | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return parse_header(read_raw_header(fd)).identity.scope
    except (OSError, EOFError, ValueError):
        return None
    finally:
        os.close(fd)


def _files_below(folder: Path) -> list[Path]:
    return [Path(root) / name for root, _, names in os.walk(folder) for name in names]
