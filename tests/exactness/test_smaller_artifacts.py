"""Memory that is written smaller (--artifact-dtype): a quarter of float32, the same answers.

In float32, since nothing but the encoding parts the answers there; in bfloat16 the rounding of one
batch or another would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from memory_server import MemoryServer, memory_chats

from memos_vllm.activation.store.shard_file import read_raw_header
from memos_vllm.activation.store.shard_format import ShardFormat, parse_header
from memos_vllm.bench.yardstick import Asker, compare

pytestmark = pytest.mark.server

CUBE = "small"
CHATS = memory_chats(CUBE)[:4]
ANSWER_TOKENS = 16
OPTIONS = ("--dtype", "float32", "--num-gpu-blocks-override", "44", "--artifact-dtype")
FLOAT32_BYTES = 4
# One byte a number, and a scale for each token and head.
INT8_SHARE = 0.27
# What int8 moves the two likeliest tokens against each other, in nats; a page in a wrong place
# moves them by whole nats.
INT8_SHIFT = 0.25

Launch = Callable[..., MemoryServer]
Note = Callable[[str], None]


def layout_of(data_dir: Path) -> ShardFormat:
    """Of the only artifact."""
    (path,) = (data_dir / "artifacts").rglob("*.safetensors")
    with path.open("rb") as file:
        return parse_header(read_raw_header(file.fileno()))


def test_int8_artifacts_are_a_quarter_as_large_and_answer_alike(launch: Launch, note: Note) -> None:
    server = launch(*OPTIONS, "int8")
    server.bake_cube(CUBE)
    server.wait_until_stored(1)
    shard = layout_of(server.data_dir)
    layout = shard.layout
    assert layout.encoding == "int8"
    numbers = shard.num_tokens * layout.num_layers * 2 * layout.num_kv_heads * layout.head_dim
    assert shard.kv_bytes <= INT8_SHARE * FLOAT32_BYTES * numbers

    asker = Asker(server.client, max_tokens=ANSWER_TOKENS)
    resident = asker.ask_each(CHATS)
    assert {answer.source for answer in resident} == {"resident"}
    server.reset_prefix_cache()
    loaded = asker.ask_each(CHATS)
    assert loaded[0].source == "store"
    assert loaded[0].cached_tokens == resident[0].cached_tokens
    comparison = compare(loaded, resident)
    note(f"int8 from the store / as computed, float32: {comparison}")
    assert comparison.shift <= INT8_SHIFT, str(comparison)
    assert comparison.gap <= INT8_SHIFT, str(comparison)

    # Another artifact dtype is another numerics class: its server computes, and writes its own.
    other = launch(*OPTIONS, "int4", data_dir=server.data_dir)
    assert other.asker.ask(CHATS[0]).source == "computed"
    other.wait_until_stored(2)
