"""The server's keys: 32 random bytes each, in files that only the owner can read."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from memos_vllm.errors import ConfigurationError

KEY_BYTES = 32


@dataclass(frozen=True, slots=True, repr=False)
class ServerKeys:
    """The keys of one data folder. Never printed, never sent anywhere.

    Attributes:
        ticket: signs the tickets that permit a request to use memory.
        salt: derives cache salts and artifact scopes from cube ids and epochs.
        artifact: authenticates artifact manifests.
        tombstone: hashes erased text for the audit log.
    """

    ticket: bytes
    salt: bytes
    artifact: bytes
    tombstone: bytes


def load_keys(secrets_dir: Path) -> ServerKeys:
    """Read the keys, making those that do not exist yet.

    Several processes may call this at once; all get the same keys.

    Raises:
        ConfigurationError: a key file is readable by others, or has the wrong size.
    """
    secrets_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    names = ("ticket", "salt", "artifact", "tombstone")
    return ServerKeys(**{name: _load_key(secrets_dir / f"{name}.key") for name in names})


def make_ray_token(secrets_dir: Path) -> Path:
    """The file of the token that every process of our Ray must show, made if it does not exist.

    Raises:
        ConfigurationError: it is readable by others.
    """
    secrets_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = secrets_dir / "ray.token"
    if not path.exists():
        _create(path, secrets.token_hex(KEY_BYTES).encode())
    _check_mode(path)
    return path


def _load_key(path: Path) -> bytes:
    if not path.exists():
        _create(path, secrets.token_bytes(KEY_BYTES))
    _check_mode(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ConfigurationError(
            f"{path} holds {len(key)} bytes instead of {KEY_BYTES}; restore it from a backup, or "
            "remove it: memory that it protects will then be baked again"
        )
    return key


def _check_mode(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigurationError(
            f"{path} can be read by others (mode {mode:04o}); run `chmod 600 {path}`"
        )


def _create(path: Path, content: bytes) -> None:
    """Write a new key; when two processes race, the first link wins and both use it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _derive(key: bytes, *parts: str) -> str:
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        encoded = part.encode()
        # Length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
        mac.update(len(encoded).to_bytes(4, "big"))
        mac.update(encoded)
    return mac.hexdigest()


def cache_salt(key: bytes, cubes: list[tuple[str, int]], labels: tuple[str, ...] = ()) -> str:
    """The prefix-cache salt of an ordered list of (cube id, epoch) and the caller's labels."""
    parts = [part for cube, epoch in cubes for part in (cube, str(epoch))]
    return _derive(key, "cache-salt", *parts, "labels", *sorted(labels))


def artifact_scope(key: bytes, cubes: list[tuple[str, int]]) -> str:
    """The scope within which artifacts of these (cube id, epoch) may be found."""
    parts = [part for cube, epoch in cubes for part in (cube, str(epoch))]
    return _derive(key, "artifact-scope", *parts)
