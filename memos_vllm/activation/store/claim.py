"""Whose artifacts a folder holds, for folders that several servers share."""

from __future__ import annotations

import hmac
from contextlib import closing
from pathlib import Path

from blake3 import blake3

from memos_vllm.activation.store.durable import FolderLock, make_folder, write_file
from memos_vllm.activation.store.paths import StorePaths
from memos_vllm.errors import ConfigurationError

_PURPOSE = b"memos artifact folder"


def claim_folder(root: Path, *, mac_key: bytes) -> None:
    """Make sure that an artifact folder is of servers with this key, or new.

    A server with another key would take every artifact here for a forgery, and put it aside.

    Raises:
        ConfigurationError: it is of servers with another key, or cannot be written.
    """
    paths = StorePaths(root)
    mine = blake3(_PURPOSE, key=mac_key).hexdigest()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        make_folder(root)
        make_folder(paths.temporaries)
        with closing(FolderLock(paths.lock)) as lock, lock.held():
            if not paths.claim.exists():
                write_file(paths.temporaries, paths.claim, mine.encode())
            found = paths.claim.read_text(errors="replace")
    except OSError as error:
        raise ConfigurationError(
            f"--artifact-url: {root} cannot be used: {error.strerror or error}"
        ) from error
    if not hmac.compare_digest(found.strip(), mine):
        raise ConfigurationError(
            f"--artifact-url: {root} holds the artifacts of a server with other keys; copy that "
            "server's secrets/ into this data folder before its first start, or give another folder"
        )
