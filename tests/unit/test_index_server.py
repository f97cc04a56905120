"""The index on a Qdrant server, over the wire: what it asks for, and how it meets trouble."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from index_kit import DIM, point, scope, sparse, unit
from qdrant_client import models
from qdrant_shim import Shim, running

from memos_vllm.config import ServerSettings
from memos_vllm.control.mos import Mos
from memos_vllm.domain.access import LOCAL_ADMIN
from memos_vllm.domain.filters import HasTag
from memos_vllm.domain.ids import CubeId
from memos_vllm.domain.memory import NewMemory
from memos_vllm.domain.search import SearchQuery
from memos_vllm.errors import ConfigurationError, Unavailable
from memos_vllm.plaintext.assembly import open_plaintext
from memos_vllm.plaintext.index import qdrant_server, server_calls
from memos_vllm.plaintext.index.base import IndexQuery
from memos_vllm.plaintext.index.qdrant_server import ServerIndex, ServerStore
from memos_vllm.plaintext.index.server_calls import Patience, ServerCalls
from memos_vllm.plaintext.index.server_models import CollectionShape, creation

CUBE = CubeId("cube")
QUERY = IndexQuery(scope(CUBE), unit(1), sparse(t1=1.0))


@pytest.fixture
def shim() -> Iterator[Shim]:
    with running(Shim()) as started:
        yield started


@pytest.fixture
def index(shim: Shim) -> ServerIndex:
    return ServerStore(shim.url).open("a", dim=DIM)


def asked(shim: Shim, ending: str) -> list[object]:
    return [body for _, path, body in shim.requests if path.endswith(ending)]


def test_a_collection_is_made_for_many_cubes(shim: Shim) -> None:
    ServerStore(shim.url, shards=3, replicas=2, quantize=True).open("a", dim=DIM)

    made = shim.created["memos--a"]
    assert isinstance(made.vectors, dict)
    dense = made.vectors["dense"]
    assert (dense.size, dense.distance, dense.on_disk) == (DIM, models.Distance.COSINE, True)
    assert made.sparse_vectors is not None
    assert made.sparse_vectors["sparse"].modifier is models.Modifier.IDF
    assert made.hnsw_config is not None
    assert (made.hnsw_config.m, made.hnsw_config.payload_m) == (0, 16)
    assert (made.shard_number, made.replication_factor) == (3, 2)
    assert isinstance(made.quantization_config, models.ScalarQuantization)
    assert made.quantization_config.scalar.always_ram
    schema = shim.schemas["memos--a"]
    assert schema["cube"] == {"type": "keyword", "is_tenant": True}
    assert schema["facts"] == {"type": "keyword", "enable_hnsw": False}
    assert schema["expires_at"] == {"type": "float", "enable_hnsw": False}
    assert {"labels", "num[].p", "num[].x", "created_at", "updated_at"} <= schema.keys()


def test_quantisation_is_off_unless_it_is_asked_for() -> None:
    made = creation(CollectionShape(), dim=DIM)
    assert made["quantization_config"] is None
    assert made["vectors_config"]["dense"].on_disk is None


def test_indexes_that_a_crash_left_out_are_made_when_it_is_opened_again(shim: Shim) -> None:
    store = ServerStore(shim.url)
    store.open("a", dim=DIM)
    del shim.schemas["memos--a"]["labels"]
    shim.requests.clear()

    store.open("a", dim=DIM)

    assert [body["field_name"] for body in asked(shim, "/index")] == ["labels"]  # type: ignore[index]
    assert len(shim.created) == 1


def test_payloads_hold_no_word_of_tags_sources_or_metadata(shim: Shim, index: ServerIndex) -> None:
    index.upsert(
        [point(CUBE, tags=("fox",), metadata={"fox": ("fox",)}, source={"title": "a fox"})]
    )
    assert "fox" not in str(asked(shim, "/points"))


def test_a_search_is_one_request_and_weighs_words_within_the_scope(
    shim: Shim, index: ServerIndex
) -> None:
    shim.requests.clear()
    index.search(
        IndexQuery(scope(CUBE, labels=["x"]), unit(1), sparse(t1=1.0), HasTag(("t",))),
        dense_limit=5,
        sparse_limit=7,
    )

    ((_, path, body),) = shim.requests
    assert path == "/collections/memos--a/points/query/batch"
    dense, by_terms = body["searches"]
    assert (dense["using"], dense["limit"]) == ("dense", 5)
    assert dense["params"]["acorn"]["enable"]
    assert dense["params"]["quantization"]["rescore"]
    assert (by_terms["using"], by_terms["limit"]) == ("sparse", 7)
    assert by_terms["params"]["idf"] == {
        "corpus": {
            "must": [{"key": "cube", "match": {"value": "cube"}}],
            "must_not": [{"key": "labels", "match": {"except": ["x"]}}],
        }
    }
    for search in (dense, by_terms):
        assert {"key": "cube", "match": {"value": "cube"}} in search["filter"]["must"]


def test_large_batches_go_in_several_requests(
    shim: Shim, index: ServerIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_server, "_BATCH_NUMBERS", 10 * DIM)
    index.upsert([point(CUBE) for _ in range(25)])
    assert [len(body["points"]) for body in asked(shim, "/points")] == [10, 10, 5]  # type: ignore[index]
    assert index.count() == 25


def test_names_of_one_namespace_are_kept_from_others(shim: Shim) -> None:
    one, two = ServerStore(shim.url, namespace="one"), ServerStore(shim.url, namespace="two")
    one.open("a", dim=DIM).upsert([point(CUBE, seq=1)])
    other = two.open("a", dim=DIM)

    assert other.opened_empty
    assert one.collections() == two.collections() == ["a"]
    two.drop("a")
    assert (one.collections(), two.collections()) == (["a"], [])


def test_two_catalogs_that_share_a_server_keep_apart_unasked(shim: Shim, tmp_path: Path) -> None:
    found = {}
    for name in ("one", "two"):
        settings = ServerSettings(data_dir=tmp_path / name, qdrant_url=shim.url, embedder="none")
        mos = Mos.open(settings.resolved_catalog_url)
        with closing(mos), closing(open_plaintext(settings, mos)) as plaintext:
            plaintext.start()
            mos.create_cube(LOCAL_ADMIN, cube_id="c")
            mos.add_memories(LOCAL_ADMIN, "c", [NewMemory(f"apple {name}")])
            assert plaintext.wait_until_indexed("c", seconds=20)
            result = plaintext.search(LOCAL_ADMIN, ["c"], SearchQuery("apple"))
            found[name] = [hit.memory.text for hit in result.hits]
            (held,) = ServerStore(shim.url, namespace=f"memos-{mos.catalog_uid()}").collections()
            assert held.startswith("memos-none")
    assert found == {"one": ["apple one"], "two": ["apple two"]}


def test_a_server_that_is_gone_is_unavailable_at_once_and_found_again(shim: Shim) -> None:
    with running(Shim()) as other:
        index = ServerStore(other.url).open("a", dim=DIM)
        index.upsert([point(CUBE, seq=1)])
    for call in (
        lambda: index.search(QUERY, dense_limit=1, sparse_limit=1),
        lambda: index.score([1], QUERY),
        index.versions,
    ):
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"127.0.0.1:\d+ does not answer") as caught:
            call()
        assert caught.value.retry_after_seconds == 2
        assert time.monotonic() - started < 4
    with running(other):
        assert [entry.seq for entry in index.versions()] == [1]


def test_a_store_can_be_made_before_the_server_is_up() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        store = ServerStore(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(Unavailable, match="does not answer"):
        store.open("a", dim=DIM)


def test_a_server_that_is_silent_is_given_up(
    shim: Shim, index: ServerIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_server, "READING", Patience(1, (0.01,), 0.5))
    shim.silent.set()
    started = time.monotonic()
    with pytest.raises(Unavailable, match="ReadTimeout"):
        index.search(QUERY, dense_limit=1, sparse_limit=1)
    assert time.monotonic() - started < 3


def test_connecting_takes_two_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_calls, "_CONNECT_SECONDS", 0.2)
    with socket.socket() as full:
        # A queue of no connections, filled: the next one is neither taken nor refused.
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        calls = ServerCalls(f"http://127.0.0.1:{full.getsockname()[1]}", api_key=None)
        started = time.monotonic()
        with pytest.raises(Unavailable, match="ConnectTimeout"):
            calls.ask(lambda client, _: client.get_collections(), Patience(30, (), 1.0))
        assert time.monotonic() - started < 2
        for one in waiting:
            one.close()


@pytest.mark.parametrize("status", [429, 502])
def test_a_busy_server_is_asked_again(shim: Shim, index: ServerIndex, status: int) -> None:
    shim.refusals = [(status, {}), (status, {})]
    index.upsert([point(CUBE, seq=1)])
    assert index.count() == 1
    assert shim.refusals == []


def test_a_server_that_stays_busy_is_unavailable(shim: Shim, index: ServerIndex) -> None:
    shim.refusals = [(503, {})] * 9
    with pytest.raises(Unavailable, match="HTTP 503: refused by the test"):
        index.search(QUERY, dense_limit=1, sparse_limit=1)
    assert len(shim.refusals) == 6


def test_a_server_that_says_how_long_to_wait_is_believed(shim: Shim, index: ServerIndex) -> None:
    shim.refusals = [(429, {"Retry-After": "7"})]
    with pytest.raises(Unavailable) as caught:
        index.search(QUERY, dense_limit=1, sparse_limit=1)
    assert caught.value.retry_after_seconds == 7


def test_what_the_server_refuses_is_not_repeated(shim: Shim, index: ServerIndex) -> None:
    shim.refusals = [(400, {}), (503, {})]
    with pytest.raises(Unavailable, match="HTTP 400: refused by the test"):
        index.upsert([point(CUBE)])
    assert shim.refusals == [(503, {})]


def test_a_collection_removed_behind_our_back_is_unavailable(
    shim: Shim, index: ServerIndex
) -> None:
    shim.store.delete_collection("memos--a")
    with pytest.raises(Unavailable, match="HTTP 404"):
        index.count()


def test_a_wrong_key_is_told_apart() -> None:
    with running(Shim(api_key="right")) as shim:
        ServerStore(shim.url, api_key="right").open("a", dim=DIM)
        for key in ("wrong-key", None):
            with pytest.raises(Unavailable, match="refuses our API key") as caught:
                ServerStore(shim.url, api_key=key).open("a", dim=DIM)
            assert "wrong-key" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.18.3", "0.11.0", "nightly"])
def test_a_server_too_old_to_weigh_words_by_cube_is_refused(version: str) -> None:
    with (
        running(Shim(version=version)) as shim,
        pytest.raises(ConfigurationError, match=f"{version}.*1.19 or newer"),
    ):
        ServerStore(shim.url).open("a", dim=DIM)


@pytest.mark.parametrize("version", ["1.19.0", "1.20.1-dev", "2.0.0"])
def test_newer_servers_are_taken(version: str) -> None:
    with running(Shim(version=version)) as shim:
        ServerStore(shim.url).open("a", dim=DIM)


def test_a_foreign_collection_of_that_name_is_left_alone(shim: Shim) -> None:
    shim.store.create_collection(
        "memos--a", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.DOT)
    )
    with pytest.raises(ConfigurationError, match="not one of ours"):
        ServerStore(shim.url).open("a", dim=DIM)


def test_a_server_that_is_no_qdrant_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=answer)
        thread.start()
        port = listening.getsockname()[1]
        with pytest.raises(Unavailable, match="no Qdrant says; check the URL"):
            ServerStore(f"http://127.0.0.1:{port}").open("a", dim=DIM)
        thread.join()


@pytest.mark.parametrize("url", ["127.0.0.1:6333", "ftp://x", "http://", "http://h:port"])
def test_a_url_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="Qdrant URL"):
        ServerStore(url)


def test_a_password_in_the_url_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        ServerStore("http://user:hunter2@127.0.0.1:9").open("a", dim=DIM)
    assert "hunter2" not in str(caught.value)
