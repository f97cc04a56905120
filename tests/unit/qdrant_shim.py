"""A loopback server that answers Qdrant's REST routes from qdrant-client's in-memory mode.

It stands in for a Qdrant server in wire tests: the bytes are those of the real client, and bodies
are checked against its models. What an index or a graph does to a search is not shown by it.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models

_INSERT: TypeAdapter[Any] = TypeAdapter(models.PointInsertOperations)
_SELECTOR: TypeAdapter[Any] = TypeAdapter(models.PointsSelector)


@dataclass
class Shim:
    """What the server holds, how it behaves, and what it was asked.

    `refusals` are HTTP statuses, with headers, that the next requests get instead of answers.
    """

    version: str = "1.20.0"
    api_key: str | None = None
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    schemas: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: dict[str, models.CreateCollection] = field(default_factory=dict)
    port: int = 0
    silent: threading.Event = field(default_factory=threading.Event)
    store: QdrantClient = field(default_factory=lambda: QdrantClient(":memory:"))
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The `result` of an answer; raises KeyError for what is not there."""
        data = json.loads(body) if body else None
        self.requests.append((method, path, data))
        for known_method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if method == known_method and found:
                with self.lock, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return action(self, found.groupdict().get("name", ""), data)
        raise AssertionError(f"the shim has no route {method} {path}")


def _collections(shim: Shim, _name: str, _data: Any) -> Any:
    return _json(shim.store.get_collections())


def _exists(shim: Shim, name: str, _data: Any) -> Any:
    return {"exists": shim.store.collection_exists(name)}


def _describe(shim: Shim, name: str, _data: Any) -> Any:
    info = _json(shim.store.get_collection(name))
    schema = {
        field: {"data_type": params["type"], "params": params, "points": 0}
        for field, params in shim.schemas.get(name, {}).items()
    }
    return info | {"payload_schema": schema}


def _create(shim: Shim, name: str, data: Any) -> Any:
    wanted = models.CreateCollection.model_validate(data)
    shim.created[name] = wanted
    return shim.store.create_collection(
        name, vectors_config=wanted.vectors, sparse_vectors_config=wanted.sparse_vectors
    )


def _drop(shim: Shim, name: str, _data: Any) -> Any:
    shim.schemas.pop(name, None)
    return shim.store.delete_collection(name)


def _create_index(shim: Shim, name: str, data: Any) -> Any:
    models.CreateFieldIndex.model_validate(data)
    shim.schemas.setdefault(name, {})[data["field_name"]] = data["field_schema"]
    return {"operation_id": 1, "status": "completed"}


def _upsert(shim: Shim, name: str, data: Any) -> Any:
    return _json(shim.store.upsert(name, _INSERT.validate_python(data).points))


def _delete(shim: Shim, name: str, data: Any) -> Any:
    return _json(shim.store.delete(name, _SELECTOR.validate_python(data)))


def _query(shim: Shim, name: str, data: Any) -> Any:
    batch = models.QueryRequestBatch.model_validate(data)
    return [_json(answer) for answer in shim.store.query_batch_points(name, batch.searches)]


def _scroll(shim: Shim, name: str, data: Any) -> Any:
    wanted = models.ScrollRequest.model_validate(data)
    records, offset = shim.store.scroll(
        name,
        scroll_filter=wanted.filter,
        limit=wanted.limit or 10,
        offset=wanted.offset,
        with_payload=wanted.with_payload if wanted.with_payload is not None else True,
        with_vectors=wanted.with_vector or False,
    )
    return {"points": [_json(record) for record in records], "next_page_offset": offset}


def _count(shim: Shim, name: str, data: Any) -> Any:
    wanted = models.CountRequest.model_validate(data)
    return _json(shim.store.count(name, count_filter=wanted.filter, exact=bool(wanted.exact)))


_NAMED = r"/collections/(?P<name>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[[Shim, str, Any], Any]]] = [
    ("GET", r"/collections", _collections),
    ("GET", _NAMED, _describe),
    ("GET", _NAMED + "/exists", _exists),
    ("PUT", _NAMED, _create),
    ("DELETE", _NAMED, _drop),
    ("PUT", _NAMED + "/index", _create_index),
    ("PUT", _NAMED + "/points", _upsert),
    ("POST", _NAMED + "/points/delete", _delete),
    ("POST", _NAMED + "/points/query/batch", _query),
    ("POST", _NAMED + "/points/scroll", _scroll),
    ("POST", _NAMED + "/points/count", _count),
]


def _json(model: Any) -> Any:
    return model.model_dump(mode="json", exclude_none=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shim: Shim

    def _handle(self) -> None:
        shim = self.shim
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if shim.silent.is_set():
            # Until the caller has lost patience.
            self.rfile.read(1)
            return
        path = urlsplit(self.path).path
        if shim.refusals:
            status, headers = shim.refusals.pop(0)
            self._reply(status, {"status": {"error": "refused by the test"}}, headers)
        elif shim.api_key is not None and self.headers.get("api-key") != shim.api_key:
            self._reply(401, {"status": {"error": "Must provide an API key"}})
        elif path == "/":
            self._reply(200, {"title": "qdrant - vector search engine", "version": shim.version})
        else:
            try:
                result = shim.answer(self.command, path, body)
            except (KeyError, ValueError) as error:
                self._reply(404, {"status": {"error": str(error)}})
            else:
                self._reply(200, {"result": result, "status": "ok", "time": 0.0})

    do_GET = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 the names that http.server calls

    def _reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 http.server's name
        pass


@contextmanager
def running(shim: Shim) -> Iterator[Shim]:
    """The shim on a loopback port: its former one, or a free one."""
    handler = type("Handler", (_Handler,), {"shim": shim})
    server = ThreadingHTTPServer(("127.0.0.1", shim.port), handler)
    server.daemon_threads = True
    shim.port = server.server_address[1]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield shim
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
