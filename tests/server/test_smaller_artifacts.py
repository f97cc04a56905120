"""Memory that is written smaller (--artifact-dtype): half the disk, the same greedy answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cube_kit import (
    activation,
    ask,
    client_of,
    cube_state,
    drop_prefix_cache,
    make_cube,
    shards_of,
    text_of,
)

from memos_vllm.activation.store.shard_file import read_raw_header
from memos_vllm.activation.store.shard_format import ShardFormat, parse_header
from memos_vllm.process import ServerProcess

StartServer = Callable[..., ServerProcess]
ANSWER_TOKENS = 12


@pytest.fixture
def servers(start_server: StartServer, tmp_path: Path) -> Iterator[Callable[[str], ServerProcess]]:
    """Servers that follow one another on one data folder."""
    running: list[ServerProcess] = []

    def start(artifact_dtype: str) -> ServerProcess:
        for server in running:
            server.stop()
        running.append(
            start_server(
                "--artifact-dtype",
                artifact_dtype,
                data_dir=tmp_path,
                environment={"VLLM_SERVER_DEV_MODE": "1"},
            )
        )
        return running[-1]

    yield start
    for server in running:
        server.stop()


def layout_of(data_dir: Path) -> ShardFormat:
    """Of the only artifact."""
    (path,) = shards_of(data_dir)
    with path.open("rb") as file:
        return parse_header(read_raw_header(file.fileno()))


def test_int8_artifacts_are_half_as_large_and_load_after_a_restart(
    servers: Callable[[str], ServerProcess], tmp_path: Path
) -> None:
    with client_of(servers("int8")) as http:
        cube_id, _ = make_cube(http, "small")
        fresh = ask(http, cube_id, max_tokens=ANSWER_TOKENS)
        assert activation(fresh)["source"] == "resident"
        shard = layout_of(tmp_path)
        assert shard.layout.encoding == "int8"
        whole = shard.num_tokens * shard.layout.num_layers * 2 * shard.layout.num_kv_heads * 64 * 2
        assert shard.kv_bytes <= 0.53 * whole
        drop_prefix_cache(http)
        loaded = ask(http, cube_id, max_tokens=ANSWER_TOKENS)
        assert activation(loaded)["source"] == "store"
        assert activation(loaded)["cached_tokens"] == activation(fresh)["cached_tokens"]
        assert text_of(loaded).split()[:4] == text_of(fresh).split()[:4]

    # Another artifact dtype is another numerics class: it recomputes, and writes its own.
    with client_of(servers("int4")) as http:
        assert activation(ask(http, cube_id))["source"] == "computed"
        assert cube_state(http, cube_id)["id"] == cube_id
    with client_of(servers("int8")) as http:
        assert activation(ask(http, cube_id))["source"] == "store"
