"""Embedded collections of one folder, in this process, and the loop that serves them to another."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from memos_vllm.errors import MemosError, Unavailable
from memos_vllm.folder_lock import FolderLock
from memos_vllm.plaintext.index.base import check_collection_name
from memos_vllm.plaintext.index.edge_calls import Answer, Call, Opened, receive, send
from memos_vllm.plaintext.index.edge_collection import EdgeCollection
from memos_vllm.plaintext.index.edge_folder import CollectionFolder

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


class EdgeHost:
    """An `IndexStore` whose collections live in this process.

    Args:
        wait_seconds: how long a process that is about to let go of the folder is waited for.
    Raises:
        Unavailable: another process has the folder open.
        ConfigurationError: the folder cannot be used.
    """

    def __init__(self, folder: Path, *, wait_seconds: float = 5.0) -> None:
        self._folder = folder
        self._lock = FolderLock(folder, what="index folder", wait_seconds=wait_seconds)
        self._open: dict[str, EdgeCollection] = {}

    def open(self, name: str, *, dim: int) -> EdgeCollection:
        check_collection_name(name)
        self._forget_closed()
        if name in self._open:
            raise Unavailable(f"collection '{name}' is open already; close it first")
        collection = EdgeCollection(self._folder / name, dim=dim)
        self._open[name] = collection
        return collection

    def collections(self) -> list[str]:
        found = (path for path in self._folder.iterdir() if path.is_dir())
        return sorted(p.name for p in found if CollectionFolder(p).current() is not None)

    def drop(self, name: str) -> None:
        check_collection_name(name)
        self._forget_closed()
        if name in self._open:
            raise Unavailable(f"collection '{name}' is open; close it before it is dropped")
        CollectionFolder(self._folder / name).remove()

    def close(self) -> None:
        for collection in self._open.values():
            try:
                collection.close()
            except Unavailable as error:
                # What it could not write is written again from the catalog.
                logger.warning("memos: %s", error)
        self._open.clear()
        self._lock.release()

    def _forget_closed(self) -> None:
        self._open = {name: c for name, c in self._open.items() if not c.closed}


def serve(connection: Connection, folder: Path, *, wait_seconds: float) -> None:
    """Answer calls, one at a time, until the caller is gone; the first answer greets it."""
    threading.Thread(
        target=_hang_up_after, args=(os.getppid(), connection.fileno()), daemon=True
    ).start()
    try:
        host = EdgeHost(folder, wait_seconds=wait_seconds)
    except MemosError as error:
        send(connection, Answer(error=error))
        return
    collections: dict[str, EdgeCollection] = {}
    try:
        send(connection, Answer())
        while True:
            send(connection, _answer(host, collections, receive(connection)))
    except (EOFError, ConnectionError):
        pass
    finally:
        host.close()


def _hang_up_after(caller: int, descriptor: int) -> None:
    """End the connection once the caller is gone: a process that it forked may hold it open."""
    with socket.socket(fileno=os.dup(descriptor)) as ours:
        while os.getppid() == caller:
            time.sleep(_POLL_SECONDS)
        ours.shutdown(socket.SHUT_RDWR)


def _answer(host: EdgeHost, collections: dict[str, EdgeCollection], call: Call) -> Answer:
    try:
        if call.collection is not None:
            method = getattr(collections[call.collection], call.method)
            return Answer(method(*call.arguments, **call.options))
        if call.method == "open":
            (name,) = call.arguments
            opened = collections[name] = host.open(name, **call.options)
            return Answer(Opened(empty=opened.opened_empty, made_anew=opened.made_anew))
        return Answer(getattr(host, call.method)(*call.arguments, **call.options))
    except MemosError as error:
        return Answer(error=error)
    except Exception as error:
        # The caller learns of our bug as of any other trouble; the traceback is in the log.
        logger.exception("memos: %s of the embedded index failed", call.method)
        return Answer(
            error=Unavailable(f"the embedded index failed: {type(error).__name__}; see the log")
        )
